"""Greedy decoding of a batch: the tokens are those of transformers' `generate`, whatever reads them."""

import pytest
import torch
import transformers as hf

from rewriter import plan, rewrite, trace
from rewriter.export.writing import of_model, rereading
from rewriter.graph.traced import Inputs
from rewriter.greedy import Said, greedy
from rewriter.pretrained import Pretrained
from rewriter.spec import Rule
from rewriter.tasks import task_of
from rewriter.tuned import tuned_parameters
from tests.cases.tiny import BART, GPT2, LLAMA, T5

GEMMA = {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0}
START = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
MAMBA = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 50}
MODELS = {
    "llama": (hf.LlamaConfig(**LLAMA), "**.{q,v,gate}_proj.weight"),
    "gpt2": (hf.GPT2Config(**GPT2), "**.c_attn.weight"),
    "gemma": (hf.Gemma3TextConfig(**{**LLAMA, **GEMMA}), "**.{q,v}_proj.weight"),
    "t5": (hf.T5Config(**T5, **START), "**.{q,v}.weight"),
    "bart": (hf.BartConfig(**{**BART, **START, "forced_eos_token_id": None}), "**.{q,v}_proj.weight"),
}
LENGTHS, NEW = (3, 9, 6, 1), 16


def made(name):
    """A random model that says many different tokens, its task's inputs, and a tuned model of it."""
    config, target = MODELS[name]
    torch.manual_seed(1)
    task = task_of("seq2seq-lm" if config.is_encoder_decoder else "causal-lm")
    model = getattr(hf, task.auto).from_config(config).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_((0.5 if name == "t5" else 0.2) * torch.randn_like(one))
    inputs = task.inputs(model)
    traced = trace(model, inputs, ("eval",))
    tuned = rewrite(traced, plan(traced, [Rule(target=target, apply=[{"lora": {"rank": 2}}])])).eval()
    return Pretrained(model, frozenset(), frozenset(), [], model, None), inputs, tuned


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 50, (n,), generator=generator).tolist() for n in LENGTHS]


def expected(model, ends):
    """What `generate` gives of a batch that is padded on the left (on the right for an encoder), up to the ends."""
    whole, encoder = max(LENGTHS), model.config.is_encoder_decoder
    pad = lambda one, fill: [*([] if encoder else fill), *one, *(fill if encoder else [])]  # noqa: E731
    ids = torch.tensor([pad(one, [0] * (whole - len(one))) for one in prompts()])
    mask = torch.tensor([pad([1] * len(one), [0] * (whole - len(one))) for one in prompts()])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": ends or None, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 1 if encoder else whole :].tolist()
    cuts = [next((i for i, token in enumerate(row) if token in ends), None) for row in out]
    return [Said(row[:cut], cut is not None) for row, cut in zip(out, cuts, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_generate(name):
    """With the cache, without one, and of the traced model, before and after its tensors change."""
    pretrained, inputs, tuned = made(name)
    model, start = pretrained.model, getattr(pretrained.model.config, "decoder_start_token_id", None)
    free = expected(model, [])
    assert len({token for one in free for token in one.ids}) > 3
    ends = [free[0].ids[5], free[2].ids[3]]  # In the middle of a row, while others go on.
    wanted = expected(model, ends)
    assert len({len(one.ids) for one in wanted}) > 1
    ways = {
        "as it is": of_model(pretrained, inputs),
        "tuned": of_model(pretrained, inputs, tuned),
        "again": rereading(lambda batch: model(**batch), list(inputs.kwargs), start),
        "traced": rereading(lambda batch: tuned(**batch), list(inputs.kwargs), start),
    }
    for way, opening in ways.items():
        assert greedy(*opening(prompts()), ends, NEW) == wanted, way
    with torch.no_grad():
        for one in tuned_parameters(tuned).values():
            one.copy_(torch.randn_like(one))
    changed = greedy(*ways["traced"](prompts()), ends, NEW)
    assert changed != wanted and greedy(*ways["tuned"](prompts()), ends, NEW) == changed


def test_a_model_that_keeps_no_keys_and_values_reads_all_again():
    """`generate` of a batch would read the padding too: each row alone."""
    torch.manual_seed(0)
    model, task = hf.MambaForCausalLM(hf.MambaConfig(**MAMBA)).eval(), task_of("causal-lm")
    opening = of_model(Pretrained(model, frozenset(), frozenset(), [], model, None), task.inputs(model))
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    wanted = [model.generate(torch.tensor([one]), **options)[0, len(one) :].tolist() for one in prompts()]
    assert [one.ids for one in greedy(*opening(prompts()), (), NEW)] == wanted


def test_no_row_is_longer_than_the_model_takes():
    pretrained, inputs, _ = made("gpt2")
    opening, told = of_model(pretrained, inputs), []
    rows = [[5] * 60, [6, 7], [8] * 64, [9] * 62]
    said = greedy(*opening(rows), (), 8, 64, lambda row, token: told.append((row, token)))
    assert [len(one.ids) for one in said] == [4, 8, 0, 2] and not any(one.ended for one in said)
    assert [[token for row, token in told if row == i] for i in range(4)] == [one.ids for one in said]
    alone = [greedy(*opening([one]), (), 8, 64)[0] if len(one) < 64 else Said([], False) for one in rows]
    assert said == alone


def test_what_stands_before_the_tokens_is_there_from_the_start():
    """Of a model that puts rows of its own there, and of one whose rest merges."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).eval()
    inputs = task_of("causal-lm").inputs(model)
    rules = [
        Rule(target="model.embed_tokens", apply=[{"prompt": {"length": 3}}]),
        Rule(target="**.v_proj.weight", apply=[{"lora": {"rank": 2}}]),
    ]
    traced = trace(model, Inputs(inputs.args, inputs.kwargs, inputs.dynamic), ("eval",))
    tuned = rewrite(traced, plan(traced, rules)).eval()
    with torch.no_grad():
        for one in tuned_parameters(tuned).values():
            one.copy_(torch.randn_like(one))
    pretrained = Pretrained(model, frozenset(), frozenset(), [], model, None)
    plain = greedy(*rereading(lambda batch: tuned(**batch), list(inputs.kwargs), None)(prompts()), (), NEW)
    assert greedy(*of_model(pretrained, inputs, tuned)(prompts()), (), NEW) == plain
    assert greedy(*of_model(pretrained, inputs)(prompts()), (), NEW) != plain
