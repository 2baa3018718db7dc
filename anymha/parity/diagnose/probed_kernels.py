"""Kernels of a candidate that is a function, measured by calls.

The values' kernel and bias are measured as they are, other changes of low rank, as of LoRA.

Of a sequence of one position the output tells the values. Of one of two positions it tells the
share of each head, and so the difference of two logits, which is a product of a query and a change
of a key: known keys give the queries, known queries the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.own_weights import NOISE, SURE, in_some_heads
from anymha.parity.oracle.recipe import Recipe, einsum, reads

Ask = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""The candidate's output (B, T, O) for other inputs, "query" and where it has one "value"."""

MOST = 6000
"""The greatest number of sequences in a call."""

MOST_NUMBERS = 600
"""The most numbers of changes that are fitted to the output."""

CALLS = 16
"""How many times what rounding explains is left by a kernel as calls measure it, at most."""

MOST_FITTED = 1 << 22
"""The most numbers of a matrix from a kernel to the output."""

NEAR = 10
"""How many times its noise a measured change may be off as it is fitted to the output."""

WEAK = 1e-4
"""What changes the output by no more than this part of the greatest change is not fitted: that is
what of two factors gives one product, and the noise of differences.
"""

STEEP = 1.5
"""The greatest difference of two logits that is asked for."""


def probed_kernels(recipe: Recipe, ask: Ask, evidence: Evidence) -> tuple[str, Recipe] | None:
    """The recipe with kernels that differ, and which; None where none is found."""
    several = recipe.decoded is not None or len(recipe.batches) > 1
    if recipe.sections or several or (recipe.causal and "value" in ask_names(recipe)):
        return None
    plain = recipe.but(masks={}, bias=None, kept=None, window=None, offset=None)
    with np.errstate(all="ignore"):
        measured = _of_values(plain, ask)
        if measured is None:
            return None
        kernel, bias = measured
        changes: Factors | None = {} if kernel is None else _factors("value", kernel)
        if changes is None or bias is not None:
            return _other_values(recipe, kernel, bias, evidence)
        rest = _of_logits(_with(plain, changes), ask)
        if rest is None or not (changes or rest):
            return None
        factors = {**rest, **changes}
        made = _fitted(recipe, factors, evidence)
        if made is None or not max(evidence.errors(made).values()) <= 1:
            return None
    weights = [f"{n}.kernel" for n in ("query", "key", "value") if n in factors]
    of = {n: in_some_heads(n, made.weights[n] - recipe.weights[n]) for n in weights}
    if any(of.values()):
        return " and ".join(f"{n} differs{of[n]}" for n in weights), made
    names = " and ".join(weights)
    ranks = " and ".join(dict.fromkeys(str(one.shape[1]) for one, _ in factors.values()))
    differ = "differs by a matrix" if len(factors) == 1 else "differ by matrices"
    return f"{names} {differ} of rank {ranks}, as of a low-rank update (LoRA)", made


def _factors(name: str, change: np.ndarray) -> Factors | None:
    low = _low(change)
    return None if low is None else {name: low}


def _other_values(
    recipe: Recipe, kernel: np.ndarray | None, bias: np.ndarray | None, evidence: Evidence
) -> tuple[str, Recipe] | None:
    """The recipe with all of the values' kernel, or bias, as it was measured."""
    weights = dict(recipe.weights)
    if kernel is not None:
        own = weights["value.kernel"]
        weights["value.kernel"] = own + kernel.reshape(own.shape)
        if np.abs(weights["value.kernel"]).max() <= NOISE * np.abs(own).max():
            return None  # an output that depends on no input tells of no weight
    if bias is not None:  # of either projection: the probabilities of a row sum to 1
        own = recipe.stages["value"].shape[2:]
        weights["value.bias"] = weights.get("value.bias", 0.0) + bias.reshape(own)
    made = recipe.but(weights=weights)
    if kernel is not None and max(evidence.errors(made).values()) <= CALLS:
        made = _nearer(made, np.abs(kernel).max(), evidence)
    fits = max(evidence.errors(made).values()) <= 1
    either, where = "output.bias or value.bias", ""
    if kernel is not None and recipe.heads[0] > 1:
        where = in_some_heads(
            "value.kernel", made.weights["value.kernel"] - recipe.weights["value.kernel"]
        )
    # Of one head calls tell the product of both kernels alone.
    of = "value.kernel" if recipe.heads[0] > 1 else "value.kernel or output.kernel"
    words = {
        (True, False): f"{of} differs{where}",
        (False, True): f"{either} differs, which adds the same to every output",
        (True, True): f"{of}, and {either} differ",
    }[kernel is not None, bias is not None]
    return (words, made) if fits else None


