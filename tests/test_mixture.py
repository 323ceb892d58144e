"""Mixtures: rows of several data sets, in the shares that are asked for."""

import json
import math
import shutil
from collections import Counter

import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter import Session, SpecError, load_rows
from rewriter.data import encode
from rewriter.spec import Spec, dump_spec
from rewriter.spec.places import parse
from tests.cases.tiny import LLAMA, saved
from tests.tasks.test_causal_lm import CHATML
from tests.tiny import make_tokenizer

CHAT = [{"user": "{q}"}, {"assistant": "{a}"}]


def spec_of(parts, task="causal-lm", **data):
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"name": "x", "task": task},
            "data": {"mixture": parts, "split": {"validation": 4}, **data},
            "rules": [{"target": "w", "apply": ["ssb"]}],
        }
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    lines = [{"c": [{"from": "human", "value": f"h{i}"}, {"from": "gpt", "value": "g"}]} for i in range(30)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "b.csv").write_text("q,a,use\n" + "\n".join(f"q{i},0{i},{i % 2}" for i in range(10)))
    turns = {"role": "from", "content": "value", "roles": {"human": "user", "gpt": "assistant"}}
    return [
        {"format": "json", "files": str(folder / "a.jsonl"), "columns": {"messages": "c"}, "turns": turns},
        {"format": "csv", "files": str(folder / "b.csv"), "chat": CHAT},
    ]


def asked(rows):
    return [json.loads(one)[0]["content"] for one in rows["messages"]]


def weighted(files, *weights):
    return [one | {"weight": weight} for one, weight in zip(files, weights, strict=True)]


def test_without_weights_every_row_is_there_once(files):
    rows = load_rows(spec_of(files), [])
    assert Counter(asked(rows.train) + asked(rows.validation)) == Counter(
        [f"h{i}" for i in range(30)] + [f"q{i}" for i in range(10)]
    )
    assert len(rows.validation) == 4
    whole = [json.loads(one) for one in rows.train["messages"]]
    assert [{"role": "user", "content": "q3"}, {"role": "assistant", "content": "03"}] in whole
    assert [{"role": "user", "content": "h3"}, {"role": "assistant", "content": "g"}] in whole


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 5), st.floats(0.2, 5), st.none() | st.integers(60, 90), st.integers(0, 3))
def test_shares_are_the_weights(files, one, other, limit, seed):
    spec = spec_of(weighted(files, one, other), limit={"train": limit}, split={"validation": 4, "seed": seed})
    rows = load_rows(spec, [])
    own = Counter(asked(load_rows(spec_of(files, split={"validation": 4, "seed": seed}), []).train))
    found = Counter(asked(rows.train))
    assert not set(found) & set(asked(rows.validation)) and set(found) <= set(own)
    sizes = [sum(name.startswith(letter) for name in own) for letter in "hq"]
    shares = [one / (one + other), other / (one + other)]
    total = min(limit or 10**9, math.ceil(max(size / share for size, share in zip(sizes, shares, strict=True)) - 1e-9))
    assert found.total() == total
    for letter, share in zip("hq", shares, strict=True):
        times = [found[name] for name in own if name.startswith(letter)]
        assert abs(sum(times) - share * total) <= 1 and max(times) - min(times) <= 1
    assert limit or set(found) == set(own)


def test_what_is_said_of_rows_names_part_and_row(files, tmp_path):
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"m": [{"role": "assistant" if i == 2 else "user", "content": "x"}]}) for i in range(4))
    )
    third = {"format": "json", "files": str(tmp_path / "c.jsonl"), "columns": {"messages": "m"}}
    tokenizer, notes = make_tokenizer(), []
    tokenizer.chat_template = CHATML
    spec = spec_of([files[1] | {"where": {"use": 1}}, third], split={"validation": 1, "seed": 0}, max_length=32)
    encode(spec, load_rows(spec, []).train, tokenizer, [], notes)
    assert notes[0].startswith("3 of 8 rows have nothing to learn from and are left out (row 0 of mixture[1], row 1")
    assert notes[1].startswith(
        "1 of 8 chats have roles out of order, or turns without text (row 2 of mixture[1]), e.g."
    )


def test_a_part_may_have_validation_rows_of_its_own(files):
    first = files[0] | {"files": {"train": files[0]["files"], "validation": files[0]["files"]}}
    spec = spec_of([first, files[1] | {"where": {"use": 1}}], split=None)
    rows = load_rows(spec, [])
    assert len(rows.train) == 35 and len(rows.validation) == 30


