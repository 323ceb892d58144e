"""Plans: counts, slices, ties, warnings, and that the meta device gives the plan of the weights."""

from functools import cache

import pytest
import torch

from rewriter import Inputs, SpecError, plan, rewrite, trace, tuned_parameters
from rewriter.algebra import Diag
from rewriter.spec import Rule
from rewriter.transforms import TRANSFORMS, transform
from tests.architectures import ARCHITECTURES, build, inputs_of, traced

pytestmark = pytest.mark.xdist_group("architectures")


@cache
def shapes(name):
    model, inputs = build(name, meta=True)
    return trace(model, inputs, modes=("eval",))


def planned(name, rules, **more):
    return plan(shapes(name), [Rule(**rule) for rule in rules], **more)


C_ATTN = "transformer.h.*.attn.c_attn.weight"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_meta_equals_weights(name):
    rules = [{"target": ARCHITECTURES[name].linear, "apply": [{"dora": {"rank": 2}}]}]
    model, _, graph = traced(name)
    with_weights = plan(graph, [Rule(**rule) for rule in rules])
    on_meta = planned(name, rules)
    assert on_meta.to_dict() == with_weights.to_dict()
    assert on_meta.total_parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("chain", "count"),
    [
        (["ssb"], 16 + 24),
        (["sam_parser"], 16),
        ([{"lora": {"rank": 4}}], 4 * (16 + 24)),
        ([{"trilora": {"rank": 4}}], 4 * (16 + 24) + 4),
        ([{"flora": {"rank": 4}}], 4 * (16 + 24) + 16),
        ([{"dora": {"rank": 4}}], 4 * (16 + 24) + 24),
        (["ssb", {"lora": {"rank": 4}}], (16 + 24) + 4 * (16 + 24)),
    ],
)
def test_counts_of_every_layer(chain, count):
    found = planned("bert", [{"target": "bert.encoder.layer.*.intermediate.dense.weight", "apply": chain}])
    assert found.trainable_parameters == 2 * count
    assert found.share == 1000 * 2 * count / found.total_parameters


def test_slices_of_a_fused_weight():
    rules = [
        {"target": C_ATTN, "slice": {"out": [0, 16]}, "apply": [{"lora": {"rank": 2}}]},
        {"target": C_ATTN, "slice": {"out": [32, 48]}, "apply": ["ssb"]},
    ]
    found = planned("gpt2", rules)
    assert [site.label for site in found.sites][:2] == [
        "transformer.h.0.attn.c_attn.weight[out 0:16]",
        "transformer.h.0.attn.c_attn.weight[out 32:48]",
    ]
    assert found.trainable_parameters == 2 * (2 * 32 + 32)


@pytest.mark.parametrize(
    ("rules", "message", "path"),
    [
        ([{"target": C_ATTN, "slice": {"out": [40, 50]}, "apply": ["ssb"]}], "out of range", ("rules", 0, "slice")),
        ([{"target": C_ATTN, "apply": ["ssb"]}] * 2, "already transformed", ("rules", 1, "target")),
        (
            [
                {"target": C_ATTN, "slice": {"out": [0, 20]}, "apply": ["ssb"]},
                {"target": C_ATTN, "slice": {"out": [16, 32]}, "apply": ["ssb"]},
            ],
            "overlaps",
            ("rules", 1, "target"),
        ),
        ([{"target": C_ATTN, "apply": [{"lora": {"rank": 17}}]}], "rank 17", ("rules", 0, "apply", 0, "lora", "rank")),
        ([{"target": C_ATTN, "apply": ["ssb", "svdiff"]}], "first of its chain", ("rules", 0, "apply")),
        ([{"target": C_ATTN, "apply": ["bitfit"]}], "tunes vectors", ("rules", 0, "apply", 0, "bitfit")),
    ],
)
def test_refused(rules, message, path):
    with pytest.raises(SpecError, match=message) as caught:
        planned("gpt2", rules)
    assert caught.value.path == path


def test_tied_weights_are_told_and_count_once():
    found = planned("gpt2", [{"target": "transformer.wte.weight", "apply": ["ssb"]}])
    assert found.trainable_parameters == 64 + 16
    assert found.notes == (
        "transformer.wte.weight = lm_head.weight are tied: every use sees the transform and the merge keeps the tie",
    )


