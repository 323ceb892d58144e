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
    with pytest.raises(SpecError, match=f"of .* weights of .* are missing: its names start with '{prefix}'"):
        load_model(spec)
