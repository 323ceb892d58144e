"""Measures: what metrics need of outputs, and metrics of that."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.deferred import Deferred
from .base import IGNORED


def guesses(logits: Tensor, labels: Tensor) -> Tensor:
    """(n, 3) for `agreement`: guess, truth and number of classes, for each label that is not ignored."""
    kept = labels != IGNORED
    guess = logits.argmax(-1)[kept]
    return torch.stack([guess, labels[kept], torch.full_like(guess, logits.shape[-1])], dim=1)


def likelihoods(logits: Tensor | Deferred, labels: Tensor) -> Tensor:
    """(batch, 3) for `perplexity`: sum of the negative log-likelihoods, tokens, correct tokens."""
    if isinstance(logits, Deferred):
        return logits.each(_likelihoods, labels, IGNORED).sum(1)
    kept = labels != IGNORED
    found = torch.zeros((*labels.shape, 3), dtype=torch.float64, device=labels.device)
    found[kept] = _likelihoods(logits[kept], labels[kept])
    return found.sum(1)


def _likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """(n, 3) of logits (n, vocabulary) and labels (n,)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide, labels, reduction="none").double()
    return torch.stack([nll, torch.ones_like(nll), (logits.argmax(-1) == labels).double()], dim=1)


def perplexity(metric: str, found: np.ndarray) -> float:
    """perplexity, of which each token is as much a part, or accuracy."""
    nll, tokens, right = found.sum(0)
    return float(math.exp(min(nll / tokens, 700.0)) if metric == "perplexity" else right / tokens)


def correlation(one: np.ndarray, other: np.ndarray, ranks: bool = False) -> float:
    """Pearson's correlation, or Spearman's of the ranks; 0 where one of them is constant."""
    from scipy import stats

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float((stats.spearmanr if ranks else stats.pearsonr)(one, other).statistic)


def agreement(metric: str, found: np.ndarray) -> float:
    """accuracy, f1 (of class 1 where there are two classes, else macro) or matthews_correlation, by scikit-learn."""
    from sklearn import metrics as sk

    guess, truth, classes = found.astype(int).T
    average = "binary" if classes[0] <= 2 else "macro"
    if metric == "accuracy":
        return float(sk.accuracy_score(truth, guess))
    if metric == "f1":
        return float(sk.f1_score(truth, guess, average=average, zero_division=0))
    return float(sk.matthews_corrcoef(truth, guess))
