"""Chats beside TRL's own templates for training: the same tokens, and the same of them learnt.

Set SUBSPAN_TRL to a folder that TRL is installed in (`pip install --no-deps --target FOLDER trl`).
"""

import os
import re
from pathlib import Path

import jinja2
import pytest
import tokenizers
import transformers as hf

from rewriter import SpecError
from rewriter.tasks.chat import tokens_of

FOLDER = Path(os.environ.get("SUBSPAN_TRL", "nowhere")) / "trl" / "chat_templates"
TEMPLATES = sorted(FOLDER.glob("*_training.jinja"))
CHAT = [
    {"role": "user", "content": "how was the film"},
    {"role": "assistant", "content": "fine film"},
    {"role": "user", "content": "and the plot"},
    {"role": "assistant", "content": "bad plot"},
]
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
CHATS = {
    "one": (CHAT[:2], None),
    "two": (CHAT, None),
    "system": ([{"role": "system", "content": "be brief"}, *CHAT], None),
    "tools": (
        [
            {"role": "user", "content": "x?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "f", "content": "2"},
            {"role": "assistant", "content": "two"},
        ],
        [{"type": "function", "function": FUNCTION}],
    ),
}


def tokenizer_of(template):
    """Of bytes, with all that looks like a marker as a special token."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    special = sorted(set(re.findall(r"<\|[^|>{}'\"]+\|>|<[a-z_/]+>|\[/?[A-Z_]+\]", template)) | {"<s>", "</s>"})
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(["a film"], trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.skipif(not TEMPLATES, reason="SUBSPAN_TRL names no folder with TRL in it")
@pytest.mark.parametrize("name", [one.stem.removesuffix("_training") for one in TEMPLATES])
def test_the_tokens_that_trl_learns_are_learnt(name):
    tokenizer = tokenizer_of((FOLDER / f"{name}_training.jinja").read_text())
    tokenizer.chat_template = (FOLDER / f"{name}_training.jinja").read_text()
    compared = 0
    for turns, tools in CHATS.values():
        try:
            theirs = tokenizer.apply_chat_template(
                turns, tools=tools, return_dict=True, return_assistant_tokens_mask=True
            )
        except jinja2.TemplateError:  # It takes no system turn, or no tools.
            continue
        try:
            ids, learnt = tokens_of(tokenizer, turns, "assistant", tools)
        except SpecError as error:
            text = tokenizer.decode(theirs["input_ids"])
            assert "leaves out" in error.message and (tools or turns[0]["content"] not in text)
            continue
        assert ids == theirs["input_ids"] and learnt == [bool(one) for one in theirs["assistant_masks"]]
        compared += any(learnt)
    if not compared:
        pytest.skip("its turns are lists of parts")
