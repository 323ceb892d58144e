"""A training step of every method beside PEFT's and the floor: time, memory, gradients, and the page of it."""

import copy
import ctypes
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import peft
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

from pipelines.beside import LINEARS
from pipelines.steps import peak_of
from rewriter import Inputs, Plan, Rule, SpecError, SubspanError, TunedModel, plan, rewrite, trace, tuned_parameters
from rewriter.passes.base import PREFIX, Context
from rewriter.passes.pipelines import PASSES
from rewriter.plan import transformed
from rewriter.plan.cost import kept_bytes, products
from rewriter.trace import twin
from rewriter.training.evaluation import for_steps
from rewriter.training.memory import return_large_blocks
from rewriter.transforms import TRANSFORMS

matplotlib.use("agg")
import matplotlib.pyplot as plt

PRESERVING = tuple(one.name for one in PASSES if one.numerics == "preserving" and "rewrite" in one.stages)
# Methods with options of their own: name of the row -> (method, options).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora, dropout 0.1": ("lora", {"dropout": 0.1}),
    "lora, mpc o": ("lora", {"mpc": "o"}),
    "lora, mpc n": ("lora", {"mpc": "n"}),
}
CLOSE = 1e-3  # Of float32, relative to each tensor's gradient; products of four layers' matrices are in it.


@dataclass(frozen=True)
class Setting:
    """What is measured: a model's shape, a batch and how a step is run."""

    model: Literal["bert", "minilm", "llama"] = "bert"
    rank: int = 8
    rows: int = 8
    length: int = 64
    rounds: int = 15
    device: str = "cpu"
    compiled: bool = False
    memory: Literal["fast", "lean"] = "fast"


@dataclass(frozen=True)
class Measured:
    """One method's step.

    Attributes:
        step, peft: medians of the interleaved ratios to the floor's time; forward, backward and AdamW.
        saved, peft_saved, floor_saved: bytes kept for the backward.
        peak, peft_peak: bytes of a step above what is held before it; on a CPU of the whole process.
        start, peft_start: seconds to build the model, of the eager one, and to run its first step; our graphs come
            from an earlier run's cache.
        products: FLOPs of the matrix products of a step over the floor's.
        gradient: the largest relative difference of a tensor's gradient to that of the formed weight in float64;
            where a site is no weight, to that of the graph without passes.
    """

    method: str
    step: float
    peft: float | None
    saved: int
    peft_saved: int | None
    floor_saved: int
    peak: int
    peft_peak: int | None
    start: float
    peft_start: float | None
    products: float
    gradient: float
    seconds: float


