"""Checkpoints that do not hold what they seem to."""

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from rewriter.errors import SpecError
from rewriter.pretrained import load_model
from rewriter.spec import Spec


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."], ids=["2-compiled", "2-parallel"])
def test_names_with_a_prefix_are_refused(tmp_path, prefix):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({prefix + name: value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    model = {"name": str(tmp_path), "task": "sequence-classification"}
    spec = Spec.model_validate({"version": 1, "model": model, "rules": [{"target": "**", "apply": ["full"]}]})
    for meta in (True, False):
        with pytest.raises(SpecError, match=f"^23 of 23 weights of .* are missing: its names start with '{prefix}'"):
            load_model(spec, meta)


def test_a_head_of_another_name_is_no_wrapped_one(tmp_path):
    """A checkpoint's own head may end like the new one's name: the base model is whole."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = {name.replace("classifier", "other.classifier"): value for name, value in load_file(file).items()}
    save_file(held, file, metadata={"format": "pt"})
    model = {"name": str(tmp_path), "task": "sequence-classification"}
    spec = Spec.model_validate({"version": 1, "model": model, "rules": [{"target": "**", "apply": ["full"]}]})
    assert load_model(spec).new == {"classifier.weight", "classifier.bias"}
