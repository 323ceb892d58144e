"""One of several labels for an image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.traced import Inputs
from .base import Batch, Collate, Reading, Role, Task, agreement, check_labels, guesses, name_labels


class ImageClassification(Task):
    """One label an image."""

    roles = {"image": Role("image"), "label": Role("label")}
    metrics = ("accuracy", "f1", "matthews_correlation", "loss")
    auto = "AutoModelForImageClassification"
    processor = "AutoImageProcessor"
    labelled = True
    smooths = True
    sequences = False

    def configure(self, config: Any, labels: Sequence[str] | None) -> None:
        name_labels(config, labels)

    def inputs(self, model: nn.Module, batch: int = 3, length: int = 11) -> Inputs:
        """Pixels (batch, channels, height, width) in the model's dtype, with a dynamic batch."""
        parameter, size = next(model.parameters()), model.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch, model.config.num_channels, height, width)
        pixels = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        return Inputs(kwargs={"pixel_values": pixels}, dynamic={"pixel_values": {0: "batch"}})

    def check(self, rows: Any, columns: Mapping[str, str], labels: Sequence[str]) -> None:
        check_labels(rows, columns, self.reader(rows.features[columns["label"]], labels), labels)

    def encode(self, rows: Any, reading: Reading) -> Any:
        """Pixels are made when a row is read."""
        columns = reading.columns
        read = self.reader(reading.features[columns["label"]], reading.labels)

        def pixels(batch: dict[str, list]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in batch[columns["image"]]]
            out = reading.processor(images=images, return_tensors="pt")
            return {"pixel_values": out["pixel_values"], "labels": [read(value) for value in batch[columns["label"]]]}

        return rows.with_transform(pixels)

    def collator(self, processor: Any, input_names: Sequence[str], start: int | None) -> Collate:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            labels = torch.tensor([row["labels"] for row in rows])
            return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}

        return collate

    def summary(self, out: Any, targets: Batch) -> Tensor:
        return guesses(out.logits, targets["labels"])

    def measure(self, metric: str, found: np.ndarray, rows: Any) -> float:
        return agreement(metric, found)
