"""Compare: how far each stage is from a wider run of the tuned model, beside the tuned model's own rounding, and
whether its decisions on the validation rows are those that the run kept."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from datasets import Dataset
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..errors import SubspanError, reason
from ..graph.ops import aten
from ..graph.sublayers import shape_of
from ..graph.traced import TracedModel
from ..spec import Spec
from ..tasks import IGNORED
from ..tasks.base import Collate
from ..training.loop import HALVES
from .verify import Stage, gap, mean_gap

FACTOR = 4.0
WIDE_ROWS = 64
# The least share of decisions that are the run's own, and the largest change of a metric that counts none. By whether
# something was computed in half precision: there near ties fall either way.
AGREEMENT = {False: 0.99, True: 0.95}
CHANGE = {False: 0.01, True: 0.05}
_SAME = 1e-6  # What another order of a sum changes in a metric of the same predictions.


@dataclass(frozen=True)
class Rows:
    """Validation rows as the run measured them.

    Attributes:
        encoded, collate, size: rows, how they become a batch, and how many of them.
        kept: (n, k) what metrics needed of the tuned run's outputs; None for runs that kept none.
        metrics: the run's own on these rows.
    """

    encoded: Dataset
    collate: Collate
    size: int
    kept: np.ndarray | None
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Truth:
    """What every stage and every file is compared with.

    Attributes:
        spec, tuned: the run's, and its model.
        reference, wide: the tuned model, and its wider run; None where `export.verify.atol` says how far is near.
        rows, why: validation rows, or why there are none.
        random: inputs that the model takes beside them.
        axes: from `sequences`.
        eps: of the type that rounding is counted in.
    """

    spec: Spec
    tuned: TracedModel
    reference: Stage
    wide: Stage | None
    rows: Rows | None
    why: str | None
    random: list[dict[str, Tensor]]
    axes: list[str | None]
    eps: float

    @property
    def wider(self) -> int:
        """How many batches of rows are compared with the wider run."""
        return -(-WIDE_ROWS // self.rows.size) if self.rows else 0

    def distances(self, stages: Mapping[str, Stage], tally: "Tally") -> tuple[dict[str, "Distance"], dict[int, float]]:
        """As the function, on the random inputs and the first rows."""
        samples = [("the random inputs", 0, inputs, {}) for inputs in self.random]
        samples += list(batches_of(self.rows, self.tuned.input_names, 0, self.wider)) if self.rows else []
        return distances(self.reference, self.wide, stages, samples, self.axes, tally)

    def far(self, name: str, found: Mapping[str, "Distance"], scale: Mapping[int, float]) -> str | None:
        """Why a stage is too far from the tuned model, if it is; `found` and `scale` are from `distances`."""
        if self.wide is not None:
            return too_far(found, scale, self.eps)
        one, atol = found[name].tuned, self.spec.export.verify.atol
        near = atol is not None and one <= atol
        return None if near else f"{name} is {one:.2e} from the tuned model, more than export.verify.atol = {atol}"

    def measured(self, stages: Mapping[str, Stage], tally: "Tally") -> dict[str, tuple[dict[str, float], float | None]]:
        """Every stage's metrics on all rows, and its share of the run's decisions; after `distances`."""
        if self.rows is None:
            return {}
        for _, _, inputs, targets in batches_of(self.rows, self.tuned.input_names, self.wider):
            for name, stage in stages.items():
                tally.add(name, stage(inputs), targets)
        return tally.measured(self.rows)


@dataclass
class Distance:
    """How far a stage is from the tuned model and from its wider run: the largest difference of real positions.

    Attributes:
        tuned: over all outputs.
        total, count: the sum of all differences to the tuned model, and how many there are.
        same, tokens: of a text on validation rows, how many next tokens are likeliest to both, and how many there are.
        wide, where: of each output, and the row it is in.
    """

    tuned: float = 0.0
    total: float = 0.0
    count: int = 0
    same: int = 0
    tokens: int = 0
    wide: dict[int, float] = field(default_factory=dict)
    where: dict[int, str] = field(default_factory=dict)


def is_half(model: TracedModel) -> bool:
    """Whether any parameter is stored in half precision."""
    return any(p.dtype in HALVES.values() for p in model.parameters())


def wider(model: TracedModel) -> torch.dtype:
    """The type that a model's rounding is seen in: float64; float32 for half types, whose rounding is far above."""
    return torch.float32 if is_half(model) else torch.float64


