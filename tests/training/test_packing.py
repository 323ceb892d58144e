"""Packed rows: none lost, none sees another, the losses and gradients of rows alone."""

import shutil

import datasets
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rewriter import Rule, Session, SpecError, plan, rewrite, trace, tuned_parameters
from rewriter.spec import Spec
from rewriter.tasks import task_of
from rewriter.training.evaluation import objective
from rewriter.training.packing import Packed, bins, check_packing, collate_packed, packed_inputs
from tests.cases.tiny import LLAMA, saved

pytestmark = pytest.mark.xdist_group("decoders")

LAST = -100
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}
LINEARS = "**.{q,v}_proj.weight"
LORA = {"lora": {"rank": 2}}
MODELS = [
    ("llama", SIZES, LINEARS, LORA),
    ("mistral", {**SIZES, "sliding_window": 4}, LINEARS, LORA),
    ("gemma3_text", {**SIZES, "sliding_window": 4}, LINEARS, LORA),
    ("qwen3", SIZES, LINEARS, LORA),
    ("llama", SIZES, "model.layers.*", {"prefix": {"length": 3}}),
    ("llama", SIZES, "model.layers.*", {"hadapter": {"bottleneck": 4}}),
]


def rows(lengths, seed=0):
    """Encoded rows, about a third of their labels ignored, the last always."""
    generator, found = torch.Generator().manual_seed(seed), []
    for n in lengths:
        ids = torch.randint(3, 97, (n,), generator=generator).tolist()
        kept = torch.rand(n, generator=generator) > 0.3
        labels = [one if keep else LAST for one, keep in zip(ids[1:], kept, strict=False)] + [LAST]
        found.append({"input_ids": ids, "attention_mask": [1] * n, "labels": labels})
    return found


def model_of(kind, sizes):
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2)
    return hf.AutoModelForCausalLM.from_config(config).double()


TRACED = {}


def traced(model, packed=True, task="causal-lm"):
    """Of a kind and a config one trace for all tests of a process: their weights are drawn from one seed."""
    key = type(model), model.config.to_json_string(), packed
    if key not in TRACED:
        inputs = task_of(task).inputs(model)
        TRACED[key] = trace(model, {"train": packed_inputs(model) if packed else inputs, "eval": inputs})
    return TRACED[key]


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_row_is_in_one_sequence_that_holds_it(lengths):
    found = bins(lengths, 20)
    assert sorted(row for one in found for row in one) == list(range(len(lengths)))
    filled = [sum(lengths[row] for row in one) for one in found]
    assert all(0 < one <= 20 for one in filled)
    # Best fit decreasing leaves at most one sequence half empty.
    assert sum(2 * one <= 20 for one in filled) <= 1


