"""Losses and metrics against plain definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rewriter import Spec
from rewriter.training.tune import checkpoints, loss, measure, summary


def spec_of(task, metric):
    return Spec(
        version=1,
        model={"name": "x", "task": task},
        train={"metric": metric},
        rules=[{"target": "w", "apply": ["ssb"]}],
    )


def test_loss_of_accumulated_batches_is_the_loss_of_all():
    """Batches of unequal length weigh by their labels, not by their number."""
    logits, labels = torch.randn(6, 5, 7, dtype=torch.float64), torch.randint(7, (6, 5))
    labels[:4, 2:] = -100
    count = (labels != -100).sum()
    parts = sum(loss("causal-lm", logits[i : i + 2], labels[i : i + 2], count) for i in (0, 2, 4))
    torch.testing.assert_close(parts, loss("causal-lm", logits, labels))
    assert loss("regression", torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0])).item() == 5.0


@pytest.mark.parametrize(
    ("metric", "value"),
    [("accuracy", 4 / 6), ("f1", 2 * 2 / (2 * 2 + 1 + 1)), ("matthews_correlation", 0.25)],
)
def test_classification(metric, value):
    truth = np.array([1, 1, 1, 0, 0, 0, 0])[:6]
    guess = torch.tensor([1, 1, 0, 1, 0, 0])
    logits = F.one_hot(guess, 2).float()
    found = measure(
        spec_of("sequence-classification", metric), summary("sequence-classification", logits, None).numpy(), truth
    )
    tp, fp, fn, tn = 2, 1, 1, 2
    if metric == "matthews_correlation":
        value = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found == {metric: pytest.approx(value)}


def test_tags_leave_out_what_is_ignored():
    labels = np.array([[0, 1, -100], [1, -100, -100]])
    logits = F.one_hot(torch.tensor([[0, 0, 1], [1, 1, 1]]), 2).float()
    found = measure(
        spec_of("token-classification", "accuracy"), summary("token-classification", logits, None).numpy(), labels
    )
    assert found == {"accuracy": pytest.approx(2 / 3)}


def test_regression():
    truth = np.array([0.0, 1.0, 3.0])
    logits = torch.tensor([[1.0], [2.0], [4.0]])
    assert measure(spec_of("regression", "mse"), summary("regression", logits, None).numpy(), truth) == {"mse": 1.0}
    assert measure(spec_of("regression", "pearson"), logits.numpy(), truth)["pearson"] == pytest.approx(1.0)


def test_perplexity_weighs_tokens():
    logits, labels = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    labels[0, 1:] = -100
    parts = torch.cat(
        [summary("causal-lm", logits[:1], labels[:1]), summary("causal-lm", logits[1:], labels[1:])]
    ).numpy()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).exp().item()
    assert measure(spec_of("causal-lm", "perplexity"), parts, None) == {"perplexity": pytest.approx(expected, rel=1e-5)}
    right = ((logits.argmax(-1) == labels) & (labels != -100)).sum() / (labels != -100).sum()
    assert measure(spec_of("causal-lm", "accuracy"), parts, None)["accuracy"] == pytest.approx(right.item(), rel=1e-5)


def test_checkpoints_are_in_the_order_of_steps(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".unfinished-1"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert checkpoints(tmp_path / "nowhere") == []