def retyped(model: TracedModel, dtype: torch.dtype) -> TracedModel:
    """The eval graph of a model in another floating type, over the same tensors: each is cast where it is read, so that
    there is never a second copy of all."""
    out = model.clone("eval")
    graph = out.graphs["eval"]
    for node in graph.nodes:
        wide = lambda value: dtype if isinstance(value, torch.dtype) and value.is_floating_point else value  # noqa: E731
        node.args, node.kwargs = map_aggregate(node.args, wide), map_aggregate(node.kwargs, wide)
    held = dict(
        itertools.chain(out.named_parameters(remove_duplicate=False), out.named_buffers(remove_duplicate=False))
    )
    places = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="get_attr"):
        value = held.get(node.target)
        if value is not None and node.users and value.is_floating_point() and value.dtype != dtype:
            with graph.inserting_before(min(node.users, key=places.get)):
                cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    out.recompile()
    return out.eval()


def sequences(graph: fx.Graph, names: Sequence[str]) -> list[str | None]:
    """For each output of a traced graph, the input whose sequence (dimension 1) it has; None where it has none.

    Args:
        names: of the inputs, in order.
    """
    axes: dict[str, str] = {}
    for name, node in zip(names, graph.find_nodes(op="placeholder"), strict=True):
        if len(shape := shape_of(node)) > 1 and isinstance(shape[1], torch.SymInt):
            axes.setdefault(str(shape[1]), name)
    shapes = [shape_of(node) for node in pytree.tree_leaves(graph.output_node().args[0]) if isinstance(node, fx.Node)]
    return [axes.get(str(shape[1])) if len(shape) > 1 else None for shape in shapes]


class Tally:
    """What every stage's metrics need of all validation rows, batch by batch.

    Args:
        spec: its task and metric are read.
        model: the tuned one.
        stages: names.
    """

    def __init__(self, spec: Spec, model: TracedModel, stages: Collection[str]):
        self.spec, self.form = spec, model.signatures["eval"].outputs
        self.sums: dict[str, Tensor] = {name: torch.zeros(2, dtype=torch.float64) for name in stages}
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in stages}

    def add(self, name: str, outputs: Sequence[np.ndarray], targets: Mapping[str, Tensor]) -> None:
        """A stage's outputs on a batch."""
        task = self.spec.task
        out = pytree.tree_unflatten([torch.from_numpy(value) for value in outputs], self.form)
        self.sums[name] += torch.stack([task.loss(out, targets).double(), task.count(targets).double()])
        if self.spec.metric != "loss":
            self.parts[name].append(task.summary(out, targets).double().numpy())

    def measured(self, rows: Rows) -> dict[str, tuple[dict[str, float], float | None]]:
        """For every stage its metrics, and the share of decisions that are the tuned run's.

        The share is None where the run kept nothing, or predictions are no decisions: no whole numbers.
        """
        spec, found = self.spec, {}
        for name, sums in self.sums.items():
            loss, count = sums.tolist()
            metrics, share = {"loss": loss / count if count else np.nan}, None
            if spec.metric != "loss":
                every = np.concatenate(self.parts[name])
                metrics = {spec.metric: spec.task.measure(spec.metric, every, rows.encoded), **metrics}
                if rows.kept is not None and (every == np.round(every)).all():
                    same = every.shape == rows.kept.shape
                    share = float((every == rows.kept).all(axis=1).mean()) if same else 0.0
            found[name] = metrics, share
        return found


