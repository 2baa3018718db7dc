"""Mistakes as people make them, told by the output alone: named, and not taken for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import Comparison, compare, declare
from tests.peer_layers import need

pytestmark = pytest.mark.usefixtures("folded_once")

BATCH, LENGTH, HEADS, WIDTH, FEATURES = 2, 6, 4, 8, 32
LAYER = anymha.MultiHeadAttention(
    HEADS,
    WIDTH,
    query_features=FEATURES,
    bias_initializer="random_normal",
    backend="numpy",
    seed=4,
)
WEIGHTS = {name: array.astype(np.float64) for name, array in anymha.get_weights(LAYER).items()}
RNG = np.random.default_rng(7)
X = RNG.standard_normal((BATCH, LENGTH, FEATURES)).astype(np.float32)
MASK = RNG.random((BATCH, LENGTH, LENGTH)) < 0.7
MASK |= np.eye(LENGTH, dtype=bool)
TOKENS = np.arange(LENGTH) < [[6], [4]]

Steps = dict[str, Callable[..., Any]]


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def attention(query: np.ndarray, seen: np.ndarray, steps: Steps, weights: Any = WEIGHTS) -> Any:
    """The layer as a port writes it out; `steps` replaces steps of it."""
    x = steps.get("input", lambda x: x)(query.astype(np.float64))
    parts = []
    for name in ("query", "key", "value"):
        projected = np.einsum("btd,dhk->bhtk", x, weights[f"{name}.kernel"])
        projected = projected + weights[f"{name}.bias"][:, None]
        parts.append(steps.get(name, lambda y: y)(projected))
    q, k, v = parts
    logits = steps.get("logits", lambda s: s / WIDTH**0.5)(q @ np.swapaxes(k, 2, 3))
    masked = steps.get("masked", lambda s, m: np.where(m, s, -np.inf))(logits, seen)
    shares = steps.get("softmax", softmax)(masked)
    shares = steps.get("shares", lambda p, m: p)(shares, seen)
    context = steps.get("context", lambda c: c)(shares @ v)
    y = np.einsum("bhtk,hko->bto", context, weights["output.kernel"]) + weights["output.bias"]
    return steps.get("output", lambda y, x: y)(y, query).astype(np.float32)


def report_of(steps: Steps, call: str = "mask", weights: Any = WEIGHTS) -> Comparison:
    """The comparison of a port with these steps with the layer."""
    if call == "mask":
        return compare(
            LAYER,
            lambda query, attention_mask: attention(query, attention_mask[:, None], steps, weights),
            X,
            attention_mask=MASK,
        )
    if call == "tokens":
        return compare(
            LAYER,
            lambda query, value_mask: attention(query, value_mask[:, None, None], steps, weights),
            X,
            value_mask=TOKENS,
        )
    causal = np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))
    return compare(
        LAYER,
        lambda query, use_causal_mask: attention(query, causal, steps, weights),
        X,
        use_causal_mask=True,
    )


def seen_as(change: Callable[[np.ndarray], np.ndarray]) -> Steps:
    """A port that changes its mask."""
    return {"masked": lambda s, m: np.where(change(m), s, -np.inf)}


def test_the_port_itself_agrees() -> None:
    for call in ("mask", "tokens", "causal"):
        assert report_of({}, call).passed


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.37, "0.37 times"),
        (1.01, "1.01 times"),
        (-1.0, "-1 times"),
        (np.log(2), "2 to the power in place of e"),
    ],
)
def test_any_scale_is_measured(factor, words) -> None:
    report = report_of({"logits": lambda s: factor * s / WIDTH**0.5})
    assert report.first_divergence == "logits"
    assert "wrong scale" in str(report.diagnosis)
    assert words in str(report.diagnosis)


@pytest.mark.parametrize(
    ("call", "steps", "words"),
    [
        ("mask", {"masked": lambda s, m: np.where(m, s, -3.5)}, "filled with -3.5"),
        ("mask", {"masked": lambda s, m: s * m}, "filled with zero"),
        ("tokens", {"masked": lambda s, m: s - 7.0 * ~m}, "lowered by 7 only"),
        ("causal", {"masked": lambda s, m: s - 7.0 * ~m}, "lowered by 7 only"),
        ("mask", {"masked": lambda s, m: s, "shares": lambda p, m: p * m}, "after the softmax"),
        ("causal", {"masked": lambda s, m: s, "shares": lambda p, m: p * m}, "after the softmax"),
        ("tokens", {"masked": lambda s, m: s, "input": lambda x: x * TOKENS[..., None]},
         "zeroed in place of masked"),
        ("tokens", seen_as(lambda m: np.broadcast_to(m, (BATCH, 1, LENGTH, LENGTH))[:, :, :, ::-1]),
         "in reverse along the keys"),
        ("tokens", seen_as(lambda m: m[::-1]), "sequences"),
        ("tokens", seen_as(lambda m: m | (np.arange(HEADS) > 0)[:, None, None]),
         "it acts on head 0 alone"),
        ("tokens", {"output": lambda y, x: y * TOKENS[..., None]}, "the output of hidden"),
        ("tokens", seen_as(lambda m: m[:1]), "ignored mask"),
        ("mask", seen_as(lambda m: m[:, :, :1]), "that of the first query for all"),
        ("mask", seen_as(lambda m: np.roll(m, 1, 3)), "shifted by one of the keys"),
        ("mask", seen_as(lambda m: m & np.swapaxes(m, 2, 3)), "measured: query"),
        ("causal", seen_as(lambda m: m & (np.arange(LENGTH) < 4)), "the last 2 keys are left out"),
    ],
)  # fmt: skip
def test_a_mask_that_acts_otherwise_is_named(call, steps, words) -> None:
    report = report_of(steps, call)
    assert words in str(report.diagnosis), report.to_text()


def test_any_other_mask_is_measured() -> None:
    other = np.random.default_rng(1).random((BATCH, 1, LENGTH, LENGTH)) < 0.6
    other |= np.eye(LENGTH, dtype=bool)
    report = report_of(seen_as(lambda m: other))
    assert "mask of other positions (measured: query 0 of sequence 0" in str(report.diagnosis)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda s: np.exp(s) / (1 + np.exp(s).sum(-1, keepdims=True)), "1 added to the denomin"),
        (lambda s: softmax(s) / 1.5, "multiplied by 0.667"),
        (lambda s: 1 / (1 + np.exp(-s)), "sigmoid"),
        (lambda s: np.maximum(np.where(np.isinf(s), 0, s), 0) ** 2 / np.maximum(
            (np.maximum(np.where(np.isinf(s), 0, s), 0) ** 2).sum(-1, keepdims=True), 1e-30),
         "squared relu"),
    ],
)  # fmt: skip
def test_another_form_of_the_softmax_is_named(form, words) -> None:
    report = report_of({"softmax": form})
    assert not report.passed
    assert words in str(report.diagnosis), report.to_text()


def normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"output": lambda y, x: y + x}, "residual added (the query)"),
        ({"output": lambda y, x: x + 0.5 * y}, "output scaled"),
        ({"output": lambda y, x: -y}, "output scaled (negative)"),
        ({"output": lambda y, x: y[:, ::-1]}, "in reverse along the positions"),
        ({"output": lambda y, x: y[::-1]}, "in reverse along the batch"),
        ({"input": normed}, "normalized once more (RMS norm, epsilon 1e-06, of the input"),
        ({"output": lambda y, x: normed(y)}, "normalized once more (RMS norm"),
        ({"query": normed, "key": normed}, "of query and key"),
        ({"context": lambda c: c / 2}, "multiplied by 0.5, the bias is not"),
        ({"context": lambda c: np.ascontiguousarray(c).reshape(BATCH, LENGTH, HEADS, WIDTH)
          .transpose(0, 2, 1, 3)}, "heads merged wrongly"),
        ({"value": lambda v: v.transpose(0, 2, 1, 3).reshape(v.shape)}, "of value"),
    ],
)  # fmt: skip
def test_what_stands_around_is_named(steps, words) -> None:
    report = report_of(steps)
    assert words in str(report.diagnosis), report.to_text()


def test_heads_that_are_merged_late_are_told_where_the_context_is_right() -> None:
    def port(query: np.ndarray) -> dict[str, np.ndarray]:
        told: dict[str, np.ndarray] = {}

        def kept(context: np.ndarray) -> np.ndarray:
            told["context"] = context.swapaxes(1, 2).astype(np.float32)
            rows = context.reshape(BATCH, LENGTH, HEADS, WIDTH)  # (B, H, T, d), not exchanged
            return rows.swapaxes(1, 2)

        output = attention(query, np.ones((1, 1, 1, LENGTH), bool), {"context": kept})
        return {**told, "output": output}

    report = compare(LAYER, port, X)
    assert report.first_divergence == "output"
    assert "heads merged wrongly (heads and positions not exchanged" in str(report.diagnosis)


def packed(order: str) -> np.ndarray:
    """The three kernels as one matrix (features, all outputs), in an order of P, H, d."""
    kernels = np.stack([WEIGHTS[f"{n}.kernel"] for n in ("query", "key", "value")])  # P D H d
    axes = ["PDHd".index(a) for a in "D" + order]
    return kernels.transpose(axes).reshape(FEATURES, -1)


def unpacked(matrix: np.ndarray, order: str) -> dict[str, np.ndarray]:
    """Weights from such a matrix, read in an order; the biases are right."""
    sizes = {"P": 3, "H": HEADS, "d": WIDTH}
    whole = matrix.reshape(FEATURES, *(sizes[a] for a in order))
    kernels = whole.transpose([("D" + order).index(a) for a in "PDHd"])
    return {f"{n}.kernel": k for n, k in zip(("query", "key", "value"), kernels, strict=True)}


@pytest.mark.parametrize(
    ("written", "read"), [("HPd", "PHd"), ("dHP", "PHd"), ("PHd", "HdP"), ("PdH", "HPd")]
)
def test_a_pack_that_is_read_in_another_order_is_named(written, read) -> None:
    report = report_of({}, weights={**WEIGHTS, **unpacked(packed(written), read)})
    told = str(report.diagnosis)
    assert "weights reshaped without a transpose" in told or "packed" in told, report.to_text()


def rounded(change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    return {n: change(w) if n.endswith("kernel") else w for n, w in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.astype(np.float16).astype(np.float64), "weights rounded to float16"),
        (lambda w: np.round(w / (a := np.abs(w).max() / 127)) * a, "weights quantised to 8 bits"),
        (lambda w: np.round(w / (a := np.abs(w).max() / 7)) * a, "weights quantised to 4 bits"),
    ],
)
def test_rounded_weights_are_told_from_each_other(change, words) -> None:
    report = report_of({}, weights=rounded(change))
    assert words in str(report.diagnosis), report.to_text()


def with_noise(share: float) -> Comparison:
    rng = np.random.default_rng(2)
    return report_of({}, weights=rounded(lambda w: w * (1 + share * rng.standard_normal(w.shape))))


@pytest.mark.parametrize("share", [1e-3, 1e-2])
def test_noise_is_no_rounding(share, request, monkeypatch) -> None:
    """Of weights that nobody can read; those of this port are in a variable of its function."""
    monkeypatch.setattr("anymha.parity.comparison.proven_weights.state_of", lambda _: {})
    if share > 1e-3:  # that no two mistakes together are like noise, takes long to find out
        request.getfixturevalue("no_pairs")
    report = with_noise(share)
    assert str(report.diagnosis).startswith("no known mistake"), report.to_text()
    assert "small everywhere" in str(report.diagnosis)


def test_noise_of_weights_that_are_read_is_other_weights() -> None:
    report = with_noise(1e-3)
    assert str(report.diagnosis).startswith("other weights (1024 of 1024 num"), report.to_text()


@pytest.mark.parametrize(
    ("name", "at"),
    [("value.kernel", (3, 1, 2)), ("output.kernel", (2, 5, 7)), ("query.kernel", (9, 0, 1))],
)
def test_one_other_weight_is_found(name, at) -> None:
    weights = {n: w.copy() for n, w in WEIGHTS.items()}
    weights[name][at] += 0.3
    report = report_of({}, weights=weights)
    assert f"one weight differs ({name}[{', '.join(map(str, at))}]" in str(report.diagnosis)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"logits": lambda s: s, "output": lambda y, x: y + x}, ("wrong scale", "residual")),
        ({"logits": lambda s: s, "masked": lambda s, m: np.where(np.swapaxes(m, 2, 3), s, -np.inf)},
         ("wrong scale", "transposed mask")),
        ({"logits": lambda s: s / WIDTH, "masked": lambda s, m: s},
         ("wrong scale", "ignored mask")),
    ],
)  # fmt: skip
def test_two_mistakes_are_both_named(steps, words) -> None:
    report = report_of(steps)
    for word in words:
        assert word in str(report.diagnosis), report.to_text()


def test_a_stage_that_is_reported_otherwise_is_no_mistake_of_the_weights() -> None:
    q = np.einsum("btd,dhk->bthk", X, WEIGHTS["query.kernel"]) + WEIGHTS["query.bias"]
    for told, words in (
        (q.transpose(0, 2, 1, 3), "as (B, H, T, d)"),
        (q.reshape(BATCH, LENGTH, -1), "in the shape"),
        (q * 0.5, "with a factor of 0.5"),
    ):
        port = declare(lambda query, told=told: {"output": LAYER(query), "query": told},
                       anymha.get_weights(LAYER), "anymha")  # fmt: skip
        report = compare(LAYER, port, X)
        assert f"the query is reported {words}" in str(report.diagnosis) or (
            words in str(report.diagnosis)
        )


def clamped(x: Any, limit: float = 0.01, norm: bool = False) -> Any:
    """`x`, whose gradient is cut off, or the norm of that of each position."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(
            lambda g: (
                g * (limit / g.norm(dim=-1, keepdim=True)).clamp(max=1.0)
                if norm
                else g.clamp(-limit, limit)
            )
        )
    return x


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda q, k, v: (q.detach(), k, v), "no gradient flows through the query"),
        (lambda q, k, v: (q, k, v.detach()), "no gradient flows through the value"),
        (lambda q, k, v: (q.detach(), k.detach(), v), "no gradient flows through"),
        (lambda q, k, v: (q, 0.5 * k + 0.5 * k.detach(), v), "key is multiplied by 0.5"),
        (
            lambda q, k, v: (q, k, clamped(v)),
            "gradient clipped (that of the value is cut at 0.01 and -0.01)",
        ),
        (lambda q, k, v: (clamped(q), k, v), "that of the query is cut at 0.01 and -0.01"),
        (
            lambda q, k, v: [clamped(x, 0.02) for x in (q, k, v)],
            "that of the query, key and value is cut at 0.02 and -0.02",
        ),
        (
            lambda q, k, v: (q, k, clamped(v, 0.05, norm=True)),
            "that of the value is cut to a norm of 0.05 at each position",
        ),
    ],
)
def test_where_gradients_are_lost_is_named(wrong, words) -> None:
    assert words in of_gradients(bart_port(wrong))


