"""Subspan beside PEFT on one setting: accuracy over seeds, and the cost of a step. Needs the extras demo and dev."""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from pipelines.console import Settings, console, failures, overrides
from pipelines.study import Study

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
FUNCTIONS = "from rewriter import Inputs, Rule, merge, plan, rewrite, trace"
COMMANDS = (
    "cli",
    "train",
    "export",
    "import_peft",
    "run",
    "push",
    "validate",
    "plan",
    "passes",
    "show",
    "schema",
    "study",
    "bench",
)


@app.command()
def accuracy(
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seeds; by default 0, 1 and 2.")] = None,
    spec: Annotated[Path, typer.Option(help="LoRA on all six linears of a BERT.")] = Path("specs/quickstart.yaml"),
) -> None:
    """Validation accuracy of Subspan and of PEFT, same data, rank, rate and batches, over seeds."""
    with failures():
        from pipelines.beside import ours, theirs
        from rewriter import Session

        table = Table("seed", "Subspan", "PEFT")
        results = []
        for seed in seeds or [0, 1, 2]:
            session = Session(spec, f"train.seed={seed}")
            results.append((ours(session), theirs(session)[0]))
            table.add_row(str(seed), *(f"{value:.4f}" for value in results[-1]))
        table.add_row("mean", *(f"{statistics.mean(column):.4f}" for column in zip(*results, strict=True)))
        console.print(table)


@app.command()
def beside(
    out: Study,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seeds; by default 0, 1 and 2.")] = None,
    spec: Annotated[str, typer.Option(help="A row of lora or prompt.")] = "specs/study/rotten_tomatoes.yaml#lora",
) -> None:
    """Put PEFT on a row's setting into a study: cells of one more row, "<row> of PEFT"."""
    with failures(out):
        from pipelines.beside import cells

        for cell, value in cells(out, spec, seeds or [0, 1, 2]):
            console.print(f"{cell}: {value:.4f}", highlight=False)


@app.command()
def lora(
    spec: Annotated[str, typer.Argument(help="Of a decoder, with one rule.")],
    rows: Annotated[int, typer.Option(help="Of a batch.")] = 8,
    length: Annotated[int, typer.Option(help="Of a row, in tokens.")] = 256,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 5,
) -> None:
    """A decoder's step by LoRA beside PEFT's: tokens per second and what is kept for the backward, fast and lean."""
    with failures():
        from pipelines.beside import step as measured

        found = measured(spec, rows, length, rounds)
        fast, lean, theirs = (size / 1e6 for size in found.saved)
        console.print(
            f"{rows}x{length}: fast {found.fast:.2f} times PEFT's tokens per second, lean {found.lean:.2f}; saved "
            f"{fast:.0f} and {lean:.0f} MB, PEFT {theirs:.0f} ({fast / theirs:.2f} and {lean / theirs:.2f} times); "
            f"gradients differ by {found.off:.1e}",
            highlight=False,
        )


@app.command()
def convert(
    run: Annotated[Path, typer.Argument(help="A finished run of a method that PEFT has too.", show_default=False)],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the low-rank terms.")] = 8,
) -> None:
    """A run's adapter as LoRA, by export and by PEFT's own conversion: the metric on its validation rows."""
    from pipelines.convert import convert

    table = Table("", "metric", "loss")
    for what, metric, loss in convert(run, rank):
        table.add_row(what, f"{metric:.4f}", f"{loss:.4f}")
    console.print(table)


@app.command()
def validate() -> None:
    """Seconds to check a RoBERTa-large row's plan and an 8-billion decoder to its train graph, and the peak memory."""
    with failures():
        from pipelines.validate import Level, check
        from rewriter import Session

        table = Table("spec", "level", "seconds", "peak memory, MB")
        for spec, level in (("specs/paper/roberta-large.yaml#10", Level.plan), ("specs/llama-8b.yaml", Level.trace)):
            started = time.perf_counter()
            check(Session(spec), level)
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            table.add_row(spec, str(level), f"{seconds:.1f}", f"{peak:,.0f}")
        console.print(table)


