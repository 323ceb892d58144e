"""What a graph is valid for: each row of the cases, and a second member of its kind."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from rewriter import (
    Inputs,
    Rule,
    Session,
    SpecError,
    SubspanError,
    merge,
    plan,
    rewrite,
    trace,
    tuned_parameters,
)
from rewriter.graph.globs import find
from tests.cases.tiny import SIZES, image_spec, saved, spec_of, vision

NAMES = [f"layer.{i}.{name}.weight" for i in range(2) for name in ("query", "key", "value", "cross.query")]


@pytest.mark.parametrize(
    ("pattern", "idle"),
    [
        ("layer.*.{qqery,key,value}.weight", "'qqery'"),
        ("layer.{0,1,2}.key.weight", "'2'"),
        ("layer.*.{query,{key,valeu}}.weight", "'{key,valeu}'|'valeu'"),
        ("{layer,leyer}.*.{key,value}.weight", "'leyer'"),
    ],
    ids=["69-word", "69-number", "69-nested", "69-first"],
)
def test_69_every_alternative_matches_something(pattern, idle):
    with pytest.raises(SpecError, match=f"({idle}) in .* matches no parameter; nearest to "):
        find([pattern], NAMES, ())


@pytest.mark.parametrize(
    "pattern", ["layer.{0,1}.{query,cross.query}.weight", "{layer.0,layer.1}.{key,value}.weight", "**"]
)
def test_69_an_alternative_may_match_in_some_combinations_alone(pattern):
    names = [name for name in NAMES if name != "layer.1.cross.query.weight"]
    assert find([pattern], names, ())


class Turns(nn.Module):
    """Another branch for longer inputs."""

    def __init__(self, most=16):
        super().__init__()
        self.linear, self.most = nn.Linear(4, 4), most

    def forward(self, x):
        y = self.linear(x)
        return y if x.shape[1] <= self.most else -y


class Even(Turns):
    """Another branch for lengths that are odd: no range, but a guard."""

    def forward(self, x):
        y = self.linear(x)
        return y if x.shape[1] % 2 == 0 else -y


def linear_rules(*targets, apply=("full",)):
    return [Rule(target=target, apply=list(apply)) for target in targets]


@pytest.mark.parametrize(
    ("module", "length", "good", "bad", "said"),
    [
        (Turns(), 11, 16, 20, "x has size 20 in dimension 1; the trace is valid up to 16"),
        (Even(), 12, 20, 11, "the trace is not valid for these inputs"),
    ],
    ids=["21-range", "21-guard"],
)
def test_21_sizes_that_the_trace_is_not_valid_for(module, length, good, bad, said):
    traced = trace(module, Inputs(kwargs={"x": torch.randn(3, length, 4)}, dynamic={"x": {0: "batch", 1: "sequence"}}))
    tuned = rewrite(traced, plan(traced, linear_rules("linear.weight")))
    for model in (traced, tuned):
        x = torch.randn(2, good, 4)
        assert torch.allclose(model(x=x), module(x), atol=1e-6)
        with pytest.raises(SubspanError, match=said):
            model(x=torch.randn(2, bad, 4))
    assert torch.allclose(torch.compile(tuned, backend="eager")(x=x), module(x), atol=1e-6)


class Changes(nn.Module):
    """A forward that changes the module for ever."""

    def __init__(self):
        super().__init__()
        self.linear, self.mode = nn.Linear(4, 4), "sparse"

    def forward(self, x):
        if x.shape[1] < 100:
            self.mode = "full"
        return self.linear(x)


def test_22_tracing_leaves_the_module_as_it_was():
    module = Changes()
    module.linear.eval()
    trace(module, Inputs(kwargs={"x": torch.randn(3, 11, 4)}))
    assert module.mode == "sparse" and module.training and not module.linear.training


def test_22_bigbird_beyond_its_turn_is_refused(tmp_path):
    config = hf.BigBirdConfig(
        **SIZES,
        max_position_embeddings=512,
        block_size=4,
        num_random_blocks=1,
        attention_type="block_sparse",
        pad_token_id=0,
    )
    saved(tmp_path, config)
    spec = spec_of(tmp_path, target="**.query.weight")
    assert Session(spec).plan()
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"max_length": 64})})
    with pytest.raises(SubspanError, match=r"the model takes at most \d+ tokens"):
        Session(spec).plan()


class Normed(nn.Module):
    def __init__(self, dims=2):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4) if dims == 2 else nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 2)
        self.dims = dims

    def forward(self, x):
        y = self.first(x)
        y = self.norm(y) if self.dims == 2 else self.norm(y[:, :, None, None])[:, :, 0, 0]
        return self.last(y)


@pytest.mark.parametrize("dims", [2, 4], ids=["23-1d", "23-2d"])
def test_23_statistics_stay_those_of_the_base(dims):
    module = Normed(dims)
    before = copy.deepcopy(module.state_dict())
    traced = trace(module, Inputs(kwargs={"x": torch.randn(8, 4)}, dynamic={"x": {0: "batch"}}))
    tuned = rewrite(traced, plan(traced, linear_rules("first.weight", apply=[{"lora": {"rank": 2}}])))
    optimiser = torch.optim.SGD(tuned_parameters(tuned).values(), lr=0.1)
    tuned.train()
    for _ in range(4):
        tuned(x=torch.randn(8, 4) * 3 + 1).square().mean().backward()
        optimiser.step()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    x = torch.randn(5, 4)
    train, (_, evaluated) = tuned(x=x), (tuned.eval(), tuned(x=x))
    assert torch.allclose(train, evaluated)
    merge(tuned, module)
    assert torch.allclose(module.eval()(x), evaluated, atol=1e-6)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen.add_(1.0)
        return self.linear(x) + self.seen


class Functional(Counts):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        return F.batch_norm(self.linear(x), self.seen, self.variance, training=self.training)


class Copies(Counts):
    def forward(self, x):
        y = self.linear(x)
        if self.training:
            self.seen.copy_(y.mean())
        return y


@pytest.mark.parametrize("kind", [Counts, Functional, Copies], ids=lambda kind: f"23-{kind.__name__}")
def test_23_other_buffers_that_move_are_refused(kind):
    with pytest.raises(SubspanError, match="changes its buffer seen while it trains"):
        trace(kind(), Inputs(kwargs={"x": torch.randn(3, 4)}))


@pytest.mark.parametrize("kind", ["convnext", "resnet"], ids="24-{}".format)
@pytest.mark.parametrize("method", [{"hadapter": {"bottleneck": 4}}, {"pa": {"rank": 4}}], ids=["hadapter", "pa"])
def test_24_channels_first_is_refused(tmp_path, kind, method):
    spec = image_spec(tmp_path, vision(kind, 64), 64)
    target = {"convnext": "convnext.encoder.stages.*.layers.*", "resnet": "resnet.encoder.stages.*.layers.*"}[kind]
    spec = spec.model_copy(update={"rules": [Rule(target=target, apply=[method])]})
    with pytest.raises(
        SpecError,
        match=r"has its channels before other dimensions \((permute|conv2d|convolution)\)|no (attention or )?feed_forward",
    ):
        Session(spec).plan()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(4, 6)), 2.0

    def forward(self, x):
        return F.linear(x, self.w * self.scale)


@pytest.mark.parametrize(
    ("module", "x", "target", "op"),
    [
        (nn.ConvTranspose2d(8, 6, 3), torch.randn(2, 8, 5, 5), "weight", "conv_transpose2d"),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)),
            torch.randn(2, 3, 5, 5),
            "parametrizations.weight.original1",
            ".*norm.*",
        ),
        (Scaled(), torch.randn(2, 6), "w", "mul"),
        (nn.LSTM(4, 6), torch.randn(3, 2, 4), "weight_ih_l0", "lstm"),
        (nn.GRU(4, 6), torch.randn(3, 2, 4), "weight_hh_l0", "gru"),
    ],
    ids=["25-transposed", "25-weight-norm", "25-scaled", "25-lstm", "25-gru"],
)
@pytest.mark.parametrize("method", [{"lora": {"rank": 2}}, "ia3"], ids=["lora", "ia3"])
def test_25_weights_whose_reading_is_not_understood(module, x, target, op, method):
    traced = trace(module, Inputs(args=(x,)))
    with pytest.raises(SpecError, match=rf"how {target} is read is not understood \({op}\).*; use full"):
        plan(traced, linear_rules(target, apply=[method]))
    assert plan(traced, linear_rules(target)).trainable_parameters == dict(module.named_parameters())[target].numel()


@pytest.mark.parametrize(
    ("build", "target", "method", "said"),
    [
        (lambda: hf.DeepseekV3Config(**SIZES, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16), "model.layers.1", {"hadapter": {"bottleneck": 2}}, "parallel feed-forwards|found"),
        (lambda: hf.GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention", "full_attention"]), "model.layers.*.self_attn", {"prefix": {"length": 2}}, r"the softmax in model.layers.0.self_attn is none of queries times keys alone \("),
        (lambda: hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=50), "backbone.layers.*", {"hadapter": {"bottleneck": 2}}, r"specialized it to be a constant \(11\)"),
    ],
    ids=["26-shared-experts", "26-sinks", "26-mamba"],
)  # fmt: skip
def test_26_found_or_refused_with_the_reason(build, target, method, said):
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(build(), attn_implementation="eager")
    from rewriter import example_inputs

    try:
        traced = trace(model, example_inputs(model, "causal-lm"), ("eval",))
        assert plan(traced, linear_rules(target, apply=[method])).sites and "found" in said
    except SubspanError as error:
        assert re.search(said, str(error)), str(error)


class Softmaxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Two()

    def forward(self, x):
        return self.attention(x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (2, 4)).transpose(1, 2) for one in (self.q, self.k, self.v))
        first = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        second = (k @ q.transpose(-2, -1)).softmax(-1) @ v
        return (first + second).transpose(1, 2).flatten(-2)


def test_27_several_softmaxes_are_refused_by_name():
    traced = trace(Softmaxes(), Inputs(args=(torch.randn(2, 5, 8),)))
    with pytest.raises(SpecError, match="attention has several softmaxes; which of them attends is not known"):
        plan(traced, linear_rules("attention", apply=[{"prefix": {"length": 2}}]))


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.linear(x)
        return {"logits": y, "auxiliary": self.head(y)} if self.training else {"logits": y}


def test_28_an_output_structure_for_each_mode():
    module = Auxiliary()
    traced = trace(module, Inputs(kwargs={"x": torch.randn(3, 4)}))
    tuned = rewrite(traced, plan(traced, linear_rules("linear.weight")))
    x = torch.randn(3, 4)
    assert set(tuned.train()(x=x)) == {"logits", "auxiliary"}
    assert set(tuned.eval()(x=x)) == {"logits"}


class Reads(nn.Module):
    """A token table, attention with a padding mask of some name, and a head."""

    def __init__(self, mask="attention_mask"):
        super().__init__()
        self.table, self.layer, self.mask = nn.Embedding(20, 8), nn.Linear(8, 8), mask

    def forward(self, input_ids, **inputs):
        x = self.table(input_ids)
        keep = inputs[self.mask].bool()[:, None, None, :]
        h = x.unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(h, h, h, attn_mask=keep)
        return self.layer(y.transpose(1, 2).flatten(-2))


class Padded(Reads):
    def forward(self, input_ids, pad):
        return super().forward(input_ids, pad=pad)


def reads(module, name, dynamic=True):
    ids = torch.randint(20, (3, 11))
    axes = {key: {0: "batch", 1: "sequence"} for key in ("input_ids", name)}
    return trace(module, Inputs(kwargs={"input_ids": ids, name: torch.ones_like(ids)}, dynamic=axes if dynamic else {}))


class Masked(Reads):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask=attention_mask)


PROMPT = [Rule(target="table", apply=[{"prompt": {"length": 3}}])]


def test_29_a_prompt_needs_a_dynamic_length():
    with pytest.raises(SpecError, match="the model was traced for sequences of one length"):
        plan(reads(Masked(), "attention_mask", dynamic=False), PROMPT)
    assert plan(reads(Masked(), "attention_mask"), PROMPT).rows == 3


def test_30_a_mask_of_another_name():
    with pytest.raises(SpecError, match="what the input 'pad' is for them is not known"):
        plan(reads(Padded("pad"), "pad"), PROMPT)


@pytest.mark.parametrize(
    "chain",
    [[{"prefix": {"length": 3}}, {"prefix": {"length": 3}}], [{"prefix": {"length": 3}}, {"prefix": {"length": 2}}]],
    ids=["31-alike", "31-lengths"],
)
def test_31_prefixes_of_a_chain_all_learn(chain):
    config = hf.BertConfig(**SIZES, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    model = hf.BertForSequenceClassification(config)
    from rewriter import example_inputs

    traced = trace(model, example_inputs(model, "sequence-classification"))
    tuned = rewrite(traced, plan(traced, [Rule(target="bert.encoder.layer.*", apply=chain)], ["classifier.weight"]))
    ids = torch.randint(50, (3, 7))
    inputs = {name: torch.ones_like(ids) if "mask" in name else torch.zeros_like(ids) for name in tuned.input_names}
    tuned.train()(**{**inputs, "input_ids": ids}).logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tuned_parameters(tuned).values())


def test_31_prompts_of_a_chain_all_learn():
    traced = reads(Masked(), "attention_mask")
    tuned = rewrite(
        traced, plan(traced, [Rule(target="table", apply=[{"prompt": {"length": 3}}, {"prompt": {"length": 2}}])])
    )
    ids = torch.randint(20, (3, 7))
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tuned_parameters(tuned).values())


class Whole(nn.Module):
    def __init__(self, dtype=torch.int8):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 6).to(dtype), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.w.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64], ids=["32-int8", "32-int64"])
def test_32_whole_numbers_are_not_tuned(dtype):
    traced = trace(Whole(dtype), Inputs(args=(torch.randn(2, 6),)))
    with pytest.raises(SpecError, match=rf"w is stored in {str(dtype)[6:]}; floating weights are tuned"):
        plan(traced, linear_rules("w", apply=[{"lora": {"rank": 2}}]))


class Idle(nn.Module):
    """The loss sees the second layer alone, or none of both."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.two(x), self.one(x)


@pytest.mark.parametrize("target", ["one.weight", "{one,two}.weight"], ids=["33-alone", "33-among"])
def test_33_a_loss_that_does_not_reach_a_weight(target):
    from rewriter import allocate

    traced = trace(Idle(), Inputs(kwargs={"x": torch.randn(3, 4)}, dynamic={"x": {0: "batch"}}))
    found = plan(traced, [Rule(target=target, apply=[{"fish_mask": {"density": 0.5}}])])
    rows = [torch.randn(4) for _ in range(8)]
    with pytest.raises(SpecError, match=r"the loss does not depend on one.weight, so its gradients decide nothing"):
        allocate(
            traced, found, rows, lambda some: {"x": torch.stack(some)}, lambda model, batch: model(**batch)[0].sum()
        )


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(11, 4)

    def forward(self, x):
        return self.linear(x)


def test_34_the_line_that_says_what_is_wrong():
    with pytest.raises(
        SubspanError, match=r"Fixed: You marked .* as dynamic but your code specialized it to be a constant \(11\)\.$"
    ):
        trace(Fixed(), Inputs(kwargs={"x": torch.randn(3, 11)}, dynamic={"x": {0: "batch", 1: "sequence"}}))
