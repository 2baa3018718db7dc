"""Parts merged or loaded wrongly: keys in blocks, shards of weights; and any two usual mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.parity import compare, declare
from tests.test_diagnose_kinds import (
    FEATURES,
    HEADS,
    LENGTH,
    SEEN,
    WEIGHTS,
    WIDTH,
    Steps,
    X,
    heads,
    layer,
    named,
    port_of,
    report_of,
    softmax,
)

pytestmark = pytest.mark.usefixtures("folded_once")

CAUSAL = {"attention_mask": np.broadcast_to(np.tri(LENGTH, dtype=bool), SEEN.shape)}
Merge = Callable[[list[tuple[np.ndarray, np.ndarray, np.ndarray]]], np.ndarray]


def blocks(logits: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each block of keys its result, the sum of its exponentials, and its maximum.

    The values are those of a unit matrix: results are shares of the keys.
    """
    for start in range(0, logits.shape[-1], size):
        part = logits[..., start : start + size]
        top = np.maximum(part.max(-1, keepdims=True), -1e30)
        weights = np.exp(part - top)
        total = weights.sum(-1, keepdims=True)
        values = np.eye(logits.shape[-1])[start : start + size]
        yield weights @ values / np.where(total > 0, total, 1.0), total, top


def in_blocks(size: int, merge: Merge) -> Callable[[np.ndarray], np.ndarray]:
    return lambda logits: merge(list(blocks(logits, size)))


