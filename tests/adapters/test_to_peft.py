"""Folders of PEFT, written of what is tuned here: they compute the same there, or are refused."""

import re

import peft
import pytest
import torch

from rewriter import Rule, SubspanError, plan, rewrite, trace, tuned_parameters
from rewriter.adapters.from_peft import tuned_from
from rewriter.adapters.to_peft import check_served, save_peft
from tests.adapters.test_peft import CLOSE, ROUGH, frozen
from tests.architectures import build, inputs_of

QUERY, KEY = (f"bert.encoder.layer.*.attention.self.{name}.weight" for name in ("query", "key"))
FIRST_QUERY = QUERY.replace("*", "0")
WIDE = "bert.encoder.layer.*.intermediate.dense.weight"
LOW = {"lora": {"rank": 2}}
# (target, chain) of each rule, and why it is not PEFT's.
NOT_THEIRS = [
    ([(QUERY, ["ssb"])], "PEFT has no ssb"),
    ([(QUERY, ["ssl", LOW])], "PEFT has no chains"),
    ([(QUERY, ["ia3"])], "PEFT changes the layer's bias too"),
    ([(QUERY, ["frod"])], "PEFT has one basis for the weights of a kind"),
    ([(QUERY, [{"frod": {"held": True}}])], "PEFT has one basis for the weights of a kind, which it finds itself"),
    ([(FIRST_QUERY, [{"frod": {"held": True}}])], "which it finds itself, and this is another"),
    ([(QUERY, [{"adamss": {"rank": 2}}])], "PEFT draws cluster from a seed"),
    (
        [("bert.encoder.layer.0", [{"prefix": {"length": 2}}])],
        "PEFT has rows before the keys and values of every",
    ),
    ([("bert.encoder.layer.*", [{"prefix": {"length": 2}}])], "in this model, its positions are neither those"),
    ([(QUERY, ["full"])], "nothing but whole parameters"),
    ([(QUERY, [{"lora": {"rank": 2, "mpc": "n"}}])], "PEFT has no nonlinearity"),
    ([(QUERY, [{"waveft": {"coefficients": 4}}])], "PEFT draws indices from a seed"),
    ([(QUERY, [LOW]), (KEY, [{"hira": {"rank": 2}}])], "PEFT has one kind in a folder, here are HIRA, LORA"),
    ([(QUERY, [{"hira": {"rank": 2}}]), (QUERY.replace("weight", "bias"), ["full"])], "not a part of one that it"),
    ([(QUERY, [{"boft": {"block": 2, "factors": 2}}])], "boft_n_butterfly_factor is 2"),
    ([(QUERY, [{"hra": {"rank": 2}}]), (KEY, [{"hra": {"rank": 4}}])], "r is 4 there and 2 elsewhere; PEFT has one"),
    ([(QUERY, [{"vera": {"rank": 2}}]), (WIDE, [{"vera": {"rank": 2}}])], "PEFT has one vera_B"),
]


@pytest.mark.parametrize(("rules", "said"), NOT_THEIRS, ids=[said for _, said in NOT_THEIRS])
def test_what_peft_has_not_is_refused(rules, said, tmp_path):
    _, model = frozen("bert")
    tuned = rewrite(model, plan(model, [Rule(target=target, apply=chain) for target, chain in rules]))
    for value in tuned_parameters(tuned).values():
        value.data += 0.1
    with pytest.raises(SubspanError, match=re.escape(said)):
        save_peft(tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


OURS = {
    "lora, its scales": [{"lora": {"rank": 2, "alpha": 3, "scale": "learned"}}],
    "rslora": [{"lora": {"rank": 2, "alpha": 3, "scale": "rslora"}}],
    "adalora": [{"adalora": {"rank": 4, "alpha": 2}}],
    "psoft": [{"psoft": {"rank": 4}}],
    "oft": [{"oft": {"block": 4}}],
    "glora": [{"glora": {"rank": 2}}],
    "lokr": [{"lokr": {"rank": 8, "alpha": 2}}],
    "delora": [{"delora": {"rank": 2}}],
    "super_tuning": [{"super_tuning": {"density": 0.1}}],
}


@pytest.mark.parametrize("name", OURS)
def test_what_is_tuned_here_computes_the_same_there(name, tmp_path):
    inputs, model = frozen("bert")
    rules = [Rule(target=QUERY, apply=OURS[name]), Rule(target="classifier.*", apply=["full"])]
    tuned = rewrite(model, plan(model, rules)).eval()
    generator = torch.Generator().manual_seed(0)
    for value in tuned_parameters(tuned).values():
        value.data = (value + 0.1 * torch.randn(value.shape, generator=generator)).float().double()
    save_peft(tuned, tmp_path / "out", task_type="SEQ_CLS")
    their = peft.PeftModel.from_pretrained(build("bert")[0].float(), tmp_path / "out").eval().double()
    batch = inputs_of("bert", inputs, 3, 9)
    close = {"rtol": 5e-5, "atol": 5e-5} if name in ROUGH else CLOSE
    torch.testing.assert_close(their(**batch).logits, tuned(**batch).logits, **close)


def test_rows_that_are_tuned_here_stand_before_every_layer_there(tmp_path):
    inputs, model = frozen("llama")
    tuned = rewrite(model, plan(model, [Rule(target="model.layers.*", apply=[{"prefix": {"length": 3}}])])).eval()
    for value in tuned_parameters(tuned).values():
        value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).double()
    save_peft(tuned, tmp_path / "out", task_type="CAUSAL_LM")
    their = peft.PeftModel.from_pretrained(build("llama")[0].float(), tmp_path / "out").eval().double()
    batch = inputs_of("llama", inputs, 3, 9)
    # Turned keys are kept in float32.
    torch.testing.assert_close(their(**batch).logits, tuned(**batch).logits, rtol=1e-5, atol=1e-5)


