"""Chats as templates render them: which tokens are learnt, by marks or by what is given and what ends a turn."""

import datetime
import json
import re

import pytest
import tokenizers
import transformers as hf

from rewriter import SpecError
from rewriter.tasks.chat import tokens_of, turns_of

MARKERS = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKERS += ["<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>"]
# After the published ones.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}",
    "llama3": "{{'<|begin_of_text|>'}}{% for m in messages %}{{'<|start_header_id|>' + m.role"
    " + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>'}}{% endfor %}{% if add_generation_prompt %}"
    "{{'<|start_header_id|>assistant<|end_header_id|>\\n\\n'}}{% endif %}",
    "gemma": "{{'<bos>'}}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{'<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
    "mistral": "{{'<s>'}}{% for m in messages %}{% if m.role == 'user' %}{{'[INST] ' + m.content + ' [/INST]'}}"
    "{% else %}{{' ' + m.content + '</s>'}}{% endif %}{% endfor %}",
    # A last turn has a place to think, the others have none; tools are told of in a system turn.
    "qwen3": "{% if tools %}{{'<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n'}}{% endif %}"
    "{% for m in messages %}{{'<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n'}}"
    "{% if m.role == 'assistant' and loop.last %}{{'<think>\\n\\n</think>\\n\\n'}}{% endif %}{{m.content or ''}}"
    "{% for call in m.tool_calls or [] %}{{call.function | tojson}}{% endfor %}{{'<|im_end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}",
}
LEARNT = {
    "chatml": ["fine film<|im_end|>\n", "bad plot<|im_end|>\n"],
    "llama3": ["fine film<|eot_id|>", "bad plot<|eot_id|>"],
    "gemma": ["fine film<end_of_turn>\n", "bad plot<end_of_turn>\n"],
    "mistral": [" fine film</s>", " bad plot</s>"],
    "qwen3": ["fine film<|im_end|>\n", "<think>\n\n</think>\n\nbad plot<|im_end|>\n"],
}
CHAT = [
    {"role": "user", "content": "how was the film"},
    {"role": "assistant", "content": "fine film"},
    {"role": "user", "content": "and the plot"},
    {"role": "assistant", "content": "bad plot"},
]


def make_tokenizer():
    """Of bytes, with the markers of all templates as special tokens."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(dict.fromkeys(()), []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["a film"], tokenizers.trainers.BpeTrainer(special_tokens=MARKERS, initial_alphabet=alphabet)
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def learnt(tokenizer, ids, kept):
    """The texts that are learnt, one for each run of tokens."""
    runs, before = [], False
    for token, now in zip(ids, kept, strict=True):
        if now:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = now
    return [tokenizer.decode(run) for run in runs]


def read(tokenizer, template, turns, learn, tools=None):
    tokenizer.chat_template = template
    return tokens_of(tokenizer, turns, learn, tools)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_turns_are_learnt(tokenizer, name):
    ids, kept = read(tokenizer, TEMPLATES[name], CHAT, "assistant")
    rendered = tokenizer.apply_chat_template(CHAT, chat_template=TEMPLATES[name], tokenize=False)
    assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert learnt(tokenizer, ids, kept) == LEARNT[name]
    assert learnt(tokenizer, *read(tokenizer, TEMPLATES[name], CHAT, "all")) == [rendered]


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_marks_say_the_same(tokenizer, name):
    """Of transformers' own, where a template has them."""
    marked = re.sub(
        r"\{\{(.*?) \+ (m\.content(?: \| trim)?) \+ ('[^']*')\}\}",
        r"{{\1}}{% if m.role == 'assistant' %}{% generation %}{{\2 + \3}}{% endgeneration %}"
        r"{% else %}{{\2 + \3}}{% endif %}",
        TEMPLATES[name],
    )
    assert "generation %}" in marked
    plain = read(tokenizer, TEMPLATES[name], CHAT, "assistant")
    assert read(tokenizer, marked, CHAT, "assistant") == plain


_TURNS = "{% for m in messages %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'}}{% endfor %}"
ODD = {
    "ends the chat with the end token": (
        _TURNS + "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% else %}{{'</s>'}}{% endif %}",
        CHAT,
        ["fine film<|im_end|>\n", "bad plot<|im_end|>\n</s>"],
    ),
    "asks for a thought that no row has": (
        _TURNS + "{% if add_generation_prompt %}{{'<|im_start|>assistant\n<think>\n'}}{% endif %}",
        CHAT,
        ["fine film<|im_end|>\n", "bad plot<|im_end|>\n"],
    ),
    "speaks first": (TEMPLATES["llama3"], CHAT[1:], ["fine film<|eot_id|>", "bad plot<|eot_id|>"]),
    "marks in a comment": ("{# {% generation %} #}" + TEMPLATES["chatml"], CHAT, LEARNT["chatml"]),
    "an end inside a text": (
        TEMPLATES["qwen3"],
        [CHAT[0], {"role": "assistant", "content": "a<|im_end|>\nb"}, *CHAT[2:]],
        ["a<|im_end|>\nb<|im_end|>\n", LEARNT["qwen3"][1]],
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_templates_and_chats(tokenizer, name):
    template, turns, expected = ODD[name]
    assert learnt(tokenizer, *read(tokenizer, template, turns, "assistant")) == expected


def test_what_a_turn_shares_with_what_is_given_is_learnt(tokenizer):
    """A space before a word, of one token with it."""
    spaced = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a:": 0, "b:": 1, "film": 2, "[UNK]": 3}, "[UNK]"))
    spaced.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?\S+"), "isolated")
    spaced.add_tokens([" film"])
    made = hf.PreTrainedTokenizerFast(tokenizer_object=spaced, eos_token="b:")
    template = "{% for m in messages %}{{m.role[:1] + ': ' + m.content}}{% endfor %}"
    template += "{% if add_generation_prompt %}{{'a: '}}{% endif %}"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "film"}]
    ids, kept = read(made, template, turns, "assistant")
    assert [token for token, now in zip(ids, kept, strict=True) if now] == made(" film")["input_ids"]


