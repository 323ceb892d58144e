"""Tiny models of several architectures on disk, and specs over them."""

import torch
import transformers as hf
from PIL import Image

from rewriter import Spec
from tests.tiny import make_tokenizer, save_csv

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
BERT = {**SIZES, "pad_token_id": 0}
LLAMA = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 3, "pad_token_id": None}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 50}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50,
}  # fmt: skip


def saved(folder, config, task="SequenceClassification", tokenizer=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = getattr(hf, f"AutoModelFor{task}" if task else "AutoModel").from_config(config)
    model.to(dtype).save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def spec_of(folder, task="sequence-classification", target="**", data=True, **model):
    file = save_csv(folder / "rows.csv") if data else None
    columns = {"text": "text"} if task == "causal-lm" else {"text": "text", "label": "label"}
    return Spec(
        version=1,
        model={"name": str(folder), "task": task, **model},
        data={"format": "csv", "files": str(file), "columns": columns, "split": {"validation": 8}, "max_length": 12}
        if data
        else None,
        rules=[{"target": target, "apply": ["full"]}],
    )


def task_spec(folder, config, auto, task, target, dtype=torch.float32, **sections):
    """A spec with LoRA on a saved model, with forty short rows; the label is a text for seq2seq-lm, else 0 or 1."""
    saved(folder / "model", config, auto, dtype=dtype)
    words = ["good film plot", "bad the plot was bad", "fine film", "awful and poor was the film"]
    label = lambda i: words[(i + 1) % 4] if task == "seq2seq-lm" else i % 2  # noqa: E731
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"{words[i % 4]},{label(i)}\n" for i in range(40)))
    columns = {"text": "text"} | ({} if task == "causal-lm" else {"label": "label"})
    data = {"format": "csv", "files": str(folder / "rows.csv"), "columns": columns, "split": {"validation": 8}}
    return Spec.model_validate(
        {
            "version": 1,
            "model": {"name": str(folder / "model"), "task": task},
            "data": {**data, "max_length": 12},
            "rules": [{"target": target, "apply": [{"lora": {"rank": 2}}]}],
            **sections,
        }
    )


IMAGE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def vision(kind, size, channels=3):
    return {
        "vit": lambda: hf.ViTConfig(**IMAGE, image_size=size, patch_size=8, num_channels=channels),
        "resnet": lambda: hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=channels),
        "segformer": lambda: hf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_channels=channels,
        ),
        "clip": lambda: hf.CLIPConfig(
            vision_config={**IMAGE, "image_size": size, "patch_size": 8, "num_channels": channels},
            text_config={**IMAGE, "vocab_size": 50},
        ),
        "siglip": lambda: hf.SiglipConfig(
            vision_config={**IMAGE, "image_size": size, "patch_size": 8, "num_channels": channels},
            text_config={**IMAGE, "vocab_size": 50},
        ),
        "convnext": lambda: hf.ConvNextConfig(
            num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=size, num_channels=channels
        ),
    }[kind]()


def image_spec(folder, config, size, mean=(0.5, 0.5, 0.5)):
    saved(folder, config, "ImageClassification", tokenizer=False)
    hf.ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=list(mean), image_std=list(mean)
    ).save_pretrained(folder)
    return Spec(
        version=1,
        model={"name": str(folder), "task": "image-classification", "labels": ["cat", "dog"]},
        data={
            "format": "imagefolder",
            "files": str(pictures(folder / "pictures", 8)),
            "columns": {"image": "image", "label": "label"},
            "split": {"validation": 2},
        },
        rules=[{"target": "**", "apply": ["full"]}],
        train={"max_steps": 1, "batch_size": 2},
    )


def pictures(folder, count=4):
    for i in range(count):
        place = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(place)
    return folder
