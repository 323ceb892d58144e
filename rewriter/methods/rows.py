"""Rows before the sequence: prefixes on keys and values, prompts before the embeddings. (13)(14)"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rewriter.algebra import Affine, Dense, Operator, Pointwise, Prepend
from rewriter.methods.bottlenecks import pa
from rewriter.transforms import (
    Alpha,
    HiddenWidth,
    Length,
    Peft,
    Place,
    Pool,
    Rank,
    Schedule,
    Scope,
    Stored,
    kaiming_uniform,
    normal,
    same,
    transform,
)

Moves = Annotated[bool, Field(description="the rows take positions: tables of these are read so many further on")]


def _made(e: Tensor, a: Tensor, a_bias: Tensor, b: Tensor, b_bias: Tensor) -> Tensor:
    """tanh(E A + a) B + b."""
    return (Affine(Dense(a), a_bias) @ Pointwise("tanh") @ Affine(Dense(b), b_bias)).apply(e)


@dataclass(frozen=True)
class Fold(Schedule):
    """What the MLP makes is all that stays of it."""

    def settle(self, pool: Pool) -> None:
        for one in pool:
            one.sizes["folded"] = 1
            one.values["p"] = _made(*(one[leaf].detach() for leaf in ("e", "a", "a_bias", "b", "b_bias")))


def _of_layer(value: Tensor, at: Place) -> Tensor:
    """P (length, m) of a layer's keys or values out of (length, layers 2 m); keys at the positions of the tokens."""
    if value.ndim != 2 or value.shape[1] != at.count * 2 * at.m:
        shape, keys = " x ".join(map(str, value.shape)), f"{at.count} layers with keys of width {at.m}"
        raise ValueError(f"prompt_embeddings of {shape} is of another model: this one has {keys}")
    own = value.unflatten(1, (-1, 2, at.m))[:, at.number, int(at.kind == "values")]
    return own if at.turn is None else _turned(own, at.turn.mT)


def _turned(rows: Tensor, turn: Tensor) -> Tensor:
    return (rows.unflatten(-1, (-1, len(turn))) @ turn.to(rows)).flatten(-2)


def _of_all(values: Sequence[tuple[Tensor, Place]]) -> Tensor:
    order = sorted(values, key=lambda one: (one[1].number, one[1].kind))
    return torch.cat([value if at.turn is None else _turned(value, at.turn) for value, at in order], dim=1)


def _check_width(config: Mapping, tensors: Mapping) -> dict:
    layers, width, shape = config.get("num_layers"), config.get("token_dim"), tuple(tensors["p"].shape)
    if layers and width and shape[-1:] != (2 * layers * width,):  # Without them PEFT asks the model.
        raise ValueError(f"num_layers {layers}, token_dim {width}: prompt_embeddings is of shape {shape}")
    return {}


_MODEL = {"num_attention_heads", "num_layers", "token_dim"}  # What the base's configuration says.


@transform(
    "reconstruction",
    on=("keys", "values"),
    peft=Peft(
        "PREFIX_TUNING",
        {"p": Stored("prompt_embeddings", _of_layer, None, joined=_of_all)},
        {"length": "num_virtual_tokens"},
        read=_check_width,
        fixed={"num_transformer_submodules": (1, None)},
        ignored=frozenset({*_MODEL, "encoder_hidden_size", "prefix_projection"}),
        rows=True,
        moves="moves",
    ),
)
def prefix(w: Operator, site: Scope, *, length: Length, hidden: HiddenWidth = None, moves: Moves = False) -> Operator:
    """concat(P, xW) on keys and on values, P small and random at the start. (13)(14), ref. 56

    With `hidden`, P = tanh(E A + a) B + b while tuning, an MLP of that width; the adapter keeps P alone. With `moves`
    the rows take positions, as PEFT's do: tables of positions are read `length` further on.
    """
    if hidden is None or site.size("folded", 0):
        return Prepend(site.tuned("p", (length, site.m), normal(0.02)), w, moves)
    site.schedule(Fold())
    a, a_bias = site.tuned("a", (site.m, hidden), kaiming_uniform), site.tuned("a_bias", hidden, 0.0)
    b, b_bias = site.tuned("b", (hidden, site.m), kaiming_uniform), site.tuned("b_bias", site.m, 0.0)
    return Prepend(_made(site.tuned("e", (length, site.m), normal(1.0)), a, a_bias, b, b_bias), w, moves)


@transform(
    "reconstruction",
    on=("embeddings",),
    peft=Peft(
        "PROMPT_TUNING",
        {"p": same("prompt_embeddings")},
        {"length": "num_virtual_tokens"},
        ignored=frozenset(
            {
                *_MODEL,
                "encoder_hidden_size",
                "encoder_num_layers",
                "encoder_reparameterization_type",
                "num_transformer_submodules",
                "prompt_tuning_init",
                "prompt_tuning_init_text",
                "tokenizer_kwargs",
                "tokenizer_name_or_path",
            }
        ),
        rows=True,
        read_as=("P_TUNING",),  # What its encoder makes is all that is saved.
    ),
)
def prompt(w: Operator, site: Scope, *, length: Length) -> Operator:
    """concat(P, embeddings), P rows of the vocabulary at the start. (13)(14), ref. 27"""

    def rows(shape, generator):
        base = w
        while isinstance(base, Prepend):
            base = base.operand
        table = base.dense()
        return table[torch.randint(len(table), shape[:1], generator=generator).to(table.device)]

    return Prepend(site.tuned("p", (length, site.m), rows), w)


@transform("combination", on=("keys", "values", "feed_forward"))
def mam(w: Operator, site: Scope, *, length: Length, rank: Rank, alpha: Alpha = None) -> Operator:
    """`prefix` on the attention and `pa` beside the feed-forward of a layer. Ref. 18"""
    if site.kind == "feed_forward":
        return pa(w, site, rank=rank, alpha=alpha)
    return prefix(w, site, length=length)