def distances(
    reference: Stage,
    wide: Stage | None,
    stages: Mapping[str, Stage],
    samples: Iterator[tuple[str, int, dict[str, Tensor], dict[str, Tensor]]],
    axes: Sequence[str | None],
    tally: Tally | None = None,
) -> tuple[dict[str, Distance], dict[int, float]]:
    """Every stage's and the tuned model's own `Distance`, and the largest value of each output.

    Args:
        reference, wide: the tuned model, and its wider run; None where only the tuned model is compared with.
        samples: (what, number of the first row, inputs, targets).
        axes: from `sequences`; positions of padding are left out.
        tally: gets every stage's outputs on samples that have targets.
    """
    found = {name: Distance() for name in ("tuned", *stages)}
    scale: dict[int, float] = {}
    for what, first, inputs, targets in samples:
        own = reference(inputs)
        exact = wide(inputs) if wide else own
        masks = [_real(name, inputs, targets) for name in axes]
        for i, (value, mask) in enumerate(zip(exact, masks, strict=True)):
            scale[i] = max(scale.get(i, 0.0), gap(value, np.zeros_like(value), mask)[0])
        for name, outputs in {"tuned": own, **{name: stage(inputs) for name, stage in stages.items()}}.items():
            one = found[name]
            if tally and targets and name != "tuned":
                tally.add(name, outputs, targets)
            if [x.shape for x in outputs] != [x.shape for x in exact]:
                one.tuned, one.wide[0], one.where[0] = np.inf, np.inf, f"{what}: other shapes"
                continue
            if tally and targets and tally.spec.task.writes:
                equal = outputs[0].argmax(-1) == own[0].argmax(-1)
                equal = equal if masks[0] is None else equal[masks[0]]
                one.same, one.tokens = one.same + int(equal.sum()), one.tokens + equal.size
            for i, (value, truth, tuned, mask) in enumerate(zip(outputs, exact, own, masks, strict=True)):
                one.tuned = max(one.tuned, gap(value, tuned, mask)[0])
                total, count = mean_gap(value, tuned, mask)
                one.total, one.count = one.total + total, one.count + count
                distance, row = gap(value, truth, mask)
                if distance >= one.wide.get(i, 0.0):
                    one.wide[i], one.where[i] = distance, f"row {first + row} of {what}"
    return found, scale


