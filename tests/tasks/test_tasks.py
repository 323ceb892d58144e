"""Losses and metrics of every task against plain definitions."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rewriter import TASKS, task_of
from rewriter.tasks import Criterion


def out_of(logits):
    return SimpleNamespace(logits=logits)


def measured(task, metric, logits, labels):
    found = task.summary(out_of(logits), {"labels": labels}).double().numpy()
    return task.measure(metric, found, None)


def test_loss_of_accumulated_batches_is_the_loss_of_all():
    """Batches of unequal length weigh by their labels, not by their number."""
    task = task_of("causal-lm")
    logits, labels = torch.randn(6, 5, 7, dtype=torch.float64), torch.randint(7, (6, 5))
    labels[:4, 2:] = -100
    parts = sum(task.loss(out_of(logits[i : i + 2]), {"labels": labels[i : i + 2]}) for i in (0, 2, 4))
    count = sum(task.count({"labels": labels[i : i + 2]}) for i in (0, 2, 4))
    torch.testing.assert_close(parts / count, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    regression = task_of("regression")
    targets = {"labels": torch.tensor([0.0, 0.0])}
    assert regression.loss(out_of(torch.tensor([[1.0], [3.0]])), targets) / regression.count(targets) == 5.0


def test_a_weighted_and_smoothed_loss_is_torch_s():
    """The mean of torch divides by the weights of the labels that are there."""
    task, weights = task_of("sequence-classification"), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 1, 0])
    criterion, targets = Criterion(0.1, weights), {"labels": labels}
    found = task.loss(out_of(logits), targets, criterion) / task.count(targets, criterion)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, weights, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("metric", "value"),
    [("accuracy", 4 / 6), ("f1", 2 * 2 / (2 * 2 + 1 + 1)), ("matthews_correlation", 3 / 9)],
)
def test_classification(metric, value):
    """tp, fp, fn, tn = 2, 1, 1, 2."""
    truth, guess = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 1, 0, 0])
    task = task_of("sequence-classification")
    assert measured(task, metric, F.one_hot(guess, 2).float(), truth) == pytest.approx(value)


def test_f1_is_macro_where_there_are_more_labels_than_rows_show():
    truth, guess = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0])
    found = measured(task_of("sequence-classification"), "f1", F.one_hot(guess, 3).float(), truth)
    assert found == pytest.approx((2 * 2 / 5 + 2 / 3) / 2)  # of classes 0 and 1; class 2 has neither truth nor guess


def test_tags_leave_out_what_is_ignored():
    labels = torch.tensor([[0, 1, -100], [1, -100, -100]])
    logits = F.one_hot(torch.tensor([[0, 0, 1], [1, 1, 1]]), 2).float()
    assert measured(task_of("token-classification"), "accuracy", logits, labels) == pytest.approx(2 / 3)


def test_regression():
    truth, logits = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([[1.0], [2.0], [4.0]])
    task = task_of("regression")
    assert measured(task, "mse", logits, truth) == 1.0
    assert measured(task, "pearson", logits, truth) == pytest.approx(1.0)
    assert measured(task, "pearson", torch.ones(3, 1), truth) == 0.0


def test_perplexity_weighs_tokens():
    logits, labels, task = torch.randn(4, 5, 7), torch.randint(7, (4, 5)), task_of("causal-lm")
    labels[0, 1:] = -100
    parts = torch.cat([task.summary(out_of(logits[i : i + 2]), {"labels": labels[i : i + 2]}) for i in (0, 2)]).numpy()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).exp().item()
    assert task.measure("perplexity", parts, None) == pytest.approx(expected, rel=1e-5)
    right = ((logits.argmax(-1) == labels) & (labels != -100)).sum() / (labels != -100).sum()
    assert task.measure("accuracy", parts, None) == pytest.approx(right.item(), rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_knows_its_metrics_and_which_way_they_go(name):
    task = task_of(name)
    assert "loss" in task.metrics and task.lower("loss") and not task.lower("accuracy")
    assert (task.ways or any(role.required for role in task.roles.values())) and task.name == name