def setting_of(one: Setting) -> tuple[nn.Module, dict[str, Tensor], list[str], str]:
    """The eager model, frozen, a batch, its linears as PEFT names them, and the glob of its layers."""
    torch.manual_seed(0)
    if one.model == "llama":
        config = transformers.LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12,
            num_key_value_heads=4, vocab_size=8192, use_cache=False,
        )  # fmt: skip
        model = transformers.LlamaModel._from_config(config)
        names, layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "layers.*"
    else:
        small = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
        sizes = small if one.model == "minilm" else {"num_hidden_layers": 4}
        config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
        model = transformers.BertModel._from_config(config, add_pooling_layer=False)
        names, layers = LINEARS, "encoder.layer.*"
    if one.device != "cpu":
        model = model.to(one.device, torch.bfloat16)
    ids = torch.randint(1000, (one.rows, one.length), device=one.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.requires_grad_(False).train(), batch, names, layers


def measure(one: Setting, only: Sequence[str] = ()) -> Iterator[Measured | tuple[str, str]]:
    """Each method's step, or (name, why it can't be had on this model); all methods and variants by default."""
    if one.memory == "lean":
        return_large_blocks()
    model, batch, names, layers = setting_of(one)
    dynamic = {name: {0: "batch", 1: "sequence"} for name in batch}
    trace(model, Inputs(kwargs=batch, dynamic=dynamic), keep=True)
    started = time.perf_counter()
    traced = trace(model, Inputs(kwargs=batch, dynamic=dynamic), keep=True)
    tracing = time.perf_counter() - started
    rows = {name: (name, {}) for name in TRANSFORMS} | VARIANTS
    if unknown := sorted(set(only) - rows.keys()):
        raise SubspanError(f"no method {unknown[0]!r}; there are {', '.join(rows)}")
    for name in only or rows:
        method, options = rows[name]
        try:
            yield _measured(one, name, method, options, model, batch, names, layers, traced, tracing)
        except SubspanError as error:
            yield name, str(error)
        gc.collect()


def _measured(one, name, method, options, model, batch, names, layers, traced, tracing) -> Measured:
    started = time.perf_counter()
    rule = Rule(target=targets(method, names, layers), apply=[{method: options_of(method, options, one.rank)}])
    planned = plan(traced, [rule])
    try:
        ours = rewrite(traced, planned).train()
    except SpecError:
        ours = rewrite(traced, planned, values=choices(planned)).train()
    generator = torch.Generator().manual_seed(0)
    for p in tuned_parameters(ours).values():
        p.data += 0.02 * torch.randn(p.shape, generator=generator).to(p)
    device = torch.device(one.device).type
    for_steps(ours, Context("train", device=device, longest=one.length, lean=one.memory == "lean"))
    steps = {"floor": _Step(one, _floor(model), batch), "ours": _Step(one, ours, batch)}
    steps["ours"]()
    start = time.perf_counter() - started + tracing
    plain = rewrite(traced, planned, values=_tensors(ours), without=PRESERVING).train()
    gradient = _difference(ours, plain, planned, model, batch)
    started = time.perf_counter()
    theirs = _theirs(method, options, one, model, names)
    if theirs is not None:
        steps["peft"] = _Step(one, theirs, batch)
        steps["peft"]()
    peft_start = time.perf_counter() - started
    saved = {key: _saved(step.model, batch) for key, step in steps.items()}
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(one.rounds):
        for key, step in steps.items():
            times[key].append(step())
    peaks = {key: step.peak() for key, step in steps.items() if key != "floor"}
    ratio = lambda key: statistics.median(a / b for a, b in zip(times[key], times["floor"], strict=True))  # noqa: E731
    has = theirs is not None
    return Measured(
        method=name,
        step=ratio("ours"),
        peft=ratio("peft") if has else None,
        saved=saved["ours"],
        peft_saved=saved.get("peft"),
        floor_saved=saved["floor"],
        peak=peaks["ours"],
        peft_peak=peaks.get("peft"),
        start=start,
        peft_start=peft_start if has else None,
        products=products(steps["ours"]) / products(steps["floor"]),
        gradient=gradient,
        seconds=statistics.median(times["floor"]),
    )


def targets(method: str, names: list[str], layers: str) -> str | list[str]:
    on = TRANSFORMS[method].on
    linears = "{" + ",".join(f"**.{name}" for name in names) + "}"
    if "matrix" in on:
        return f"{layers}.{linears}.weight"
    if "vector" in on:
        return f"{layers}.{linears}.bias"
    return "**embed*" if on == ("embeddings",) else layers


def options_of(method: str, given: dict[str, Any], rank: int) -> dict[str, Any]:
    fields = TRANSFORMS[method].options.model_fields
    usual = {"rank": rank, "bottleneck": 8 * rank, "length": rank, "alpha": 2.0 * rank} | given
    return {name: value for name, value in usual.items() if name in fields}


def choices(planned: Plan) -> dict[str, Tensor]:
    """Indices that a schedule would choose from the data, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    chosen = {leaf.name: leaf for site in planned.sites for leaf in site.leaves if leaf.role == "chosen" and leaf.below}
    return {
        name: torch.randperm(leaf.below, generator=generator)[: math.prod(leaf.shape)].reshape(leaf.shape)
        for name, leaf in chosen.items()
    }


def _tensors(model: TunedModel) -> dict[str, Tensor]:
    """The adapter's tensors by name."""
    buffers = {name.removeprefix(PREFIX): b for name, b in model.named_buffers() if name.startswith(PREFIX)}
    return {name: p.detach() for name, p in tuned_parameters(model).items()} | buffers


def _saved(model: nn.Module, batch: dict[str, Tensor]) -> int | None:
    try:
        return kept_bytes(model, batch, _loss)
    except NotImplementedError:  # It keeps sparse tensors.
        return None


class _Step:
    """Forward, backward and AdamW of a model, timed."""

    def __init__(self, one: Setting, model: nn.Module, batch: dict[str, Tensor]):
        self.model, self.batch, self.cuda = model, batch, one.device != "cpu"
        tuned = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(tuned, lr=1e-5) if tuned else None
        self.run = torch.compile(model, dynamic=True) if one.compiled else model

    def __call__(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss = _loss(self.run, self.batch)
        for value in getattr(self.model, "penalties", {}).values():
            loss = loss + value
        loss.backward()
        if self.optimiser:
            self.optimiser.step()
            self.optimiser.zero_grad()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def peak(self) -> int:
        """Bytes above what is held before a step."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            self()
            return torch.cuda.max_memory_allocated() - held
        ctypes.CDLL(None).malloc_trim(0)  # What earlier steps freed is given back, so that it counts again.
        return peak_of(self)


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A sum of the last hidden states with fixed random weights; rows before the sequence don't count."""
    states = model(**batch)[0][:, -batch["input_ids"].shape[1] :]
    weights = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(1)).to(states)
    return (states * weights).sum() / states.shape[-1]


def _floor(model: nn.Module) -> nn.Module:
    """The frozen model, whose backward goes down to the first layer's input."""
    out = twin(model)
    first = out.embeddings if hasattr(out, "embeddings") else out.get_input_embeddings()
    first.register_forward_hook(lambda module, given, result: result.requires_grad_())
    return out


def _difference(
    ours: TunedModel, plain: TunedModel, planned: Plan, model: nn.Module, batch: dict[str, Tensor]
) -> float:
    """By how much gradients differ from those of the formed weights in float64, or of the graph without passes.

    A tensor's difference is relative to its own gradient, or to a thousandth of the largest one where it is smaller.
    """
    torch.manual_seed(0)
    mine = _gradients(ours, batch)
    torch.manual_seed(0)
    expected = _gradients(plain, batch)
    drawn = any(not torch.equal(expected[name], value) for name, value in _gradients(plain, batch).items())
    try:
        if not drawn and all(site.layout is not None for site in planned.sites):
            expected = _formed(ours, planned, model, batch)
    except NotImplementedError:
        pass
    least = 1e-3 * max(float(value.norm()) for value in expected.values())
    return max(float((mine[name] - value).norm()) / max(float(value.norm()), least) for name, value in expected.items())


def _gradients(model: TunedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    tuned = tuned_parameters(model)
    found = torch.autograd.grad(_loss(model, batch), list(tuned.values()))
    return dict(zip(tuned, found, strict=True))


def _formed(ours: TunedModel, planned: Plan, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the eager model with phi(W) in the place of W, formed from the same tensors in float64."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in _tensors(ours).items()}
    tuned = {name: wide[name].requires_grad_() for name in tuned_parameters(ours)}
    eager = copy.deepcopy(model).double()
    weights = dict(eager.named_parameters())
    formed = {
        name: sites[0].layout.restore(
            transformed(list(sites), weights[name], lambda site, leaf: wide[leaf.name], True, []).dense()
        )
        for name, sites in planned.by_weight().items()
    }
    run_eager = lambda **inputs: functional_call(eager, formed, kwargs=inputs)  # noqa: E731
    return dict(zip(tuned, torch.autograd.grad(_loss(run_eager, batch), list(tuned.values())), strict=True))


def _theirs(method: str, options: dict[str, Any], one: Setting, model: nn.Module, names: list[str]) -> nn.Module | None:
    """PEFT's model of the method on the same linears, or plain transformers where no method is needed."""
    if "mpc" in options:
        return None
    if method == "full":
        out = copy.deepcopy(model)
        for name, p in out.named_parameters():
            p.requires_grad_(any(f"{linear}.weight" in name for linear in names))
        return out
    config = _config(method, options, one.rank, names)
    return None if config is None else peft.get_peft_model(twin(model), config).train()


def _config(method: str, options: dict[str, Any], rank: int, names: list[str]) -> peft.PeftConfig | None:
    on, alpha = {"target_modules": names}, 2 * rank
    found: dict[str, Callable[[], peft.PeftConfig]] = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=options.get("dropout", 0.0), **on),
        "dora": lambda: peft.LoraConfig(r=rank, lora_alpha=alpha, use_dora=True, **on),
        "adalora": lambda: peft.AdaLoraConfig(init_r=rank, target_r=rank, lora_alpha=alpha, total_step=1000, **on),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], **on),
        "ssl": lambda: peft.IA3Config(feedforward_modules=names, **on),
        "vera": lambda: peft.VeraConfig(r=rank, **on),
        "loha": lambda: peft.LoHaConfig(r=rank, alpha=alpha, **on),
        "lokr": lambda: peft.LoKrConfig(r=rank, alpha=alpha, **on),
        "hra": lambda: peft.HRAConfig(r=rank, **on),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, **on),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, **on),
        "delora": lambda: peft.DeloraConfig(r=rank, **on),
        "road": lambda: peft.RoadConfig(variant="road_1", group_size=2, **on),
        "miss": lambda: peft.MissConfig(r=rank, **on),
        "randlora": lambda: peft.RandLoraConfig(r=rank, randlora_alpha=20 * rank, **on),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=1000, **on),
        "hira": lambda: peft.HiraConfig(r=rank, **on),
        "shira": lambda: peft.ShiraConfig(r=rank, **on),
        "gralora": lambda: peft.GraloraConfig(r=rank, alpha=alpha, gralora_k=2, **on),
        "c3a": lambda: peft.C3AConfig(block_size=8, **on),
        "deft": lambda: peft.DeftConfig(r=rank, alpha=alpha, **on),
        "psoft": lambda: peft.PsoftConfig(r=rank, psoft_alpha=rank, **on),
        "peanut": lambda: peft.PeanutConfig(r=rank, depth=1, **on),
        "waveft": lambda: peft.WaveFTConfig(n_frequency=1000, **on),
        "glora": lambda: peft.GloraConfig(r=rank, **on),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=rank, task_type="FEATURE_EXTRACTION"),
    }
    return found[method]() if method in found else None


