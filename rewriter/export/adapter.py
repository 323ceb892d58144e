"""A run's adapter for others: a folder of PEFT, as it is or as low-rank terms, compared before it appears."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor

from ..adapters.from_peft import TASK_TYPES, tuned_from
from ..adapters.to_peft import heads_of, save_peft
from ..data import encode, load_rows
from ..errors import SubspanError
from ..files import aside, write_json
from ..graph.traced import TracedModel
from ..pretrained import Pretrained, collator
from ..sources import absent
from ..spec import Spec
from ..training.evaluation import predict, referred
from ..tuned import TunedModel
from .low_rank import Seen, as_low_rank, look, said_of
from .ship import load_tuned, random_inputs
from .verify import apart, torch_stage

LOSES = 0.02  # of the metric, at most
_ROWS = 256  # training rows that layers are seen on
_NEAR = 1e-5  # of the largest output: what is read back computes the same, up to rounding


def ship_adapter(
    spec: Spec, run: Path, low_rank: bool = False, rank: int | None = None, error: float = 0.01
) -> dict[str, Any]:
    """Write RUN/peft/, or RUN/peft-lora/ with every change as a low-rank term, and read it back before it appears.

    Args:
        spec: of the run.
        run: its folder, with an adapter.
        low_rank: by `low_rank.as_low_rank`, with `rank` or `error`, on inputs of the run's training rows.

    Returns:
        What was written and how far apart: `largest`, and for low-rank terms `sites`, `metric`, `before`, `after`.

    Raises:
        SubspanError: PEFT has no such adapter; what is read back differs; or the metric falls by more than `LOSES`.
    """
    pretrained, _, inputs, traced, tuned = load_tuned(spec, run)
    tuned.eval(), traced.eval()
    report, task_type = {}, TASK_TYPES.get(spec.task.auto)
    if low_rank:
        given = tuned
        parts = None if spec.data is None or absent(spec.data) else load_rows(spec, pretrained.labels)
        seen = seen_by(tuned, spec, pretrained, traced, parts.train) if parts else {}
        heads = heads_of(traced, task_type)
        tuned, found = as_low_rank(given, traced, rank, error, seen, heads=heads)
        report["calibrated"] = bool(seen)
        report["sites"] = said_of(found)
        report |= _measured(spec, pretrained, traced, parts.validation, given, tuned) if parts else {}
    folder = run / ("peft-lora" if low_rank else "peft")
    with aside(folder) as (place,):
        save_peft(tuned, place, spec.model.name, task_type)
        stages = (torch_stage(one) for one in (tuned, tuned_from(traced, place, tuple(tuned.plan.new))[0]))
        report["largest"], relative = apart(*stages, random_inputs(spec, pretrained, inputs, tuned))
        if not relative <= _NEAR:
            raise SubspanError(f"what is read back differs by {report['largest']:.2e}; nothing is written")
        write_json(place / "subspan.json", report)
    return report | {"folder": str(folder)}


def seen_by(
    model: TunedModel, spec: Spec, pretrained: Pretrained, traced: TracedModel, rows: Dataset
) -> dict[str, Seen]:
    """What layers see of the first training rows: `low_rank.look`.

    Args:
        traced: the base of the model.
        rows: of the training data.
    """
    encoded = encode(spec, rows.select(range(min(_ROWS, len(rows)))), pretrained.processor, pretrained.labels)
    collate, size = collator(spec, pretrained, model.input_names), spec.train.batch_size

    def batches() -> Iterator[dict[str, Tensor]]:
        for first in range(0, len(encoded), size):
            batch = collate([encoded[i] for i in range(first, min(first + size, len(encoded)))])
            yield {name: batch[name] for name in model.input_names}

    return look(model, traced, batches())


def _measured(
    spec: Spec, pretrained: Pretrained, traced: TracedModel, rows: Dataset, before: TunedModel, after: TunedModel
) -> dict[str, Any]:
    """The metric on the validation rows as tuned and as written.

    Raises:
        SubspanError: it falls by more than `LOSES`.
    """
    encoded = encode(spec, rows, pretrained.processor, pretrained.labels)
    collate = collator(spec, pretrained, before.input_names)
    encoded = referred(traced, spec, encoded, collate)
    name = spec.compared
    one, other = (predict(model, spec, encoded, collate)[0][name] for model in (before, after))
    before.eval(), after.eval()
    lost = (other - one) if spec.task.lower(name) else (one - other)
    if not lost <= LOSES * (max(abs(one), 1e-3) if spec.task.lower(name) else 1.0):
        raise SubspanError(
            f"{name} is {other:.4f} as low-rank terms and {one:.4f} as tuned; nothing is written. Give a larger "
            "--rank, or a smaller --error"
        )
    return {"metric": name, "before": one, "after": other}
