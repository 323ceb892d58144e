"""Chats from file to gradient: what a step learns is what transformers does with the tokens that are marked by hand."""

import json

import pytest
import torch
import transformers as hf

from rewriter import Session, Spec, plan, rewrite, trace, tuned_parameters
from rewriter.tasks.base import IGNORED
from rewriter.training.packing import Packed, collate_packed
from tests.cases.tiny import LLAMA, saved
from tests.tasks.test_chat import CHAT, LEARNT, TEMPLATES, make_tokenizer

CALL = {"type": "function", "function": {"name": "rate", "arguments": {"film": "a"}}}
TOOLS = [{"type": "function", "function": {"name": "rate"}}]
CALLED = [
    {"role": "user", "content": "rate it"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "it is fine"},
]
CALLS = ['{"name": "rate", "arguments": {"film": "a"}}<|im_end|>\n', "<think>\n\n</think>\n\nit is fine<|im_end|>\n"]
TARGET = "model.layers.*.self_attn.{q,v}_proj.weight"


def rows_of(name):
    """Chats, their tools, and the texts of each that are learnt."""
    last = LEARNT[name][1].replace("bad plot", "fine film")
    found = [(CHAT, None, LEARNT[name]), (CHAT[:2], None, [last])]
    return [*found, (CALLED, TOOLS, CALLS)] if name == "qwen3" else found


def marked(tokenizer, name, row):
    """Token ids of a chat and its labels: what lies in the texts that are learnt."""
    turns, tools, texts = row
    whole = tokenizer.apply_chat_template(turns, tools=tools, chat_template=TEMPLATES[name], tokenize=False)
    made, spans, start = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True), [], 0
    for text in texts:
        start = whole.index(text, start) + len(text)
        spans.append((start - len(text), start))
    kept = [any(a <= first and last <= b for a, b in spans) for first, last in made["offset_mapping"]]
    ids = made["input_ids"]
    return ids, [one if keep else IGNORED for one, keep in zip(ids, kept, strict=True)]


def padded(rows, side, *fills):
    """(rows, longest) of each of several lists of numbers a row, with the attention mask before them."""
    most, out = max(len(row[0]) for row in rows), []
    for values, fill in zip([[[1] * len(row[0]) for row in rows], *zip(*rows, strict=True)], (0, *fills), strict=True):
        gaps = [[fill] * (most - len(one)) for one in values]
        out.append(torch.tensor([[*g, *v] if side == "left" else [*v, *g] for g, v in zip(gaps, values, strict=True)]))
    return out


def expected(folder, rows, side):
    """Loss and gradients of transformers, in float64."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder).double()
    mask, ids, labels = padded(rows, side, 0, IGNORED)
    logits = model(input_ids=ids, attention_mask=mask).logits  # Its own loss is in float32.
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    loss.backward()
    return loss.detach(), {
        f"model.layers.{i}.self_attn.{k}_proj": getattr(layer.self_attn, f"{k}_proj").weight.grad
        for i, layer in enumerate(model.model.layers)
        for k in "qv"
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats") / "model"
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "max_position_embeddings": 512}
    saved(folder, hf.LlamaConfig(**LLAMA | sizes), "CausalLM", tokenizer=False)
    tokenizer.save_pretrained(folder)
    return folder


def job_of(model, name, folder, packing):
    rows = rows_of(name)
    columns = {"messages": "messages"} | ({"tools": "tools"} if name == "qwen3" else {})
    lines = [
        {"messages": turns} | ({"tools": json.dumps(tools)} if name == "qwen3" else {}) for turns, tools, _ in rows
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "template.jinja").write_text(TEMPLATES[name])
    files = dict.fromkeys(("train", "validation"), str(folder / "rows.jsonl"))
    data = {"format": "json", "files": files, "columns": columns, "max_length": 512}
    spec = {
        "version": 1,
        "model": {"name": str(model), "task": "causal-lm"},
        "data": data | {"template": str(folder / "template.jinja")},
        "rules": [{"target": TARGET, "apply": ["full"]}],
        "train": {"packing": packing},
    }
    session = Session(Spec.model_validate(spec))
    return session.spec, session.prepare()


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_losses_and_gradients_are_those_of_transformers(model, tmp_path, name, packing):
    """In float64, so that what is left is the order of sums."""
    spec, job = job_of(model, name, tmp_path, packing)
    rows = [marked(hf.AutoTokenizer.from_pretrained(model), name, row) for row in rows_of(name)]
    shifted = [(ids, [*labels[1:], IGNORED]) for ids, labels in rows]
    encoded = list(job.train)
    assert [(row["input_ids"], row["labels"]) for row in encoded] == shifted
    traced = trace(job.pretrained.module.double(), job.inputs, keep=True)
    tuned = rewrite(traced, plan(traced, spec.rules)).train()
    if packing:
        packed = Packed(encoded, [len(ids) for ids, _ in rows], 512)
        assert len(packed) == 1
        check(model, spec.task, tuned, collate_packed([packed[0]]), rows, "right")
        return
    check(model, spec.task, tuned, job.collate(encoded), rows, "right")
    left = dict(zip(("attention_mask", "input_ids", "labels"), padded(shifted, "left", 0, IGNORED), strict=True))
    check(model, spec.task, tuned, left, rows, "left")


def check(folder, task, tuned, batch, rows, side):
    """The mean loss over what is learnt, and the gradients, are those of transformers with rows padded on a side."""
    tuned.zero_grad()
    loss = task.loss(tuned(**{key: batch[key] for key in tuned.input_names if key in batch}), batch)
    loss = loss / sum(one != IGNORED for _, labels in rows for one in labels)
    loss.backward()
    theirs, gradients = expected(folder, rows, side)
    torch.testing.assert_close(loss.detach(), theirs, rtol=1e-12, atol=0)
    found = {key: p.grad for key, p in tuned_parameters(tuned).items()}
    assert len(found) == len(gradients) == 4
    for key, gradient in gradients.items():
        (own,) = (one for name, one in found.items() if key in name)
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(own.T, gradient, rtol=1e-9, atol=1e-14)  # Theirs is (outputs, inputs).
