"""Stages are compared by the tuned model's own rounding, on real positions, and by decisions."""

import numpy as np
import pytest
import torch

from rewriter import Session, trace
from rewriter.export import compare
from rewriter.export.verify import torch_stage
from tests import tiny
from tests.architectures import build

STAGES = ("merged", "checkpoint", "onnx")


def samples(inputs, padded=False):
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        batch["attention_mask"][1, 4:] = 0
    if "token_type_ids" in inputs.kwargs:
        batch["token_type_ids"] = torch.zeros_like(ids)
    return [("the validation data", 8, batch, {})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_passes_by_its_own_rounding_and_a_changed_one_does_not(name, dtype, tmp_path):
    model, inputs = build(name, dtype)
    traced = trace(model, inputs, ("eval",))
    exact = compare.wider(traced)
    assert exact is (torch.float64 if dtype is torch.float32 else torch.float32)
    wide = compare.retyped(traced, exact)
    assert {p.data_ptr() for p in wide.parameters()} == {p.data_ptr() for p in traced.parameters()}
    changed = traced.clone()
    changed.recompile()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.data = parameter.data * 1.1
    stages = {"same": torch_stage(model), "changed": torch_stage(changed)}
    axes = compare.sequences(traced.graphs["eval"], traced.input_names)
    held = compare.recorded(torch_stage(traced), torch_stage(wide, exact), samples(inputs), tmp_path)
    found, scale = compare.distances(held, stages, axes)
    assert 0 < found["tuned"].wide[0] < 100 * torch.finfo(dtype).eps * scale[0]
    assert compare.too_far({k: found[k] for k in ("tuned", "same")}, scale, torch.finfo(dtype).eps) is None
    said = compare.too_far(found, scale, torch.finfo(dtype).eps)
    assert said.startswith("changed is") and "row " in said and "export.verify.atol" in said
    assert "of the validation data" in said and "nothing is written" in said


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_near(value, tmp_path):
    """Neither in the tuned model and every stage alike, nor where padding alone is finite."""
    model, inputs = build("llama", torch.float32)
    traced = trace(model, inputs, ("eval",))
    exact = torch_stage(traced)
    broken = lambda batch: [x * value for x in exact(batch)]  # noqa: E731
    for reference, wide in ((broken, broken), (broken, exact), (exact, broken)):
        held = compare.recorded(reference, wide, samples(inputs), tmp_path)
        found, scale = compare.distances(held, {"stage": broken}, [None])
        assert compare.too_far(found, scale, 1e-7).startswith("stage is inf")


def test_a_base_in_half_precision_ships_by_its_own_rounding(tmp_path):
    """Its ONNX file is in float32 all the same."""
    session = Session(tiny.project(tmp_path), "model.dtype=bfloat16", "train.max_steps=3")
    session.tune(tmp_path / "run")
    found = session.export()
    assert 1e-4 < found["rounding"] < 0.1 and found["atol"] is None and set(found["stages"]) == set(STAGES)
    assert found["rows"] == {"random": 16, "compared": 16, "validation": 16, "why": None}


def test_padding_is_left_out(tmp_path):
    """A stage that differs on padding alone is not far; on a real token it is."""
    model, inputs = build("llama", torch.float32)
    traced = trace(model, inputs, ("eval",))
    axes = compare.sequences(traced.graphs["eval"], traced.input_names)
    assert axes[0] in traced.input_names
    reference = torch_stage(traced)

    def moved(row, place):
        def stage(batch):
            (first, *rest) = reference(batch)
            first = first.copy()
            first[row, place] += 1.0
            return [first, *rest]

        return stage

    stages = {"padding": moved(1, 6), "token": moved(1, 2), "nan": lambda b: [x * np.nan for x in reference(b)]}
    held = compare.recorded(reference, reference, samples(inputs, padded=True), tmp_path)
    found, _ = compare.distances(held, stages, axes)
    assert found["padding"].tuned == 0.0
    assert found["token"].tuned == pytest.approx(1.0) and found["token"].where[0] == "row 9 of the validation data"
    assert found["nan"].tuned == np.inf
