"""validate --level smoke: the whole run of a small copy, so that what would fail at the end fails first."""

import tempfile

import pytest
import transformers as hf

from pipelines.validate import Format, Level, check_all
from rewriter import Session, SpecError
from tests.cases.tiny import BART, GPT2, image_spec, task_spec, vision
from tests.tiny import project

pytestmark = pytest.mark.slow


def smoke(file, *settings):
    return [
        str(one) for result in check_all([file], list(settings), Level.smoke, Format.json) for one in result["findings"]
    ]


def test_a_spec_passes_and_nothing_stays(tmp_path, monkeypatch, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "t").mkdir()
    spec = project(tmp_path / "p")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    before = sorted(tmp_path.joinpath("p").rglob("*"))
    assert smoke(spec) == []
    assert sorted(tmp_path.joinpath("p").rglob("*")) == before
    assert not [name for name in (tmp_path / "t").iterdir() if not name.name.startswith("subspan-data-")]
    assert "step" not in capsys.readouterr().out


def test_a_broken_exporter_fails_here(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no op named so")

    monkeypatch.setattr("torch.onnx.export", broken)
    spec = project(tmp_path)
    (found,) = smoke(spec)
    assert "can't export to ONNX: no op named so" in found
    assert smoke(spec, "export.onnx=null") == []


def test_what_can_t_merge_is_no_checkpoint(tmp_path):
    file = project(tmp_path)
    text = file.read_text()
    rule = text[text.index("  - target") : text.index('  - target: "classifier')]
    prefix = '  - target: "bert.encoder.layer.*"\n    apply: [{prefix: {length: 2}}]\n'
    file.write_text(text.replace(rule, prefix) + "strict: true\nexport: {checkpoint: true}\n")
    (found,) = smoke(file)
    assert "export.checkpoint: prefix(length=2) can't merge into plain weights, so there is no checkpoint" in found
    assert "spec.yaml:19:22: " in found
    assert smoke(file, "export.checkpoint=false") == []


CONFIGS = {
    "gpt2": ("sequence-classification", "CausalLM", lambda: hf.GPT2Config(**{**GPT2, "n_layer": 4}, eos_token_id=3), "transformer.h.3.attn.c_attn.weight"),
    "bart": ("seq2seq-lm", "Seq2SeqLM", lambda: hf.BartConfig(**{**BART, "encoder_layers": 3, "decoder_layers": 3}), "**.self_attn.{q,v}_proj.weight"),
}  # fmt: skip


def spec_for(folder, name):
    task, auto, config, target = CONFIGS[name]
    return task_spec(folder, config(), auto, task, target, train={"batch_size": 4, "epochs": 3})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_model_has_a_small_copy(tmp_path, name):
    report = Session(spec_for(tmp_path, name)).smoke()
    assert {"merged", "checkpoint", "onnx"} == set(report["stages"])
    assert report["rows"]["validation"] > 0
    assert report["rows"]["random"] == 16


def test_an_image_model_too(tmp_path):
    spec = image_spec(tmp_path, vision("vit", 32), 32)
    assert Session(spec).smoke()["rows"]["validation"] > 0


def test_without_data_there_is_no_run(tmp_path):
    spec = spec_for(tmp_path, "gpt2")
    with pytest.raises(SpecError, match="'data' is missing"):
        Session(spec.model_copy(update={"data": None})).smoke()
