"""Base models and tokenizers that used to enter wrong."""

import json
import os

import pytest
import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from rewriter import Inputs, Rule, Session, SpecError, SubspanError, fingerprint, trace
from rewriter.pretrained import load_model, load_processor
from tests.cases.tiny import BART, BERT, GPT2, LLAMA, T5, image_spec, saved, spec_of, vision
from tests.tiny import make_tokenizer


def bert(folder, **more):
    return saved(folder, hf.BertConfig(**BERT), **more)


def refused(spec, said, **options):
    with pytest.raises(SubspanError, match=said):
        Session(spec).plan(**options)


def rename(folder, change):
    file = folder / "model.safetensors"
    save_file(
        {new: value for name, value in load_file(file).items() if (new := change(name))},
        file,
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize("pads", [1, 15], ids=["1-other", "1-last"])
@pytest.mark.parametrize("own", [None, 0], ids=["none", "another"])
def test_1_the_tokenizer_s_padding_is_the_model_s(tmp_path, pads, own):
    saved(tmp_path, hf.LlamaConfig(**{**LLAMA, "pad_token_id": own}))
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pads)
    tokenizer.save_pretrained(tmp_path)
    pretrained = load_model(spec_of(tmp_path))
    assert pretrained.model.config.pad_token_id == pads
    alone = pretrained.processor(["good film"], return_tensors="pt")
    both = pretrained.processor(["good film", "good the plot was bad and the film"], return_tensors="pt", padding=True)
    with torch.no_grad():
        one, two = (
            pretrained.model(input_ids=some["input_ids"], attention_mask=some["attention_mask"]).logits[0]
            for some in (alone, both)
        )
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (["bert.encoder.layer.1.output.dense.weight"], "1 of 41 weights of .* are missing, e.g. bert.encoder.layer.1.output.dense.weight"),
        (["bert.embeddings.word_embeddings.weight", "bert.pooler.dense.bias"], "2 of 41 weights of .* are missing, e.g. bert.emb"),
    ],
    ids=["2-one", "2-two"],
)  # fmt: skip
def test_missing_weights_are_refused(tmp_path, lost, said):
    rename(bert(tmp_path), lambda name: None if name in lost else name)
    refused(spec_of(tmp_path), said)


@pytest.mark.parametrize("lead", ["_orig_mod.", "module.", "model."], ids=["2-compiled", "2-parallel", "2-other"])
def test_2_a_wrapped_base_without_a_head(tmp_path, lead):
    saved(tmp_path, hf.BertConfig(**BERT), task="")
    rename(tmp_path, lambda name: lead + name)
    refused(spec_of(tmp_path), f"39 of 39 weights of .* are missing: its names start with '{lead}'")


def test_2_what_no_forward_reads_may_be_missing(tmp_path):
    saved(tmp_path, hf.BertConfig(**BERT), task="")
    rename(tmp_path, lambda name: None if "pooler" in name else name)
    assert Session(spec_of(tmp_path, "sentence-embedding", data=False)).plan()


def test_2_a_checkpoint_of_more_layers_is_refused(tmp_path):
    bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refused(spec_of(tmp_path), "has weights of more layers than its config: bert.encoder.layer.1")


@pytest.mark.parametrize("extra", [1, 3], ids=["9-one", "9-many"])
def test_9_every_token_has_a_row(tmp_path, extra):
    bert(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(50 - len(tokenizer) + extra)])
    tokenizer.save_pretrained(tmp_path)
    ids = "id 50" if extra == 1 else "ids 50"
    refused(spec_of(tmp_path), rf"the tokenizer's {ids} \(more34\).* have no row in the model's table of 50")


def bpe(prefix=False):
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the good film was bad"] * 5, trainer)
    core.decoder = tokenizers.decoders.ByteLevel()
    return core


@pytest.mark.parametrize("kind", ["RobertaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"], ids="11-{}".format)
def test_11_words_are_the_tokens_of_running_text(tmp_path, kind):
    core = bpe()
    if kind == "PreTrainedTokenizerFast":
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
    else:
        core.model.save(str(tmp_path))
        tokenizer = getattr(hf, kind)(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(tmp_path)
    saved(tmp_path, hf.BertConfig(**{**BERT, "vocab_size": 400}), tokenizer=False)
    spec = spec_of(tmp_path, "token-classification", data=False)
    found = load_processor(spec)
    words = ["the", "good", "film", "was", "bad"]
    split = found(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert split == found(" ".join(words), add_special_tokens=False)["input_ids"]
    found.save_pretrained(tmp_path / "again")
    again = load_processor(spec, str(tmp_path / "again"))
    assert again(words, is_split_into_words=True, add_special_tokens=False)["input_ids"] == split


@pytest.mark.parametrize("kind", ["t5", "bart"], ids="15-{}".format)
def test_15_a_decoder_s_start_is_known(tmp_path, kind):
    config = {
        "t5": lambda: hf.T5Config(**T5),
        "bart": lambda: hf.BartConfig(**BART),
    }[kind]()
    saved(tmp_path, config, "Seq2SeqLM")
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"decoder_start_token_id": None}))
    refused(spec_of(tmp_path, "seq2seq-lm"), "its config has no decoder_start_token_id")