@app.command()
def step(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; by default lora and dora.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every method.")] = False,
    out: Annotated[
        Path | None, typer.Option("--json", help="File to write; other methods of the same setting in it stay.")
    ] = None,
    model: Annotated[
        Literal["bert", "minilm", "llama"],
        typer.Option(help="Shape: bert (768 x 4), minilm (384 x 6) or llama (768 x 4)."),
    ] = "bert",
    rows: Annotated[int, typer.Option("--batch", help="Rows of a batch.")] = 8,
    length: Annotated[int, typer.Option(help="Of a row, in tokens.")] = 64,
    rank: Annotated[int, typer.Option(help="Of what has one.")] = 8,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 15,
    memory: Annotated[Literal["fast", "lean"], typer.Option(help="train.memory.")] = "fast",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda: in bfloat16.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Under torch.compile, with dynamic shapes.")] = False,
) -> None:
    """A step of methods beside PEFT's and the frozen model's: time, memory, time to the first one, and gradients.

    The floor is forward and backward of the frozen model down to the first layer's input; the others' steps are with
    AdamW. Gradients are compared with those of formed weights in float64: a time whose gradients differ doesn't count.
    """
    with failures():
        from pipelines.performance import COLUMNS, Setting, line, measure, to_json
        from rewriter.files import write_text

        one = Setting(model, rank, rows, length, rounds, device, compiled, memory)
        table, found, absent = Table(*COLUMNS), [], {}
        for row in measure(one, () if every else methods or ("lora", "dora")):
            if isinstance(row, tuple):
                absent[row[0]] = row[1]
                console.print(f"{row[0]}: left out: {row[1]}", highlight=False)
                continue
            found.append(row)
            console.print(" | ".join(line(row)), highlight=False)
            table.add_row(*line(row))
        console.print(table)
        if out:
            write_text(out, to_json(one, found, absent, out.read_text() if out.exists() else None))


@app.command()
def performance(
    files: Annotated[list[Path], typer.Argument(help="Of `step --json`.")],
    out: Annotated[Path, typer.Option(help="Page to write; its picture lies beside it.")] = Path("docs/performance.md"),
) -> None:
    """Write the page of what `step` measured."""
    with failures():
        from pipelines.performance import write_page

        write_page(files, out)


@app.command()
def start(rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 7) -> None:
    """Seconds until imports are done and until each command has answered --help, in fresh processes."""
    with failures():
        python = [sys.executable, "-c"]
        lines = {code: [*python, code] for code in ("import torch", "import rewriter", FUNCTIONS)}
        lines |= {f"{name} --help": [sys.executable, "-m", f"pipelines.{name}", "--help"] for name in COMMANDS}
        times: dict[str, list[float]] = {name: [] for name in lines}
        for _ in range(rounds):
            for name, line in lines.items():
                started = time.perf_counter()
                subprocess.run(line, check=True, capture_output=True)
                times[name].append(time.perf_counter() - started)
        table = Table("", "seconds", "over import torch")
        for name, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(own, times["import torch"], strict=True))
            table.add_row(name, f"{statistics.median(own):.2f}", f"{ratio:.2f}")
        console.print(table)


@app.command()
def decoding(
    run: Annotated[Path, typer.Argument(help="Folder of an exported run of a decoder.")],
    prompts: Annotated[int, typer.Option(help="Rows of the validation data.")] = 16,
    tokens: Annotated[int, typer.Option(help="That each goes on by.")] = 64,
    length: Annotated[int, typer.Option(help="Of the sequence that is timed.")] = 512,
) -> None:
    """How many prompts go on as `generate` on merged/ does, and the time of a token with the cache and without."""
    with failures(run):
        from pipelines.decoding import same_tokens, step_times

        same, count = same_tokens(run, prompts, tokens)
        console.print(f"{same} of {count} prompts go on by the same {tokens} tokens as generate's", highlight=False)
        times = step_times(run, length)
        said = ", ".join(f"{name} {value:.1f} ms" for name, value in times.items())
        console.print(
            f"token {length}: {said}: {times['without'] / times['with the cache']:.1f} times", highlight=False
        )