def test_a_factor_of_the_gradient_of_one_weight_is_measured() -> None:
    port = bart_port(lambda *three: three)
    linear, weight = port.out_proj, port.out_proj.weight
    linear.forward = lambda y: y @ (0.9 * weight + (0.1 * weight).detach()).mT + linear.bias
    assert "that of output.kernel is multiplied by 0.9" in of_gradients(port)


@pytest.mark.parametrize(
    ("hook", "names", "words"),
    [
        (lambda g: g.clamp(-0.1, 0.1), ("q_proj", "k_proj", "v_proj", "out_proj"),
         "gradient clipped (those of"),
        (lambda g: g.clamp(-0.1, 0.1), ("v_proj",), "that of value.kernel is cut at 0.1 and -0.1"),
        (lambda g: g * min(1.0, 0.5 / g.norm().item()), ("q_proj", "v_proj", "out_proj"),
         "have a norm of 0.5 each"),
        (lambda g: 0.25 * g, ("q_proj", "v_proj"),
         "those of query.kernel and value.kernel are multiplied by 0.25"),
    ],
)  # fmt: skip
def test_gradients_of_weights_that_a_hook_cuts_are_told(hook, names, words) -> None:
    port = bart_port(lambda *three: three)
    for name in names:
        getattr(port, name).weight.register_hook(hook)
    assert words in of_gradients(port)