def log_sum(total: np.ndarray, top: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return top + np.log(total)


def ring(turned: bool = False, kept: bool = False) -> Merge:
    """Blocks come one after another, as round a ring of devices."""

    def merge(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
        (out, total, top), *rest = parts
        held = log_sum(total, top)
        for new, total, top in rest:
            log = log_sum(total, top)
            with np.errstate(over="ignore", invalid="ignore"):
                share = 1 / (1 + np.exp(log - held if turned else held - log))
            out = out - share * (out - new)
            held = held if kept else np.logaddexp(held, log)
        return out

    return merge


def weighed(weigh: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Merge:
    """The sum of results, weighed by their sums and maxima (P, ..., 1)."""

    def merge(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
        results, totals, tops = map(np.stack, zip(*parts, strict=True))
        return (results * weigh(totals, tops)).sum(0)

    return merge


def right(totals: np.ndarray, tops: np.ndarray) -> np.ndarray:
    weights = totals * np.exp(tops - tops.max(0))
    return weights / weights.sum(0)


def running(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """A running result that is divided by the sum in each block, and not multiplied by it."""
    out, total, top = (np.zeros_like(a) for a in parts[0])
    top = top - 1e30
    for new, more, other in parts:
        most = np.maximum(top, other)
        total = total * np.exp(top - most) + more * np.exp(other - most)
        out = (out * np.exp(top - most) + new * more * np.exp(other - most)) / total
        top = most
    return out


@pytest.mark.parametrize("call", [{}, CAUSAL], ids=["all", "causal"])
@pytest.mark.parametrize("merge", [ring(), weighed(right)])
def test_blocks_that_are_merged_rightly_agree(merge, call) -> None:
    assert report_of({"softmax": in_blocks(3, merge)}, **call).passed


@pytest.mark.parametrize(
    ("size", "call", "merge", "words"),
    [
        (3, CAUSAL, weighed(lambda t, m: (t > 0) / (t > 0).sum(0)),
         "averaged over those that see a key"),
        (2, {}, weighed(lambda t, m: np.full_like(t, 1 / len(t))), "averaged"),
        (3, {}, weighed(lambda t, m: t / t.sum(0)), "by their sums, each less its own maximum"),
        (3, {}, weighed(lambda t, m: right(t, m) / right(t, m)[-1]), "by the sum of the last part"),
        (4, {}, weighed(lambda t, m: t * np.exp(m - m.max(0)) / t[-1]),
         "by the sum of the last part, less its own maximum"),
        (3, {}, weighed(lambda t, m: (w := 2 ** log_sum(t, m)) / w.sum(0)),
         "weighed by powers of 2 of the logarithms of their sums"),
        (3, {}, lambda parts: weighed(lambda t, m: np.concatenate([right(t, m)[:-1], 0 * t[-1:]]))(
            parts), "the last left out, its sum is not"),
        (3, {}, ring(turned=True), "merged one by one, new and old weights exchanged"),
        (2, {}, ring(kept=True), "merged one by one, the sum stays that of the first"),
        (3, {}, running, "divided by the sum so far in each part, not multiplied by it before"),
    ],
)  # fmt: skip
def test_blocks_of_keys_that_are_merged_wrongly_are_named(size, call, merge, words) -> None:
    told = named(report_of({"softmax": in_blocks(size, merge)}, **call))
    assert told.startswith("another softmax (the keys in "), told
    assert words in told


def by_log_sums(logits: np.ndarray, share: Any) -> np.ndarray:
    """Three parts of the keys, each less the logarithm of its own sum; hidden logits are finite."""
    parts, logs = [], []
    for part in np.array_split(np.where(np.isneginf(logits), -1e30, logits), 3, axis=-1):
        top = part.max(-1, keepdims=True)
        logs.append(top + np.log(np.exp(part - top).sum(-1, keepdims=True)))
        parts.append(np.exp(part - logs[-1]))
    return np.concatenate(
        [own * w for own, w in zip(parts, share(np.stack(logs)), strict=True)], -1
    )


@pytest.mark.parametrize("share", [lambda x: np.full_like(x, 1 / 3), np.ones_like])
def test_parts_without_a_key_that_is_seen_are_merged_too(share) -> None:
    right = report_of({"softmax": lambda s: by_log_sums(s, lambda x: softmax(x, 0))}, **CAUSAL)
    assert right.passed
    told = named(report_of({"softmax": lambda s: by_log_sums(s, share)}, **CAUSAL))
    how = "added" if share is np.ones_like else "averaged"
    words = f"the keys in 3 parts, each divided by its own sum, {how}"
    assert words in told, told
    assert "the keys of a part in which none is seen have weights of 1" in told


def test_parts_whose_hidden_keys_are_all_alike_are_averaged() -> None:
    mean = weighed(lambda t, m: np.full_like(t, 1 / len(t)))
    merge = in_blocks(4, mean)
    told = named(report_of({"softmax": lambda s: merge(np.maximum(s, -1e30))}, **CAUSAL))
    assert "averaged, the keys of a part in which none is seen are all alike" in told, told


def test_a_ring_that_turns_once_too_few_is_named() -> None:
    """Three devices of two positions each; none has the keys of the device after it."""
    rows, columns = np.indices((6, 6)) // 2
    hidden = columns == (rows + 1) % 3
    port = port_of(layer(), {"softmax": lambda s: softmax(np.where(hidden, -np.inf, s))})
    told = named(compare(layer(), port, X[:, :6]))
    assert "as of a ring that turns once too few" in told, told


def relu(s: np.ndarray) -> np.ndarray:
    return np.maximum(s, 0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: (e := relu(s) + 1e-6) / e.sum(-1, keepdims=True),
         "relu, divided by their sum, 1e-06 added to each, hidden keys too"),
        (lambda s: (e := relu(s) + 1e-4 * np.isfinite(s)) / e.sum(-1, keepdims=True),
         "relu, divided by their sum, 1e-04 added to each that is seen"),
        (lambda s: relu(s) ** 2 / (relu(s) ** 2).sum(-1, keepdims=True).clip(1e-3),
         "squared relu, divided by their sum"),
        (lambda s: relu(s) / np.sqrt(LENGTH),
         "relu, divided by the root of the number of keys"),
        (lambda s: np.where(np.isfinite(s), 1 / (1 + np.exp(-s)), 0)
         / np.isfinite(s).sum(-1, keepdims=True),
         "sigmoid, divided by the number of keys that are seen"),
    ],
)  # fmt: skip
def test_positive_functions_in_place_of_the_exponential_are_named(change, words) -> None:
    assert words in named(report_of({"softmax": change}, attention_mask=SEEN))


@pytest.mark.parametrize(
    ("feature", "least", "words"),
    [
        (lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))), 0.0,
         "none: elu + 1 of the features of queries and keys, divided by the sum"),
        (relu, 1e-3, "relu of the features of queries and keys, divided by the sum and 0.001"),
    ],
)  # fmt: skip
def test_linear_attention_is_named_under_a_mask(feature, least, words) -> None:
    def shares(s: np.ndarray) -> np.ndarray:
        seen = np.where(np.isfinite(s), s, 0)
        return seen / (seen.sum(-1, keepdims=True) + least)

    steps = {"query": feature, "key": feature, "scale": lambda s: s, "softmax": shares}
    assert words in named(report_of(steps, attention_mask=SEEN))


def changed(*names: str) -> Callable[..., Steps]:
    """Steps that change weights of these names."""
    return lambda change: {"weights": lambda w: w | {name: change(w[name]) for name in names}}


def of_head(head: int, factor: float) -> np.ndarray:
    return np.where(np.arange(HEADS) == head, factor, 1.0)[:, None]


def exchanged(array: np.ndarray) -> np.ndarray:
    """The halves of the first axis."""
    return np.concatenate(np.split(array, 2)[::-1])


QUERY = "query.kernel", "query.bias"