def machine(one: Setting) -> dict[str, Any]:
    """Which machine and libraries gave the numbers."""
    known = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = next((value.strip() for key, _, value in known if key.strip() == "model name"), platform.processor())
    name = cpu if one.device == "cpu" else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {
        "processor": name, "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(), **versions,
    }  # fmt: skip


def to_json(one: Setting, found: Sequence[Measured], absent: Mapping[str, str], before: str | None = None) -> str:
    """All that was found, as `write_page` reads it.

    Args:
        before: what was found earlier; of the same setting on the same machine, other methods' rows stay.
    """
    whole = {"machine": machine(one), "setting": asdict(one), "methods": [asdict(row) for row in found]}
    whole["absent"] = dict(absent)
    known = json.loads(before) if before else {}
    if all(known.get(key) == whole[key] for key in ("machine", "setting")):
        rows = {row["method"]: row for row in known["methods"]} | {row["method"]: row for row in whole["methods"]}
        whole |= {"methods": list(rows.values()), "absent": known["absent"] | whole["absent"]}
    return json.dumps(whole, indent=1) + "\n"


def line(row: Measured) -> list[str]:
    """A row of the table."""
    mega = lambda size: "" if size is None else f"{size / 1e6:.0f}"  # noqa: E731
    ratio = lambda value: "" if value is None else f"{value:.2f}"  # noqa: E731
    off = f"{row.gradient:.0e}" if row.gradient < CLOSE else f"**{row.gradient:.0e}**"
    return [
        row.method, ratio(row.step), ratio(row.peft), ratio(row.products), mega(row.saved), mega(row.peft_saved),
        mega(row.peak), mega(row.peft_peak), ratio(row.start), ratio(row.peft_start), off,
    ]  # fmt: skip


