"""Plans: counts, slices, ties, warnings, and that the meta device gives the plan of the weights."""

import pytest

from rewriter import Inputs, SpecError, plan, trace
from rewriter.spec import Rule
from tests.architectures import ARCHITECTURES, build


def planned(name, rules, meta=True, **more):
    model, inputs = build(name, meta=meta)
    return plan(trace(model, inputs, modes=("eval",)), [Rule(**rule) for rule in rules], **more)


C_ATTN = "transformer.h.*.attn.c_attn.weight"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_meta_equals_weights(name):
    rules = [{"target": ARCHITECTURES[name].linear, "apply": [{"dora": {"rank": 2}}]}]
    dtype = {"dtype": __import__("torch").float32} if name == "mixtral" else {}
    model, inputs = build(name, meta=False, **dtype)
    with_weights = plan(trace(model, inputs, modes=("eval",)), [Rule(**rule) for rule in rules])
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
    from rewriter.transforms import METHODS

    class Opaque(Operator):
        def dense(self):
            raise NotImplementedError

    ssb = METHODS["ssb"]
    monkeypatch.setattr(type(ssb), "__call__", lambda self, w, site, options: Opaque())
    found = planned("bert", [{"target": "bert.pooler.dense.weight", "apply": ["ssb"]}])
    assert not found.sites[0].merges and "can't merge" in found.notes[0]