def test_pruned_triplets_go_out(tmp_path):
    """Ranks that a schedule settled, of 4 each."""
    inputs, model = frozen("bert")
    rules = [Rule(target=QUERY, apply=[{"adalora": {"rank": 4, "alpha": 2}}])]
    left = {f"{QUERY.replace('*', str(i))}.adalora": {"rank": 3 - 2 * i} for i in range(2)}
    tuned = rewrite(model, plan(model, rules, given=left)).eval()
    for value in tuned_parameters(tuned).values():
        value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).double()
    save_peft(tuned, tmp_path / "out")
    their = peft.PeftModel.from_pretrained(build("bert")[0].float(), tmp_path / "out").eval().double()
    batch = inputs_of("bert", inputs, 3, 9)
    torch.testing.assert_close(their(**batch).logits, tuned(**batch).logits, rtol=1e-5, atol=1e-5)


HEADS = {
    "bert": "bert.encoder.layer.*.attention.self.query.weight",
    "roberta": "roberta.encoder.layer.*.attention.self.query.weight",
    "distilbert": "distilbert.transformer.layer.*.attention.q_lin.weight",
}


@pytest.mark.parametrize("rules", [[], [("**classifier*.**", ["full"])]], ids=["frozen", "whole"])
@pytest.mark.parametrize("arch", HEADS)
def test_peft_finds_the_head_that_it_saves_of_itself(arch, rules, tmp_path):
    inputs, model = frozen(arch)
    every = [Rule(target=target, apply=chain) for target, chain in [(HEADS[arch], [LOW]), *rules]]
    tuned = rewrite(model, plan(model, every)).eval()
    for value in tuned_parameters(tuned).values():
        value.data = value.data + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).double()
    save_peft(tuned, tmp_path / "out", task_type="SEQ_CLS")
    their = peft.PeftModel.from_pretrained(build(arch)[0].float(), tmp_path / "out").eval().double()
    batch = inputs_of(arch, inputs, 3, 9)
    torch.testing.assert_close(their(**batch).logits, tuned(**batch).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuned_from(model, tmp_path / "out")[0].eval()(**batch), tuned(**batch))


def test_an_adapter_within_that_head_is_refused(tmp_path):
    _, model = frozen("bert")
    found = plan(model, [Rule(target=[QUERY, "classifier.weight"], apply=[LOW])])
    with pytest.raises(SubspanError, match="PEFT saves the head of such a task whole"):
        save_peft(rewrite(model, found), tmp_path / "out", task_type="SEQ_CLS")
    with pytest.raises(SubspanError, match="PEFT saves the head of such a task whole"):
        check_served(model, found, "peft", "SEQ_CLS")
    check_served(model, found, "peft")


def test_what_serves_is_told_without_weights():
    model, inputs = build("llama", meta=True)
    traced = trace(model, inputs, ("eval",))
    found = plan(traced, [Rule(target="model.layers.*", apply=[{"prefix": {"length": 2}}])])
    assert check_served(traced, found, "peft") == []
    with pytest.raises(SubspanError, match="vllm reads low-rank terms of linear layers alone"):
        check_served(traced, found, "vllm")
    _, model = frozen("bert")
    found = plan(model, [Rule(target=QUERY, apply=[{"frod": {"held": True}}])])
    with pytest.raises(SubspanError, match="PEFT finds the basis of the weights of a kind itself"):
        check_served(model, found, "peft")


@pytest.mark.parametrize("still", [False, True])
def test_clusters_with_biases_go_out_again(still, tmp_path):
    """The column of the basis that stands for the bias is found from what became of it, which may be nothing."""
    torch.manual_seed(0)
    base = build("bert")[0].float()
    config = peft.AdamssConfig(r=8, num_subspaces=2, target_modules=["query"], task_type="SEQ_CLS")
    their = peft.get_peft_model(base, config).eval()
    for p in their.parameters():
        p.data += 0.0 if still else 0.1 * torch.randn_like(p) * p.requires_grad
    their.save_pretrained(tmp_path / "in")
    inputs, model = frozen("bert")
    save_peft(tuned_from(model, tmp_path / "in")[0], tmp_path / "out", task_type="SEQ_CLS")
    back = peft.PeftModel.from_pretrained(build("bert")[0].float(), tmp_path / "out").eval()
    batch = {name: value for name, value in inputs_of("bert", inputs, 3, 9).items()}
    torch.testing.assert_close(back(**batch).logits, their(**batch).logits, rtol=1e-5, atol=1e-5)
    again = tuned_from(model, tmp_path / "out")[0].eval()
    torch.testing.assert_close(again(**batch).logits.float(), their(**batch).logits, rtol=1e-5, atol=1e-5)