def test_tools_and_their_calls(tokenizer):
    call = {"type": "function", "function": {"name": "rate", "arguments": {"film": "a"}}}
    turns = [
        {"role": "user", "content": "rate it"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "it is fine"},
    ]
    tools = [{"type": "function", "function": {"name": "rate"}}]
    ids, kept = read(tokenizer, TEMPLATES["qwen3"], turns, "assistant", tools)
    assert learnt(tokenizer, ids, kept) == [
        '{"name": "rate", "arguments": {"film": "a"}}<|im_end|>\n',
        "<think>\n\n</think>\n\nit is fine<|im_end|>\n",
    ]
    assert '"function": {"name": "rate"}' in tokenizer.decode(ids)


def test_whose_tokens_are_whose_is_known_or_refused(tokenizer):
    backwards = "{% for m in messages | reverse %}{{m.role + m.content}}{% endfor %}"
    with pytest.raises(SpecError, match="which tokens are the assistant's is not known"):
        read(tokenizer, backwards, CHAT, "assistant")
    with pytest.raises(SpecError, match="its chat template can't render the turns: no system"):
        read(tokenizer, "{{raise_exception('no system')}}", CHAT, "assistant")
    with pytest.raises(SpecError, match="has no chat template"):
        read(tokenizer, None, CHAT, "assistant")


RATE = {"type": "function", "function": {"name": "rate", "arguments": {"film": "a"}}}
TOOL = [{"type": "function", "function": {"name": "rate"}}]
CALLING = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [RATE, RATE]}, {"role": "tool", "content": "18"}]
CALLING += [{"role": "assistant", "content": "It is 18 degrees"}]
SAYS = "{{'<|im_start|>' + m.role + m.content + '<|im_end|>'}}"
TELLS = "{% for t in tools or [] %}{{t | tojson}}{% endfor %}"
BRIEF = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Be brief. How was it?"}, CHAT[1]]
BUT_THIRD = "{% if not loop.index0 == 2 %}" + SAYS + "{% endif %}"
SHORT = [*CHAT[:2], {"role": "user", "content": "a"}, CHAT[3]]
# A template of one turn `m`, a chat, its tools, and what is said to be left out.
LEAVES_OUT = {
    "a system turn": ("{% if m.role != 'system' %}" + SAYS + "{% endif %}", BRIEF, None, "turn 0, the system's"),
    "a question": (BUT_THIRD, CHAT, None, "turn 2, the user's"),
    "one that is part of an answer": (BUT_THIRD + "{{m.tool_calls or []}}", CALLING, None, "turn 2, the tool's"),
    "one that is part of the markup": (BUT_THIRD, SHORT, None, "turn 2, the user's"),
    "a repeated question": (BUT_THIRD, [*CHAT[:2], CHAT[0], CHAT[3]], None, "turn 2, the user's"),
    "calls": (SAYS, CALLING, TOOL, "a call in turn 1"),
    "the second call": (SAYS + "{{(m.tool_calls or [])[:1]}}", CALLING, TOOL, "a call in turn 1"),
    "arguments": (
        SAYS + "{% for c in m.tool_calls or [] %}{{c.function.name}}{% endfor %}",
        CALLING,
        TOOL,
        "a call in",
    ),
    "tools": (SAYS, [{"role": "user", "content": "please rate it"}, CHAT[1]], TOOL, "the tools"),
}


@pytest.mark.parametrize("name", LEAVES_OUT)
@pytest.mark.parametrize("learn", ["assistant", "all"])
def test_what_a_template_leaves_out_is_refused(tokenizer, name, learn):
    turn, turns, tools, said = LEAVES_OUT[name]
    template = ("" if name == "tools" else TELLS) + "{% for m in messages %}" + turn + "{% endfor %}"
    with pytest.raises(SpecError, match=f"its chat template leaves out {said}") as error:
        read(tokenizer, template, turns, learn, tools)
    assert error.value.path == ("data", "template")


