"""Compare: how far each stage is from a wider run of the tuned model, beside the tuned model's own rounding, and
whether its decisions on the validation rows are those that the run kept."""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from ..training.evaluation import HALVES
from .verify import Stage, gap

FACTOR = 4.0
WIDE_ROWS = 64
# Of outputs: the most numbers in a batch, and the most that are kept of the tuned model; one row may have more.
BATCH_NUMBERS, KEPT_NUMBERS = 2**25, 2**27
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
        most: how many a batch may have.
        wider: how many batches are compared with the wider run.
        kept: (n, k) what metrics needed of the tuned run's outputs; None for runs that kept none.
        metrics: the run's own on these rows.
    """

    encoded: Dataset
    collate: Collate
    size: int
    most: int
    wider: int
    kept: np.ndarray | None
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Sample:
    """A batch, and what the tuned model and its wider run make of it, on disk: they need not stay in memory.

    Attributes:
        what, first: where its rows are from, and the number of the first.
        inputs, targets: of the batch.
        file: of the outputs.
    """

    what: str
    first: int
    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    file: Path

    def outputs(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of the tuned model and of its wider run; twice the same where there was none."""
        with np.load(self.file) as held:
            own = [held[name] for name in held.files if name.startswith("own")]
            return own, [held[name] for name in held.files if name.startswith("wide")] or own


def recorded(
    reference: Stage,
    wide: Stage | None,
    samples: Iterable[tuple[str, int, dict[str, Tensor], dict[str, Tensor]]],
    folder: Path,
) -> Iterator[Sample]:
    """Run the tuned model on samples.

    Args:
        reference, wide: the tuned model, and its wider run; None where only the tuned model is compared with.
        samples: (what, number of the first row, inputs, targets).
        folder: for the outputs.
    """
    for what, first, inputs, targets in samples:
        made = {"own": reference(inputs), "wide": wide(inputs) if wide else []}
        file = folder / f"{len(list(folder.iterdir()))}.npz"
        np.savez(file, **{f"{name}{i}": value for name, values in made.items() for i, value in enumerate(values)})
        yield Sample(what, first, inputs, targets, file)


@dataclass(frozen=True)
class Truth:
    """What every stage and every file is compared with.

    Attributes:
        spec: the run's.
        names, form: of the tuned model's inputs, and of its outputs.
        half: whether any of its parameters is stored in half precision.
        samples: random inputs that the model takes, and the first validation rows.
        rows, why: validation rows, or why there are none.
        axes: from `sequences`.
        eps: of the type that rounding is counted in; None where `export.verify.atol` says how far is near.
        stored: of each output, how far it moves where the weights that are merged are rounded as they are stored.
    """

    spec: Spec
    names: list[str]
    form: pytree.TreeSpec
    half: bool
    samples: list[Sample]
    rows: Rows | None
    why: str | None
    axes: list[str | None]
    eps: float | None
    stored: Mapping[int, float] = field(default_factory=dict)

    def batched(self, size: int) -> "Truth":
        """The same rows in batches of another size, without samples."""
        return replace(self, samples=[], rows=self.rows and replace(self.rows, size=size, wider=0))

    def tally(self, stages: Collection[str]) -> "Tally":
        """Of some stages."""
        return Tally(self.spec, self.form, stages)

    def distances(
        self, stages: Mapping[str, Stage], tally: "Tally", wide: bool = True
    ) -> tuple[dict[str, "Distance"], dict[int, float]]:
        """As the function, on all samples."""
        return distances(self.samples, stages, self.axes, tally, wide)

    def far(self, name: str, found: Mapping[str, "Distance"], scale: Mapping[int, float]) -> str | None:
        """Why a stage is too far from the tuned model, if it is; `found` and `scale` are from `distances`."""
        if self.eps is not None:
            return too_far(found, scale, self.eps, self.stored)
        one, atol = found[name].tuned, self.spec.export.verify.atol
        near = atol is not None and one <= atol
        return None if near else f"{name} is {one:.2e} from the tuned model, more than export.verify.atol = {atol}"

    def measured(self, stages: Mapping[str, Stage], tally: "Tally") -> dict[str, tuple[dict[str, float], float | None]]:
        """Every stage's metrics on all rows, and its share of the run's decisions; after `distances`."""
        if self.rows is None:
            return {}
        for _, _, inputs, targets in batches_of(self.rows, self.names, self.rows.wider):
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


