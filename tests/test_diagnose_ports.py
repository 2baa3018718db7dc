"""Mistakes of gates, slopes, kernels and backward passes, each in a port of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.parity import compare
from anymha.parity.diagnose.causes import Diagnosis
from tests.frameworks import required

pytestmark = pytest.mark.usefixtures("folded_once")

BATCH, LENGTH, HEADS, FEATURES = 2, 7, 6, 36
WIDTH = FEATURES // HEADS
X = np.random.default_rng(4).standard_normal((BATCH, LENGTH, FEATURES)).astype(np.float32)
ROWS, COLUMNS = np.indices((LENGTH, LENGTH))
NOTHING = Diagnosis()
Change = Callable[[np.ndarray], np.ndarray]


def layer_of(**options: Any) -> Any:
    own = {"query_features": FEATURES, "bias_initializer": "random_normal", "seed": 4, **options}
    return anymha.MultiHeadAttention(HEADS, WIDTH, backend="numpy", **own)


def port_of(
    layer: Any, bias: np.ndarray | float = 0.0, gate: Callable[..., Any] | None = None,
    weights: Callable[[Any], Any] = lambda w: w, stored: Change = lambda x: x,
    attention: Callable[..., Any] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """The layer in float64; `gate` gives the output from context, gates and output's weights."""
    w = weights({name: a.astype(np.float64) for name, a in anymha.get_weights(layer).items()})

    def port(query: Any) -> Any:
        x = query.astype(np.float64)
        q, k, v = (stored(stored(np.einsum("btd,dhk->bthk", x, w[f"{n}.kernel"])) + w[f"{n}.bias"])
                   for n in ("query", "key", "value"))  # fmt: skip
        logits = np.einsum("bthk,bshk->bhts", q, k) / WIDTH**0.5 + bias
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares = shares / shares.sum(-1, keepdims=True)
        context = np.einsum("bhts,bshv->bthv", shares, v)
        if attention is not None:
            context = attention(q, k, v)
        kernel, more = w["output.kernel"], w["output.bias"]
        if gate is None:
            return (np.einsum("bthv,hvo->bto", context, kernel) + more).astype(query.dtype)
        flat = w["gate.kernel"].reshape(FEATURES, -1)
        gates = 1 / (1 + np.exp(-(x @ flat + w["gate.bias"].ravel())))
        return gate(context, gates, kernel, more).astype(query.dtype)

    return port


def named(layer: Any, port: Any, x: Any = X) -> str:
    report = compare(layer, port, x)
    assert not report.passed
    assert report.diagnosis is not None
    return str(report.diagnosis)


