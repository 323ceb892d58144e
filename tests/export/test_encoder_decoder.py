"""Encoder-decoders with a cache: what the two files decode is what `generate` says."""

import json

import numpy as np
import pytest
import torch
import transformers as hf

from rewriter import Session
from rewriter.answer import answerer
from rewriter.export.encoder_decoder import FILES, decoded, encoded
from rewriter.export.verify import open_file
from tests.cases.tiny import BART, T5, task_spec

pytestmark = pytest.mark.slow

START = {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {
    "t5": (lambda: hf.T5Config(**T5, **START), "decoder.**.{q,v}.weight"),
    "bart": (lambda: hf.BartConfig(**{**BART, **START}), "model.decoder.layers.*.self_attn.{q,v}_proj.weight"),
}
NEW = 12


def exported(folder, name, **more):
    config, target = MODELS[name]
    train = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.1}
    session = Session(task_spec(folder, config(), "Seq2SeqLM", "seq2seq-lm", target, train=train, **more))
    session.tune(folder / "run")
    session.export()
    return session, json.loads((folder / "run" / "export.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_generate_and_so_are_answers(tmp_path, name):
    session, found = exported(tmp_path, name)
    assert found["cache"] == {"holds": True, "reason": None}
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "merged")
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate((9, 4, 1)):
        ids[row, :length] = torch.randint(4, 16, (length,), generator=torch.Generator().manual_seed(row))
        mask[row, :length] = 1
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 1:]
    encoder, decoder = (open_file(tmp_path / "run" / "onnx" / file) for file in FILES)
    hidden, held = encoded(encoder, ids.numpy(), mask.numpy())
    with torch.no_grad():
        wanted = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    np.testing.assert_allclose(hidden[mask.bool().numpy()], wanted[mask.bool()], atol=1e-5)
    following, past, tokens = np.zeros((3, 1), np.int64), None, []
    for _ in range(NEW):
        logits, past = decoded(decoder, following, held, past)
        following = logits[:, -1:].argmax(-1)
        tokens.append(following)
    np.testing.assert_array_equal(np.concatenate(tokens, axis=1), expected.numpy())
    assert [one.name for one in encoder.get_outputs()][1:3] == ["present.0.encoder.key", "present.0.encoder.value"]
    read = {one.name: one.shape[2] for one in decoder.get_inputs() if one.name.startswith("past_key_values.0")}
    assert read["past_key_values.0.decoder.key"] == "past_sequence"
    assert read["past_key_values.0.encoder.value"] == "encoder_sequence"
    answers = [
        answerer(session.spec, tmp_path / "run", stage, 8)({"text": "good film"}) for stage in ("onnx", "merged")
    ]
    assert answers[0] == answers[1]