COLUMNS = (
    "method", "step / floor", "PEFT's", "products", "saved, MB", "PEFT's", "peak, MB", "PEFT's",
    "to the first step, s", "PEFT's", "gradients off by",
)  # fmt: skip


def write_page(files: Sequence[Path], out: Path) -> None:
    """The page of what was measured, with a picture of each file's times beside it."""
    parts = [_HEAD]
    for file in files:
        known = json.loads(file.read_text())
        found = [Measured(**row) for row in known["methods"]]
        parts.append(_part(known["machine"], Setting(**known["setting"]), found, known["absent"]))
        picture = out.with_name(f"{file.stem}.png")
        _draw(found, picture)
        parts.append(f"![Time of a step over the floor's]({picture.name})\n")
    out.write_text("\n".join(parts))


_HEAD = """# What a training step costs

Every method's step beside PEFT's and beside the floor: the frozen model's forward and backward down to the first
layer's input, without tuned weights. Others' steps are forward, backward and AdamW. Rounds are interleaved in one
process; ratios are medians. Gradients are compared in the same run with those of formed weights (phi(W) in the place of
W, in float64), or, where a site is no weight or draws at random, with the graph's without passes. What is bold differs.

Products are the FLOPs of a step's matrix products over the floor's: a method that gives every entry of W a gradient of
its own (`full`, and whatever is a function of W that no factors express) has one product more for each that the floor
has two of, one that multiplies by two matrices of W's size instead of W twice as many.

`train.memory` is `fast` or `lean`. `lean` computes activations and norms that tuned factors read again in the backward,
and gives freed blocks back to the system. To the first step: from the eager model, with the trace of an earlier run.

Written by `python pipelines/bench.py performance FILES` from `python pipelines/bench.py step --all --json FILE`.
"""