@app.command()
def packing(
    spec: Annotated[str, typer.Argument(help="Of a decoder.")],
    rows: Annotated[int, typer.Option(help="Of the training data.")] = 128,
    settings: Settings = None,
) -> None:
    """Tokens per second of packed rows over those of padded ones, and by how much their loss differs."""
    with failures():
        from pipelines.steps import packing as measured

        found = measured(spec, rows, *overrides(settings))
        console.print(
            f"packed: {found.times:.2f} times the tokens per second of padded batches ({found.filled[0]:.0%} of a "
            f"batch are tokens of rows, padded {found.filled[1]:.0%}); the loss differs by {found.off:.1e}",
            highlight=False,
        )


@app.command()
def head(
    spec: Annotated[str, typer.Argument(help="Of a decoder.")],
    rows: Annotated[int, typer.Option(help="Of a batch.")] = 8,
    length: Annotated[int, typer.Option(help="Of a row, in tokens.")] = 256,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 7,
) -> None:
    """Time and peak memory of a step whose logits are computed in chunks, over those of one with whole logits."""
    with failures():
        from pipelines.steps import head as measured

        ratio, peak, off = measured(spec, rows, length, rounds)
        console.print(
            f"{rows}x{length} in chunks: {ratio:.2f} times the time, {peak:.2f} times the peak memory of a step; "
            f"gradients differ by {off:.1e}",
            highlight=False,
        )


@app.command()
def recompute(
    spec: Annotated[str, typer.Argument(help="Of a decoder.")],
    rows: Annotated[int, typer.Option(help="Of a batch.")] = 4,
    length: Annotated[int, typer.Option(help="Of a row, in tokens.")] = 128,
) -> None:
    """What a step saves whose limits.activation_memory is half of what the plain one saves, and what that costs."""
    with failures():
        from pipelines.steps import recompute as measured

        found = measured(spec, rows, length)
        size = lambda count: f"{count / 1e6:.1f} MB"  # noqa: E731
        console.print(
            f"saves {size(found.plain)}; limited to {size(found.plain // 2)}: {size(found.planned)} planned, "
            f"{size(found.measured)} measured, {found.layers} layers computed again for {found.added:+.0%} FLOPs; "
            f"loss and gradients {'equal' if found.same else 'differ'}",
            highlight=False,
        )


@app.command()
def memory(
    what: Annotated[list[str] | None, typer.Argument(help="tuning, checkpoint or onnx; default: all.")] = None,
    folder: Annotated[Path, typer.Option(help="For the model and its runs; seven times the weights.")] = Path(
        "runs/memory"
    ),
    layers: Annotated[int, typer.Option(help="Of the model; 30 are 1.45 billion parameters.")] = 30,
) -> None:
    """The peak memory of tuning and of an export above imports, of a random Llama in bfloat16, over its weights."""
    with failures(folder):
        from pipelines.memory import WHAT, factors

        for name, size, factor in factors(folder, layers, what or WHAT):
            console.print(f"{name}: {size:.2f} GB of weights, peak {factor:.2f} times that", highlight=False)


@app.command()
def kernels() -> None:
    """Write the table of ONNX Runtime's CUDA kernels, by which files for a GPU are checked elsewhere; needs a GPU."""
    with failures():
        import onnxruntime

        from rewriter.export.kernels import TABLE, registered

        found = {"onnxruntime": onnxruntime.__version__, "kernels": registered()}
        lines = ",\n".join(f'  "{name}": {json.dumps(one)}' for name, one in found["kernels"].items())
        TABLE.write_text(f'{{"onnxruntime": "{onnxruntime.__version__}", "kernels": {{\n{lines}\n}}}}\n')
        console.print(f"{TABLE}: {len(found['kernels'])} operators", highlight=False)


@app.command()
def gpu(
    only: Annotated[list[str] | None, typer.Argument(help="minilm, bert-base or smollm2; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/gpu.md"),
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/gpu"),
) -> None:
    """Tune three models on a GPU, export each with --target cuda, and write the page of what was found; needs a GPU."""
    with failures():
        from pipelines.gpu import export_all, write_page

        export_all(runs, only or ())
        write_page(runs, out)


if __name__ == "__main__":
    app()
