"""Encoded rows are kept, under a name that says all that decides what they are."""

import datasets
import pytest

from rewriter import data
from rewriter.data import encode
from rewriter.files import cache_folder
from tests.tasks.test_causal_lm import CHATML, spec_of
from tests.tiny import make_tokenizer

ROWS = [{"p": f"the film {i}", "c": " good plot " * (i % 5)} for i in range(40)]
COLUMNS = {"prompt": "p", "completion": "c"}


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "_FEW", 10)
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))


def read(rows=ROWS, template=CHATML, **options):
    tokenizer, notes = make_tokenizer(), []
    tokenizer.chat_template = template
    spec = spec_of(**{"columns": COLUMNS, "max_length": 8, **options})
    return encode(spec, datasets.Dataset.from_list(rows), tokenizer, [], notes), notes


def kept():
    return {one.name for one in cache_folder("encoded").iterdir()} if cache_folder("encoded").exists() else set()


def test_rows_are_encoded_once(monkeypatch):
    first, notes = read()
    assert len(kept()) == 1 and any("are cut to 8 tokens" in one for one in notes)
    monkeypatch.setattr(type(spec_of(columns=COLUMNS).task), "encode", None)
    again, told = read()
    assert again.to_list() == first.to_list() and told == notes and len(kept()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [*ROWS[:-1], {"p": "the film", "c": " good"}]},
        {"template": CHATML + " "},
        {"max_length": 9},
        {"long": "split"},
        {"loss": "all"},
        {"columns": {"text": "p"}},
    ],
)
def test_what_decides_is_in_the_name(changes):
    read()
    read(**changes)
    assert len(kept()) == 2


def test_other_code_encodes_anew(monkeypatch):
    read()
    monkeypatch.setattr(data, "_code", lambda: "another")
    read()
    assert len(kept()) == 2


def test_what_is_broken_is_made_again_and_what_can_t_be_kept_is_not():
    first, notes = read()
    (place,) = cache_folder("encoded").iterdir()
    for file in place.glob("*.arrow"):
        file.write_bytes(b"nothing")
    again, told = read()
    assert again.to_list() == first.to_list() and told == notes
    assert len(read(ROWS[:5])[0]) and len(kept()) == 1
