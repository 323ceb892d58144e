"""One of several labels for an image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import SpecError, reason
from ..graph.traced import Inputs
from .base import (
    Batch,
    Collate,
    Reading,
    Role,
    Task,
    name_labels,
)
from .cells import check_labels
from .measures import agreement, guesses

_NAME = ("model", "name")
_PROBES = ((40, 40), (64, 40), (40, 90))
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageClassification(Task):
    """One label an image."""

    asks = ("image",)
    roles = {"image": Role("image"), "label": Role("label")}
    metrics = ("accuracy", "f1", "matthews_correlation", "loss")
    auto = "AutoModelForImageClassification"
    tag = "image-classification"
    processor = "AutoImageProcessor"
    labelled = True
    smooths = True
    sequences = False

    def configure(self, config: Any, labels: Sequence[str] | None) -> None:
        name_labels(config, labels)

    def inputs(self, model: nn.Module, batch: int = 3, length: int = 11, processor: Any = None) -> Inputs:
        """Pixels (batch, channels, height, width) in the model's dtype, with a dynamic batch: of the size that the
        processor makes, without one of the size in the config."""
        parameter = next(model.parameters())
        channels, size = _of_config(model.config)
        if processor is not None:
            made = {tuple(_pixels(processor, [Image.new("RGB", size)]).shape[1:]) for size in _PROBES}
            if len(made) > 1:
                raise SpecError("its image processor makes pictures of several sizes; give it one size", _NAME)
            ((own, *size),) = made
            if own != channels:
                raise SpecError(f"its image processor makes {own} channels, the model reads {channels}", _NAME)
        if size is None:
            raise SpecError("its config has no image_size, and no image processor says one", _NAME)
        values = torch.zeros((batch, channels, *size), dtype=parameter.dtype, device=parameter.device)
        return Inputs(kwargs={"pixel_values": values}, dynamic={"pixel_values": {0: "batch"}})

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        check_labels(rows, columns, self.reader(rows.features[columns["label"]], labels), labels)

    def encode(self, rows: Any, reading: Reading, notes: list[str]) -> Any:
        """Pixels are made when a row is read."""
        columns = reading.columns
        read = self.reader(reading.features[columns["label"]], reading.labels)

        def values(batch: dict[str, list]) -> dict[str, Any]:
            try:
                made = _pixels(reading.processor, batch[columns["image"]])
            except Exception as error:  # Of PIL, of a file that is no picture.
                said = f"an image can't be read: {reason(error)}"
                raise SpecError(said, ("data", "columns", "image")) from error
            return {"pixel_values": made, "labels": [read(value) for value in batch[columns["label"]]]}

        return rows.with_transform(values)

    def collator(self, processor: Any, input_names: Sequence[str], start: int | None) -> Collate:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            labels = torch.tensor([row["labels"] for row in rows])
            return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}

        return collate

    def summary(self, out: Any, targets: Batch) -> Tensor:
        return guesses(out.logits, targets["labels"])

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return agreement(metric, found)


def _of_config(config: Any) -> tuple[int, tuple[int, int] | None]:
    """Channels, and height and width where the config says them."""
    vision = getattr(config, "vision_config", config)
    channels, size = getattr(vision, "num_channels", 3), getattr(vision, "image_size", None)
    return channels, size if size is None else tuple(size) if isinstance(size, list | tuple) else (size, size)


def _pixels(processor: Any, images: list[Image.Image]) -> Tensor:
    """(images, channels, height, width): as many channels as the processor has means for."""
    means = getattr(processor, "image_mean", None)
    channels = len(means) if isinstance(means, list | tuple) else 3
    mode = _MODES.get(channels)
    if mode is None:
        raise SpecError(f"its image processor has means for {channels} channels; pictures have 1, 3 or 4", _NAME)
    arrays = [np.array(image.convert(mode)).reshape(image.height, image.width, channels) for image in images]
    return processor(images=arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
