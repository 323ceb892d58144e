"""PEFT as the oracle: the same tensors give the same outputs and gradients."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rewriter import Inputs, Rule, merge, plan, rewrite, trace, tuned_parameters
from tests.architectures import build, inputs_of

N, M, RANK, ALPHA = 12, 10, 3, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


class Net(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.first, self.second = nn.Linear(N, M, bias=bias), nn.Linear(M, N, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


CASES = {
    "lora": (
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"]),
        {"lora": {"rank": RANK, "alpha": ALPHA}},
        {"a": "lora_A.default.weight", "b": "lora_B.default.weight"},
    ),
    "dora": (
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["first", "second"]),
        {"dora": {"rank": RANK, "alpha": ALPHA}},
        {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"},
    ),
    "ia3": (
        peft.IA3Config(target_modules=["first", "second"], feedforward_modules=[]),
        "ia3",
        {"l": "ia3_l.default"},
    ),
    "ssl": (
        peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["first", "second"]),
        "ssl",
        {"l": "ia3_l.default"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_and_gradients(name):
    config, step, leaves = CASES[name]
    # PEFT's (IA)3 scales the bias too; (10) scales W alone, so they agree on linears without a bias.
    net = Net(bias=name != "ia3").double()
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    graph = trace(net, Inputs(args=(torch.zeros(4, N, dtype=torch.float64),), dynamic={0: {0: "batch"}}))
    ours = rewrite(graph, plan(graph, [Rule(target="{first,second}.weight", apply=[step])]))
    mine, their = tuned_parameters(ours), dict(theirs.base_model.model.named_parameters())
    assert len(mine) == sum(p.requires_grad for p in their.values())
    pairs = []
    for layer in ("first", "second"):
        for leaf, suffix in leaves.items():
            p, q = mine[f"{layer}.weight.{name}.{leaf}"], their[f"{layer}.{suffix}"]
            with torch.no_grad():
                q.copy_(q + 0.3 * torch.randn_like(q))
                p.copy_(q.reshape(-1) if p.ndim == 1 else q.T)
            pairs.append((p, q))
    x = torch.randn(5, N, dtype=torch.float64)
    weights = torch.randn(5, N, dtype=torch.float64)
    ours.train()
    theirs.train()
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    (ours(x) * weights).sum().backward()
    (theirs(x) * weights).sum().backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad.reshape(-1) if p.ndim == 1 else q.grad.T, **CLOSE)
    merge(ours, net)
    torch.testing.assert_close(net(x), theirs.eval().merge_and_unload()(x), **CLOSE)


def same(value):
    return value


def transposed(value):
    return value.T


def skew(value):
    """Upper triangles of the skew parts of square blocks."""
    half = 0.5 * (value - value.transpose(-2, -1))
    rows, columns = torch.triu_indices(value.shape[-1], value.shape[-1], 1)
    return half[..., rows, columns].flatten(0, 1)


BOTH = {"target_modules": ["first", "second"]}
# PEFT's BOFT has one butterfly factor where it has no CUDA extension; more of them: tests/test_transforms.py.
# Method -> (PEFT's configuration, the spec's step, tuned leaf -> (PEFT's name, how its tensor is seen as ours)).
FAMILY = {
    "vera": (
        peft.VeraConfig(r=RANK, **BOTH),
        {"vera": {"rank": RANK}},
        {"d": ("vera_lambda_d.default", same), "l": ("vera_lambda_b.default", same)},
    ),
    "loha": (
        peft.LoHaConfig(r=RANK, alpha=ALPHA, **BOTH),
        {"loha": {"rank": RANK, "alpha": ALPHA}},
        {
            "a1": ("hada_w1_b.default", transposed), "b1": ("hada_w1_a.default", transposed),
            "a2": ("hada_w2_b.default", transposed), "b2": ("hada_w2_a.default", transposed),
        },
    ),
    "lokr": (
        peft.LoKrConfig(r=2, alpha=ALPHA, **BOTH),
        {"lokr": {"rank": 2, "alpha": ALPHA}},
        {
            "c": ("lokr_w1.default", transposed),
            "a": ("lokr_w2_b.default", transposed), "b": ("lokr_w2_a.default", transposed),
        },
    ),
    "hra": (peft.HRAConfig(r=4, **BOTH), {"hra": {"rank": 4}}, {"u": ("hra_u.default", same)}),
    "oft": (
        peft.OFTConfig(r=0, oft_block_size=2, use_cayley_neumann=False, **BOTH),
        {"oft": {"block": 2}},
        {"q": ("oft_R.default.weight", same)},
    ),
    "boft": (
        peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=1, **BOTH),
        {"boft": {"block": 2, "factors": 1}},
        {"q": ("boft_R.default", skew), "l": ("boft_s.default", lambda value: value.squeeze(-1))},
    ),
    "delora": (
        peft.DeloraConfig(r=RANK, **BOTH),
        {"delora": {"rank": RANK, "bound": 15.0}},
        {
            "a": ("delora_A.default", transposed), "b": ("delora_B.default", transposed),
            "c": ("delora_lambda.default", lambda value: value.reshape(1, 1)),
        },
    ),
    "road": (
        peft.RoadConfig(variant="road_1", group_size=2, **BOTH),
        "road",
        {"angle": ("road_theta.default", same), "length": ("road_alpha.default", same)},
    ),
    "miss": (peft.MissConfig(r=RANK, **BOTH), {"miss": {"rank": RANK}}, {"d": ("miss_block.default", same)}),
    "randlora": (
        peft.RandLoraConfig(r=RANK, randlora_alpha=ALPHA, **BOTH),
        {"randlora": {"rank": RANK, "alpha": ALPHA}},
        {"d": ("randlora_lambda.default", same), "g": ("randlora_gamma.default", same)},
    ),
    "fourierft": (
        peft.FourierFTConfig(n_frequency=20, scaling=30.0, **BOTH),
        {"fourierft": {"frequencies": 20, "scale": 30.0}},
        {"d": ("fourierft_spectrum.default", same)},
    ),
    "pissa": (
        peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="pissa", **BOTH),
        {"pissa": {"rank": RANK}},
        {"a": ("lora_A.default.weight", transposed), "b": ("lora_B.default.weight", transposed)},
    ),
    "hira": (
        peft.HiraConfig(r=RANK, **BOTH),
        {"hira": {"rank": RANK}},
        {"a": ("hira_A.default", transposed), "b": ("hira_B.default", transposed)},
    ),
    "shira": (peft.ShiraConfig(r=2, **BOTH), {"shira": {"rank": 2}}, {"d": ("shira_weight.default", same)}),
    "frod": (
        peft.FrodConfig(sparse_rate=0.1, progressbar=False, target_modules=["second"]),
        {"frod": {"density": 0.1}},
        {"t": ("frod_lambda_l.default", same), "d": ("frod_lambda_s_values.default", same)},
    ),
    "gralora": (
        peft.GraloraConfig(r=4, alpha=ALPHA, gralora_k=2, **BOTH),
        {"gralora": {"rank": 4, "alpha": ALPHA, "blocks": 2}},
        {"a": ("gralora_A.default", same), "b": ("gralora_B.default", same)},
    ),
    "c3a": (peft.C3AConfig(block_size=2, **BOTH), {"c3a": {"block": 2}}, {"c": ("c3a_kernel.default", same)}),
    "deft": (
        peft.DeftConfig(r=RANK, alpha=ALPHA, **BOTH),
        {"deft": {"rank": RANK, "alpha": ALPHA}},
        {"p": ("deft_P.default", same), "r": ("deft_R.default", transposed)},
    ),
    "psoft": (
        peft.PsoftConfig(r=4, psoft_alpha=4, **BOTH),
        {"psoft": {"rank": 4}},
        {
            "q": ("psoft_R.default.weight", lambda value: value.reshape(1, -1)),
            "a": ("psoft_R.default.vector_a", same), "b": ("psoft_R.default.vector_b", same),
        },
    ),
    "peanut": (
        peft.PeanutConfig(r=RANK, depth=1, **BOTH),
        {"peanut": {"rank": RANK, "depth": 1}},
        {
            "a": ("peanut_A.default.weight", transposed), "b": ("peanut_B.default.weight", transposed),
            "encoder_0": ("peanut_encoders.default.0.weight", transposed),
            "decoder_0": ("peanut_decoders.default.0.weight", transposed),
        },
    ),
    "waveft": (
        peft.WaveFTConfig(n_frequency=20, scaling=5.0, **BOTH),
        {"waveft": {"coefficients": 20, "scale": 5.0}},
        {"d": ("waveft_spectrum.default", same)},
    ),
    "super_tuning": (
        peft.SupertuningConfig(sparsity=0.875, r=RANK, lora_alpha=ALPHA, **BOTH),
        {"super_tuning": {"density": 0.125, "rank": RANK, "alpha": ALPHA}},
        {
            "d": ("supertuning_values.default", same),
            "a": ("supertuning_lora_A.default.weight", transposed), "b": ("supertuning_lora_B.default.weight", transposed),
        },
    ),
    "glora": (
        peft.GloraConfig(r=RANK, **BOTH),
        {"glora": {"rank": RANK}},
        {
            "a1": ("glora_A.default.Xu", transposed), "b1": ("glora_A.default.Xd", transposed),
            "a2": ("glora_B.default.Xu", transposed), "b2": ("glora_B.default.Xd", transposed),
        },
    ),
}  # fmt: skip


def take_constants(name, theirs, ours):
    """PEFT's frozen random tensors, in ours."""
    buffers = dict(ours.named_buffers())
    for layer, (n, m) in {"first": (N, M), "second": (M, N)}.items():
        at = f"subspan.frozen.{name}."
        if name == "vera":
            buffers[f"{at}a_{n}x{RANK}"].copy_(theirs.base_model.vera_A["default"][:, :n].T)
            buffers[f"{at}b_{RANK}x{m}"].copy_(theirs.base_model.vera_B["default"][:m].T)
        if name == "randlora":
            bases, short = -(-min(n, m) // RANK), min(n, m)
            buffers[f"{at}a_{RANK}x1x{short}"].copy_(theirs.base_model.randlora_A["default"][:, :1, :short])
            b = theirs.base_model.randlora_B["default"][: max(n, m), :bases].flatten(1)
            buffers[f"{at}b_{max(n, m)}x{bases * RANK}"].copy_(b)
        layer_of = lambda: getattr(theirs.base_model.model, layer)  # noqa: B023, E731
        own = f"subspan.{layer}.weight.{name}."
        if name == "shira":
            rows, columns = layer_of().shira_indices["default"]
            buffers[f"{own}indices"].copy_(columns * m + rows)
        if name == "waveft":
            rows, columns = layer_of().waveft_indices["default"]
            # Their top right quarter holds the rows' details, ours the columns'.
            other = (rows < m // 2) != (columns < n // 2)
            rows, columns = (rows + other * (m // 2)) % m, (columns + other * (n // 2)) % n
            buffers[f"{own}indices"].copy_(columns * m + rows)
        if name == "frod" and layer == "second":
            one = layer_of()
            buffers[f"{own}u"].copy_(one.frod_V["default"])
            buffers[f"{own}vt"].copy_(one.frod_U["default"].T)
            rows, columns = one.frod_s_indices["default"]
            buffers[f"{own}indices"].copy_(columns * n + rows)
        if name == "psoft":
            a, b = layer_of()._psoft_A_cache["default"], layer_of()._psoft_B_cache["default"]
            buffers[f"{own}u"][:, :4] = a.T
            buffers[f"{own}vt"][:4] = (b / buffers[f"{own}s"][:4]).T
        if name == "fourierft":
            rows, columns = getattr(theirs.base_model.model, layer).indices["default"]
            buffers[f"subspan.{layer}.weight.fourierft.indices"].copy_(columns * m + rows)


@pytest.mark.parametrize("name", FAMILY)
def test_the_wider_family(name):
    config, step, leaves = FAMILY[name]
    # RoAD and GLoRA change the bias too; ours are of W alone, so they agree on linears without a bias.
    net = Net(bias=name not in ("road", "glora")).float().double()
    single = name in ("pissa", "psoft")
    theirs = peft.get_peft_model(copy.deepcopy(net).float() if single else copy.deepcopy(net), config).double()
    graph = trace(net, Inputs(args=(torch.zeros(4, N, dtype=torch.float64),), dynamic={0: {0: "batch"}}))
    layers = sorted(config.target_modules)
    ours = rewrite(graph, plan(graph, [Rule(target=[f"{layer}.weight" for layer in layers], apply=[step])]))
    mine, their = tuned_parameters(ours), dict(theirs.base_model.model.named_parameters())
    assert len(mine) == sum(p.requires_grad for p in their.values())
    take_constants(name, theirs, ours)
    pairs = []
    for layer in layers:
        for leaf, (suffix, seen) in leaves.items():
            p, q = mine[f"{layer}.weight.{name}.{leaf}"], their[f"{layer}.{suffix}"]
            with torch.no_grad():
                q.copy_(q + 0.3 * torch.randn_like(q))
                p.copy_(seen(q))
            pairs.append((p, q, seen))
    x, weights = torch.randn(5, N, dtype=torch.float64), torch.randn(5, N, dtype=torch.float64)
    ours.train()
    theirs.train()
    # Some of PEFT's compute in float32, or start from factors in float32.
    rough = ("fourierft", "pissa", "psoft", "c3a", "deft", "frod", "waveft")
    close = {"rtol": 2e-5, "atol": 2e-5} if name in rough else CLOSE
    torch.testing.assert_close(ours(x), theirs(x), **close)
    (ours(x) * weights).sum().backward()
    (theirs(x) * weights).sum().backward()
    for p, q, seen in pairs:
        # A skew block's entry above the diagonal stands for two of PEFT's, each with half the weight.
        expected = 2 * seen(q.grad) if seen is skew else seen(q.grad)
        torch.testing.assert_close(p.grad, expected, **close)
    merge(ours, net)
    torch.testing.assert_close(net(x), theirs(x), **close)


def test_adamss():
    """Their clusters of outputs and their basis, in ours; a cluster's tensors are rows of ours."""
    net, rank, clusters = Net(bias=False).float().double(), 4, 2
    config = peft.AdamssConfig(r=rank, num_subspaces=clusters, subspace_rank=1, **BOTH)
    theirs = peft.get_peft_model(copy.deepcopy(net), config).double()
    graph = trace(net, Inputs(args=(torch.zeros(4, N, dtype=torch.float64),), dynamic={0: {0: "batch"}}))
    step = {"adamss": {"rank": rank, "subspaces": clusters, "subspace_rank": 1}}
    ours = rewrite(graph, plan(graph, [Rule(target=["first.weight", "second.weight"], apply=[step])])).train()
    mine, buffers = tuned_parameters(ours), dict(ours.named_buffers())
    pairs = []
    for layer in ("first", "second"):
        one, own = getattr(theirs.base_model.model, layer), f"{layer}.weight.adamss."
        a, b = one.adamss_A["default"], one.adamss_B["default"]
        buffers[f"subspan.{own}u"][:, :rank] = one.adamss_newB["default"].T
        groups = [one.seg_result["default"][i].long() for i in range(clusters)]
        with torch.no_grad():
            for i, group in enumerate(groups):
                buffers[f"subspan.{own}cluster"][group] = i
                a[i].normal_()
                b[i].normal_()
                mine[f"{own}a"][i] = a[i].T
                mine[f"{own}b"][group] = b[i]
        pairs += [(mine[f"{own}a"], [lambda g, i=i: g[i] for i in range(clusters)], a, transposed)]
        pairs += [(mine[f"{own}b"], [lambda g, group=group: g[group] for group in groups], b, same)]
    x, weights = torch.randn(5, N, dtype=torch.float64), torch.randn(5, N, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    (ours(x) * weights).sum().backward()
    (theirs(x) * weights).sum().backward()
    for p, parts, tensors, seen in pairs:
        for part, q in zip(parts, tensors, strict=True):
            torch.testing.assert_close(part(p.grad), seen(q.grad), **CLOSE)
    merge(ours, net)
    torch.testing.assert_close(net(x), theirs(x), **CLOSE)


def test_tinylora():
    """Their singular vectors, which are rounded to float32, and projections, which they draw for each layer, in ours."""
    net = Net(bias=True).float().double()
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.TinyLoraConfig(r=2, u=5, target_modules=["first"])).double()
    graph = trace(net, Inputs(args=(torch.zeros(4, N, dtype=torch.float64),), dynamic={0: {0: "batch"}}))
    rule = Rule(target="first.weight", apply=[{"tinylora": {"rank": 2, "numbers": 5}}])
    ours = rewrite(graph, plan(graph, [rule])).train()
    (mine,), buffers, one = tuned_parameters(ours).values(), dict(ours.named_buffers()), theirs.base_model.model.first
    (their,) = [p for p in theirs.parameters() if p.requires_grad]
    root = buffers["subspan.first.weight.tinylora.s"][:2].sqrt()
    buffers["subspan.first.weight.tinylora.u"][:, :2] = one.tinylora_A["default"].T / root
    buffers["subspan.first.weight.tinylora.vt"][:2] = (one.tinylora_B["default"] / root).T
    buffers["subspan.first.weight.tinylora.p_5x2x2"].copy_(one.tinylora_P["default"].transpose(1, 2))
    with torch.no_grad():
        mine.copy_(their.normal_())
    x, weights = torch.randn(5, N, dtype=torch.float64), torch.randn(5, N, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    (ours(x) * weights).sum().backward()
    (theirs(x) * weights).sum().backward()
    torch.testing.assert_close(mine.grad, their.grad, **CLOSE)


def test_adalora_forward_and_penalty():
    """PEFT's penalty is a mean of norms, (25) a sum of squares: with one factor orthogonal it is half the other's."""
    net = nn.Sequential(nn.Linear(N, M)).double()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x):
            return SequenceClassifierOutput(loss=x.new_zeros(()), logits=self.net(x))

    config = peft.AdaLoraConfig(
        init_r=RANK, lora_alpha=ALPHA, target_modules=["net.0"], total_step=10, orth_reg_weight=1.0
    )
    theirs = peft.get_peft_model(Named(), config).double()
    graph = trace(net, Inputs(args=(torch.zeros(4, N, dtype=torch.float64),), dynamic={0: {0: "batch"}}))
    step = {"adalora": {"rank": RANK, "alpha": ALPHA, "coefficient": 0.25}}
    ours = rewrite(graph, plan(graph, [Rule(target="0.weight", apply=[step])])).train()
    mine, their = tuned_parameters(ours), dict(theirs.base_model.model.named_parameters())
    names = {leaf: next(n for n in their if f"lora_{part}" in n) for leaf, part in zip("abd", "ABE", strict=True)}
    for leaf, name in names.items():
        with torch.no_grad():
            value = their[name].normal_()
            mine[f"0.weight.adalora.{leaf}"].copy_(value.reshape(-1) if leaf == "d" else value.T)
    x = torch.randn(5, N, dtype=torch.float64)
    # PEFT divides by rank + 1e-5.
    torch.testing.assert_close(ours(x), theirs(x=x).logits, rtol=1e-5, atol=1e-5)
    expected = 0.0
    for leaf in "ab":
        before = their[names[leaf]].detach().clone()
        flat = before if leaf == "b" else before.T
        with torch.no_grad():
            orthogonal = torch.linalg.qr(flat)[0]
            their[names[leaf]].copy_(orthogonal if leaf == "b" else orthogonal.T)
            expected += 0.25 * float(2 * theirs.base_model.forward(x=x).loss) ** 2
            their[names[leaf]].copy_(before)
    assert float(ours.penalties["mpc_o"].detach()) == pytest.approx(expected, rel=1e-9)


PROMPTED = {
    "llama": ("CAUSAL_LM", "model.embed_tokens"),
    "gpt2": ("CAUSAL_LM", "transformer.wte"),
    "bert": ("SEQ_CLS", "bert.embeddings"),
    "roberta": ("SEQ_CLS", "roberta.embeddings"),
    "distilbert": ("SEQ_CLS", "distilbert.embeddings"),
}


@pytest.mark.parametrize("name", PROMPTED)
def test_prompt(name):
    """PEFT's prompt before the embeddings; PEFT's logits of a causal model run along the prompt too, ours don't."""
    model, inputs = build(name)
    length, (task, target) = 5, PROMPTED[name]
    config = peft.PromptTuningConfig(
        task_type=task, num_virtual_tokens=length, token_dim=16, num_layers=2, num_attention_heads=2
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    graph = trace(model, inputs, modes=("eval",))
    ours = rewrite(graph, plan(graph, [Rule(target=target, apply=[{"prompt": {"length": length}}])])).eval()
    table = theirs.prompt_encoder["default"].embedding.weight
    (mine,) = tuned_parameters(ours).values()
    with torch.no_grad():
        table.data = torch.randn(table.shape, dtype=torch.float64)
        mine.copy_(table)
    x = inputs_of(name, inputs, 3, 9)
    expected = theirs(**x).logits
    torch.testing.assert_close(ours(**x).logits, expected[:, length:] if task == "CAUSAL_LM" else expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_prefix(name):
    """PEFT's prefix is a key-value cache, which moves the positions of the tokens; ours are given the same ones."""
    model, inputs = build(name)
    length = 5
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    ).eval()
    positions = torch.arange(11).expand(3, -1)
    example = Inputs(
        kwargs={**inputs.kwargs, "position_ids": positions.clone()},
        dynamic={**inputs.dynamic, "position_ids": {0: "batch", 1: "sequence"}},
    )
    graph = trace(model, example)
    ours = rewrite(graph, plan(graph, [Rule(target="model.layers.*", apply=[{"prefix": {"length": length}}])])).eval()
    table = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.data = torch.randn(table.shape, dtype=torch.float64)
        layers = table.view(length, 2, 2, -1)  # (length, layer, key or value, heads x head width)
        for i in range(2):
            for j, kind in enumerate(("keys", "values")):
                tuned_parameters(ours)[f"model.layers.{i}.self_attn.{kind}.prefix.p"].copy_(layers[:, i, j])
    x = inputs_of(name, inputs, 3, 9)
    shifted = (torch.arange(9) + length).expand(3, -1)
    torch.testing.assert_close(ours(**x, position_ids=shifted).logits, theirs(**x).logits, **CLOSE)