def test_a_packed_batch():
    made = rows([3, 2, 4])
    batch = collate_packed([made[:2], made[2:]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["input_ids"].tolist() == [made[0]["input_ids"] + made[1]["input_ids"], [*made[2]["input_ids"], 0]]
    assert batch["labels"].tolist() == [made[0]["labels"] + made[1]["labels"], [*made[2]["labels"], LAST]]
    packed = Packed(made, [3, 2, 4], 5)
    assert [[one["input_ids"] for one in packed[i]] for i in range(len(packed))] == [
        [made[2]["input_ids"]],
        [made[0]["input_ids"], made[1]["input_ids"]],
    ]


@pytest.mark.parametrize(
    ("kind", "sizes", "target", "step"), MODELS, ids=[f"{m[0]}-{next(iter(m[3]))}" for m in MODELS]
)
def test_losses_and_gradients_are_those_of_rows_alone(kind, sizes, target, step):
    """In float64, so that what is left is the order of sums."""
    model, task = model_of(kind, sizes), task_of("causal-lm")
    made = rows([5, 9, 3, 7, 12, 2])
    rules = [Rule.model_validate({"target": target, "apply": [step]})]
    packed = traced(model)
    check_packing(packed, made)
    plain = traced(model, packed=False)
    found = {}
    for name, one in (("packed", packed), ("alone", plain)):
        tuned = rewrite(one, plan(one, rules))
        for key, p in tuned_parameters(tuned).items():
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(sum(map(ord, key))))
        if name == "packed":
            batches = [collate_packed([made[:3], made[3:]])]
        else:
            batches = [
                {key: torch.tensor([row[key]]) for key in ("input_ids", "attention_mask", "labels")} for row in made
            ]
        tuned.train()
        losses, counts = [], 0
        for batch in batches:
            losses.append(objective(task)(tuned, batch) * (count := task.count(batch)))
            counts += count
        value = sum(losses) / counts
        value.backward()
        found[name] = value.item(), {key: p.grad for key, p in tuned_parameters(tuned).items()}
    assert found["packed"][0] == pytest.approx(found["alone"][0], rel=1e-12)
    for key, one in found["alone"][1].items():
        assert one.abs().max() > 0
        torch.testing.assert_close(found["packed"][1][key], one, rtol=1e-8, atol=1e-10)


def test_dropout_is_not_held_against_a_model():
    config = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    check_packing(traced(model_of("gpt2", config)), rows([5, 9, 3]))


def test_a_model_that_does_not_keep_rows_apart_is_refused():
    sizes = {**{key: SIZES[key] for key in SIZES if key not in ("head_dim", "num_key_value_heads")}, "ffn_dim": 48}
    with pytest.raises(SpecError, match="does not keep packed rows apart: their logits differ by"):
        check_packing(traced(model_of("opt", {**sizes, "word_embed_proj_dim": 32})), rows([5, 9, 3]))
    with pytest.raises(SpecError, match="BloomForCausalLM takes no position_ids"):
        packed_inputs(model_of("bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("packing")
    saved(place / "model", hf.LlamaConfig(**LLAMA), "CausalLM")
    texts = ["good film", "bad the plot was bad", "a fine film and a good plot", "fine"] * 12
    datasets.Dataset.from_dict({"text": texts}).to_json(place / "rows.jsonl")
    return place


def spec_of(folder, apply=LORA, target=LINEARS, **train):
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"name": str(folder / "model"), "task": "causal-lm"},
            "data": {
                "format": "json",
                "files": str(folder / "rows.jsonl"),
                "columns": {"text": "text"},
                "split": {"validation": 8},
                "max_length": 24,
            },
            "rules": [{"target": target, "apply": [apply]}],
            "train": {"packing": True, "batch_size": 2, "epochs": 2, "log_steps": 1, "checkpoint_steps": 1, **train},
        }
    )


def test_a_packed_run_resumes_within_an_epoch_to_the_same_bits(folder, tmp_path):
    whole = Session(spec_of(folder)).tune(tmp_path / "whole")
    per_epoch = whole["train"]["steps"] // 2
    assert whole["train"]["rows"] == 40 and 2 <= per_epoch <= 9  # 40 rows alone would be 20 steps.
    run = tmp_path / "run"
    Session(spec_of(folder)).tune(run)
    (run / "metrics.json").unlink()
    for one in sorted((run / "checkpoints").iterdir(), key=lambda one: int(one.name.split("-")[1]))[1:]:
        shutil.rmtree(one)
    again = Session(spec_of(folder)).tune(run, resume=True)
    for one in (whole, again):
        one["train"].pop("seconds")
    assert again == whole
    assert (run / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_by_length": True}, "packed rows are in no group"),
        ({"apply": {"prompt": {"length": 2}}, "target": "model.embed_tokens"}, "only the first packed row"),
    ],
)
def test_what_can_t_be_packed_is_said_before_weights_are_read(folder, changes, message):
    with pytest.raises((SpecError, ValueError), match=message):
        Session(spec_of(folder, **changes)).plan()