def test_labels_and_texts_of_several_data_sets(tmp_path):
    (tmp_path / "a.csv").write_text("t,y\n" + "\n".join(f"{i},no" for i in range(6)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"s": i, "l": "yes"}) for i in range(6)))
    parts = [
        {"format": "csv", "files": str(tmp_path / "a.csv"), "columns": {"text": "t", "label": "y"}},
        {"format": "json", "files": str(tmp_path / "b.jsonl"), "columns": {"text": "s", "label": "l"}},
    ]
    rows = load_rows(spec_of(parts, "sequence-classification"), ["no", "yes"])
    assert Counter([*rows.train["label"], *rows.validation["label"]]) == {"no": 6, "yes": 6}
    with pytest.raises(SpecError, match="expected one of the labels no, maybe") as error:
        load_rows(spec_of(parts, "sequence-classification"), ["no", "maybe"])
    assert error.value.path == ("data", "mixture", 1, "columns", "label")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"s": i, "l": 1}) for i in range(6)))
    with pytest.raises(SpecError, match="different things in columns of one role") as error:
        load_rows(spec_of(parts, "sequence-classification"), ["no", "yes"])
    assert error.value.path == ("data", "mixture")


def test_what_is_written_out_is_read_again(files):
    spec = spec_of(weighted(files, 1.0, 2.5))
    assert Spec.model_validate(parse(dump_spec(spec)).data) == spec


@pytest.mark.parametrize(
    ("change", "path", "said"),
    [
        ({"columns": {"text": "q"}, "chat": None}, ("data", "mixture", 1, "columns"), "all parts have the same"),
        ({"weight": 2.0}, ("data", "mixture", 1), "give all parts a weight, or none"),
        ({"columns": {"txt": "q"}, "chat": None}, ("data", "mixture", 1, "columns"), "all parts have the same"),
    ],
)
def test_parts_that_do_not_go_together(files, change, path, said):
    with pytest.raises(SpecError, match=said) as error:
        spec_of([files[0], files[1] | change])
    assert error.value.path == path


def test_a_part_without_a_row_is_refused(files):
    with pytest.raises(SpecError, match="none of 5 rows") as error:
        load_rows(spec_of(weighted(files, 100.0, 1.0), limit={"train": 5}), [])
    assert error.value.path == ("data", "mixture", 1, "weight")


def test_malformed_parts_are_refused(files):
    for columns in (5, ["a"]):
        with pytest.raises(ValueError, match="valid dictionary"):
            spec_of([{**files[0], "columns": columns}, files[1]])


def test_keys_of_parts_are_given_in_parts(files):
    for key, value in (("format", "csv"), ("where", {"a": 1}), ("columns", {"messages": "c"})):
        with pytest.raises(SpecError, match="in each part") as error:
            spec_of(files, **{key: value})
        assert error.value.path == ("data", key)


def test_mistakes_in_a_part_have_its_place(files):
    with pytest.raises(SpecError, match="no column 'd'") as error:
        load_rows(spec_of([files[0] | {"columns": {"messages": "d"}}, files[1]]), [])
    assert error.value.path == ("data", "mixture", 0, "columns", "messages")


def test_a_run_over_a_mixture_resumes_to_the_same_bits(files, tmp_path):
    saved(tmp_path / "model", hf.LlamaConfig(**LLAMA), "CausalLM")
    said = "{% for m in messages %}{{m.role + ' ' + m.content + ' '}}{% endfor %}"
    spec = spec_of(weighted(files, 1.0, 2.0), template=said, loss="all", max_length=16).model_dump(mode="json")
    spec["model"]["name"] = str(tmp_path / "model")
    spec["rules"] = [{"target": "**.q_proj.weight", "apply": [{"lora": {"rank": 2}}]}]
    spec["train"] |= {"batch_size": 8, "epochs": 2, "checkpoint_steps": 13, "log_steps": 1}
    runs = [tmp_path / name for name in ("whole", "killed")]
    for run in runs:
        Session(Spec.model_validate(spec)).tune(run)
    (runs[1] / "metrics.json").unlink()
    kept = sorted((runs[1] / "checkpoints").iterdir(), key=lambda one: int(one.name.split("-")[1]))
    assert [one.name for one in kept] == ["checkpoint-13", "checkpoint-20"]  # The first in the middle of an epoch.
    shutil.rmtree(kept[1])
    Session(Spec.model_validate(spec)).tune(runs[1], resume=True)
    tensors, logs = (
        [(run / name).read_bytes() for run in runs] for name in ("adapter/adapter.safetensors", "log.jsonl")
    )
    assert tensors[0] == tensors[1] and logs[0] == logs[1]