def _nearer(recipe: Recipe, most: float, evidence: Evidence) -> Recipe:
    """The recipe with a values' kernel that gives the output, where it is near to that measured.

    The output is linear in it. Calls measure it within their own rounding, a part of `most`.
    """
    got, exact = evidence.reported["output"], recipe.stages["output"]
    order, kernel = reads(recipe), recipe.weights["value.kernel"]
    shares, w = recipe.stages["dropped_probabilities"], recipe.weights["output.kernel"]
    if exact.size * kernel.size > MOST_FITTED or got.shape != exact.shape:
        return recipe
    seen = einsum("bhts,bsd->bthd", shares, recipe.inputs["value"])
    grouped = np.eye(recipe.heads[1])[order]
    slopes = np.einsum("bthd,hvo,hg->btodgv", seen, w, grouped, optimize=True)
    slopes = slopes.reshape(exact.size, kernel.size)
    more = np.linalg.lstsq(slopes, (got - exact).reshape(-1), rcond=1e-6)[0]
    if not np.abs(more).max() <= NOISE * most:
        return recipe
    weights = {**recipe.weights, "value.kernel": kernel + more.reshape(kernel.shape)}
    return recipe.but(weights=weights)


def ask_names(recipe: Recipe) -> tuple[str, ...]:
    """The inputs of a call: the query, and the value where it is another."""
    alike = np.array_equal(recipe.inputs["query"], recipe.inputs["value"])
    return ("query",) if alike else ("query", "value")


Factors = dict[str, tuple[np.ndarray, np.ndarray]]
"""The changes of kernels, by projection: the product of (D, r) and (r, H * d)."""


def _with(recipe: Recipe, changes: Factors) -> Recipe:
    weights = dict(recipe.weights)
    for name, (one, other) in changes.items():
        kernel = weights[f"{name}.kernel"]
        weights[f"{name}.kernel"] = kernel + (one @ other).reshape(kernel.shape)
    return recipe.but(weights=weights)