def _part(machine: dict[str, Any], one: Setting, found: Sequence[Measured], absent: dict[str, str]) -> str:
    where = f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft"))
    seconds = statistics.median(row.seconds for row in found)
    compiled = ", under torch.compile" if one.compiled else ""
    lines = [
        f"## {one.model}, {one.rows} x {one.length} tokens, rank {one.rank}, {one.memory}{compiled}",
        "",
        f"{where}; {versions}; medians of {one.rounds} rounds. The floor takes {seconds:.3f} s and keeps "
        f"{found[0].floor_saved / 1e6:.0f} MB.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
        *("| " + " | ".join(line(row)) + " |" for row in found),
        "",
        *(f"- {name} is left out: {why}" for name, why in absent.items()),
    ]
    return "\n".join(lines) + "\n"


def _draw(found: Sequence[Measured], to: Path) -> None:
    """Ratios to the floor, ours and PEFT's, on a logarithmic axis."""
    rows = sorted(found, key=lambda row: row.step, reverse=True)
    figure, axes = plt.subplots(figsize=(8, 0.22 * len(rows) + 1), layout="constrained")
    places = range(len(rows))
    axes.scatter([row.step for row in rows], places, label="Subspan", zorder=3)
    theirs = [(row.peft, place) for place, row in zip(places, rows, strict=True) if row.peft is not None]
    if theirs:
        axes.scatter(*zip(*theirs, strict=True), label="PEFT", marker="x", zorder=3)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(yticks=list(places), yticklabels=[row.method for row in rows], xscale="log", xlabel="step / floor")
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend()
    figure.savefig(to, dpi=110)
    plt.close(figure)