def merged(context: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return np.einsum("bthv,hvo->bto", context, kernel)


@pytest.mark.parametrize(
    ("kind", "gate", "words"),
    [
        ("elementwise", lambda c, g, w, b: merged(c * g.reshape(c.shape), w) + b, None),
        ("elementwise", lambda c, g, w, b: merged(c, w) * g + b,
         "gate after the output (before its bias)"),
        ("head", lambda c, g, w, b: merged(c * g[..., None], w) + b, None),
        ("head", lambda c, g, w, b: merged(c * g[:, :, None], w) + b,
         "gate of other heads (the gate of head h multiplies column h of every head)"),
    ],
)  # fmt: skip
def test_gates_in_other_places_are_named(kind, gate, words) -> None:
    right = layer_of(gate=kind)
    port = port_of(right, gate=gate)
    assert compare(right, port, X).passed if words is None else named(right, port) == words


FIRST = np.array([0.0, 2, 4, 6, 1, 3])  # of a power of 2, from 0; then every other one
OWN = np.array([2.0, 4, 6, 8, 1, 3])


@pytest.mark.parametrize(
    ("slopes", "words"),
    [
        (2.0**-OWN[None], None),
        (2.0**-FIRST[None], "alibi of other slopes (2^(-8h/4), h from 0, then 2^(-8h/8), h = 1"),
        ((2.0**-OWN).repeat(BATCH).reshape(BATCH, HEADS),
         "alibi of other slopes (batch and heads exchanged"),
    ],
)  # fmt: skip
def test_slopes_of_heads_that_are_no_power_of_two(slopes, words) -> None:
    right = layer_of(alibi=True)
    port = port_of(right, -slopes[..., None, None] * abs(ROWS - COLUMNS))
    if words is None:
        assert compare(right, port, X).passed
    else:
        assert named(right, port).startswith(words)


def test_a_kernel_of_another_projection_beside_its_own_bias() -> None:
    right = layer_of()
    port = port_of(right, weights=lambda w: w | {
        "query.kernel": w["output.kernel"].reshape(w["query.kernel"].shape)})  # fmt: skip
    words = "weights of another projection (query has the kernel of the output)"
    assert named(right, port) == words


def half(x: np.ndarray, form: Any = ml_dtypes.bfloat16) -> np.ndarray:
    return np.asarray(x).astype(form).astype(np.float64)


def fused(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention in bfloat16, as of a fused kernel: what is divided by the sum is the product."""
    logits = np.einsum("bthk,bshk->bhts", half(q), half(k)) / WIDTH**0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    context = np.einsum("bhts,bshv->bthv", half(weights), half(v))
    return half(context / weights.sum(-1)[..., None].swapaxes(1, 2))


def test_a_fused_kernel_in_half_precision_is_named() -> None:
    right = layer_of()
    words = "computed in bfloat16 (attention alone, from queries, keys and values to the context)"
    assert named(right, port_of(right, attention=fused)) == words


@pytest.mark.parametrize("stored", [half, np.asarray])
def test_keys_and_values_in_float8_of_a_layer_in_half_precision(stored) -> None:
    right, x = layer_of(dtype="bfloat16"), X.astype(ml_dtypes.bfloat16)

    def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, form: Any) -> np.ndarray:
        k, v = half(k, form), half(v, form)
        logits = np.einsum("bthk,bshk->bhts", q, k) / WIDTH**0.5
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("bhts,bshv->bthv", shares / shares.sum(-1, keepdims=True), v)

    def port(form: Any) -> Any:
        return port_of(right, stored=stored, attention=lambda q, k, v: attention(q, k, v, form))

    assert compare(right, port(ml_dtypes.bfloat16), x).passed
    told = named(right, port(ml_dtypes.float8_e4m3fn), x)
    assert told == "rounded to float8_e4m3fn (key and value)"


@pytest.mark.parametrize(
    ("turned", "mean", "words"),
    [
        (False, False, None),
        (True, False, "the gradient of the value is not transposed"),
        (False, True, "the mean over the keys in the softmax's derivative has no p"),
    ],
)
def test_backward_passes_by_hand(turned, mean, words) -> None:
    torch = required("torch")

    class Weighed(torch.autograd.Function):
        """The softmax times the values."""

        @staticmethod
        def forward(ctx: Any, logits: Any, values: Any) -> Any:
            shares = logits.softmax(-1)
            ctx.save_for_backward(shares, values)
            return shares @ values

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            (g,), (shares, values) = gradients, ctx.saved_tensors
            own = g @ values.mT
            rest = own.mean(-1, keepdim=True) if mean else (shares * own).sum(-1, keepdim=True)
            return shares * (own - rest), (shares if turned else shares.mT) @ g

    right = layer_of()
    w = {name: torch.from_numpy(a.copy()) for name, a in anymha.get_weights(right).items()}

    def port(query: Any) -> Any:
        q, k, v = (torch.einsum("btd,dhk->bhtk", query, w[f"{n}.kernel"])
                   + w[f"{n}.bias"][:, None] for n in ("query", "key", "value"))  # fmt: skip
        y = Weighed.apply(q @ k.mT / WIDTH**0.5, v)
        return torch.einsum("bhtv,hvo->bto", y, w["output.kernel"]) + w["output.bias"]

    x = torch.from_numpy(X)
    if words is None:
        assert compare(right, port, x).passed
    else:
        told = named(right, port, x)
        assert told.startswith("wrong jacobian")
        assert words in told


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (lambda y, g: y * g, None),
        (lambda y, g: y, "the sum of the context without its gradient"),
        (lambda y, g: g, "the sum of the context's gradient without the context"),
        (lambda y, g: (y * g).sum(1, keepdim=True), "that of all heads together"),
        (lambda y, g: (y * g).roll(1, 2), "that of the query before"),
        (lambda y, g: (y * g) / WIDTH**0.5, "multiplied by the scale"),
        (lambda y, g: 0.3 * (y * g), "multiplied by 0.3"),
    ],
)
def test_each_wrong_delta_of_a_backward_pass_is_named(delta, words) -> None:
    torch = required("torch")

    class Core(torch.autograd.Function):
        """Attention whose backward pass takes the softmax's own term from the context."""

        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            shares = (q @ k.mT / WIDTH**0.5).softmax(-1)
            ctx.save_for_backward(q, k, v, shares, shares @ v)
            return shares @ v

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            (g,), (q, k, v, shares, y) = gradients, ctx.saved_tensors
            rest = delta(y, g).sum(-1, keepdim=True)
            slopes = shares * (g @ v.mT - rest) / WIDTH**0.5
            return slopes @ k, slopes.mT @ q, shares.mT @ g

    right = layer_of()
    w = {name: torch.from_numpy(a.copy()) for name, a in anymha.get_weights(right).items()}

    def port(query: Any) -> Any:
        three = (torch.einsum("btd,dhk->bhtk", query, w[f"{n}.kernel"])
                 + w[f"{n}.bias"][:, None] for n in ("query", "key", "value"))  # fmt: skip
        y = Core.apply(*three)
        return torch.einsum("bhtv,hvo->bto", y, w["output.kernel"]) + w["output.bias"]

    report = compare(right, port, torch.from_numpy(X))
    assert report.passed == (words is None)
    detail = f"the delta of the softmax's derivative is {words}"
    assert words is None or str(report.diagnosis) == f"wrong jacobian ({detail})"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q, k, v.detach()), "no gradient flows through the value"),
        (lambda q, k, v: (q, k.detach(), v), "that through the key is lost or has a factor"),
        (lambda q, k, v: (q, 0.5 * (k + k.detach()), v), "that through the key is lost or has"),
        (lambda q, k, v: (q.detach(), k, v), "no gradient reaches query"),
        (lambda q, k, v: (0.5 * (q + q.detach()), k, v), "that of query is multiplied by 0.5"),
        (lambda q, k, v: (q, 0.5 * (k + k.detach()), v.detach() + 2 * (v - v.detach())),
         "the gradients alone differ"),
    ],
)  # fmt: skip
def test_gradients_of_two_functions_of_unknown_weights(change, words) -> None:
    torch = required("torch")
    w = {name: torch.from_numpy(a.copy()) for name, a in anymha.get_weights(layer_of()).items()}

    def attention(query: Any, value: Any, change: Any = lambda *three: three) -> Any:
        q, k, v = (torch.einsum("btd,dhk->bhtk", x, w[f"{n}.kernel"]) + w[f"{n}.bias"][:, None]
                   for n, x in (("query", query), ("key", value), ("value", value)))  # fmt: skip
        q, k, v = change(q, k, v)
        y = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
        return torch.einsum("bhtv,hvo->bto", y, w["output.kernel"]) + w["output.bias"]

    def other(query: Any, value: Any) -> Any:
        return attention(query, value, change)

    def reference(query: Any, value: Any) -> Any:
        return attention(query, value)

    x = torch.from_numpy(X)
    report = compare(reference, other, [x, x.flip(1) * 0.7])
    assert words in str(report.diagnosis)
    if "the key" in words:  # which one input of all three tells too
        report = compare(
            lambda query: reference(query, query), lambda query: other(query, query), x
        )
        assert words in str(report.diagnosis)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ("", None),
        ("shares values", ""),
        ("values", " for the gradient of the values"),
        ("shares", " for the softmax's derivative"),
    ],
)
def test_a_backward_pass_that_hides_less(places, words) -> None:
    torch = required("torch")
    hidden = torch.from_numpy(ROWS < COLUMNS)

    class Weighed(torch.autograd.Function):
        """The causal softmax times the values."""

        @staticmethod
        def forward(ctx: Any, logits: Any, values: Any) -> Any:
            masked = logits.masked_fill(hidden, -torch.inf)
            ctx.save_for_backward(logits, masked, values)
            return masked.softmax(-1) @ values

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            (g,), (logits, masked, values) = gradients, ctx.saved_tensors
            shares, total = masked.softmax(-1), masked.logsumexp(-1, keepdim=True)
            every, own = (logits - total).exp(), g @ values.mT
            rest = (shares * own).sum(-1, keepdim=True)
            of_values = every if "values" in places else shares
            return (every if "shares" in places else shares) * (own - rest), of_values.mT @ g

    right = layer_of()
    w = {name: torch.from_numpy(a.copy()) for name, a in anymha.get_weights(right).items()}

    def port(query: Any, use_causal_mask: bool = False) -> Any:
        assert use_causal_mask
        q, k, v = (torch.einsum("btd,dhk->bhtk", query, w[f"{n}.kernel"])
                   + w[f"{n}.bias"][:, None] for n in ("query", "key", "value"))  # fmt: skip
        y = Weighed.apply(q @ k.mT / WIDTH**0.5, v)
        return torch.einsum("bhtv,hvo->bto", y, w["output.kernel"]) + w["output.bias"]

    report = compare(right, port, torch.from_numpy(X), use_causal_mask=True)
    assert report.passed == (words is None)
    detail = f"the probabilities are made anew without the causal mask{words}"
    assert words is None or str(report.diagnosis) == f"wrong jacobian ({detail})"


