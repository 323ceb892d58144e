"""A GGUF file is converted once, to what `from_pretrained` reads."""

from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import transformers as hf

from rewriter.gguf import location_of
from rewriter.spec import Model

WIDTH, INNER, LAYERS, HEADS = 32, 64, 2, 4
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "cd"]


def make_gguf(file):
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH), "output.weight": (len(TOKENS), WIDTH)}
    shapes["output_norm.weight"] = (WIDTH,)
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}.weight": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.{name}.weight": (INNER, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (WIDTH, INNER)}
        shapes |= {f"blk.{i}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    weights = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def converted(tmp_path, monkeypatch):
    weights = make_gguf(tmp_path / "tiny.gguf")

    def convert(cache):
        monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / cache))
        return location_of(Model(name=str(tmp_path), gguf="tiny.gguf", task="causal-lm"))

    return weights, convert


def test_the_weights_and_the_tokens_are_the_file_s(converted):
    weights, convert = converted
    place = convert("one")
    found = hf.AutoModelForCausalLM.from_pretrained(place).state_dict()
    for name, own in (("model.embed_tokens", "token_embd"), ("model.layers.1.mlp.down_proj", "blk.1.ffn_down")):
        assert np.array_equal(found[f"{name}.weight"].numpy(), weights[f"{own}.weight"])
    tokenizer = hf.AutoTokenizer.from_pretrained(place)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcda")["input_ids"]) == ["ab", "cd", "a"]
    assert convert("one") == place


def test_it_is_the_same_offline_and_not(converted, monkeypatch):
    """A run says what its base was, file by file: it has to go on with a base that was converted elsewhere."""
    folders = []
    for offline in (True, False):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        place = Path(converted[1](f"offline-{offline}"))
        folders.append({file.name: file.read_bytes() for file in sorted(place.iterdir())})
    assert folders[0].keys() == folders[1].keys() and len(folders[0]) >= 4
    assert [name for name in folders[0] if folders[0][name] != folders[1][name]] == []