def test_equal_answers_whose_thoughts_are_left_out_are_learnt(tokenizer):
    """The first of them is not looked for in the second, where its thought stands."""
    template = (
        "{% for m in messages %}{{'<|im_start|>' + m.role + '\n'}}{% if m.role == 'assistant' and not loop.last %}"
        "{{m.content.split('</think>')[-1]}}{% else %}{{m.content}}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
    )
    answer = {"role": "assistant", "content": "<think>hm</think>fine"}
    ids, kept = read(tokenizer, template, [CHAT[0], answer, CHAT[2], answer], "assistant")
    assert learnt(tokenizer, ids, kept) == ["fine<|im_end|>\n", "<think>hm</think>fine<|im_end|>\n"]


def test_marks_that_mark_nothing_are_refused(tokenizer):
    template = "{% for m in messages %}{{m.role + m.content}}{% generation %}{% endgeneration %}{% endfor %}"
    with pytest.raises(SpecError, match="marks nothing, or not all, of turn 1, the assistant's"):
        read(tokenizer, template, CHAT, "assistant")


MARK, UNMARK = "{% generation %}", "{% endgeneration %}"
CALLED = "{% for c in m.tool_calls or [] %}{{c.function | tojson}}{% endfor %}"


@pytest.mark.parametrize(
    ("start", "inside", "turns", "said"),
    [
        ("{% if m.role == 'user' %}", f"{MARK}{{{{m.content}}}}{UNMARK}", CHAT, "marks turn 0, the user's, as the"),
        ("{% if true %}", f"{MARK}{{{{m.content}}}}{UNMARK}", CHAT, "marks turn 0, the user's, as the"),
        ("{% if m == messages[-1] %}", f"{MARK}{{{{m.content}}}}{UNMARK}", CHAT, "not all, of turn 1, the assistant's"),
        (
            "{% if m.role == 'assistant' %}",
            f"{MARK}{{{{m.content}}}}{UNMARK}{CALLED}",
            [*CALLING, CHAT[1]],
            "not all, of turn 1, the assistant's",
        ),
    ],
    ids=["the user", "everybody", "the last", "no call"],
)
def test_marks_of_others_turns_are_refused(tokenizer, start, inside, turns, said):
    template = f"{{% for m in messages %}}{start}{inside}{{% else %}}{{{{m.content}}}}{{% endif %}}|{{% endfor %}}"
    with pytest.raises(SpecError, match=said):
        read(tokenizer, template, turns, "assistant")


def test_what_a_template_writes_in_another_way_is_there(tokenizer):
    template = "{% for m in messages %}{{'<|im_start|>' + m.role + (m.content | upper) + '<|im_end|>'}}{% endfor %}"
    assert len(learnt(tokenizer, *read(tokenizer, template, CHAT, "assistant"))) == 2


SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
NAMES, ROLES = {"role": "role", "content": "content"}, {"human": "user", "gpt": "assistant"}


def test_nulls_are_left_out_where_a_table_fills_them_in():
    call = {"function": {"name": "rate", "arguments": {"film": None, "stars": 1}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert turns_of(json.dumps([turn]), NAMES, {}) == [{"role": "assistant", "tool_calls": [call]}]
    (found,) = turns_of([turn], NAMES, {})
    assert found["tool_calls"][0]["function"]["arguments"] == {"stars": 1}


@pytest.mark.parametrize(
    ("cell", "names", "expected"),
    [
        (
            SHAREGPT,
            {"role": "from", "content": "value"},
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        (json.dumps(CHAT), NAMES, CHAT),
        ([{"role": "user", "content": "a", "tool_calls": None}], NAMES, [{"role": "user", "content": "a"}]),
        ([], NAMES, "no turns"),
        (None, NAMES, "no turns"),
        ("good", NAMES, "no list as JSON: Expecting value"),
        ("[{'role': 'user'}]", NAMES, "no list as JSON: Expecting property name"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], NAMES, [{"role": "user", "content": "a"}]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}],
            NAMES,
            "turn 0 has its content in 2 parts",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], NAMES, r"turn 0 has the content .*image.*, no text"),
        ('[{"role": "user", "content": {"x": 1}}]', NAMES, "turn 0 has the content {'x': 1}, no text"),
        (
            [{"role": "user", "content": datetime.date(2020, 1, 1)}],
            NAMES,
            r"has the content datetime.*, no text",
        ),
        (r'[{"role": "user", "content": "a\ud800"}]', NAMES, r"holds '\\ud800', half of a character"),
        ([{"role": "User", "content": "a"}], NAMES, "'User', not one of .*; data.turns.roles says which"),
        ('{"a": 1}', NAMES, "no list of objects"),
        ([{"role": "bot", "content": "a"}], NAMES, "turn 0 has the role 'bot', not one of system"),
        ([{"role": "user"}], NAMES, "turn 0 has no content"),
        ([{"role": "user", "content": 5}], NAMES, "turn 0 has the content 5, no text"),
        (SHAREGPT, NAMES, "turn 0 has no role, but from, value: data.turns"),
        (CHAT, {"role": "from", "content": "value"}, "turn 0 has 'role' and no 'from', as data.turns calls it"),
    ],
)
def test_turns_are_read_or_refused(cell, names, expected):
    if isinstance(expected, list):
        assert turns_of(cell, names, ROLES) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            turns_of(cell, names, ROLES)