@pytest.mark.parametrize(
    ("dtype", "asked"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, "float32")],
    ids=["17-bfloat16", "17-float16", "17-asked"],
)
@pytest.mark.parametrize("meta", [True, False])
def test_17_a_checkpoint_keeps_its_type(tmp_path, dtype, asked, meta):
    bert(tmp_path, dtype=dtype)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_model(spec_of(tmp_path, dtype=asked), meta).model.dtype
    assert found == (torch.float32 if asked else dtype)


SAID = {
    "torchao": r"quantised \(torchao\), which is not supported", "hqq": r"quantised \(hqq\), which is not supported",
    "awq": "stored by awq in None bits", "gptq": "stored by gptq in None bits",
    "fp8": "says that the base model is quantised by fp8, and no weight of it is",
}  # fmt: skip


@pytest.mark.parametrize("method", SAID, ids="18-{}".format)
def test_18_quantised_bases_are_refused_by_name(tmp_path, method):
    bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    refused(spec_of(tmp_path), SAID[method])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=lambda dtype: f"18-{dtype}")
def test_18_quantised_weights_are_told_by_their_type(tmp_path, dtype):
    file = bert(tmp_path) / "model.safetensors"
    held = load_file(file)
    name = "bert.encoder.layer.0.output.dense.weight"
    save_file({**held, name: held[name].to(dtype)}, file, metadata={"format": "pt"})
    refused(spec_of(tmp_path), f"{name} of the base model is stored in .*, and its config does not say how")


@pytest.mark.parametrize("kind", ["gpt2", "opt"], ids="19-{}".format)
def test_19_padding_moves_no_position(tmp_path, kind):
    config = {
        "gpt2": lambda: hf.GPT2Config(**GPT2),
        "opt": lambda: hf.OPTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=32,
            max_position_embeddings=64,
            vocab_size=50,
            word_embed_proj_dim=32,
        ),
    }[kind]()
    saved(tmp_path, config, "CausalLM", tokenizer=False)
    make_tokenizer().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(written | {"padding_side": "left"}))
    spec = spec_of(tmp_path, "causal-lm")
    job = Session(spec).prepare()
    short, long = sorted(range(len(job.train)), key=lambda i: len(job.train[i]["input_ids"]))[:: len(job.train) - 1]
    losses = []
    for rows in ([short], [short, long]):
        batch = job.collate([job.train[i] for i in rows])
        with torch.no_grad():
            out = job.pretrained.module.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        losses.append(
            torch.nn.functional.cross_entropy(out.logits[0], batch["labels"][0], ignore_index=-100, reduction="sum")
        )
    assert torch.allclose(*losses, rtol=1e-6)
    assert load_processor(spec).padding_side == "left", "what is shipped pads as its owner wants"


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]], ids=["54-none", "54-config"])
def test_54_no_tokenizer_is_made_up(tmp_path, left):
    bert(tmp_path)
    for name in os.listdir(tmp_path):
        if "token" in name and name not in left:
            os.remove(tmp_path / name)
    refused(spec_of(tmp_path), "tokenizer")


@pytest.mark.parametrize(
    "name", ["w.bin", "../w.safetensors", "/etc/w.safetensors", "a/w.safetensors"], ids="58-{}".format
)
def test_58_an_index_leads_nowhere_else(tmp_path, name):
    file = bert(tmp_path) / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), name)}
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(spec_of(tmp_path), f"names '{name}': only safetensors files of the same folder are read")


@pytest.mark.parametrize("where", ["file", "spec", "part"], ids="59-{}".format)
def test_59_no_code_of_a_hub_is_asked_for(tmp_path, where):
    bert(tmp_path)
    asks = {"_attn_implementation": "user/kernel"}
    config = json.loads((tmp_path / "config.json").read_text())
    if where == "file":
        (tmp_path / "config.json").write_text(json.dumps(config | asks))
    more = {
        "spec": {"config": config | {"attn_implementation": "user/kernel"}},
        "part": {"config": config | {"text_config": asks}},
    }.get(where, {})
    refused(spec_of(tmp_path, **more), "'user/kernel' asks for code of a hub, which is not run")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "other.safetensors"], ids="68-{}".format)
def test_68_weights_elsewhere_are_said_at_once(tmp_path, name):
    os.rename(bert(tmp_path) / "model.safetensors", tmp_path / name)
    refused(spec_of(tmp_path), f"its weights are in {name}, not in model.safetensors")


def test_68_an_adapter_of_another_library_is_no_base(tmp_path):
    (bert(tmp_path) / "adapter_config.json").write_text('{"base_model_name_or_path": "user/base"}')
    refused(spec_of(tmp_path), "the folder holds an adapter of another library")


