"""Spans: windows, targets, the best span, exact match and F1."""

from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F

from rewriter import SpecError, task_of
from rewriter.tasks import Reading
from rewriter.tasks.question_answering import exact, overlap
from tests.tiny import make_tokenizer

TASK = task_of("question-answering", {"stride": 2, "longest": 3})
COLUMNS = {"question": "q", "context": "c", "answers": "a"}
CONTEXT = "the film was great and the plot was bad"


def rows_of(*answers, context=CONTEXT):
    texts = [{"text": [a] if a else [], "answer_start": [context.index(a)] if a else []} for a in answers]
    return datasets.Dataset.from_dict({"q": ["the plot"] * len(texts), "c": [context] * len(texts), "a": texts})


def encoded(rows, length):
    tokenizer = make_tokenizer()
    found = TASK.encode(rows, Reading(COLUMNS, rows.features, tokenizer, [], length), [])
    collate = TASK.collator(tokenizer, ["input_ids", "attention_mask"], None)
    return found, collate([found[i] for i in range(len(found))]), tokenizer


@pytest.mark.parametrize("length", [9, 32])
def test_targets_are_the_answer_s_tokens_in_every_window_that_has_it(length):
    """5 tokens are the question's and the special ones'; a window of 9 has 4 words of the context."""
    found, batch, tokenizer = encoded(rows_of("plot was", "", "great"), length)
    whole = 0
    for i, row in enumerate(found["row"]):
        ids, first, last = batch["input_ids"][i], batch["start_positions"][i], batch["end_positions"][i]
        words = tokenizer.convert_ids_to_tokens(ids[first : last + 1])
        answer = ["plot was", "", "great"][row]
        inside = [CONTEXT[a:b] for a, b in zip(found["starts"][i], found["ends"][i], strict=True) if a >= 0]
        if answer and " ".join(inside).find(answer) >= 0:
            assert " ".join(words) == answer
            whole += 1
        else:
            assert first == last == 0 and words == ["[CLS]"]
    assert whole >= 2 and (length == 32) == (len(found) == 3)


def scored(batch, spans):
    """Logits that are highest at these (first, last) tokens."""
    shape = batch["starts"].shape
    out = SimpleNamespace(start_logits=torch.zeros(shape), end_logits=torch.zeros(shape))
    for i, (first, last) in enumerate(spans):
        out.start_logits[i, first], out.end_logits[i, last] = 5.0, 5.0
    return out


def measured(metric, rows, batch, out):
    return TASK.measure(metric, TASK.summary(out, batch).numpy(), rows)


def test_the_loss_is_the_mean_of_both_ends():
    _, batch, _ = encoded(rows_of("plot was", "great"), 32)
    out = SimpleNamespace(
        start_logits=torch.randn(batch["starts"].shape), end_logits=torch.randn(batch["starts"].shape)
    )
    ends = [F.cross_entropy(getattr(out, f"{name}_logits"), batch[f"{name}_positions"]) for name in ("start", "end")]
    torch.testing.assert_close(TASK.loss(out, batch) / TASK.count(batch), sum(ends) / 2)


def test_right_spans_are_whole_matches():
    found, batch, _ = encoded(rows_of("plot was", "great"), 32)
    out = scored(batch, zip(batch["start_positions"], batch["end_positions"], strict=True))
    assert measured("exact_match", found, batch, out) == measured("f1", found, batch, out) == 1.0
    # One word too many for the second: 2 * (1/2 * 1) / (1/2 + 1).
    first, last = batch["start_positions"] - torch.tensor([0, 1]), batch["end_positions"]
    out = scored(batch, zip(first, last, strict=True))
    assert measured("exact_match", found, batch, out) == 0.5
    assert measured("f1", found, batch, out) == pytest.approx((1 + 2 / 3) / 2)


def test_no_span_ends_before_it_starts_or_is_too_long_or_outside():
    found, batch, _ = encoded(rows_of("great"), 32)
    out = scored(batch, [(12, 5)])  # The end stands before the start: the best pair in order is another one.
    _, start, end, *_ = TASK.summary(out, batch)[0].tolist()
    assert 0 <= start < end and len(CONTEXT[int(start) : int(end)].split()) <= 3
    out = scored(batch, [(1, 2)])  # In the question.
    assert TASK.summary(out, batch)[0, 1] >= 0
    assert measured("f1", found, batch, out) <= 1.0


def test_no_answer_counts_where_some_questions_have_none():
    found, batch, _ = encoded(rows_of("great", ""), 32)
    out = scored(batch, [(batch["start_positions"][0], batch["end_positions"][0]), (0, 0)])
    assert measured("exact_match", found, batch, out) == 1.0
    out = scored(batch, [(0, 0), (0, 0)])
    assert measured("exact_match", found, batch, out) == 0.5
    answerable, batch, _ = encoded(rows_of("great", "bad"), 32)
    out = scored(batch, [(0, 0), (0, 0)])  # Every question has an answer, so none is no guess.
    assert (TASK.summary(out, batch)[:, 1] >= 0).all() and measured("exact_match", answerable, batch, out) <= 0.5


@pytest.mark.parametrize(
    ("guess", "answer", "same", "f1"),
    [
        ("The film!", "film", 1, 1), ("great film", "film", 0, 2 / 3), ("plot", "film", 0, 0), ("", "", 1, 1),
        ("", "film", 0, 0), ("a film film", "film", 0, 2 / 3),
    ],
)  # fmt: skip
def test_exact_match_and_f1(guess, answer, same, f1):
    assert exact(guess, answer) == same and overlap(guess, answer) == pytest.approx(f1)


def test_answers_that_do_not_fit_are_refused():
    rows = datasets.Dataset.from_dict({"q": ["x"], "c": [CONTEXT], "a": [{"text": ["film"], "answer_start": [3]}]})
    with pytest.raises(SpecError, match="row 0: the context has ' fil' at 3, not the answer 'film'"):
        TASK.check(rows, COLUMNS, [])
    rows = datasets.Dataset.from_dict(
        {"q": ["x"] * 2, "c": [CONTEXT] * 2, "a": [rows[0]["a"] | {"answer_start": [4]}, None]}
    )
    with pytest.raises(
        SpecError, match=r"row 1 holds None; a question without an answer has \{text: \[\], answer_start"
    ):
        TASK.check(rows, COLUMNS, [])
    with pytest.raises(SpecError, match="leaves no room for a context"):
        encoded(rows_of("great"), 7)