def bart_port(wrong: Callable[..., Any]) -> Any:
    """The layer as a module of torch; `wrong` changes queries, keys and values."""
    torch = need("torch")

    class Port(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(self, name, torch.nn.Linear(FEATURES, FEATURES))

        def forward(self, x: Any) -> Any:
            q, k, v = (p(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2)
                       for p in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
            q, k, v = wrong(q, k, v)
            y = torch.softmax(q @ k.mT / WIDTH**0.5, -1) @ v
            return self.out_proj(y.transpose(1, 2).reshape(x.shape))

    port = Port()
    state = anymha.from_canonical(anymha.get_weights(LAYER), layout="transformers.bart")
    port.load_state_dict({n: torch.tensor(np.array(a)) for n, a in state.items()})
    return port


def of_gradients(port: Any) -> str:
    """Why the gradients of a port differ, where all before them agrees."""
    report = compare(LAYER, declare(port, layout="transformers.bart", num_heads=HEADS), X)
    assert report.first_divergence is not None
    assert report.first_divergence.startswith("gradient of ")
    return str(report.diagnosis)


def test_a_mask_is_named_where_no_weights_are_known() -> None:
    def reference(query: Any, attention_mask: Any) -> Any:
        return attention(query, attention_mask[:, None], {})

    def inverted(query: Any, attention_mask: Any) -> Any:
        return attention(query, ~attention_mask[:, None], {})

    mask = MASK.copy()
    mask[:, :, 0], mask[:, :, 1] = True, False
    report = compare(reference, inverted, X, attention_mask=mask)
    assert str(report.diagnosis).startswith("inverted mask (`attention_mask`)")


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("query", lambda q: q - WEIGHTS["query.bias"]),
        ("query", lambda q: q * np.linspace(1, 2, q.shape[-1])),
        ("key", lambda k: k[:, :, ::-1] - 0.3),
    ],
)
def test_a_stage_that_is_told_wrongly_beside_a_right_output_is_no_mistake(stage, change) -> None:
    right = np.einsum("btd,dhk->bthk", X, WEIGHTS[f"{stage}.kernel"]) + WEIGHTS[f"{stage}.bias"]
    port = declare(lambda query: {"output": LAYER(query), stage: change(right)},
                   anymha.get_weights(LAYER), "anymha")  # fmt: skip
    told = str(compare(LAYER, port, X).diagnosis)
    assert told == f"the reported {stage} is not that of which the output is made"


def test_a_value_that_is_the_key_too_has_the_gradients_of_both() -> None:
    torch = need("torch")
    options = {"query_features": FEATURES, "softcap": 1.5, "seed": 1}
    layer = anymha.MultiHeadAttention(HEADS, WIDTH, backend="torch", **options)
    x, y = (torch.from_numpy(10 * np.random.default_rng(n).standard_normal(X.shape)).float()
            for n in (1, 2))  # fmt: skip
    report = compare(layer, lambda query, value: layer(query, value), (x, y))
    assert report.passed, report.to_text()


def test_that_the_time_ran_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anymha.parity.diagnose.diagnosis.PAIRS_SECONDS", 0.0)
    report = report_of({"output": lambda y, x: np.sin(3 * y)})
    assert "nor any two of those that there was time for" in str(report.diagnosis)


def test_scaling_by_the_length_is_named() -> None:
    dynamic = {"scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 4}
    layer, plain = (
        anymha.MultiHeadAttention(
            HEADS, WIDTH, query_features=FEATURES, rotary=rotary, backend="numpy", seed=4
        )
        for rotary in (dynamic, True)
    )
    told = str(compare(layer, lambda query: plain(query), X).diagnosis)
    assert told.startswith("rotary scaling left out")
