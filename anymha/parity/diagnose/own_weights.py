"""Weights of a candidate that differ: those that it tells, or one that is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import numpy as np

from anymha.parity.diagnose.changes import listed
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.measured import Family, fitted, number
from anymha.parity.diagnose.measured_weights import related
from anymha.parity.oracle.oracle import gradients_of
from anymha.parity.oracle.recipe import Arrays, Recipe, einsum, reads
from anymha.parity.stages.tolerance import eps
from anymha.parity.stages.trace import Trace, name_of_dtype

MOST = 1 << 22
"""Up to so many numbers the effects of single weights are computed."""

ALONG = 0.5
"""The least part of the differences along which one weight must move the output."""

NONE = 1e-4
"""Singular values below this, of the greatest, are rounding."""

SURE = 4
"""How many times the rank of a change the least size of a matrix must be."""

NOISE = 3e-3
"""The part of a measured change that may be noise."""

LEVERAGE = 0.9
"""The greatest part of its own error that a position may take into a fit."""

MORE = 32
"""How many positions there should be more than features, at least."""

SECONDS = 5.0
"""How long further calls are made."""

LARGE = 0.25
"""Of which part of the greatest of a column numbers tell a factor of it."""

CLEAR = 0.03
"""How far the logarithms of factors are apart that differ."""

TURNS = 30
"""How often factors of rows and of columns are measured by each other."""

FIX = "Give both the same weights: save and load them again. Low-rank updates (LoRA) are added \
once, with their sign and their factor alpha / r."


def with_own_weights(recipe: Recipe, trace: Trace) -> tuple[str, Recipe] | None:
    """The recipe with the weights that a trace tells, and which differ; None where none do."""
    own: Mapping[str, np.ndarray] = trace.weights or {}
    changed: Arrays = {}
    words = []
    for name, right in recipe.weights.items():
        array = own.get(name)
        if array is None or array.size != right.size:
            continue
        apart = np.abs(array.reshape(right.shape).astype(np.float64) - right)
        unit = eps(name_of_dtype(array)) * float(np.max(np.abs(right), initial=0.0))
        if np.any(apart > unit):
            changed[name] = array.reshape(right.shape).astype(np.float64)
            count = int((apart > unit).sum())
            low = ""
            if right.ndim == 3 and 2 * count > right.size:
                inputs = right[..., 0].size if name.startswith("output") else right.shape[0]
                one, other = (a.reshape(inputs, -1) for a in (right, changed[name]))
                low = low_rank(other - one) or rescaled(one, other)
            counted = f"{count} of {right.size} numbers of {name}"
            counted += in_some_heads(name, changed[name] - right) * (count > 1)
            words.append(f"{name} differs{low}" if low else counted)
    if not changed:
        return None
    how = related(recipe.weights, changed) or ", ".join(words)
    return how, recipe.but(weights={**recipe.weights, **changed})


def low_rank(matrix: np.ndarray, noise: float = NONE) -> str:
    """That a matrix has a low rank but for noise, in words; empty where it has none."""
    values = np.linalg.svd(matrix, compute_uv=False)
    rank = int(np.sum(values > noise * values[0]))
    if SURE * rank > min(matrix.shape):
        return ""
    return f" by a matrix of rank {rank}, as of a low-rank update (LoRA)"


def rescaled(right: np.ndarray, wrong: np.ndarray) -> str:
    """That the rows or columns of a matrix have other factors, in words; empty where they do not.

    What whole numbers of 8 bits lose is no difference.
    """
    most = np.abs(right).max(0)
    large = np.abs(right) > LARGE * most
    if min(right.shape) < 4 or not np.all(large.any(0)) or not np.all(large.any(1)):
        return ""
    ratio = np.where(large, wrong / np.where(large, right, 1.0), 1.0)
    if not np.all(ratio > 0) or not np.all(np.isfinite(ratio)):
        return ""
    logs, weight = np.log(ratio), np.where(large, right**2 / most**2, 0.0)
    rows, columns = np.zeros(len(logs)), np.zeros(logs.shape[1])
    for _ in range(TURNS):
        rows = np.average(logs - columns, axis=1, weights=weight)
        columns = np.average(logs - rows[:, None], axis=0, weights=weight)
    made = right * np.exp(rows[:, None] + columns)
    lost = most / 254 * np.exp(rows[:, None] + columns)
    if np.any(np.abs(wrong - made) > 1.5 * lost):
        return ""
    several = [what for what, one in (("row", rows), ("column", columns)) if np.ptp(one) > CLEAR]
    if len(several) == 2 and len(rows) == len(columns):
        of = np.log(np.abs(right).max(1)), np.log(most)
        moved = {"row": (rows + of[0], columns - of[0]), "column": (columns + of[1], rows - of[1])}
        for what, (one, other) in moved.items():
            if max(np.ptp(one), np.ptp(other)) < CLEAR:
                (wrong_one,) = {*moved} - {what}
                return f": whole numbers have the scale of each {wrong_one}, not of each {what}"
    return f": each {' and each '.join(several)} has a factor of its own" if several else ""


def same_weights(one: Arrays, other: Arrays) -> bool:
    """Whether two recipes have the same weights but for rounding; a bias of zeros is as none."""
    for name in {**one, **other}:
        a, b = one.get(name), other.get(name)
        a = np.zeros_like(b) if a is None and b is not None else np.asarray(a)
        b = np.zeros_like(a) if b is None else b
        near = 1e-6 * float(np.max(np.abs(b), initial=0.0))
        if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=near):
            return False
    return True


def one_weight(recipe: Recipe, evidence: Evidence, before: float) -> tuple[str, Recipe] | None:
    """The recipe with the one other weight that explains an output, and which one it is."""
    output, exact = evidence.reported.get("output"), recipe.stages["output"]
    if output is None or output.shape != exact.shape or recipe.sections:
        return None
    apart = output - exact
    if not np.all(np.isfinite(apart)):
        return None
    whole = float(np.sum(apart**2))
    slopes = gradients_of(recipe, apart, {})
    found = []
    for name, sizes in _effects(recipe):
        along = np.square(slopes[name]) / np.where(sizes > 0, sizes, np.inf)
        at = np.unravel_index(int(np.argmax(along)), along.shape)
        found.append((float(along[at]), name, at, float(slopes[name][at] / sizes[at])))
    for share, name, at, step in sorted(found, reverse=True, key=lambda one: one[0])[:2]:
        if share < ALONG * whole:
            return None
        old = float(recipe.weights[name][at])

        def make(more: float, name: str = name, at: tuple[int, ...] = at) -> Recipe:
            array = recipe.weights[name].copy()
            array[at] += more
            return recipe.but(weights={**recipe.weights, name: array})

        def words(more: float, name: str = name, at: tuple[int, ...] = at, old: float = old) -> str:
            place = ", ".join(map(str, at))
            return f"{name}[{place}] is {number(old + more)} in place of {number(old)}"

        family = Family(make, (0.5 * step, step, 1.5 * step), words)
        one = fitted(family, evidence, before)
        if one is not None and max(evidence.errors(one[1]).values()) <= 1:
            return one
    return None


def other_kernels(recipe: Recipe, evidence: Evidence) -> tuple[str, Recipe] | None:
    """The recipe with the weights that give the projections that are told, and what they are.

    Where there are no more positions than features, some kernel gives any projection: weights are
    named where positions could have refuted them, those of further calls included.
    """
    told = _told_projections(recipe, evidence)
    every, told = _of_further_calls(recipe, evidence, told) if told else (recipe, told)
    changed, words = Arrays(), []
    for name, got in told.items():
        own = Evidence(evidence.trace, {name: got}, evidence.reference)
        if max(own.errors(every).values()) <= 1:
            continue
        weights = _other_weights(every, own, name)
        if not weights:
            return None
        changed |= weights
        for weight, array in weights.items():
            change = array - recipe.weights.get(weight, 0.0)
            of = in_some_heads(weight, change)
            noise = max(NONE, 8 * eps(name_of_dtype(evidence.trace.output)))
            low = "" if of or change.ndim < 3 else low_rank(change.reshape(len(change), -1), noise)
            words.append(f"{weight} differs{of}{low}")
    made = recipe.but(weights={**recipe.weights, **changed})
    if not changed or max(evidence.errors(made).values()) > 1:
        return None
    return ", ".join(words), made


def _told_projections(recipe: Recipe, evidence: Evidence) -> Arrays:
    """The projections that are told, and differ."""
    turned, told = {name for section in recipe.sections for name in section.acts}, Arrays()
    for name in ("query", "key", "value"):
        got, exact = evidence.reported.get(name), recipe.stages[name]
        if name in turned or got is None or got.shape != exact.shape:
            continue
        if np.all(np.isfinite(got)) and np.abs(got - exact).max() > NONE * np.abs(exact).max():
            told[name] = got
    return told


def _of_further_calls(recipe: Recipe, evidence: Evidence, told: Arrays) -> tuple[Recipe, Arrays]:
    """The recipe of all calls, and the projections that are told in them."""
    again, begun = evidence.trace.again, time.perf_counter()
    calls, widths = [(recipe.inputs, told)], {n: recipe.inputs[n].shape[-1] for n in told}
    while again is not None:
        rows = {n: sum(x[n][..., 0].size for x, _ in calls) for n in told}
        missing = max((max(1.5 * widths[n], widths[n] + MORE) - rows[n]) / rows[n] for n in told)
        took = time.perf_counter() - begun  # so far, and as long for each row that is missing
        if len(calls) > 1 and (missing <= 0 or took * (1 + missing) > SECONDS):
            break
        try:
            inputs, trace = again(len(calls))
        except Exception:  # it takes no other numbers
            break
        more = {n: trace.stages[n].astype(np.float64) for n in told if n in trace.stages}
        if len(more) < len(told) or any(
            (inputs[n].shape[1:], more[n].shape[2:])
            != (recipe.inputs[n].shape[1:], told[n].shape[2:]) for n in told
        ):  # fmt: skip
            break
        calls.append((inputs, more))
    if len(calls) == 1:
        return recipe, told
    every = recipe.but(
        inputs={n: np.concatenate([x[n].astype(np.float64) for x, _ in calls])
                for n in recipe.inputs},
        masks={}, bias=None, kept=None, window=None, offset=None, positions=None,
        key_positions=None, segments=None, key_segments=None,
    )  # fmt: skip
    return every, {n: np.concatenate([stages[n] for _, stages in calls]) for n in told}


def _other_weights(recipe: Recipe, evidence: Evidence, name: str) -> Arrays:
    """The other bias, kernel or both that give a projection; empty where none do."""
    (got,), x = evidence.reported.values(), recipe.inputs[name]
    apart = (got - recipe.stages[name]).reshape(-1, got[0, 0].size)
    x = x.reshape(len(apart), -1)
    one, shape = np.ones((len(x), 1)), recipe.stages[name].shape[2:]
    ways = {("bias",): one, ("kernel",): x, ("kernel", "bias"): np.hstack([x, one])}
    for parts, columns in ways.items():
        if not _refutable(columns):
            return {}
        change = np.linalg.lstsq(columns, apart, rcond=None)[0]
        more = {
            "kernel": change[: x.shape[1]].reshape(-1, *shape),
            "bias": change[-1].reshape(shape),
        }
        weights = {f"{name}.{p}": recipe.weights.get(f"{name}.{p}", 0.0) + more[p] for p in parts}
        made = recipe.but(weights={**recipe.weights, **weights})
        if max(evidence.errors(made).values()) <= 1:
            return weights
    return {}


def _refutable(columns: np.ndarray) -> bool:
    """Whether each row of a fit could show that it is none: the others foretell it.

    Of its own error a row keeps the part that is not its leverage.
    """
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return bool(np.square(left[:, sizes > NONE * sizes[0]]).sum(1).max() <= LEVERAGE)


def in_some_heads(name: str, change: np.ndarray) -> str:
    """In which heads a weight differs, in words; empty where it does in all."""
    if name == "output.bias":
        return ""
    along = change.ndim - (3 if name == "output.kernel" else 2)
    sizes = np.moveaxis(np.abs(change), along, 0).reshape(change.shape[along], -1).max(1)
    heads = np.flatnonzero(sizes > NOISE * sizes.max())
    of = listed([str(head) for head in heads])
    return "" if len(heads) == len(sizes) else f" in head{'s' * (len(heads) > 1)} {of}"


def _effects(recipe: Recipe) -> Iterator[tuple[str, np.ndarray]]:
    """By weight the squared length of the change of the output as it is changed by 1."""
    stages, w, x = recipe.stages, recipe.weights, recipe.inputs
    shares, context, heads = stages["dropped_probabilities"], stages["context"], reads(recipe)
    kernel = w["output.kernel"]
    grouped = np.eye(stages["value"].shape[2])[heads]  # [H, K]
    strength = np.sum(kernel**2, -1)  # (H, d_v)
    mixed = np.square(einsum("bhts,bsi->bhti", shares, x["value"])).sum((0, 2))  # (H, D)
    yield "value.kernel", einsum("hi,hj,hg->igj", mixed, strength, grouped)
    if "value.bias" in w:
        sums = np.square(shares.sum(-1)).sum((0, 2))
        yield "value.bias", einsum("h,hj,hg->gj", sums, strength, grouped)
    of_context = np.square(context).sum((0, 1))[..., None]
    yield "output.kernel", np.broadcast_to(of_context, kernel.shape)
    if "output.bias" in w:
        count = float(np.prod(stages["output"].shape[:2]))
        yield "output.bias", np.full(w["output.bias"].shape, count)
    # The output's change as one logit's part of a query's or key's feature changes.
    keys, values = stages["key"][:, :, heads], stages["value"][:, :, heads]
    batch, queries, count = recipe.lengths
    features = max(x["query"].shape[-1], x["key"].shape[-1], keys.shape[-1])
    if batch * queries * len(heads) * features * kernel.shape[-1] > MOST:
        return

    def moved(sides: np.ndarray) -> np.ndarray:
        """(B, T, H, f): squared changes as logits change by sides (B, S, H, f)."""
        mean = einsum("bhts,bshf->bthf", shares, sides)
        change = einsum("bhts,bshf,bshv->bthfv", shares, sides, values)
        change = change - einsum("bthf,bthv->bthfv", mean, context)
        return np.square(einsum("bthfv,hvo->bthfo", change, kernel)).sum(-1)

    by_key = recipe.scale**2 * moved(keys)
    yield "query.kernel", einsum("bti,bthf->ihf", x["query"] ** 2, by_key)
    if "query.bias" in w:
        yield "query.bias", by_key.sum((0, 1))
    whole = np.broadcast_to(x["key"][:, :, None], (batch, count, len(heads), x["key"].shape[-1]))
    by_input = recipe.scale**2 * moved(whole)
    yield "key.kernel", einsum("bthf,bthi,hg->igf", stages["query"] ** 2, by_input, grouped)