@pytest.mark.parametrize(
    ("hidden_too", "words"),
    [
        (False, "wrong jacobian (the softmax's derivative is left out, dp)"),
        (True, "wrong jacobian (the softmax's derivative is left out, dp, of hidden keys too)"),
    ],
)
def test_a_softmax_with_the_gradient_of_its_logits(hidden_too, words) -> None:
    torch = required("torch")
    right = layer_of()
    w = {name: torch.from_numpy(a.copy()) for name, a in anymha.get_weights(right).items()}

    def port(query: Any, use_causal_mask: bool = False) -> Any:
        q, k, v = (torch.einsum("btd,dhk->bhtk", query, w[f"{n}.kernel"])
                   + w[f"{n}.bias"][:, None] for n in ("query", "key", "value"))  # fmt: skip
        logits = q @ k.mT / WIDTH**0.5
        seen = torch.from_numpy(ROWS >= COLUMNS) | torch.tensor(not use_causal_mask)
        shares = logits.masked_fill(~seen, -torch.inf).softmax(-1).detach()
        through = logits if hidden_too else logits.masked_fill(~seen, 0.0)
        y = (shares + (through - through.detach())) @ v
        return torch.einsum("bhtv,hvo->bto", y, w["output.kernel"]) + w["output.bias"]

    report = compare(right, port, torch.from_numpy(X), use_causal_mask=True)
    assert str(report.diagnosis) == words