def _low(change: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The factors of a change of low rank; None where its rank is not sure to be low."""
    left, sizes, right = np.linalg.svd(change, full_matrices=False)
    rank = int(np.sum(sizes > NOISE * sizes[0]))
    if not np.all(np.isfinite(sizes)) or SURE * rank > min(change.shape):
        return None
    return left[:, :rank] * sizes[:rank], right[:rank]


def _solved(x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """The kernel from inputs to what it adds; None where none does, or a bias is added too."""
    with_one = np.concatenate([x, np.ones((len(x), 1))], 1)
    both = np.linalg.lstsq(with_one, y, rcond=None)[0]
    most, left = NOISE * np.abs(y).max(), np.abs(with_one @ both - y).max()
    return both[:-1] if max(np.abs(both[-1]).max(), left) <= most else None


def _asked(
    recipe: Recipe, ask: Ask, query: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, Recipe]:
    """What the candidate gives for a query and a value, and the recipe of that call."""
    inputs = {"query": query, "key": value, "value": value}
    inputs = {n: x.astype(np.float32).astype(np.float64) for n, x in inputs.items()}
    got = ask({name: inputs[name] for name in ask_names(recipe)}).astype(np.float64)
    return got, recipe.but(inputs=inputs, positions=None, key_positions=None, segments=None,
                           key_segments=None)  # fmt: skip


def _of_values(recipe: Recipe, ask: Ask) -> tuple[np.ndarray | None, np.ndarray | None] | None:
    """How the values' kernel (D, K * d_v) and bias (K * d_v) differ, None where they do not.

    From sequences of one position; None alone where no other kernel and bias explain those.
    """
    features = [len(recipe.weights[f"{name}.kernel"]) for name in ("query", "value")]
    rng, count = np.random.default_rng(0), 4 * (features[1] + 1)
    value = rng.standard_normal((count, 1, features[1]))
    crossed = "value" in ask_names(recipe)
    query = rng.standard_normal((count, 1, features[0])) if crossed else value
    got, other = _asked(recipe, ask, query, value)
    exact = other.stages["output"]
    if got.shape != exact.shape or not np.all(np.isfinite(got)):
        return None
    if np.abs(got - exact).max() <= 1e-4 * np.abs(exact).max():
        return None, None
    x = other.inputs["value"][:, 0]
    with_one = np.concatenate([x, np.ones((len(x), 1))], 1)
    change = np.linalg.lstsq(with_one, (got - exact)[:, 0], rcond=None)[0]
    grouped = np.eye(recipe.heads[1])[reads(recipe)]
    kernel = einsum("hvo,hg->gvo", recipe.weights["output.kernel"], grouped)
    kernel = kernel.reshape(-1, kernel.shape[-1])
    most = np.abs(change).max()
    left = np.abs(with_one @ change - (got - exact)[:, 0]).max()
    if np.linalg.matrix_rank(kernel) < len(kernel) or left > NOISE * np.abs(got - exact).max():
        return None
    values = change @ np.linalg.pinv(kernel)
    if np.abs(values @ kernel - change).max() > NOISE * most:
        return None
    same = np.abs(change[:-1]).max() <= NOISE * most, np.abs(change[-1]).max() <= NOISE * most
    return None if same[0] else values[:-1], None if same[1] else values[-1]


def _of_logits(recipe: Recipe, ask: Ask) -> Factors | None:
    """How the queries' or the keys' kernel differs, from sequences of two positions."""
    w, (heads, shared) = recipe.weights, recipe.heads
    rows_of, features = len(w["query.kernel"]), len(w["key.kernel"])
    rows = max(rows_of + 1, 2 * w["query.kernel"].shape[2]) + 4
    if rows * features > MOST or heads > w["output.kernel"].shape[2]:
        return None
    x = np.random.default_rng(1).standard_normal((rows, rows_of))
    crossed, order = "value" in ask_names(recipe), reads(recipe)
    last = np.random.default_rng(2).standard_normal((rows, features)) if crossed else x
    queries = einsum("rd,dhk->rhk", x, w["query.kernel"]) + w.get("query.bias", 0.0)
    keys = w["key.kernel"][:, order]
    right = recipe.scale * einsum("rhk,dhk->hrd", queries, keys)
    step = STEEP / np.abs(right).max()
    value = np.stack([last[:, None] - step * np.eye(features), np.broadcast_to(
        last[:, None], (rows, features, features))], 2)  # (rows, features, 2, D)  # fmt: skip
    value = value.reshape(-1, 2, features)
    query = np.repeat(x, features, 0)[:, None] if crossed else value
    got, other = _asked(recipe, ask, query, value)
    values = other.stages["value"][:, :, order]
    parts = einsum("bshv,hvo->bsho", values, w["output.kernel"])
    apart = got[:, -1] - parts[:, 1].sum(1) - w.get("output.bias", 0.0)
    columns = (parts[:, 0] - parts[:, 1]).swapaxes(1, 2)  # (B, O, H)
    shares = (np.linalg.pinv(columns) @ apart[..., None])[..., 0]
    moved = np.log(shares / (1 - shares)).reshape(rows, features, heads) / -step
    moved = np.moveaxis(moved, -1, 0)  # (H, rows, D)
    change = moved - right
    most = np.abs(change).max()
    if not np.isfinite(most):
        return None
    if most <= 1e-3 * np.abs(right).max():
        return {}
    turned = recipe.scale * keys.transpose(1, 2, 0)  # (H, d, D)
    of_queries = change @ np.linalg.pinv(turned)  # (H, rows, d)
    if np.abs(of_queries @ turned - change).max() <= NOISE * most:
        kernel = _solved(x, np.moveaxis(of_queries, 0, 1).reshape(rows, -1))
        low = None if kernel is None else _low(kernel)
        return None if low is None else {"query": low}
    own = recipe.scale * np.moveaxis(queries, 1, 0).reshape(shared, -1, queries.shape[2])
    grouped = change.reshape(shared, -1, features)  # (K, H / K * rows, D)
    of_keys = np.linalg.pinv(own) @ grouped  # (K, d, D)
    if np.abs(own @ of_keys - grouped).max() <= NOISE * most:
        low = _low(np.moveaxis(of_keys, -1, 0).reshape(features, -1))
        return None if low is None else {"key": low}
    return None


def _fitted(recipe: Recipe, changes: Factors, evidence: Evidence) -> Recipe | None:
    """The recipe with changes that are fitted to the output, near to those that are measured."""
    arrays = [array for pair in changes.values() for array in pair]
    sizes = np.cumsum([0, *(array.size for array in arrays)])
    if sizes[-1] > MOST_NUMBERS:
        return None

    def made(numbers: np.ndarray) -> Recipe:
        again = [numbers[a:b].reshape(array.shape)
                 for a, b, array in zip(sizes, sizes[1:], arrays, strict=False)]  # fmt: skip
        pairs = zip(again[::2], again[1::2], strict=True)
        return _with(recipe, dict(zip(changes, pairs, strict=True)))

    begun = numbers = np.concatenate([array.reshape(-1) for array in arrays])
    for _ in range(2):
        left = evidence.differences(made(numbers))
        small = 1e-5 * np.abs(numbers).max()
        slopes = [(left - evidence.differences(made(numbers + small * unit))) / small
                  for unit in np.eye(len(numbers))]  # fmt: skip
        numbers = numbers + np.linalg.lstsq(np.stack(slopes, 1), left, rcond=WEAK)[0]
    moved = np.abs(numbers - begun).max()
    return made(numbers) if moved <= NEAR * NOISE * np.abs(begun).max() else None