def test_uneven_matches_warn_or_fail():
    import torch
    from torch import nn

    class Hybrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)}), nn.ModuleDict({"k": nn.Linear(4, 4)})])

        def forward(self, x):
            return self.layers[1]["k"](self.layers[0]["q"](x))

    graph = trace(Hybrid(), Inputs(args=(torch.zeros(3, 4),)))
    rules = [Rule(target="layers.*.q.weight", apply=["ssb"])]
    assert plan(graph, rules).warnings == ("rules[0]: layers.*.q.weight is in 1 of 2 layers; not in 1",)
    with pytest.raises(SpecError, match="uneven match"):
        plan(graph, rules, strict=True)


def test_heads_are_apart():
    rules = [{"target": "classifier.*", "apply": ["full"]}, {"target": "bert.pooler.dense.weight", "apply": ["ssl"]}]
    found = planned("bert", rules, new=["classifier.weight", "classifier.bias", "bert.pooler.dense.bias"])
    assert (found.trainable_parameters, found.head_parameters) == (16, 34)
    assert found.warnings == ("bert.pooler.dense.bias is newly made and no rule tunes it: it stays random",)


def test_what_cannot_merge_is_told(monkeypatch):
    from rewriter.algebra import Operator
    from rewriter.transforms import TRANSFORMS

    class Opaque(Operator):
        def dense(self):
            raise NotImplementedError

    ssb = TRANSFORMS["ssb"]
    monkeypatch.setattr(type(ssb), "__call__", lambda self, w, site, options: Opaque())
    found = planned("bert", [{"target": "bert.pooler.dense.weight", "apply": ["ssb"]}])
    assert not found.sites[0].merges and "can't merge" in found.notes[0]


@pytest.mark.parametrize("chain", [["prefix", "prefix"], ["prompt", "prompt"]])
def test_rows_of_a_chain_stand_one_after_another(chain):
    """concat(P2, P1, xW): as one method with the rows of both."""
    _, inputs, graph = traced("bert")
    target = "bert.encoder.layer.*" if chain[0] == "prefix" else "bert.embeddings"
    lengths = (3, 2)
    apply = [{name: {"length": length}} for name, length in zip(chain, lengths, strict=True)]
    two = rewrite(graph, plan(graph, [Rule(target=target, apply=apply)]))
    one = rewrite(graph, plan(graph, [Rule(target=target, apply=[{chain[0]: {"length": 5}}])]))
    own = tuned_parameters(two)
    assert len(own) == 2 * len(tuned_parameters(one))
    with torch.no_grad():
        for name, value in tuned_parameters(one).items():
            place, _, leaf = name.rpartition(f".{chain[0]}.")
            value.copy_(torch.cat([own[f"{place}.{chain[0]}_2.{leaf}"], own[f"{place}.{chain[0]}.{leaf}"]]))
    x = inputs_of("bert", inputs, 3, 9)
    with torch.no_grad():
        torch.testing.assert_close(two.eval()(**x).logits, one.eval()(**x).logits, rtol=1e-9, atol=1e-10)


def test_what_does_not_compose_is_refused(monkeypatch):
    monkeypatch.setattr(TRANSFORMS, "_found", dict(TRANSFORMS.items()))

    @transform("reconstruction", on=("keys", "values"))
    def louder(w, site):
        """xW Diag(l): keys and values take rows alone."""
        return w @ Diag(site.tuned("l", site.m, 1.0))

    with pytest.raises(SpecError, match="louder: these methods do not compose on keys"):
        planned("bert", [{"target": "bert.encoder.layer.*", "apply": ["louder"]}])


def test_sizes_that_a_shape_bounds_are_known_by_their_type():
    """The option's own type says so: whatever its name, also where it may be none."""
    for step, option in (({"lora": {"rank": 17}}, "rank"), ({"super_tuning": {"rank": 17}}, "rank")):
        with pytest.raises(SpecError, match=r"rank 17 is larger than .* allows: it is 16 x 16") as caught:
            planned("bert", [{"target": "bert.pooler.dense.weight", "apply": [step]}])
        assert caught.value.path == ("rules", 0, "apply", 0, next(iter(step)), option)
