"""Any number of labels a text."""

from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from rewriter import SpecError, task_of
from rewriter.tasks import Criterion, Reading
from tests.tiny import make_tokenizer

TASK, LABELS = task_of("multi-label-classification"), ["a", "b", "c"]
COLUMNS = {"text": "text", "label": "tags"}


def rows_of(tags):
    return datasets.Dataset.from_dict({"text": ["good"] * len(tags), "tags": tags})


def test_lists_of_names_or_numbers_become_zeros_and_ones():
    for tags in ([["c", "a"], [], ["b", "b"]], [[2, 0], [], [1]]):
        rows = rows_of(tags)
        TASK.check(rows, COLUMNS, LABELS)
        found = TASK.encode(rows, Reading(COLUMNS, rows.features, make_tokenizer(), LABELS, 8), [])
        assert found["labels"] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
        assert TASK.label_counts(rows, COLUMNS, LABELS)[2] == 1


def test_a_label_that_is_none_is_refused():
    with pytest.raises(SpecError, match=r"column 'tags' holds 'd' \(text 'good'\); expected one of the labels a, b, c"):
        TASK.check(rows_of([["a"], ["d"]]), COLUMNS, LABELS)


def test_zeros_and_ones_are_not_taken_for_numbers_of_labels():
    with pytest.raises(SpecError, match=r"row 1 holds \[1, 0, 1\]; not zeros and ones, but the labels"):
        TASK.check(rows_of([[0, 1], [1, 0, 1]]), COLUMNS, LABELS)
    for value in (1, 1.0):
        with pytest.raises(SpecError, match="not zeros and ones"):
            TASK.check(rows_of([[0, value], [value, 0]]), COLUMNS, ["a", "b"])
    TASK.check(rows_of([[0, 1], [1]]), COLUMNS, ["a", "b"])
    TASK.check(rows_of([["a", "b"], ["b", "a"]]), COLUMNS, ["a", "b"])


def test_the_loss_is_torch_s():
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4, 3)).double()
    out, targets = SimpleNamespace(logits=logits), {"labels": labels}
    torch.testing.assert_close(
        TASK.loss(out, targets) / TASK.count(targets), F.binary_cross_entropy_with_logits(logits, labels)
    )
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    criterion = Criterion(0.2, weights)
    expected = F.binary_cross_entropy_with_logits(logits, labels * 0.8 + 0.1, reduction="none") * weights
    found = TASK.loss(out, targets, criterion) / TASK.count(targets, criterion)
    torch.testing.assert_close(found, expected.sum() / (4 * weights.sum()))


def test_micro_and_macro_f1():
    """By hand: two of a, of which one is found; b found once too often; c neither. And against scikit-learn."""
    truth = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    guess = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 0]])
    found = TASK.summary(SimpleNamespace(logits=guess * 4 - 2), {"labels": truth}).numpy()
    assert TASK.measure("micro_f1", found, None) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert TASK.measure("macro_f1", found, None) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    truth, logits = torch.randint(2, (50, 5)).float(), torch.randn(50, 5)
    found = TASK.summary(SimpleNamespace(logits=logits), {"labels": truth}).numpy()
    for average in ("micro", "macro"):
        expected = f1_score(truth.numpy(), (logits > 0).numpy(), average=average)
        assert TASK.measure(f"{average}_f1", found, None) == pytest.approx(expected)