def elements(graph: fx.Graph, longest: int) -> int:
    """The most numbers that one row has in an output of a traced graph.

    Args:
        longest: tokens of a row.
    """
    sizes = [[size if isinstance(size, int) else longest for size in shape[1:]] for shape in _shapes(graph)]
    return max(map(math.prod, sizes), default=1)


def wider(model: TracedModel) -> torch.dtype:
    """The type that a model's rounding is seen in: float64; float32 for half types, whose rounding is far above."""
    return torch.float32 if is_half(model) else torch.float64


def retyped(model: TracedModel, dtype: torch.dtype, stored: Collection[str] = (), eps: float = 0.0) -> TracedModel:
    """The eval graph of a model in another floating type, over the same tensors: each is cast where it is read, so that
    there is never a second copy of all.

    Args:
        stored: names of weights whose entries are moved at random, as rounding to a type of this `eps` moves them.
    """
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
        if value is None or not node.users or not value.is_floating_point():
            continue
        read, first = node, min(node.users, key=places.get)
        with graph.inserting_before(first):
            if value.dtype != dtype:
                read = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
            if node.target in stored:
                read = graph.call_function(_jittered, (read, eps))
        if read is not node:
            node.replace_all_uses_with(read, delete_user_cb=lambda user: user in places)
    out.recompile()
    return out.eval()


def _jittered(weight: Tensor, eps: float) -> Tensor:
    generator = torch.Generator(weight.device).manual_seed(0)
    noise = torch.rand(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device)
    return noise.sub_(0.5).mul_(eps).add_(1).mul_(weight)


def sequences(graph: fx.Graph, names: Sequence[str]) -> list[str | None]:
    """For each output of a traced graph, the input whose sequence (dimension 1) it has; None where it has none.

    Args:
        names: of the inputs, in order.
    """
    axes: dict[str, str] = {}
    for name, node in zip(names, graph.find_nodes(op="placeholder"), strict=True):
        if len(shape := shape_of(node)) > 1 and isinstance(shape[1], torch.SymInt):
            axes.setdefault(str(shape[1]), name)
    return [axes.get(str(shape[1])) if len(shape) > 1 else None for shape in _shapes(graph)]


def _shapes(graph: fx.Graph) -> list[torch.Size]:
    """Of a graph's outputs."""
    return [shape_of(node) for node in pytree.tree_leaves(graph.output_node().args[0]) if isinstance(node, fx.Node)]


class Tally:
    """What every stage's metrics need of all validation rows, batch by batch.

    Args:
        spec: its task and metric are read.
        form: of the tuned model's outputs.
        stages: names.
    """

    def __init__(self, spec: Spec, form: pytree.TreeSpec, stages: Collection[str]):
        self.spec, self.form = spec, form
        self.sums: dict[str, Tensor] = {name: torch.zeros(2, dtype=torch.float64) for name in stages}
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in stages}

    def add(self, name: str, outputs: Sequence[np.ndarray], targets: Mapping[str, Tensor]) -> None:
        """A stage's outputs on a batch."""
        task = self.spec.task
        out = pytree.tree_unflatten([torch.from_numpy(value) for value in outputs], self.form)
        self.sums[name] += torch.stack([task.loss(out, targets).double(), task.count(targets).double()])
        if self.spec.compared != "loss":
            self.parts[name].append(task.summary(out, targets).double().numpy())

    def measured(self, rows: Rows) -> dict[str, tuple[dict[str, float], float | None]]:
        """For every stage its metrics, and the share of decisions that are the tuned run's.

        The share is None where the run kept nothing, or predictions are no decisions: no whole numbers.
        """
        spec, found = self.spec, {}
        for name, sums in self.sums.items():
            loss, count = sums.tolist()
            metrics, share = {"loss": loss / count if count else np.nan}, None
            if spec.compared != "loss":
                every = np.concatenate(self.parts[name])
                metrics = {spec.compared: spec.task.measure(spec.compared, every, rows.encoded), **metrics}
                if rows.kept is not None and (every == np.round(every)).all():
                    same = every.shape == rows.kept.shape
                    share = float((every == rows.kept).all(axis=1).mean()) if same else 0.0
            found[name] = metrics, share
        return found


