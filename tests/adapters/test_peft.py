"""Folders of PEFT: what it saves computes the same here, and what is saved here computes the same there."""

import copy
from functools import cache

import peft
import pytest
import torch

from rewriter import load_adapter, save_adapter, trace
from rewriter.adapters.from_peft import tuned_from
from rewriter.adapters.to_peft import save_peft
from tests.architectures import build, inputs_of

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
# PEFT computes these in float32, or starts from factors in float32.
ROUGH = {"fourierft", "pissa", "psoft", "c3a", "deft", "waveft"}
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
LAYERS = {
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}
SQUARE = {"bert": ["query", "value"], "llama": ["q_proj", "o_proj"]}
# Name -> (configuration, its options, layers, transform).
CONFIGS = {
    "lora": (peft.LoraConfig, {"r": 3, "lora_alpha": 6}, LAYERS, "lora"),
    "lora, rslora": (peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_rslora": True}, LAYERS, "lora"),
    "lora, patterns": (
        peft.LoraConfig,
        {
            "r": 3,
            "lora_alpha": 6,
            "rank_pattern": {"query": 5, "layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"value": 1},
        },
        {name: LAYERS[name] for name in ("bert", "llama")},
        "lora",
    ),
    "lora, saved head": (
        peft.LoraConfig,
        {
            "r": 3,
            "lora_alpha": 6,
            "modules_to_save": ["classifier"],
            "layers_to_transform": [1],
            "layers_pattern": "layer",
        },
        {"bert": ["query"]},
        "lora",
    ),
    "lora, embeddings": (
        peft.LoraConfig,
        {"r": 3, "lora_alpha": 6},
        {"bert": ["word_embeddings", "query"], "llama": ["embed_tokens", "q_proj"]},
        "lora",
    ),
    "dora": (peft.LoraConfig, {"r": 3, "lora_alpha": 6, "use_dora": True}, LAYERS, "dora"),
    "pissa": (peft.LoraConfig, {"r": 3, "lora_alpha": 3, "init_lora_weights": "pissa"}, LAYERS, "pissa"),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}, LAYERS, "ia3"),
    "ia3, feed-forward": (
        peft.IA3Config,
        {"feedforward_modules": ["down_proj"]},
        {"llama": ["k_proj", "v_proj", "down_proj"]},
        "ia3",
    ),
    "adalora": (
        peft.AdaLoraConfig,
        {"init_r": 4, "lora_alpha": 6, "total_step": 10},
        {name: LAYERS[name] for name in ("bert", "llama")},
        "adalora",
    ),
    "vera": (peft.VeraConfig, {"r": 3}, LAYERS, "vera"),
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 6}, LAYERS, "loha"),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 6}, LAYERS, "lokr"),
    "lokr, factor": (peft.LoKrConfig, {"r": 1, "alpha": 2, "decompose_factor": 2}, LAYERS, "lokr"),
    "hra": (peft.HRAConfig, {"r": 4}, LAYERS, "hra"),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}, LAYERS, "oft"),
    "oft, series": (peft.OFTConfig, {"r": 0, "oft_block_size": 8}, LAYERS, "oft"),
    "boft": (peft.BOFTConfig, {"boft_block_size": 2, "boft_n_butterfly_factor": 1}, LAYERS, "boft"),
    "delora": (peft.DeloraConfig, {"r": 3}, LAYERS, "delora"),
    "road": (peft.RoadConfig, {"group_size": 2}, LAYERS, "road"),
    "road, groups": (peft.RoadConfig, {"group_size": 8}, {n: LAYERS[n] for n in ("bert", "llama")}, "road"),
    "miss": (peft.MissConfig, {"r": 3}, LAYERS, "miss"),
    "randlora": (peft.RandLoraConfig, {"r": 3, "randlora_alpha": 6}, LAYERS, "randlora"),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 20, "scaling": 30.0}, LAYERS, "fourierft"),
    "hira": (peft.HiraConfig, {"r": 3}, LAYERS, "hira"),
    "shira": (peft.ShiraConfig, {"r": 2}, LAYERS, "shira"),
    "gralora": (peft.GraloraConfig, {"r": 4, "alpha": 6, "gralora_k": 2}, LAYERS, "gralora"),
    "c3a": (peft.C3AConfig, {"block_size": 8}, LAYERS, "c3a"),
    "deft": (peft.DeftConfig, {"r": 3, "alpha": 6}, LAYERS, "deft"),
    "psoft": (peft.PsoftConfig, {"r": 4, "psoft_alpha": 4}, LAYERS, "psoft"),
    "peanut": (peft.PeanutConfig, {"r": 3, "depth": 1}, LAYERS, "peanut"),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 20, "scaling": 5.0}, LAYERS, "waveft"),
    "super_tuning": (peft.SupertuningConfig, {"sparsity": 0.875, "r": 3, "lora_alpha": 6}, LAYERS, "super_tuning"),
    "glora": (peft.GloraConfig, {"r": 3}, LAYERS, "glora"),
    "prompt": (
        peft.PromptTuningConfig,
        {"num_virtual_tokens": 5, "token_dim": 16, "num_layers": 2, "num_attention_heads": 2},
        {"bert": None},
        "prompt",
    ),
}
# PEFT has these on linear layers alone.
NO_CONV1D = {
    "boft", "oft", "oft, series", "hra", "loha", "lokr", "lokr, factor", "delora", "road", "miss", "randlora", "hira",
    "shira", "gralora", "c3a", "deft", "psoft", "peanut", "waveft", "super_tuning", "glora",
}  # fmt: skip
CASES = [
    (name, arch)
    for name, (_, _, layers, _) in CONFIGS.items()
    for arch in layers
    if not (arch == "gpt2" and name in NO_CONV1D)
]


def theirs(name, arch):
    kind, options, layers, _ = CONFIGS[name]
    more = {} if layers[arch] is None else {"target_modules": layers[arch]}
    torch.manual_seed(0)
    base = build(arch)[0].float()
    model = peft.get_peft_model(copy.deepcopy(base), kind(**options, **more, task_type=TASKS[arch]))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return base, model.eval()


@cache
def frozen(arch):
    """Example inputs and a traced model, in float64 with weights of float32."""
    model, inputs = build(arch)
    return inputs, trace(model.float().double(), inputs)


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_there_and_back(name, arch, tmp_path):
    """Logits, gradients where the same tensors are tuned, our own adapter's file, and PEFT's folder again."""
    base, their = theirs(name, arch)
    close = {"rtol": 5e-5, "atol": 5e-5} if name in ROUGH else CLOSE
    their.save_pretrained(tmp_path / "peft")
    inputs, model = frozen(arch)
    tuned, _ = tuned_from(model, tmp_path / "peft")
    assert CONFIGS[name][3] in {one.name for site in tuned.plan.sites for one, _ in site.chain}
    batch = inputs_of(arch, inputs, 3, 9)
    expected = their.double()(**batch).logits
    torch.testing.assert_close(tuned.eval()(**batch).logits, expected, **close)
    save_adapter(tuned, tmp_path / "ours")
    again = load_adapter(model, tmp_path / "ours").eval()
    torch.testing.assert_close(again(**batch).logits, expected, **close)
    save_peft(again, tmp_path / "again", task_type=TASKS[arch])
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval().double()
    torch.testing.assert_close(back(**batch).logits, expected, **close)