def _real(name: str | None, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> np.ndarray | None:
    """(batch, sequence): which positions of an input's sequence are no padding; None where all count."""
    if name is None:
        return None
    mask = inputs.get("attention_mask")
    if name.startswith("decoder"):
        labels = targets.get("labels")
        mask = None if labels is None else (labels != IGNORED)
    same = mask is not None and mask.shape == inputs[name].shape[:2]
    return mask.bool().numpy() if same else None


def too_far(found: Mapping[str, Distance], scale: Mapping[int, float], eps: float) -> str | None:
    """What to say of the first output that is further from the wider run than rounding explains; None if all are near.

    What is not finite, in a stage, in the tuned model or in its wider run, is not near.

    Args:
        found, scale: from `distances`.
        eps: of the tuned model's type; half of it, relative to the largest value, is one rounding of the output.
    """
    own = found["tuned"].wide
    for name, one in found.items():
        for i, distance in one.wide.items():
            rounding = max(own.get(i, 0.0), eps / 2 * scale.get(i, 0.0))
            if name != "tuned" and not (np.isfinite(rounding) and distance <= FACTOR * rounding):
                return (
                    f"{name} is {distance:.2e} from a wider run of the tuned model ({one.where[i]}), the tuned model "
                    f"itself {own.get(i, np.inf):.2e}: more than {FACTOR:g} times its rounding; nothing is written. "
                    "Set export.verify.atol to the difference from the tuned model that you accept (here "
                    f"{one.tuned:.2e})"
                )
    return None


def batches_of(
    rows: Rows, names: Sequence[str], start: int = 0, stop: int | None = None
) -> Iterator[tuple[str, int, dict[str, Tensor], dict[str, Tensor]]]:
    """Samples of `distances` from validation rows, batches `start` to `stop`."""
    count = len(rows.encoded)
    for first in range(0, count, rows.size)[start:stop]:
        batch = rows.collate([rows.encoded[i] for i in range(first, min(first + rows.size, count))])
        inputs = {name: batch.pop(name) for name in names}
        yield "the validation data", first, inputs, batch


def check_measured(
    spec: Spec, found: Mapping[str, tuple[dict[str, float], float | None]], rows: Rows, half: bool
) -> None:
    """Refuse a stage that decides otherwise than the tuned run did.

    Raises:
        SubspanError: naming the stage, its metric and the run's.
    """
    if rows.kept is None and spec.metric != "loss":
        return  # Of a version that kept none: a change of the data could not be told from a fault.
    own = rows.metrics[spec.metric]
    if own is None:
        said = f"{spec.metric} of the run's metrics.json is no number (null): the tuned model gave none"
        raise SubspanError(f"{said} on its validation rows; nothing is written. Tune again, at a lower rate")
    if rows.kept is not None and spec.metric != "loss":
        kept = spec.task.measure(spec.metric, rows.kept, rows.encoded)
        if not abs(kept - own) <= _SAME * max(abs(own), 1.0):
            said = f"the run's metrics.json says {spec.metric} {own:.4f}, its predictions on the validation rows"
            raise SubspanError(f"{said} {kept:.4f}; nothing is written. One of the two, or the data, has changed since")
    for name, (metrics, share) in found.items():
        value = metrics[spec.metric]
        said = f"{name} has {spec.metric} {value:.4f} on the validation rows, the tuned run had {own:.4f}"
        changed = "; nothing is written. If the data has changed since, put it back, or tune again"
        if share is not None and share < AGREEMENT[half]:
            raise SubspanError(
                f"{said}; {share:.1%} of its decisions are the same, {AGREEMENT[half]:.0%} at least{changed}"
            )
        if share is None and not abs(value - own) <= CHANGE[half] * max(abs(own), 1e-3):
            raise SubspanError(f"{said}, more than {CHANGE[half]:.0%} apart{changed}")


def run_wide(stage: Stage) -> Stage:
    """A stage whose failure says what to set.

    Raises:
        SubspanError: when it is run: an op has no wider form.
    """

    def run(batch: dict[str, Tensor]) -> list[np.ndarray]:
        try:
            return stage(batch)
        except Exception as error:
            raise SubspanError(
                f"the tuned model can't be run in a wider type to see its rounding ({reason(error)}); set "
                "export.verify.atol to the difference that you accept"
            ) from error

    return run


def joined(one: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two reports on the same rows as one."""
    both = dict(one) | {"max_abs_diff": max(one["max_abs_diff"], other["max_abs_diff"])}
    for name in ("stages", "from_wide", "metrics", "agreement"):
        both[name] = one[name] and {**one[name], **other[name]}
    return both


def report(
    spec: Spec, found: Mapping[str, Distance], counts: Mapping[str, int], measures: Mapping[str, Any], wide: bool
) -> dict[str, Any]:
    """The content of verify.json, less what merging says."""
    stages = {name: one for name, one in found.items() if name != "tuned"}
    return {
        "max_abs_diff": max((one.tuned for one in stages.values()), default=0.0),
        "atol": spec.export.verify.atol,
        "stages": {name: one.tuned for name, one in stages.items()},
        "rounding": max(found["tuned"].wide.values(), default=0.0) if wide else None,
        "from_wide": {name: max(one.wide.values(), default=0.0) for name, one in stages.items()} if wide else None,
        "rows": dict(counts),
        "metrics": {name: metrics for name, (metrics, _) in measures.items()},
        "agreement": {name: share for name, (_, share) in measures.items()},
    }
