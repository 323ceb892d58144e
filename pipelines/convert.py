"""A run's adapter as LoRA beside PEFT's own conversion of it: the metric of both."""

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import peft
from safetensors.torch import load_file, save_file

from rewriter.adapters.from_peft import CONFIG, TENSORS, tuned_from
from rewriter.data import encode, load_rows
from rewriter.exchange import export_adapter
from rewriter.export.ship import load_tuned
from rewriter.folder import spec_of
from rewriter.pretrained import collator
from rewriter.training.evaluation import predict, referred


def convert(run: Path, rank: int) -> Iterator[tuple[str, float, float]]:
    """(what, the metric, the loss) on the run's validation rows: as tuned, as LoRA by export, as LoRA by PEFT.

    Args:
        run: folder of a finished run whose method PEFT has too.
        rank: of the low-rank terms.
    """
    spec = spec_of(run)
    pretrained, _, _, traced, tuned = load_tuned(spec, run)
    rows = encode(spec, load_rows(spec, pretrained.labels).validation, pretrained.processor, pretrained.labels)
    collate, new = collator(spec, pretrained, tuned.input_names), tuple(tuned.plan.new)
    rows = referred(traced, spec, rows, collate)

    def measured(what, model):
        found = predict(model, spec, rows, collate)[0]
        return what, found[spec.compared], found["loss"]

    yield measured("as tuned", tuned)
    export_adapter(run)
    export_adapter(run, low_rank=True, rank=rank)
    yield measured("exported as LoRA", tuned_from(traced, run / "peft-lora", new)[0])
    their = peft.PeftModel.from_pretrained(copy.deepcopy(pretrained.model), run / "peft")
    config, tensors = peft.convert_to_lora(their, rank)
    whole = json.loads((run / "peft" / CONFIG).read_text())["modules_to_save"]
    heads = {
        key: value
        for key, value in load_file(run / "peft" / TENSORS).items()
        if any(f".{one}." in key for one in whole)
    }
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        save_file({key: value.contiguous() for key, value in tensors.items()} | heads, Path(place) / TENSORS)
        yield measured("PEFT's conversion", tuned_from(traced, Path(place), new)[0])
