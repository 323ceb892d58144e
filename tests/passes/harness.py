"""What every pass is held to, by being in the list alone: equal numbers with and without it, and true graphs."""

from functools import cache
from typing import Any

import torch
from torch import fx

from rewriter import Rule, plan, rewrite, tuned_parameters
from rewriter.passes.base import SITE, Context, Pass
from rewriter.passes.pipelines import PASSES
from rewriter.tuned import TunedModel
from tests.architectures import ARCHITECTURES, cleaned, inputs_of, raw

CHAINS = (
    [{"lora": {"rank": 4}}],  # s = 1
    [{"lora": {"rank": 2, "alpha": 8, "dropout": 0.1, "mpc": "o"}}],
    [{"dora": {"rank": 2, "alpha": 8}}],
    ["ssb", {"trilora": {"rank": 2}}],
    [{"vera": {"rank": 2}}],
)
LAYERS = {
    "bert": "bert.encoder.layer.*", "roberta": "roberta.encoder.layer.*", "deberta-v2": "deberta.encoder.layer.*",
    "distilbert": "distilbert.transformer.layer.*", "modernbert": "model.layers.*", "gpt2": "transformer.h.*",
    "llama": "model.layers.*", "qwen3": "model.layers.*", "mixtral": "model.layers.*", "vit": "vit.layers.*",
    "t5": "{encoder,decoder}.block.*",
}  # fmt: skip
TOKENS = {"gpt2": "transformer.wte", "t5": "encoder.embed_tokens"}
TOKENS |= dict.fromkeys(("llama", "qwen3", "mixtral"), "model")
BY_NAME = {one.name: one for one in PASSES}


def light(name: str) -> list[Rule]:
    """One chain on the linears of an architecture, another one for each architecture."""
    chain = CHAINS[list(ARCHITECTURES).index(name) % len(CHAINS)]
    return [Rule(target=ARCHITECTURES[name].linear, apply=chain)]


def every_place(name: str) -> list[Rule]:
    """Rules that stand on every kind of place the architecture has."""
    rules = [
        Rule(target=ARCHITECTURES[name].linear, apply=[{"lora": {"rank": 2, "mpc": "d"}}]),
        Rule(target=ARCHITECTURES[name].other, apply=[{"lora": {"rank": 2}}]),
        Rule(target=LAYERS[name], apply=[{"hadapter": {"bottleneck": 4}}]),
        Rule(target=LAYERS[name], apply=[{"prefix": {"length": 3, "hidden": 4}}]),
    ]
    if name != "vit":
        rules.append(Rule(target=TOKENS.get(name, "**.embeddings"), apply=[{"prompt": {"length": 5}}]))
    return rules


def rewritten(name: str, rules: list[Rule], without: tuple[str, ...] = ()) -> TunedModel:
    """An architecture's rewrite without some passes, its tuned tensors moved away from their start."""
    graph = cleaned(name, without)
    tuned = rewrite(graph, plan(graph, rules), without=without)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in sorted(tuned_parameters(tuned).items()):
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    return tuned


@cache
def reference(name: str) -> tuple[TunedModel, dict[str, Any]]:
    """The light rewrite with all passes, and its numbers."""
    tuned = rewritten(name, light(name))
    return tuned, numbers(tuned, name)


def numbers(tuned: TunedModel, name: str) -> dict[str, Any]:
    """Outputs, penalties and gradients of a rewrite, in both modes, on a batch unlike the traced one."""
    found = {}
    x = inputs_of(name, raw(name)[1], 3, 9)
    for mode in ("train", "eval"):
        tuned.train(mode == "train")
        torch.manual_seed(0)
        out = tuned(**x).logits
        loss = out.square().mean() + sum(tuned.penalties.values()) if mode == "train" else out.square().mean()
        leaves = tuned_parameters(tuned)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found[mode] = {"out": out.detach(), "loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}
    return found


def check_numbers(one: Pass, name: str) -> None:
    """Equal outputs, losses and gradients with and without a pass, up to float64's rounding."""
    tuned, expected = reference(name)
    if {"train", "export"} & set(one.stages):
        found = tuned.clone()
        tensors = {**dict(tuned.named_parameters(remove_duplicate=False)), **dict(tuned.named_buffers())}
        for mode, graph in found.graphs.items():
            context = Context(mode, tuned.plan, tensors=tensors, lean=True)
            found.graphs[mode] = one.function(graph, context)
            for key, value in context.folded.items():
                found.add(key, value, persistent=False)
        found.recompile()
    else:
        found = rewritten(name, light(name), (one.name,))
    # Mixtral is in float32.
    close = {"rtol": 1e-4, "atol": 1e-6} if name == "mixtral" else {"rtol": 1e-10, "atol": 1e-12}
    for mode, values in numbers(found, name).items():
        assert values.keys() == expected[mode].keys()
        for key, value in values.items():
            torch.testing.assert_close(value, expected[mode][key], **close, msg=lambda text, key=key: f"{key}: {text}")


def check_graphs(tuned: TunedModel, name: str) -> None:
    """Graphs that are well formed, whose inserted nodes are aten ops of a module and a site, and whose shapes hold."""
    x = list(inputs_of(name, raw(name)[1], 3, 9).values())
    for mode, graph in tuned.graphs.items():
        graph.lint()
        labels = {site.label for site in tuned.plan.sites}
        for node in graph.nodes:
            if SITE in node.meta:
                aten = node.op == "get_attr" or (node.op == "call_function" and "aten" in str(node.target))
                assert aten and node.meta.get("val") is not None and "nn_module_stack" in node.meta, (
                    mode,
                    node.format_node(),
                )
                assert node.meta[SITE] in labels
        tuned.train(mode == "train")
        _Shapes(fx.GraphModule(tuned, graph)).run(*x)


class _Shapes(fx.Interpreter):
    """Runs a graph and compares every tensor with the shape and type that its node says."""

    def run(self, *args):
        self.sizes: dict[str, int] = {}
        inputs = self.module.graph.find_nodes(op="placeholder")
        for node, value in zip(inputs, args, strict=True):
            for dim, size in zip(node.meta["val"].shape, value.shape, strict=True):
                if isinstance(dim, torch.SymInt):
                    self.sizes[str(dim)] = size
        with torch.no_grad():
            return super().run(*args)

    def run_node(self, node):
        value = super().run_node(node)
        said = node.meta.get("val")
        if isinstance(said, torch.Tensor) and isinstance(value, torch.Tensor) and node.op != "output":
            shape = [self.size(dim) for dim in said.shape]
            assert all(a in (None, b) for a, b in zip(shape, value.shape, strict=True)), node.format_node()
            assert said.dtype == value.dtype, node.format_node()
        return value

    def size(self, dim) -> int | None:
        """A dimension for this run's sizes; None where it depends on the data."""
        if isinstance(dim, int):
            return dim
        found = dim.node.expr.subs(self.sizes)
        return int(found) if found.is_number else None
