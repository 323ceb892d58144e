"""Tied weights: a table of ids that is a linear layer too."""

import pytest
import torch
import transformers as hf

from rewriter import Rule, Session, SpecError
from tests.cases.tiny import GPT2, T5, saved, spec_of

pytestmark = pytest.mark.slow


def tied(folder, kind="gpt2"):
    config = {
        "gpt2": lambda: hf.GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "t5": lambda: hf.T5Config(**T5, decoder_start_token_id=0, dropout_rate=0.0),
    }[kind]()
    return saved(folder, config, "CausalLM" if kind == "gpt2" else "Seq2SeqLM")


@pytest.mark.parametrize(
    ("kind", "target", "apply", "cut"),
    [
        ("gpt2", "**", ["full"], None),
        ("gpt2", "@", ["full"], None),
        ("t5", "@", [{"lora": {"rank": 2}}], {"in": [3, 9]}),
        ("gpt2", "@", ["full"], {"in": [0, 10]}),
    ],
    ids=["35-all", "35-table", "35-slice", "36-tokens"],
)
def test_35_tied_weights_are_exported_and_stay_tied(tmp_path, kind, target, apply, cut):
    tied(tmp_path / "model", kind)
    table = {"gpt2": "transformer.wte.weight", "t5": "shared.weight"}[kind]
    spec = spec_of(tmp_path / "model", "causal-lm" if kind == "gpt2" else "seq2seq-lm")
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"good film {'plot ' * (i % 3)},bad film\n" for i in range(20))
    )
    rule = {"target": target.replace("@", table), "apply": apply} | ({"slice": cut} if cut else {})
    data = spec.data.model_dump(by_alias=True) | {"files": str(tmp_path / "rows.csv")}
    spec = type(spec).model_validate(
        {
            **spec.model_dump(by_alias=True),
            "data": data,
            "rules": [rule],
            "export": {"onnx": None} if kind == "t5" else {},  # Its tables are tied in the checkpoint.
            "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01},
        }
    )
    session = Session(spec)
    session.tune(tmp_path / "run")
    session.export()
    merged = (hf.AutoModelForCausalLM if kind == "gpt2" else hf.AutoModelForSeq2SeqLM).from_pretrained(
        tmp_path / "run" / "merged"
    )
    base = type(merged).from_pretrained(tmp_path / "model")
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    change = (merged.get_input_embeddings().weight - base.get_input_embeddings().weight).abs()
    if cut:
        start, stop = cut["in"]
        outside = torch.ones(50, dtype=torch.bool)
        outside[start:stop] = False
        assert not change[outside].any(), "the other tokens stay as they were"
    assert change.any()


def test_36_a_slice_of_both_names_is_refused(tmp_path):
    tied(tmp_path / "model")
    spec = spec_of(tmp_path / "model", "causal-lm")
    rule = Rule.model_validate(
        {"target": ["transformer.wte.weight", "lm_head.weight"], "apply": ["full"], "slice": {"in": [0, 10]}}
    )
    with pytest.raises(SpecError, match=r"is a table of ids and a linear layer.*: target one of its names"):
        Session(spec.model_copy(update={"rules": [rule]})).plan()


def test_36_a_slice_of_the_head_is_the_head_s(tmp_path):
    tied(tmp_path / "model")
    spec = spec_of(tmp_path / "model", "causal-lm")
    rule = Rule.model_validate({"target": "lm_head.weight", "apply": ["full"], "slice": {"out": [0, 10]}})
    (site,) = Session(spec.model_copy(update={"rules": [rule]})).plan().sites
    assert site.shape == (32, 10)