def adapted(*names: str) -> Any:
    """Changes kernels by matrices of rank 2."""

    def changed(w: Any) -> Any:
        rng = np.random.default_rng(7)
        more = {
            f"{name}.kernel": 0.2 * np.einsum(
                "dr,rhk->dhk", rng.standard_normal((FEATURES, 2)),
                rng.standard_normal((2, HEADS, WIDTH)))
            for name in names
        }  # fmt: skip
        return w | {name: w[name] + array for name, array in more.items()}

    return changed


@pytest.mark.parametrize(
    "names", [("query",), ("key",), ("value",), ("query", "value"), ("key", "value")]
)
def test_low_rank_updates_are_told_by_calls(names, monkeypatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.Search.diagnose", lambda *_: NOTHING)
    right = layer_of()
    several = " and ".join(f"{name}.kernel" for name in names)
    differ = "differs by a matrix" if len(names) == 1 else "differ by matrices"
    words = f"other weights ({several} {differ} of rank 2, as of a low-rank update (LoRA))"
    x = np.random.default_rng(2).standard_normal((2, 12, FEATURES)).astype(np.float32)
    assert named(right, port_of(right, weights=adapted(*names)), x) == words


def test_low_rank_updates_are_told_of_a_function_that_needs_a_mask(monkeypatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.Search.diagnose", lambda *_: NOTHING)
    right = layer_of()
    other = anymha.convert(right, to="numpy")
    anymha.set_weights(other, adapted("query")(dict(anymha.get_weights(right))))
    x = np.random.default_rng(2).standard_normal((2, 12, FEATURES)).astype(np.float32)
    pairs = np.tri(12, k=6, dtype=bool)[None] | np.ones((2, 1, 1), bool)
    port = lambda query, attention_mask: other(query, attention_mask=attention_mask)  # noqa: E731
    report = compare(right, port, x, attention_mask=pairs)
    assert "query.kernel differs by a matrix of rank 2" in str(report.diagnosis)


@pytest.mark.parametrize("names", [("kernel",), ("bias",), ("kernel", "bias")])
def test_values_of_another_layer_are_told_by_calls(names, monkeypatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.Search.diagnose", lambda *_: NOTHING)
    right, rng = layer_of(), np.random.default_rng(7)

    def changed(w: Any) -> Any:
        own = {f"value.{name}" for name in names}
        return w | {n: 0.3 * rng.standard_normal(w[n].shape) for n in w if n in own}

    x = np.random.default_rng(2).standard_normal((2, 12, FEATURES)).astype(np.float32)
    either = "output.bias or value.bias"
    words = {
        ("kernel",): "value.kernel differs",
        ("bias",): f"{either} differs, which adds the same to every output",
        ("kernel", "bias"): f"value.kernel, and {either} differ",
    }[names]
    assert named(right, port_of(right, weights=changed), x) == f"other weights ({words})"


def test_a_kernel_as_calls_measure_it_hides_no_other_mistake(monkeypatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.Search.diagnose", lambda *_: NOTHING)
    right, rng = layer_of(), np.random.default_rng(7)
    own = {"value.kernel": rng.standard_normal(anymha.get_weights(right)["value.kernel"].shape)}
    other = layer_of(scale=1.003 * right.config.scale_value)
    anymha.set_weights(other, anymha.get_weights(right) | own)
    x = 0.3 * np.random.default_rng(2).standard_normal((1, 6, FEATURES)).astype(np.float32)
    assert "differs" not in named(right, lambda query: other(query), x)


@pytest.mark.usefixtures("no_pairs")
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_an_output_that_does_not_depend_on_the_inputs(constant) -> None:
    told = named(layer_of(), lambda query: 0 * query + np.float32(constant))
    assert told == "the output does not depend on the inputs"


@pytest.mark.usefixtures("no_pairs")
def test_one_output_for_all_queries_of_a_sequence_may_depend_on_the_inputs() -> None:
    port = port_of(layer_of(), attention=lambda q, k, v: (v**3).mean(1, keepdims=True) + 0 * q)
    x = np.random.default_rng(2).standard_normal((1, 6, FEATURES)).astype(np.float32)
    assert "does not depend" not in named(layer_of(), port, x)


@pytest.mark.usefixtures("no_pairs")
def test_a_constant_output_of_one_sequence_tells_of_no_weight() -> None:
    x = np.random.default_rng(2).standard_normal((1, 6, FEATURES)).astype(np.float32)
    told = named(layer_of(), lambda query: 0 * query + np.float32(3), x)
    assert "differ" not in told.replace("the difference", ""), told


@pytest.mark.parametrize("rank", [9, 36])
def test_kernels_that_differ_by_a_high_rank_are_no_low_rank_update(rank, monkeypatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.Search.diagnose", lambda *_: NOTHING)
    right, rng = layer_of(), np.random.default_rng(7)
    more = (rng.standard_normal((FEATURES, rank)) @ rng.standard_normal((rank, FEATURES))) / rank

    def changed(w: Any) -> Any:
        return w | {"query.kernel": w["query.kernel"] + more.reshape(w["query.kernel"].shape)}

    assert "rank" not in named(right, port_of(right, weights=changed))


def test_other_kernels_of_one_head_are_told_as_that(monkeypatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.Search.diagnose", lambda *_: NOTHING)
    right, rng = layer_of(), np.random.default_rng(7)
    last = right.config.num_heads - 1
    for name in ("key", "value"):
        own = anymha.get_weights(right)[f"{name}.kernel"].copy()
        own[:, last] = 0.3 * rng.standard_normal(own[:, last].shape)
        told = named(right, port_of(right, weights=lambda w, n=name, k=own: w | {f"{n}.kernel": k}))
        assert told == f"other weights ({name}.kernel differs in head {last})"
