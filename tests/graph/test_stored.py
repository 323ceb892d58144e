import re
import sys

import pytest
import torch
from torch import nn

from rewriter import Inputs, Session, SubspanError, kept, trace
from rewriter.graph.stored import _evaluated
from tests import tiny
from tests.architectures import ARCHITECTURES, UNLIKE, build, inputs_of, traced

pytestmark = pytest.mark.xdist_group("architectures")


def described(model, name):
    """Nodes with their arguments, shapes and modules; symbols have other names each time."""
    return [
        re.sub(
            r"\bs\d+\b", "s",
            f"{n.op} {n.name} {n.target} {n.args} {n.kwargs} {n.meta.get('val')} {n.meta.get('nn_module_stack')}",
        )
        for n in model.graphs[name].nodes
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))
    return tmp_path / "traces"


LIKE = [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name not in UNLIKE]


@pytest.mark.parametrize("name", [*UNLIKE, *LIKE])
def test_the_meta_devices_trace_is_the_runs_and_comes_back_as_it_was(name, cache):
    """Without weights, with weights and from the disk: the same nodes with the same shapes, and the same outputs."""
    model, inputs, plain = traced(name)
    hollow, shapes = build(name, meta=True)
    first = trace(hollow, shapes, keep=True)
    files = sorted(cache.iterdir())
    found = trace(model, inputs, keep=True)
    assert len(files) == 2 and sorted(cache.iterdir()) == files
    for mode in ("train", "eval"):
        assert described(first, mode) == described(plain, mode)
        assert described(found, mode) == described(plain, mode)
        assert found.signatures[mode].ranges == plain.signatures[mode].ranges
    batch = inputs_of(name, inputs, 4, 9)
    expected, got = plain.eval()(**batch), found.eval()(**batch)
    assert type(got) is type(expected) and torch.equal(got[0], expected[0])


class Cut(nn.Module):
    """Another branch for long rows, and for odd ones."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x) * self.scale
        return y if x.shape[1] % 2 else y + torch.tensor([1.0, 2.0, 3.0, 4.0])


def of(model, length=7, **options):
    inputs = Inputs(kwargs={"x": torch.randn(3, length, 4)}, dynamic={"x": {0: "batch", 1: "sequence"}})
    return trace(model, inputs, ("eval",), keep=True, **options)


def test_what_a_trace_is_valid_for_comes_back_with_it(cache):
    model = Cut().eval()
    plain = of(model)
    found = of(model)
    assert len(list(cache.iterdir())) == 1
    for one in (plain, found):
        with pytest.raises(SubspanError, match="the trace is not valid for these inputs"):
            one(x=torch.randn(2, 8, 4))
    even, again = of(model, 6), of(model, 6)
    x = torch.randn(2, 10, 4)
    assert torch.equal(even(x=x), model(x)) and torch.equal(again(x=x), model(x))


def hooked(model):
    model.linear.register_forward_hook(lambda module, args, out: out + 1)
    return model


def held(model):
    model.helper = lambda x: x
    return model


@pytest.mark.parametrize(
    "other, kept_too",
    [(Cut(3.0), True), (Cut().double(), True), (hooked(Cut()), False), (held(Cut()), False)],
    ids=["attribute", "dtype", "hook", "function"],
)
def test_another_model_is_traced_anew(other, kept_too, cache):
    """What a forward depends on is in the key; where it has no name, nothing is kept."""
    of(Cut().eval())
    dtype = other.linear.weight.dtype
    inputs = Inputs(kwargs={"x": torch.randn(3, 7, 4, dtype=dtype)}, dynamic={"x": {0: "batch", 1: "sequence"}})
    found = trace(other.eval(), inputs, ("eval",), keep=True)
    assert len(list(cache.iterdir())) == 1 + kept_too
    torch.testing.assert_close(found(**inputs.kwargs), other(**inputs.kwargs))


def test_the_codes_version_the_passes_and_the_inputs_are_in_the_key(monkeypatch):
    model = Cut()
    inputs = Inputs(kwargs={"x": torch.randn(3, 7, 4)}, dynamic={"x": {0: "batch"}})
    wider = Inputs(kwargs={"x": torch.randn(3, 9, 4)}, dynamic={"x": {0: "batch"}})
    free = Inputs(kwargs=inputs.kwargs, dynamic={"x": {0: "batch", 1: "sequence"}})
    keys = [kept.key_of(model, one, "eval", ()) for one in (inputs, wider, free)]
    keys += [kept.key_of(model, inputs, "train", ()), kept.key_of(model, inputs, "eval", ("remove_checks",))]
    monkeypatch.setattr(kept, "_own", lambda: "another version")
    keys.append(kept.key_of(model, inputs, "eval", ()))
    assert None not in keys and len(set(keys)) == 6


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], lambda data: data.replace(b"aten", b"atem"), lambda d: b""]
)
def test_a_broken_file_is_passed_over_and_made_anew(damage, cache):
    model, x = Cut().eval(), torch.randn(3, 7, 4)
    of(model)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(of(model)(x=x), model(x))
    assert file.read_bytes() == whole


@pytest.mark.parametrize("text", ["__import__('os')", "L.__class__", "(lambda: 1)()", "[1]", "L['x'].data_ptr()"])
def test_an_expression_is_arithmetic(text):
    with pytest.raises(ValueError, match="no arithmetic expression"):
        _evaluated(text, {"L": {"x": torch.ones(2)}})


def test_expressions():
    sizes = {"s0": 7, "s1": 3}
    found = {
        text: _evaluated(text, sizes) for text in ("s0*s1", "2*s0**2 - s1", "(s0//2)", "Mod(s0, 4)", "Max(s0, s1)")
    }
    assert list(found.values()) == [21, 95, 3, 3, 7]


def test_a_folder_that_cant_be_written_is_passed_over(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "file"))
    model, x = Cut().eval(), torch.randn(3, 7, 4)
    assert torch.equal(of(model)(x=x), model(x))


def test_a_session_traces_once(tmp_path, monkeypatch, cache):
    """What a plan has traced, a run does not trace again; a second run traces nothing."""
    modes, tracing = [], sys.modules["rewriter.trace"]
    whole = tracing.capture
    monkeypatch.setattr(
        tracing, "capture", lambda *given, **more: modes.append(more["training"]) or whole(*given, **more)
    )
    file = tiny.project(tmp_path / "project")
    losses = []
    for name in ("first", "second"):
        session = Session(file, "train.max_steps=2")
        session.plan()
        assert not modes or modes[0] is False
        losses.append(session.tune(tmp_path / name)["train"]["loss"])
    assert modes == [False, True] and losses[0] == losses[1]
