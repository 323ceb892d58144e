"""Every method in float64: apply equals x @ dense, so do gradients; start values; counts by TRANSFORMS' formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter import SpecError
from rewriter.algebra import Concat, Dense
from rewriter.transforms import TRANSFORMS, compose, decompose, initial_value


def lokr_count(n, m, r):
    p, q = (next(i for i in range(int(width**0.5), 0, -1) if width % i == 0) for width in (n, m))
    n, m = n // p, m // q
    return p * q + (r * (n + m) if r < max(n, m) / 2 else n * m)


# Method -> (options, count of a site of n inputs, m outputs and rank r). All are the identity at the start.
COUNTS = {
    "full": ((), lambda n, m, r: n * m),
    "xattn": ((), lambda n, m, r: n * m),
    "diff_pruning": ((), lambda n, m, r: 2 * n * m),
    "pafi": ((), lambda n, m, r: max(1, round(0.005 * n * m))),
    "adalora": (("rank", "alpha"), lambda n, m, r: r * (n + m) + r),
    "sam_parser": ((), lambda n, m, r: min(n, m)),
    "ia3": ((), lambda n, m, r: m),
    "ssl": ((), lambda n, m, r: n),
    "ssb": ((), lambda n, m, r: n + m),
    "bitfit": ((), lambda n, m, r: m),
    "lora": (("rank", "alpha"), lambda n, m, r: r * (n + m)),
    "trilora": (("rank", "alpha"), lambda n, m, r: r * (n + m) + r),
    "flora": (("rank", "alpha"), lambda n, m, r: r * (n + m) + r * r),
    "dora": (("rank", "alpha"), lambda n, m, r: r * (n + m) + m),
    "spectral": (("rank",), lambda n, m, r: r * (n + m)),
    "svdiff": ((), lambda n, m, r: min(n, m)),
}
COUNTS |= {
    "pissa": (("rank",), lambda n, m, r: r * (n + m)),
    "milora": (("rank",), lambda n, m, r: r * (n + m)),
    "lora_fa": (("rank", "alpha"), lambda n, m, r: r * m),
    "lora_xs": (("rank", "alpha"), lambda n, m, r: r * r),
    "vera": (("rank",), lambda n, m, r: r + m),
    "randlora": (("rank", "alpha"), lambda n, m, r: -(-min(n, m) // r) * (r + min(n, m))),
    "loha": (("rank", "alpha"), lambda n, m, r: 2 * r * (n + m)),
    "lokr": (("rank", "alpha"), lokr_count),
    "fourierft": ((), lambda n, m, r: min(1000, n * m)),
    "delora": (("rank",), lambda n, m, r: r * (n + m) + 1),
    "tied_lora": (("rank", "alpha"), lambda n, m, r: r * (n + m) + r + m),
    "lora_dash": (("rank", "alpha"), lambda n, m, r: r * (n + m) + min(8, n, m)),
    "miss": (("rank",), lambda n, m, r: r * m),
    "hra": ({"rank": 2}, lambda n, m, r: 2 * n),
    "oft": ({"block": 4}, lambda n, m, r: n // 4 * 6),
    "boft": ({"block": 2, "factors": 2}, lambda n, m, r: n + m),
    "road": ((), lambda n, m, r: m),
}
COUNTS |= {
    "hira": (("rank",), lambda n, m, r: r * (n + m)),
    "shira": (("rank",), lambda n, m, r: min(n * m, r * (n + m))),
    "frod": ({"density": 0.2}, lambda n, m, r: (k := min(n, m)) + min(max(1, int(0.2 * k * k)), k * (k - 1))),
    "gralora": ({"rank": 4, "blocks": 2}, lambda n, m, r: 4 * (n + m)),
    "c3a": ({"block": 2}, lambda n, m, r: n * m // 2),
    "deft": (("rank", "alpha"), lambda n, m, r: r * (n + m)),
    "psoft": (("rank",), lambda n, m, r: r * (r - 1) // 2 + 2 * r),
    "adamss": (("rank",), lambda n, m, r: min(5, m) * r + m),
    "peanut": (("rank",), lambda n, m, r: 2 * r * m + 2 * r * r),
    "tinylora": (("rank",), lambda n, m, r: 64),
    "waveft": ({"coefficients": 9}, lambda n, m, r: 9),
    "super_tuning": (("rank",), lambda n, m, r: max(1, round(0.005 * n * m)) + r * (n + m)),
    "glora": (("rank",), lambda n, m, r: 2 * r * (n + m)),
}
# Of whole blocks of inputs or outputs: tested on four times the size.
BLOCKED = ("oft", "boft", "road", "gralora", "c3a", "waveft")
# Of these a site inside a module, or a selection first, is needed: tests/training/test_schedules.py.
ELSEWHERE = {"s_bitfit", "prefix", "prompt", "fish_mask", "fish_dip", "spt", "hadapter", "padapter", "pa", "mam"}
MATRIX = [name for name in COUNTS if name != "bitfit"]
DECOMPOSING = ("sam_parser", "spectral", "svdiff", "pissa", "milora", "lora_xs", "lora_dash")
DECOMPOSING += ("frod", "psoft", "adamss", "tinylora")
PLAIN = [name for name in MATRIX if name not in BLOCKED]
ANYWHERE = [name for name in PLAIN if name not in (*DECOMPOSING, "pafi", "super_tuning")]
CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64, sizes below 10: rounding is of the order of 1e-14.


def chain_of(names, rank):
    values = {"rank": rank, "alpha": 2.5}

    def options(name):
        given = COUNTS[name][0]
        return given if isinstance(given, dict) else {key: values[key] for key in given}

    return [(TRANSFORMS[name], TRANSFORMS[name].options(**options(name))) for name in names]


def sized(name, size):
    return tuple(4 * width for width in size) if name in BLOCKED else size


class Tensors:
    """Leaves of one site as tensors; `noise` moves the tuned ones away from their start."""

    def __init__(self, base, noise=0.0, seed=0):
        self.base, self.noise, self.tuned, self.every = base, noise, {}, {}
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, leaf):
        self.every[leaf.name] = value = self.made(leaf)
        return value

    def made(self, leaf):
        value = initial_value(leaf, 0, lambda: decompose(self.base))
        if leaf.role == "chosen":
            return value
        value = value.double().reshape(leaf.shape)
        if leaf.role == "tuned":
            value = value + self.noise * torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
            value = self.tuned[leaf.name] = value.requires_grad_()
        return value


def gradients(value, weights, tensors):
    return torch.autograd.grad(
        (value * weights).sum(), list(tensors.tuned.values()), allow_unused=True, retain_graph=True
    )


def check(base, wrap, names, rank, noise=0.3, bias=True):
    """apply == x @ dense (+ bias), and the same gradients, for a chain on a base operator."""
    tensors = Tensors(base, noise)
    op = compose(chain_of(names, rank), wrap(base), tuple(base.shape), tensors, "w")
    n, m = base.shape[-2:]
    x = torch.randn(*base.shape[:-2], 3, n, dtype=torch.float64)
    b = torch.randn(m, dtype=torch.float64) if bias else None
    weights = torch.randn(*base.shape[:-2], 3, m, dtype=torch.float64)
    expected = x @ op.dense() + (b if bias else 0)
    torch.testing.assert_close(op.apply(x, b), expected, **CLOSE)
    torch.testing.assert_close(op.times(x), x @ op.dense(), **CLOSE)
    for one, other in zip(
        gradients(op.apply(x, b), weights, tensors), gradients(expected, weights, tensors), strict=True
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **CLOSE)
    return op, tensors


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def matrix(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", MATRIX)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(size=sizes, rank=st.integers(1, 9), seed=st.integers(0, 99), transposed=st.booleans())
def test_apply_is_x_times_dense(name, size, rank, seed, transposed):
    size = sized(name, size)
    rank = min(rank, *size)
    wrap = (lambda w: Dense(w.mT.contiguous(), transposed=True)) if transposed else Dense
    check(matrix(size, seed), wrap, [name], rank)


@pytest.mark.parametrize("name", MATRIX)
def test_batches_of_matrices(name):
    base = matrix((4, *(sized(name, (6, 5)))), 1)
    check(base, Dense, [name], 2, bias=False)
    check(base, lambda w: Dense(w.mT.contiguous(), transposed=True), [name], 2, bias=False)


@pytest.mark.parametrize("name", COUNTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=sizes, rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_identity_at_the_start_and_count(name, size, rank, seed):
    n, m = (1, size[1]) if name == "bitfit" else sized(name, size)
    rank = min(rank, n, m)
    base = matrix((n, m), seed)
    tensors = Tensors(base)
    op = compose(chain_of([name], rank), Dense(base), (n, m), tensors, "w")
    torch.testing.assert_close(op.dense(), base, rtol=1e-6, atol=1e-6)  # Random start values are drawn in float32.
    assert sum(t.numel() for t in tensors.tuned.values()) == COUNTS[name][1](n, m, rank)


@pytest.mark.parametrize("first", PLAIN)
@pytest.mark.parametrize("second", ANYWHERE)
def test_chains_of_two(first, second):
    op, tensors = check(matrix((6, 5), 3), Dense, [first, second], 2)
    n, m = 6, 5
    assert sum(t.numel() for t in tensors.tuned.values()) == COUNTS[first][1](n, m, 2) + COUNTS[second][1](n, m, 2)
    f = Tensors(matrix((6, 5), 3), 0.3)
    inner = compose(chain_of([first], 2), Dense(f.base), (6, 5), f, "w").dense().detach()
    if first != second:
        # g(f(W)): the second method on the first one's result, with the same tensors.
        g = compose(chain_of([second], 2), Dense(inner), (6, 5), lambda leaf: tensors.every[leaf.name], "w")
        torch.testing.assert_close(op.dense(), g.dense(), **CLOSE)


@pytest.mark.parametrize("second", DECOMPOSING)
def test_decompositions_come_first(second):
    with pytest.raises(SpecError, match="must be the first"):
        check(matrix((4, 4), 0), Dense, ["lora", second], 2)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("axis", ["out", "in"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(3, 9), st.integers(3, 9)), cut=st.integers(1, 8), seed=st.integers(0, 99))
def test_slices(name, axis, size, cut, seed):
    n, m = size
    width = m if axis == "out" else n
    cut = min(cut, width - 1)
    base = matrix(size, seed)
    dim = -1 if axis == "out" else -2
    left, right = base.narrow(dim, 0, cut), base.narrow(dim, cut, width - cut)
    tensors = Tensors(left, 0.3)
    op = Concat(
        (compose(chain_of([name], 1), Dense(left), tuple(left.shape), tensors, "w"), Dense(right)),
        (cut, width - cut),
        axis,
    )
    x, b = matrix((3, n), seed + 1), matrix((m,), seed + 2)
    expected = x @ op.dense() + b
    torch.testing.assert_close(op.apply(x, b), expected, **CLOSE)
    torch.testing.assert_close(op.dense().narrow(dim, cut, width - cut), right, **CLOSE)
    weights = matrix((3, m), seed + 3)
    pairs = zip(gradients(op.apply(x, b), weights, tensors), gradients(expected, weights, tensors), strict=True)
    assert all(torch.allclose(one, other, **CLOSE) for one, other in pairs)


def test_lora_dropout_is_on_the_input_and_leaves_dense_alone():
    method = TRANSFORMS["lora"]
    base = matrix((6, 5), 0)
    tensors = Tensors(base, 0.3)
    chain = [(method, method.options(rank=2, dropout=0.5))]
    op = compose(chain, Dense(base), (6, 5), tensors, "w")
    a, b = tensors.tuned["w.lora.a"], tensors.tuned["w.lora.b"]
    torch.testing.assert_close(op.dense(), base + a @ b, **CLOSE)
    x = matrix((200, 6), 1)
    torch.manual_seed(3)
    dropped = torch.dropout(x, 0.5, True)
    torch.manual_seed(3)
    torch.testing.assert_close(op.apply(x), x @ base + dropped @ a @ b, **CLOSE)


def one_method(name, base, **options):
    tensors = Tensors(base, 0.3)
    chain, penalties = [(TRANSFORMS[name], TRANSFORMS[name].options(**options))], []
    op = compose(chain, Dense(base), tuple(base.shape), tensors, "w", penalties=penalties)
    return op, {leaf.rpartition(".")[2]: value for leaf, value in tensors.tuned.items()}, penalties


@pytest.mark.parametrize("name", ["pa", "lora", "trilora", "adalora", "flora"])
@pytest.mark.parametrize("scale", ["fixed", "rslora", "learned"])
def test_a_nonlinearity_between_the_factors(name, scale):
    """(30) and section IV.B: xW + s h(xA) B by hand; no matrix, so nothing to merge."""
    base, x, bias = matrix((6, 5), 1), matrix((7, 6), 2), matrix((5,), 3)
    op, t, _ = one_method(name, base, rank=2, alpha=3.0, scale=scale, **({} if name == "pa" else {"mpc": "n"}))
    s = {"fixed": 3 / 2, "rslora": 3 / 2**0.5, "learned": t.get("s")}[scale]
    middle = {"trilora": lambda h: h * t["d"], "adalora": lambda h: h * t["d"], "flora": lambda h: h @ t["m"]}
    expected = x @ base + bias + s * middle.get(name, lambda h: h)(torch.relu(x @ t["a"])) @ t["b"]
    torch.testing.assert_close(op.apply(x, bias), expected, **CLOSE)
    torch.testing.assert_close(op.apply(x), expected - bias, **CLOSE)
    leaves = list(t.values())
    weights = matrix((7, 5), 4)
    for one, other in zip(
        torch.autograd.grad((op.apply(x, bias) * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **CLOSE)
    with pytest.raises(NotImplementedError):
        op.dense()


@pytest.mark.parametrize("name", ["lora", "trilora", "adalora", "flora"])
@pytest.mark.parametrize("mpc", ["o", "d"])
def test_matrix_pattern_penalties(name, mpc):
    """(25)(26) by hand: they change the loss, not the matrix."""
    base = matrix((6, 5), 1)
    op, t, penalties = one_method(name, base, rank=2, mpc=mpc, coefficient=0.25)
    gram = t["b"] @ t["b"].T
    pattern = torch.eye(2, dtype=torch.float64) if mpc == "o" else torch.diag(gram.diagonal())
    left = torch.linalg.matrix_norm(t["a"].T @ t["a"] - torch.eye(2, dtype=torch.float64)).square()
    right = torch.linalg.matrix_norm(gram - pattern).square()
    ((label, value),) = penalties
    assert label == f"mpc_{mpc}"
    torch.testing.assert_close(value, 0.25 * (left + right), **CLOSE)
    plain, _, none = one_method(name, base, rank=2, mpc=None)
    torch.testing.assert_close(op.dense(), plain.dense(), **CLOSE)
    assert not none


@pytest.mark.parametrize("scale", ["fixed", "rslora", "learned"])
def test_scales_and_a_chain_on_them(scale):
    base, x = matrix((6, 5), 1), matrix((7, 6), 2)
    op, t, _ = one_method("lora", base, rank=4, alpha=6.0, scale=scale)
    s = {"fixed": 1.5, "rslora": 3.0, "learned": t.get("s")}[scale]
    torch.testing.assert_close(op.dense(), base + s * t["a"] @ t["b"], **CLOSE)
    lora = TRANSFORMS["lora"], TRANSFORMS["lora"].options(rank=4, alpha=6.0, scale=scale)
    if scale == "learned":
        start = Tensors(base)
        compose([lora], Dense(base), (6, 5), start, "w")
        assert start.tuned["w.lora.s"].tolist() == [[1.5]]
    tensors = Tensors(base, 0.3)
    chain = [lora, (TRANSFORMS["dora"], TRANSFORMS["dora"].options(rank=2))]
    op = compose(chain, Dense(base), (6, 5), tensors, "w")
    torch.testing.assert_close(op.apply(x), x @ op.dense(), **CLOSE)
    assert all(g is not None for g in gradients(op.apply(x), matrix((7, 5), 3), tensors))


def test_butterflies_by_hand():
    """boft with explicit permutations: evens before odds, in pieces of half a block, within runs of block * 2^i."""
    n, m, block, factors = 16, 5, 4, 3
    base = matrix((n, m), 1)
    op, t, _ = one_method("boft", base, block=block, factors=factors)
    q = t["q"].detach().unflatten(0, (factors, n // block))
    rows, columns = torch.triu_indices(block, block, 1)
    expected, unit = base, torch.eye(block, dtype=torch.float64)
    for i in range(factors):
        skew = torch.zeros(n // block, block, block, dtype=torch.float64)
        skew[:, rows, columns] = q[i]
        skew = skew - skew.transpose(1, 2)
        rotations = torch.linalg.solve(unit + skew, unit - skew, left=False)
        run, half = block * 2**i, block // 2
        pieces = torch.arange(n).view(n // run, run // half, half)
        order = torch.cat([pieces[:, ::2], pieces[:, 1::2]], dim=1).flatten()
        p = torch.eye(n, dtype=torch.float64)[order]
        expected = p @ torch.block_diag(*rotations) @ p.T @ expected
    torch.testing.assert_close(op.dense(), expected * t["l"], **CLOSE)
    plain = (op.dense() / t["l"]).detach()
    torch.testing.assert_close(plain.T @ plain, base.T @ base, **CLOSE)


def test_gates_are_random_in_training_alone():
    base = matrix((6, 5), 1)
    method = TRANSFORMS["diff_pruning"]
    chain = [(method, method.options(coefficient=0.1))]
    values = Tensors(base, 0.3)
    evaluated = compose(chain, Dense(base), (6, 5), values, "w").dense()
    alpha, d = values.tuned["w.diff_pruning.alpha"], values.tuned["w.diff_pruning.d"]
    gate = (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)
    torch.testing.assert_close(evaluated, base + gate * d, **CLOSE)
    fixed = iter([alpha, d, alpha, d])
    penalties = []
    one, other = (
        compose(chain, Dense(base), (6, 5), lambda leaf: next(fixed), "w", training=True, penalties=penalties).dense()
        for _ in range(2)
    )
    assert not torch.equal(one, other)
    # P(z > 0) of a hard-concrete gate with temperature 2/3, stretched to [-0.1, 1.1] (arXiv 1712.01312, (12)).
    expected = 0.1 * torch.sigmoid(alpha - 2 / 3 * math.log(0.1 / 1.1)).sum()
    torch.testing.assert_close(penalties[0][1], expected, **CLOSE)


def test_dora_norm_takes_no_gradient():
    """(33): the norm is a constant, so the gradient of A is that of V m / c with c fixed."""
    base = matrix((6, 5), 0)
    tensors = Tensors(base, 0.3)
    op = compose(chain_of(["dora"], 2), Dense(base), (6, 5), tensors, "w")
    a, b, m = (tensors.tuned[f"w.dora.{name}"] for name in "abm")
    v = base + 2.5 / 2 * a @ b
    by_hand = v * (m / v.detach().norm(dim=0))
    torch.testing.assert_close(op.dense(), by_hand, **CLOSE)
    for one, other in zip(
        torch.autograd.grad(op.dense().sum(), [a, b, m]), torch.autograd.grad(by_hand.sum(), [a, b, m]), strict=True
    ):
        torch.testing.assert_close(one, other, **CLOSE)


def test_start_values_do_not_depend_on_other_sites():
    base = matrix((6, 5), 0)
    one, other = Tensors(base), Tensors(base)
    compose(chain_of(["lora"], 2), Dense(base), (6, 5), one, "a")
    compose(chain_of(["lora"], 2), Dense(base), (6, 5), other, "b")
    again = Tensors(base)
    compose(chain_of(["lora"], 2), Dense(base), (6, 5), again, "a")
    assert torch.equal(one.tuned["a.lora.a"], again.tuned["a.lora.a"])
    assert not torch.equal(one.tuned["a.lora.a"], other.tuned["b.lora.a"])


def test_every_method_is_covered():
    assert set(COUNTS) | ELSEWHERE == set(TRANSFORMS)


def rotated(name, options, noise=0.5):
    base = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = Tensors(base, noise)
    one = TRANSFORMS[name]
    return compose([(one, one.options(**options))], Dense(base), (16, 6), tensors, "w").dense(), base, tensors


def test_reflections_are_multiplied_in_their_order():
    found, expected, tensors = rotated("hra", {"rank": 4})
    for u in next(iter(tensors.every.values())).T:
        expected = expected - 2 * torch.outer(u, u @ expected) / (u @ u)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_butterflies_are_the_same_joined_and_one_by_one(monkeypatch):
    joined = rotated("boft", {"block": 2, "factors": 4})[0]
    monkeypatch.setattr("rewriter.methods.rotations._JOINED", 4)
    torch.testing.assert_close(rotated("boft", {"block": 2, "factors": 4})[0], joined, **CLOSE)