def distances(
    samples: Iterable[Sample],
    stages: Mapping[str, Stage],
    axes: Sequence[str | None],
    tally: Tally | None = None,
    wide: bool = True,
) -> tuple[dict[str, Distance], dict[int, float]]:
    """Every stage's and the tuned model's own `Distance`, and the largest value of each output.

    Args:
        axes: from `sequences`; positions of padding are left out.
        tally: gets every stage's outputs on samples that have targets.
        wide: compare with the wider run too.
    """
    found = {name: Distance() for name in ("tuned", *stages)}
    scale: dict[int, float] = {}
    for sample in samples:
        own, exact = sample.outputs()
        exact = exact if wide else own
        masks = [_real(name, sample.inputs, sample.targets) for name in axes]
        for i, (value, mask) in enumerate(zip(exact, masks, strict=True)):
            scale[i] = max(scale.get(i, 0.0), gap(value, np.zeros(1, value.dtype), mask).largest)
        _add(found["tuned"], sample, own, own, exact, masks)
        for name, stage in stages.items():
            outputs = stage(sample.inputs)
            writes = False
            if tally and sample.targets:
                tally.add(name, outputs, sample.targets)
                writes = tally.spec.task.writes
            _add(found[name], sample, outputs, own, exact, masks, writes)
    return found, scale


def _add(
    one: Distance,
    sample: Sample,
    outputs: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    exact: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    writes: bool = False,
) -> None:
    """Count a stage's outputs on a sample in its distance.

    Args:
        writes: whether the first output is of next tokens.
    """
    if [x.shape for x in outputs] != [x.shape for x in exact]:
        one.tuned, one.wide[0], one.where[0] = np.inf, np.inf, f"{sample.what}: other shapes"
        return
    if writes:
        equal = outputs[0].argmax(-1) == own[0].argmax(-1)
        equal = equal if masks[0] is None else equal[masks[0]]
        one.same, one.tokens = one.same + int(equal.sum()), one.tokens + equal.size
    for i, (value, truth, tuned, mask) in enumerate(zip(outputs, exact, own, masks, strict=True)):
        apart = gap(value, tuned, mask)
        one.tuned = max(one.tuned, apart.largest)
        one.total, one.count = one.total + apart.total, one.count + apart.count
        apart = apart if truth is tuned else gap(value, truth, mask)
        if apart.largest >= one.wide.get(i, 0.0):
            one.wide[i], one.where[i] = apart.largest, f"row {sample.first + apart.row} of {sample.what}"


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


def too_far(
    found: Mapping[str, Distance], scale: Mapping[int, float], eps: float, stored: Mapping[int, float] | None = None
) -> str | None:
    """What to say of the first output that is further from the wider run than rounding explains; None if all are near.

    What is not finite, in a stage, in the tuned model or in its wider run, is not near.

    Args:
        found, scale: from `distances`.
        eps: of the tuned model's type; half of it, relative to the largest value, is one rounding of the output.
        stored: what rounding of merged weights adds to the tuned model's own.
    """
    own = {i: one + (stored or {}).get(i, 0.0) for i, one in found["tuned"].wide.items()}
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
    if rows.kept is None and spec.compared != "loss":
        return  # Of a version that kept none: a change of the data could not be told from a fault.
    own = rows.metrics[spec.compared]
    if own is None:
        said = f"{spec.compared} of the run's metrics.json is no number (null): the tuned model gave none"
        raise SubspanError(f"{said} on its validation rows; nothing is written. Tune again, at a lower rate")
    if rows.kept is not None and spec.compared != "loss":
        kept = spec.task.measure(spec.compared, rows.kept, rows.encoded)
        if not abs(kept - own) <= _SAME * max(abs(own), 1.0):
            said = f"the run's metrics.json says {spec.compared} {own:.4f}, its predictions on the validation rows"
            raise SubspanError(f"{said} {kept:.4f}; nothing is written. One of the two, or the data, has changed since")
    for name, (metrics, share) in found.items():
        value = metrics[spec.compared]
        said = f"{name} has {spec.compared} {value:.4f} on the validation rows, the tuned run had {own:.4f}"
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