def test_68_a_tokenizer_without_padding_and_end(tmp_path):
    bert(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    refused(spec_of(tmp_path), "has no token to pad with, and none for the end")


def test_68_rotations_on_a_half_base(tmp_path):
    bert(tmp_path, dtype=torch.float16)
    spec = spec_of(tmp_path)
    rule = Rule(target="bert.encoder.layer.*.attention.self.query.weight", apply=["oft"])
    spec = spec.model_copy(update={"rules": [rule]})
    tuned = Session(spec).rewritten()
    assert tuned.plan.trainable_parameters > 0


@pytest.mark.parametrize("kind", ["resnet", "segformer", "clip", "siglip", "convnext"], ids="16-{}".format)
def test_16_sizes_come_from_the_processor(tmp_path, kind):
    session = Session(image_spec(tmp_path, vision(kind, 32), 32))
    traced, _ = session.shapes()
    assert session.prepare().inputs["eval"].kwargs["pixel_values"].shape[1:] == (3, 32, 32)
    assert session.plan().trainable_parameters > 0 and traced


def test_16_a_size_that_does_not_fit_is_refused(tmp_path):
    refused(image_spec(tmp_path, vision("vit", 32), 48), "48.*32")


@pytest.mark.parametrize("channels", [1, 4], ids="16-{}".format)
def test_16_pictures_have_the_model_s_channels(tmp_path, channels):
    job = Session(image_spec(tmp_path, vision("vit", 32, channels), 32, mean=[0.5] * channels)).prepare()
    assert job.collate([job.train[0], job.train[1]])["pixel_values"].shape == (2, channels, 32, 32)


def test_16_means_of_other_channels_are_refused(tmp_path):
    refused(image_spec(tmp_path, vision("vit", 32, 1), 32), "its image processor makes 3 channels, the model reads 1")


def test_16_a_broken_picture_is_named(tmp_path):
    spec = image_spec(tmp_path, vision("vit", 32), 32)
    next((tmp_path / "pictures" / "cat").iterdir()).write_bytes(b"no picture")
    with pytest.raises(SpecError, match=r"row \d of column 'image' holds no picture that can be read"):
        Session(spec).check_data()


def retype(folder, name, dtype):
    file = folder / "model.safetensors"
    held = load_file(file)
    save_file(held | {name: held[name].to(dtype)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.int64])
def test_2_weights_in_whole_numbers(tmp_path, dtype):
    bert(tmp_path)
    retype(tmp_path, "bert.pooler.dense.weight", dtype)
    refused(spec_of(tmp_path), "bert.pooler.dense.weight of .* is stored in whole numbers")


def test_2_a_wider_type_is_no_quantised_one(tmp_path):
    bert(tmp_path, dtype=torch.float64)
    assert next(load_model(spec_of(tmp_path)).model.parameters()).dtype == torch.float64


def test_2_other_types_in_a_checkpoint_are_said(tmp_path):
    bert(tmp_path, dtype=torch.bfloat16)
    retype(tmp_path, "bert.embeddings.LayerNorm.weight", torch.float32)
    (said,) = load_model(spec_of(tmp_path)).notes
    assert said.startswith("1 weights of ") and said.endswith("model.dtype: float32 keeps them")


def test_2_a_weight_that_is_not_finite(tmp_path):
    bert(tmp_path)
    retype(tmp_path, "bert.pooler.dense.bias", torch.float32)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    held["bert.pooler.dense.bias"][3] = float("nan")
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"bert\.pooler\.dense\.bias of .* is not finite"):
        load_model(spec_of(tmp_path))


def resnet(folder):
    config = hf.ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    return saved(folder, config, "ImageClassification", tokenizer=False)


def test_2_statistics_that_a_checkpoint_lacks(tmp_path):
    resnet(tmp_path)
    rename(tmp_path, lambda name: None if name.endswith("embedder.normalization.running_var") else name)
    refused(spec_of(tmp_path, "image-classification", data=False), "1 statistics of .* are missing, e.g. .*running_var")


def test_52_statistics_are_part_of_a_base(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    inputs = Inputs((torch.randn(3, 4),), dynamic={0: {0: "batch"}})
    before = fingerprint(trace(module, inputs))
    module[1].running_var.mul_(2)
    assert fingerprint(trace(module, inputs)) != before


def test_labels_of_a_trained_head_in_another_order(tmp_path):
    saved(tmp_path, hf.BertConfig(**BERT, id2label={0: "negative", 1: "positive"}))
    refused(
        spec_of(tmp_path, labels=["positive", "negative"]),
        "trained with the labels in another order, negative, positive",
    )
    assert Session(spec_of(tmp_path, labels=["negative", "positive"])).plan()
    assert Session(spec_of(tmp_path, labels=["bad", "good"])).plan()


def test_8_a_tokenizer_without_masks(tmp_path):
    bert(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_input_names": ["input_ids"]}))
    session = Session(spec_of(tmp_path))
    assert "attention_mask" in session.prepare().train.column_names


def test_8_a_tokenizer_that_has_no_token_for_a_word(tmp_path):
    bert(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["unk_token"] = "[NONE]"
    file.write_text(json.dumps(content))
    spec = spec_of(tmp_path)
    (tmp_path / "rows.csv").write_text("text,label\n" + "word,0\nother,1\n" * 10)
    with pytest.raises(SpecError, match="its tokenizer can't read the rows"):
        Session(spec).prepare()