@pytest.mark.parametrize(
    ("steps", "told", "words"),
    [
        (changed("query.kernel")(lambda a: a[:, [0, 1, 0, 1]]), (True, False),
         "shards loaded wrongly (query's kernel, cut into 2 along the heads: the first part"),
        (changed("key.kernel")(lambda a: a[:, [0, 0, 2, 2]]), (True,),
         "key's kernel, cut into 4 along the heads: of each 2 parts the first for all"),
        (changed("query.kernel")(exchanged), (True, False),
         "shards loaded wrongly (query, cut into 2 along the features: exchanged)"),
        (changed("output.kernel")(lambda a: a[[0, 0, 2, 3]]), (True, False),
         "shards loaded wrongly (output, cut into 4 along the heads: part 0 twice, part 1 missing"),
        (changed("value.kernel", "value.bias")(lambda a: a * of_head(2, 0.0)), (True,),
         "heads left out (head 2 of 4 is zero: the value)"),
        (changed("query.kernel")(lambda a: a * of_head(2, 0.0)), (True,),
         "shards loaded wrongly (query's kernel, cut into 4 along the heads: part 2 is missing)"),
        (changed("output.kernel")(exchanged), (False,), "the halves exchanged, as of two shards"),
        (changed(*QUERY)(lambda a: a * of_head(2, 2.0)), (True, False),
         "weights scaled (query's kernel and bias, of which head 2 of 4 is 2 times as great)"),
        (changed("key.kernel")(lambda a: 2 * a), (True, ), "weights scaled (key's kernel, 2 times"),
        (changed("value.kernel", "value.bias")(lambda a: 1.3 * a), (True,),
         "weights scaled (value's kernel and bias, 1.3 times)"),
        (changed("value.bias")(lambda a: 0.7 * a), (True, False),
         "weights scaled (value's bias, 0.7 times)"),
        (changed("output.kernel")(lambda a: a * of_head(3, 0.0)[..., None]), (False,),
         "heads left out (head 3 of 4 is zero: the context, or its part of the output's kernel)"),
        (changed(*QUERY)(lambda a: 2 * a), (False,),
         "wrong scale (2 times, as of weights of query or key that are taken twice)"),
    ],
)  # fmt: skip
def test_weights_of_other_shards_or_with_a_factor_are_named(steps, told, words) -> None:
    for stages in told:
        assert words in named(report_of(steps, stages))


def over_queries(s: np.ndarray) -> np.ndarray:
    return softmax(s, 2)


def merged_early(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.einsum("bhts,bshv->bhtv", p, v).reshape(len(v), LENGTH, HEADS, WIDTH)


USUAL = {
    "wrong scale": {"scale": lambda s: s},
    "softmax over another axis": {"softmax": over_queries},
    "heads merged wrongly": {"context": merged_early},
    "heads split wrongly": {"query": lambda q: q.reshape(len(q), HEADS, LENGTH, WIDTH).swapaxes(
        1, 2)},
    "transposed kernel": changed("value.kernel")(
        lambda a: a.reshape(FEATURES, FEATURES).T.reshape(a.shape)),
    "missing bias": changed("output.bias")(lambda a: 0 * a),
    "heads interleaved": {"key": lambda k: k.reshape(*k.shape[:2], WIDTH, HEADS).swapaxes(2, 3)},
}  # fmt: skip


@pytest.mark.parametrize("other", ["softmax over another axis", "heads merged wrongly"])
@pytest.mark.parametrize("one", USUAL)
def test_any_two_usual_mistakes_are_both_named(one, other) -> None:
    if one != other:
        told = named(report_of(USUAL[one] | USUAL[other], attention_mask=SEEN))
        assert one in told, told
        assert other in told


def test_one_mistake_with_two_projections_is_named_for_both() -> None:
    def turned(array: np.ndarray) -> np.ndarray:
        return array.reshape(FEATURES, FEATURES).T.reshape(array.shape)

    told = named(report_of(changed("query.kernel", "output.kernel")(turned)))
    assert told == "transposed kernel (query) and transposed kernel (output)"


def test_an_inverted_mask_beside_a_wrong_merge_is_named() -> None:
    def port(query: Any, attention_mask: Any) -> Any:
        return port_of(layer(), {"context": merged_early})(query, ~attention_mask)

    told = named(compare(layer(), port, X, attention_mask=SEEN & ~np.eye(LENGTH, dtype=bool)))
    assert "inverted mask" in told, told
    assert "heads merged wrongly (heads and positions not exchanged" in told


def test_heads_that_are_told_in_another_order_are_named() -> None:
    one = layer()
    right_queries = np.einsum("btd,dhk->bthk", X, WEIGHTS["query.kernel"]) + WEIGHTS["query.bias"]
    port = declare(lambda query: {"output": one(query), "query": heads([2, 0, 3, 1])(
        right_queries)}, anymha.get_weights(one), "anymha")  # fmt: skip
    told = str(compare(one, port, X).diagnosis)
    assert told == "the query is reported with its heads in the order 2, 0, 3, 1"


@pytest.mark.parametrize(
    ("steps", "call", "told"),
    [
        ({"context": merged_early}, {}, "heads merged wrongly (heads and positions not exchanged: "
         "written as (B, H, T, d), read as (B, T, H, d))"),
        ({"scale": lambda s: s / WIDTH}, {}, "wrong scale (applied twice, 1/(width of a head))"),
        ({"weights": lambda w: w | {n: 0 * a for n, a in w.items() if n.endswith("bias")}}, {},
         "missing bias (query, key, value and output)"),
        ({"softmax": lambda s: np.exp(s) / (2 + np.exp(s).sum(-1, keepdims=True))}, {},
         "another softmax (2 added to the denominator, as of 2 more keys with a logit of zero "
         "(padding that is not hidden))"),
    ],
)  # fmt: skip
def test_causes_are_told_once_and_in_whole(steps, call, told) -> None:
    assert named(report_of(steps, **call)) == told
