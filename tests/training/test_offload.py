"""Frozen weights that stay in the CPU's memory: which, where, and that nothing else changes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rewriter import Inputs, Rule, Session, SpecError, SubspanError, plan, rewrite, trace
from rewriter.algebra import Format, Quantised, held_bytes, parts_of
from rewriter.training.offload import Offloaded, layers_to_offload, offload
from tests import tiny


class Layers(nn.Module):
    """A table and layers of 80 x 64 weights of 4 bytes: 20,480 bytes a layer, 6,400 outside."""

    def __init__(self, count: int = 3):
        super().__init__()
        self.table = nn.Embedding(20, 80)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(80, 64, bias=False), nn.Linear(64, 80, bias=False)) for _ in range(count)
        )

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


IDS, LAYER, OUTSIDE, ONE = torch.arange(20).view(4, 5), 40_960, 6_400, 20_480


def tuned(method, few_bits=False):
    torch.manual_seed(0)
    traced = trace(Layers(), Inputs(args=(IDS,)))
    found = plan(traced, [Rule(target="layers.*.*.weight", apply=[method])])
    if few_bits:
        for name in ("layers.0.0.weight", "layers.1.1.weight"):
            weight = Quantised.of(traced.get_parameter(name), Format("int4", 16))
            path, _, last = name.rpartition(".")
            traced.get_submodule(path).register_parameter(last, nn.Parameter(weight, False))
    return traced, found


@pytest.mark.parametrize(
    ("most", "layers"),
    [
        (None, []),
        (OUTSIDE + 3 * LAYER, []),
        (OUTSIDE + 3 * LAYER - 1, ["layers.0"]),
        (OUTSIDE + 2 * LAYER + ONE, ["layers.0"]),
        (OUTSIDE + LAYER + ONE, ["layers.0", "layers.1"]),
        (OUTSIDE + ONE, ["layers.0", "layers.1", "layers.2"]),
    ],
)
def test_as_few_layers_go_as_leave_room_for_the_rest_and_the_largest_weight(most, layers):
    found = layers_to_offload(Layers(), most, ())
    assert list(found) == layers
    assert all(names == [f"{layer}.{i}.weight" for i in (0, 1)] for layer, names in found.items())


def test_what_is_in_no_layer_has_to_fit():
    with pytest.raises(SpecError, match=r"6,400 bytes of weights are no matrices of layers, and .* 20,480: more"):
        layers_to_offload(Layers(), OUTSIDE + ONE - 1, ())
    with pytest.raises(SpecError, match="6,400 bytes of weights are no matrices of layers: more than the limit of 10"):
        layers_to_offload(Layers(0), 10, ())


@pytest.mark.parametrize("few_bits", [False, True], ids=["dense", "few-bits"])
@pytest.mark.parametrize("method", [{"lora": {"rank": 2}}, {"dora": {"rank": 2}}, {"svdiff": {}}, {"ssb": {}}], ids=str)
def test_outputs_and_gradients_are_the_same_bits(method, few_bits):
    results = []
    for away in (False, True):
        traced, found = tuned(method, few_bits)
        if away:
            offload(traced, layers_to_offload(traced, OUTSIDE + LAYER + ONE, ()))
        model = rewrite(traced, found, seed=1)
        out = model(IDS)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 2 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_elsewhere_the_weights_stay_and_their_copies_do_not_last():
    """The meta device stands for another one: what computes is there, the numbers are still on the CPU."""
    traced, found = tuned({"lora": {"rank": 2}}, few_bits=True)
    before = {name: [one.clone() for one in parts_of(p)] for name, p in traced.named_parameters()}
    layers = layers_to_offload(traced, OUTSIDE + LAYER + ONE, ())
    offload(traced, layers)
    model = rewrite(traced, found, seed=1).to("meta")
    away = {name for names in layers.values() for name in names}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one), one)[1], lambda one: one):
        assert model(IDS.to("meta")).device.type == "meta"
    for name, weight in model.named_parameters():
        assert weight.device.type == "meta" and isinstance(weight, Offloaded) == (name in away), name
        if name in away:
            assert all(part.device.type == "cpu" for part in weight.parts)
            assert all(torch.equal(a, b) for a, b in zip(weight.parts, before[name], strict=True))
            assert held_bytes(weight) == sum(one.nbytes for one in before[name]) and weight.dense().is_meta
    shapes = {tuple(model.get_parameter(name).shape) for name in away}
    saved = [one for one in kept if tuple(one.shape) in shapes | {shape[::-1] for shape in shapes}]
    assert sum(isinstance(one, Offloaded) for one in saved) >= len(away) - 1


LIMIT = "limits.weight_memory"


def test_a_run_is_the_same_and_goes_on_without(tmp_path):
    folder = tiny.project(tmp_path)
    sizes = Session(folder).cost()
    whole = sum(held_bytes(one) for one in Session(folder).shapes()[0].parameters())
    assert sizes.weights == whole and sizes.offloaded == 0
    small = Session(folder, f"{LIMIT}={whole - 2_000}")
    assert small.cost().offloaded >= 1 and small.cost().weights < whole - 2_000
    runs = []
    for name, settings in (("plain", []), ("small", [f"{LIMIT}={whole - 2_000}"])):
        runs.append(tmp_path / name)
        Session(folder, *settings).tune(runs[-1])
    tensors = [load_file(run / "adapter/adapter.safetensors") for run in runs]
    assert all(torch.equal(one, tensors[1][name]) for name, one in tensors[0].items())
    one, other = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert one["validation"] == other["validation"]
    (runs[1] / "metrics.json").unlink()
    shutil.rmtree(runs[1] / "adapter")
    assert Session(folder).tune(runs[1], resume=True)["validation"] == other["validation"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([f"{LIMIT}=1 kB"], "limits.weight_memory: .* bytes of weights are no matrices of layers.*limit of 1,000"),
        ([f"{LIMIT}=1 GB", "train.parallel.shard=2"], "shared out among processes, or kept in the CPU's memory"),
        ([f"{LIMIT}=many"], "expected bytes, or a size such as 8 GiB"),
    ],
)
def test_mistakes(tmp_path, settings, said):
    with pytest.raises(SubspanError, match=said):
        Session(tiny.project(tmp_path), *settings).plan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: what stays on one can't be measured")
def test_a_cuda_device_holds_what_is_planned():
    torch.manual_seed(0)
    traced = trace(Layers(40), Inputs(args=(IDS,)))
    limit = OUTSIDE + 10 * LAYER + ONE
    offload(traced, layers_to_offload(traced, limit, ()))
    before = torch.cuda.memory_allocated()
    model = traced.to("cuda").eval()
    assert torch.cuda.memory_allocated() - before <= 1.1 * limit
    expected, found = traced.clone("eval").to("cpu")(IDS), model(IDS.to("cuda")).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
