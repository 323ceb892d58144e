"""Vectors of texts: pooling, losses, metrics, and what sentence-transformers reads."""

import json

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import transformers as hf
from pydantic import ValidationError

from rewriter import Spec, SpecError, task_of
from rewriter.tasks import Reading
from tests.tiny import make_tokenizer, save_model

NAME = "sentence-embedding"
TASK = task_of(NAME)
SCORED = {"text": "a", "text_pair": "b", "score": "s"}


def embeddings(rows, size=4):
    return F.normalize(torch.randn(rows, size, dtype=torch.float64), dim=1)


def test_pairs_with_a_score_learn_their_cosine():
    vectors, score = embeddings(6), torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
    found = TASK.loss({"sentence_embedding": vectors}, {"score": score}) / TASK.count({"score": score})
    cosine = F.cosine_similarity(vectors[:3], vectors[3:])
    torch.testing.assert_close(found, F.mse_loss(cosine, score))


def test_pairs_alone_tell_their_other_half_from_the_batch_s():
    vectors, targets = embeddings(6), {"labels": torch.arange(3)}
    found = TASK.loss({"sentence_embedding": vectors}, targets) / TASK.count(targets)
    cosines = 20 * vectors[:3] @ vectors[3:].T
    expected = -sum(cosines[i].log_softmax(0)[i] for i in range(3)) / 3
    torch.testing.assert_close(found, expected)


def test_spearman_is_scipy_s():
    vectors, score = embeddings(40), torch.rand(20, dtype=torch.float64)
    found = TASK.summary({"sentence_embedding": vectors}, {"score": score}).numpy()
    expected = scipy.stats.spearmanr(F.cosine_similarity(vectors[:20], vectors[20:]).numpy(), score.numpy()).statistic
    assert TASK.measure("spearman", found, None) == pytest.approx(expected, abs=1e-6)
    constant = np.concatenate([np.ones((3, 4)), np.array([[0.1], [0.2], [0.3]])], axis=1)
    assert TASK.measure("spearman", constant, None) == 0.0


def test_recall_at_k():
    """By hand, on a circle: the third text has another's half nearer than its own."""
    angles = torch.tensor([0.0, 50.0, 100.0]), torch.tensor([5.0, 70.0, 180.0])
    vectors = torch.cat([torch.stack([a.deg2rad().cos(), a.deg2rad().sin()], dim=1) for a in angles])
    # 0: 5 is nearest. 50: 70 is nearest. 100: 70 is nearer than its own, 180.
    found = TASK.summary({"sentence_embedding": vectors}, {"labels": torch.arange(3)}).numpy()
    assert TASK.measure("recall@1", found, None) == pytest.approx(2 / 3)
    assert TASK.measure("recall@5", found, None) == 1.0
    twice = np.concatenate([found, found[:1]])  # A pair that stands there twice is found by either.
    assert TASK.measure("recall@1", twice, None) == pytest.approx(3 / 4)


def test_scores_are_cosines_or_said_to_be_others():
    rows = datasets.Dataset.from_dict({"a": ["good"], "b": ["bad"], "s": [4]})
    with pytest.raises(SpecError, match=r"holds 4 .*from -1 to 1; other scores need model.task_options"):
        TASK.check(rows, SCORED, [])
    scaled = task_of(NAME, {"scores": [0.0, 5.0]})
    scaled.check(rows, SCORED, [])
    encoded = scaled.encode(rows, Reading(SCORED, rows.features, make_tokenizer(), [], 8), [])
    batch = scaled.collator(make_tokenizer(), ["input_ids", "attention_mask"], None)([encoded[0]])
    assert batch["score"].tolist() == [pytest.approx(0.8)] and batch["input_ids"].shape[0] == 2
    assert (
        TASK.metrics_of(SCORED)[0] == "spearman" and TASK.metrics_of({"text": "a", "text_pair": "b"})[0] == "recall@1"
    )


@pytest.mark.parametrize("scores", [[1.0, 1.0], [0.0, float("nan")], [5.0]])
def test_scores_that_say_nothing_are_refused(scores):
    with pytest.raises(ValidationError):
        task_of(NAME, {"scores": scores})


def test_pairs_alone_need_others():
    """A pair alone in its batch has a loss of 0."""
    rules, name = [{"target": "x", "apply": ["full"]}], {"name": "x", "task": NAME}
    made = {"version": 1, "model": name, "rules": rules, "train": {"batch_size": 1}}
    data = {"format": "csv", "files": "x.csv", "split": {"validation": 1}}
    Spec.model_validate({**made, "data": {**data, "columns": SCORED}})
    with pytest.raises(SpecError, match="sentence-embedding needs 2 rows to learn from") as caught:
        Spec.model_validate({**made, "data": {**data, "columns": {"text": "a", "text_pair": "b"}}})
    assert caught.value.path == ("train", "batch_size")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_pooling_leaves_padding_out(model):
    """Of a padded row the vector is that of the row alone, for both ways to pool."""
    base = hf.AutoModel.from_pretrained(model).eval()
    ids, mask = torch.tensor([[2, 5, 9, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    for pooling, pooled in (("mean", lambda x: x[:, :4].mean(1)), ("cls", lambda x: x[:, 0])):
        module = task_of(NAME, {"pooling": pooling}).module(base)
        assert module.state_dict().keys() == base.state_dict().keys()
        with torch.no_grad():
            found = module(ids, mask)["sentence_embedding"]
            expected = F.normalize(pooled(base(ids[:, :4], mask[:, :4]).last_hidden_state), dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("written", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
    ],
)
def test_a_model_says_how_it_pools(tmp_path, written, pooling):
    base = hf.AutoModel.from_pretrained(save_model(tmp_path / "model"))
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps(written))
    if pooling is None:
        with pytest.raises(SpecError, match="which is not mean or cls"):
            TASK.module(base)
        assert task_of(NAME, {"pooling": "mean"}).module(base).pooling == "mean"
    else:
        assert TASK.module(base).pooling == pooling
