"""Rows of PEFT before keys and values: those of another model are refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewriter import SubspanError, load_adapter
from tests.adapters.test_peft import edited, frozen, theirs

# A folder's prefix, and how it is none of this model's.
NO_PREFIX = {
    "layers": (lambda p: torch.cat([p, p], 1), {"num_layers": 4}, "is of another model: this one has 2 layers"),
    "width": (lambda p: p[:, :16].contiguous(), {"token_dim": 4}, "is of another model: this one has 2 layers"),
    "key": (lambda p: p, {"num_layers": 3}, "num_layers 3, token_dim 8: prompt_embeddings is of shape"),
    "rows": (lambda p: p[:3].contiguous(), {}, "num_virtual_tokens 5"),
    "no table": (lambda p: p.flatten(), {}, "num_layers 2, token_dim 8: prompt_embeddings is of shape"),
    "odd": (lambda p: p[:, :-1].contiguous(), {}, "num_layers 2, token_dim 8: prompt_embeddings is of shape"),
}


@pytest.mark.parametrize("name", NO_PREFIX)
def test_another_model_s_prefix_is_refused(name, tmp_path):
    theirs("prefix", "llama")[1].save_pretrained(tmp_path)
    change, config, said = NO_PREFIX[name]
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: change(value) for key, value in load_file(file).items()}, file)
    edited(tmp_path, **config)
    with pytest.raises(SubspanError, match=said):
        load_adapter(frozen("llama")[1], tmp_path)
