"""Mistakes of the backward pass alone: what the gradients lack, or have too often."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.changes import listed
from anymha.parity.diagnose.measured import nearest, number
from anymha.parity.oracle.oracle import Changes, gradients_of
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.oracle.truth import Folded
from anymha.parity.stages.limits import computed_dtype
from anymha.parity.stages.tolerance import eps
from anymha.parity.stages.trace import Trace

START = "gradient of "
LEFT = 1e-3, 0.05
"""The least and the greatest part of the differences of gradients that a mistake may leave, by
their rounding."""

CLIPPED = "gradient clipped"
FIX = ("The forward pass agrees: look at this place of the backward pass, or for a tensor that is "
       "detached.")  # fmt: skip
FIXES = {CLIPPED: "Clip gradients in the optimizer's step, after both are compared: no hook or "
         "backward pass of the layer cuts them."}  # fmt: skip

PROJECTIONS = ("query", "key", "value")

PLACES = ("output", "context", "logits", "query", "key", "value", "input of query", "input of key",
          "input of value")  # fmt: skip
"""Where a gradient may be lost or multiplied."""


def diagnose_gradients(
    folded: Folded, traces: tuple[Trace, Trace], cotangent: np.ndarray, wrong: Collection[str]
) -> Diagnosis:
    """Why the gradients of a candidate alone differ.

    Without a cause that fits it is "the gradients alone differ", or nothing where others do.
    """
    first = next(iter(wrong))
    if not first.startswith(START):
        return Diagnosis()
    reference, candidate = ({n: a.astype(np.float64) for n, a in trace.gradients.items()}
                            for trace in traces)  # fmt: skip
    names = [n for n in reference if n in candidate and reference[n].shape == candidate[n].shape]
    flat = folded.flat(cotangent)

    def vector(changes: Changes) -> np.ndarray:
        gradients = folded.shaped(gradients_of(folded.recipe, flat, changes))
        return _joined(gradients, reference, names)

    most = _most(traces)
    right, got = (_joined(side, reference, names) for side in (reference, candidate))
    known = set(names) <= set(folded.shaped(gradients_of(folded.recipe, flat, {})))
    found: list[tuple[float, Cause]] = []
    if known and np.linalg.norm(vector({}) - right) < most * np.linalg.norm(got - right):
        exact = vector({})
        own, recipe = _each_scaled(reference, candidate, names), folded.recipe
        searches = (
            lambda: (*_models(exact, vector, got, recipe), *_row_terms(recipe, vector, got),
                     *_unmasked(recipe, vector), own, *_of_shared_heads(recipe, vector),
                     *_each_clipped(reference, candidate, names)),
            lambda: _clipped(vector, got),
        )  # fmt: skip
        for search in searches:
            for name, detail, theirs in search() if not found else ():
                left = float(np.linalg.norm(got - theirs) / (np.linalg.norm(got - right) or 1.0))
                if left <= most:
                    found.append((left, Cause(name, detail, first, FIXES.get(name, FIX))))
    if found:
        # The first of those that leave about the same: the places stand in the order of the layer.
        least = min(left for left, _ in found)
        left, cause = next(one for one in found if one[0] <= 1.5 * least + 1e-5)
        return Diagnosis((cause,), min(left / most, 1.0))
    return gradients_alone(first)


def _each_scaled(
    reference: Arrays, candidate: Arrays, names: list[str]
) -> tuple[str, str, np.ndarray]:
    """Name, detail and the gradients where some of them have a factor of their own, or are zero."""
    sizes = {n: float(np.vdot(reference[n], reference[n])) for n in names}
    factors = {n: float(np.vdot(reference[n], candidate[n])) / (sizes[n] or 1.0) for n in names}
    off = {n: f for n, f in factors.items() if sizes[n] and abs(f - 1) > 1e-3}
    scaled = {n: off.get(n, 1.0) * reference[n] for n in names}
    theirs = _joined(scaled, reference, names)
    if not any(abs(f) > 1e-3 for f in off.values()):
        return "gradient detached", f"no gradient reaches {', '.join(off)}", theirs
    norms = {n: float(np.linalg.norm(candidate[n])) for n in off}
    if len(off) > 1 and np.ptp([*norms.values()]) <= 1e-5 * max(norms.values()):
        detail = f"those of {listed([*off])} have a norm of {number(max(norms.values()))} each"
        return CLIPPED, detail, theirs
    if len(off) > 1 and np.ptp([*off.values()]) <= 1e-4 * max(map(abs, off.values())):
        factor = next(iter(off.values()))
        words = f"those of {listed([*off])} are multiplied by {number(factor)}"
        return "gradient scaled", words, theirs
    words = (f"that of {n} is multiplied by {number(f)}" for n, f in off.items())
    return "gradient scaled", ", ".join(words), theirs


def _each_clipped(
    reference: Arrays, candidate: Arrays, names: list[str]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """The gradients where numbers of some of them are cut at a limit, the greatest that is left."""
    limits = {n: float(np.max(np.abs(candidate[n]), initial=0.0)) for n in names}
    over = {n: c for n, c in limits.items() if np.max(np.abs(reference[n]), initial=0.0) >
            (1 + 1e-3) * c > 0}  # fmt: skip
    if over:
        theirs = {n: np.clip(reference[n], -over[n], over[n]) if n in over else reference[n]
                  for n in names}  # fmt: skip
        by_limit: dict[str, list[str]] = {}
        for n, limit in over.items():
            by_limit.setdefault(number(limit), []).append(n)
        words = (f"{_whose(of)} cut at {limit} and -{limit}" for limit, of in by_limit.items())
        yield CLIPPED, ", ".join(words), _joined(theirs, reference, names)


def _whose(of: list[str]) -> str:
    return f"that of {of[0]} is" if len(of) == 1 else f"those of {listed(of)} are"


def _cut(gradient: np.ndarray, limit: float) -> np.ndarray:
    return np.clip(gradient, -limit, limit)


def _cut_norms(gradient: np.ndarray, limit: float) -> np.ndarray:
    """The vector of each position and head no longer than the limit."""
    sizes = np.linalg.norm(gradient, axis=-1, keepdims=True)
    return gradient * np.minimum(1.0, limit / np.where(sizes > 0, sizes, 1.0))


def _clipped(
    vector: Callable[[Changes], np.ndarray], got: np.ndarray
) -> Iterator[tuple[str, str, np.ndarray]]:
    """A gradient within the layer that is cut at a limit, which is measured."""
    every = ("query", "key", "value")
    for places in (*((place,) for place in PLACES), ("masked_logits",), ("probabilities",), every):
        seen: list[float] = []

        def noted(gradient: np.ndarray, seen: list[float] = seen) -> np.ndarray:
            seen.append(float(np.max(np.abs(gradient), initial=0.0)))
            return gradient

        vector(dict.fromkeys(places, noted))
        for cut, words in ((_cut, "cut at {0} and -{0}"),
                           (_cut_norms, "cut to a norm of {0} at each position")):  # fmt: skip

            def theirs(power: float, cut: Any = cut, places: Any = places) -> np.ndarray:
                return vector(dict.fromkeys(places, lambda g: cut(g, math.exp(power))))

            if max(seen, default=0.0) > 0:
                powers = math.log(max(seen)) + np.linspace(1, -10.5, 24)
                power = nearest(lambda power, theirs=theirs: float(
                    np.linalg.norm(got - theirs(power))), powers)  # fmt: skip
                limit = words.format(number(math.exp(power)))
                detail = f"{_whose([f'the {listed(places)}'])} {limit}"
                yield CLIPPED, detail, theirs(power)


def _most(traces: tuple[Trace, Trace]) -> float:
    """The greatest part of the differences that a mistake may leave."""
    return min(max(LEFT[0], 32 * max(eps(computed_dtype(trace)) for trace in traces)), LEFT[1])


def gradients_of_inputs(first: str, traces: tuple[Trace, Trace]) -> Diagnosis:
    """Why gradients of inputs alone differ, where no weights are known.

    What comes through the keys alone is told from what comes through the values: each row of the
    softmax's derivative adds up to zero, so the gradient of unturned keys does over the positions.
    """
    reference, candidate = ({n: a.astype(np.float64) for n, a in trace.gradients.items()}
                            for trace in traces)  # fmt: skip
    names = [n for n in reference if n in candidate and reference[n].shape == candidate[n].shape]
    right, got = (_joined(side, reference, names) for side in (reference, candidate))
    most = _most(traces)

    def explains(theirs: np.ndarray) -> bool:
        return bool(np.linalg.norm(got - theirs) <= most * np.linalg.norm(got - right))

    name, detail, theirs = _each_scaled(reference, candidate, names)
    if explains(theirs):
        return Diagnosis((Cause(name, detail, first, FIX),), 0.0)
    shared = "value" if "value" in names else "query"  # the input that is the keys' too
    others = {**reference, shared: candidate.get(shared, np.zeros(0))}
    if "key" in names or shared not in names or not explains(_joined(others, reference, names)):
        return gradients_alone(first)
    whole, rest, lost = (
        float(np.linalg.norm(np.sum(a, axis=-2)))
        for a in (reference[shared], candidate[shared], reference[shared] - candidate[shared])
    )
    if rest <= most * whole and shared == "value":
        detail = ("no gradient flows through the value: that of value adds up to zero over the "
                  "positions, as that through the keys alone")  # fmt: skip
    elif lost <= most * whole:
        detail = (f"that through the key is lost or has a factor: what that of {shared} lacks adds "
                  "up to zero over the positions")  # fmt: skip
    else:
        return gradients_alone(first)
    return Diagnosis((Cause("gradient detached", detail, first, FIX),), 0.0)


def gradients_alone(first: str) -> Diagnosis:
    """All that the forward pass gives agrees, and gradients differ, this one first."""
    fix = ("The forward pass agrees: look for a tensor that is detached, a gradient of your own, "
           "or a factor that the backward pass leaves out.")  # fmt: skip
    return Diagnosis.certain("the gradients alone differ", first, fix)


def _models(
    right: np.ndarray, vector: Callable[[Changes], np.ndarray], got: np.ndarray, recipe: Recipe
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, detail and the gradients of each mistake, with its factor measured."""
    for count in (1, 2, 3):
        for places in itertools.combinations(PLACES, count):
            if count > 1 and len({place.startswith("input") for place in places}) > 1:
                continue
            if count > 1 and not set(places) <= set(PLACES[3:]):
                continue
            # Gradients are linear in one factor; of several, those that are all lost are tried.
            without = vector(dict.fromkeys(places, np.zeros_like))
            part = right - without
            if not np.any(part):
                continue
            factor = float((got - without) @ part / (part @ part)) if count == 1 else 0.0
            what = " and ".join(places)
            if abs(factor) < 1e-3:
                yield "gradient detached", f"no gradient flows through the {what}", without
            elif abs(factor - 1) > 1e-3:
                words = f"that of the {what} is multiplied by {number(factor)}"
                words += _meaning(recipe, factor, places)
                yield "gradient scaled", words, without + factor * part
    yield from _several_scaled(right, vector, got, recipe)
    jacobians = {
        "the softmax's derivative lacks the sum over the keys, p * dp": lambda p, g: p * g,
        "the softmax's derivative is left out, dp": lambda p, g: g,
        "the softmax's derivative lacks its factor p": lambda p, g: (
            g - np.sum(p * g, -1, keepdims=True)
        ),
        "the softmax's derivative is that of a sigmoid, p * (1 - p) * dp": lambda p, g: (
            p * (1 - p) * g
        ),
        "the sum over the keys in the softmax's derivative has no p": lambda p, g: (
            p * (g - np.sum(g, -1, keepdims=True))
        ),
        "the mean over the keys in the softmax's derivative has no p": lambda p, g: (
            p * (g - np.mean(g, -1, keepdims=True))
        ),
        "the sum over the keys in the softmax's derivative is added": lambda p, g: (
            p * (g + np.sum(p * g, -1, keepdims=True))
        ),
        "the mean over the keys is taken in the softmax's derivative": lambda p, g: (
            p * (g - np.mean(p * g, -1, keepdims=True))
        ),
        "the softmax's derivative is that of its logarithm, dp - p * sum(dp)": lambda p, g: (
            g - p * np.sum(g, -1, keepdims=True)
        ),
        "the softmax's derivative is transposed, the sum is over the queries": lambda p, g: (
            p * (g - np.sum(p * g, -2, keepdims=True))
        ),
    }
    turned = lambda weights: weights.swapaxes(2, 3)  # noqa: E731
    every = ("query", "key", "value")
    for names in (("value",), ("key",), ("query",), *itertools.combinations(every, 2), every):
        words = "the product with queries and keys for the gradient of the {} is not transposed"
        try:
            wrong = vector({f"weights of {name}": turned for name in names})
        except ValueError:
            continue  # there are not as many queries as keys
        yield "wrong jacobian", words.format(" and ".join(names)), wrong
    for words, change in jacobians.items():
        # A key that is hidden gets no gradient where its logit was replaced.
        for where, seen in ("", lambda p: p > 0), (", of hidden keys too", np.ones_like):

            def softmax(
                p: np.ndarray, g: np.ndarray, change: Any = change, seen: Any = seen
            ) -> np.ndarray:
                return seen(p) * change(p, seen(p) * g)

            yield "wrong jacobian", words + where, vector({"softmax": softmax})


def _meaning(recipe: Recipe, factor: float, places: Collection[str]) -> str:
    """What a factor of gradients stands for, after a comma; nothing where that is not known."""
    scale, (heads, shared) = recipe.scale, recipe.heads
    known = [(1 / scale, "the scale is left out"), (scale, "the scale acts twice")] if scale else []
    if {*places} <= {"key", "value"}:
        words = f"the mean of the {heads // shared} heads that share one, not their sum"
        known.append((shared / heads, words))
    every = [meaning for value, meaning in known
             if value != 1 and math.isclose(factor, value, rel_tol=1e-2)]  # fmt: skip
    return f", {' or '.join(every)}" if every else ""


def _several_scaled(
    right: np.ndarray, vector: Callable[[Changes], np.ndarray], got: np.ndarray, recipe: Recipe
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Gradients of queries, keys and values with a factor each, which are measured together."""
    parts = {name: right - vector({name: np.zeros_like}) for name in PROJECTIONS}
    parts = {name: part for name, part in parts.items() if np.any(part)}
    rest = right - sum(parts.values())
    if len(parts) < 2:
        return
    found = np.linalg.lstsq(np.stack([*parts.values()], 1), got - rest, rcond=None)[0]
    factors = {name: 1.0 if abs(f - 1) < 1e-3 else float(f)
               for name, f in zip(parts, found, strict=True)}  # fmt: skip
    by_factor: dict[str, list[str]] = {}
    for name, factor in factors.items():
        if factor != 1:
            by_factor.setdefault(number(factor), []).append(name)
    if sum(map(len, by_factor.values())) < 2:
        return
    words = []
    for told, names in by_factor.items():
        of = "that of the {} is" if len(names) == 1 else "those of the {} are"
        meaning = _meaning(recipe, factors[names[0]], names)
        words.append(f"{of.format(listed(names))} multiplied by {told}{meaning}")
    theirs = rest + sum(factors[name] * part for name, part in parts.items())
    yield "gradient scaled", ", ".join(words), theirs


def _of_shared_heads(
    recipe: Recipe, vector: Callable[[Changes], np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Gradients of key heads that several query heads read, not added up over these."""
    heads, shared = recipe.heads
    group = heads // shared
    if group == 1:
        return

    def split(gradient: np.ndarray) -> np.ndarray:
        return gradient.reshape(*gradient.shape[:2], shared, group, gradient.shape[3])

    def tiled(gradient: np.ndarray) -> np.ndarray:
        return gradient.reshape(*gradient.shape[:2], group, shared, -1).sum(2)

    ways: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
        "that of the first of the heads that share one alone": lambda g: split(g)[:, :, :, 0],
        "that of the last of the heads that share one alone": lambda g: split(g)[:, :, :, -1],
        "the sum over heads of other groups, h % the number of key heads": tiled,
        "the sum over all heads, for each": lambda g: g.sum(2, keepdims=True) + np.zeros(
            (1, 1, shared, 1)),
    }  # fmt: skip
    for words, way in ways.items():
        for names in (("key", "value"), ("key",), ("value",)):
            changes = {f"sharing {name}": way for name in names}
            detail = f"{'those' if len(names) > 1 else 'that'} of the {listed(names)}: {words}"
            yield "gradient of shared heads", detail, vector(changes)


def _row_terms(
    recipe: Recipe, vector: Callable[[Changes], np.ndarray], got: np.ndarray
) -> Iterator[tuple[str, str, np.ndarray]]:
    """A softmax's derivative p * (dp - delta) with a wrong delta, the number of each row."""
    seen: Arrays = {}

    def look(gradient: np.ndarray) -> np.ndarray:
        seen["dy"] = gradient
        return gradient

    vector({"context": look})
    y, dy = (np.swapaxes(a, 1, 2) for a in (recipe.stages["context"], seen["dy"]))  # (B, H, T, d)
    p, right = recipe.stages["probabilities"], np.sum(y * dy, -1, keepdims=True)
    deltas = {
        "the sum of the context without its gradient": y.sum(-1, keepdims=True),
        "the sum of the context's gradient without the context": dy.sum(-1, keepdims=True),
        "the sum of the context's squares": np.sum(y * y, -1, keepdims=True),
        "the sum of the squares of the context's gradient": np.sum(dy * dy, -1, keepdims=True),
        "the mean over the width, not the sum": right / y.shape[-1],
        "that of all heads together": right.sum(1, keepdims=True) + 0 * right,
        "the mean of all heads": right.mean(1, keepdims=True) + 0 * right,
        "that of all queries together": right.sum(2, keepdims=True) + 0 * right,
        "the mean of all queries": right.mean(2, keepdims=True) + 0 * right,
        "that of the query before": np.roll(right, 1, 2),
        "that of the next query": np.roll(right, -1, 2),
        "that of the head before": np.roll(right, 1, 1),
        "that of the next head": np.roll(right, -1, 1),
        "that of the sequence before": np.roll(right, 1, 0),
        "its absolute value": np.abs(right),
        "multiplied by the scale": recipe.scale * right,
        "divided by the scale": right / (recipe.scale or 1.0),
    }
    without = vector({"softmax": lambda p, g: p * g})
    for words, delta in deltas.items():
        theirs = vector({"softmax": lambda p, g, delta=delta: p * (g - delta)})
        yield "wrong jacobian", f"the delta of the softmax's derivative is {words}", theirs
    part = without - vector({"softmax": lambda p, g: p * (g - right)})
    factor = float((without - got) @ part / (float(part @ part) or 1.0))
    words = f"the delta of the softmax's derivative is multiplied by {number(factor)}"
    yield "wrong jacobian", words, without - factor * part
    top = np.max(p, -1, keepdims=True)
    made = p / np.where(top > 0, top, 1.0)
    kept = 1.0 if recipe.kept is None else recipe.kept
    every: Changes = {"softmax": lambda p, g: made * (g - np.sum(p * g, -1, keepdims=True)),
                      "weights of value": lambda _: made * kept}  # fmt: skip
    yield ("wrong jacobian", "the probabilities are made anew without their sum",
           vector(every))  # fmt: skip


def _unmasked(
    recipe: Recipe, vector: Callable[[Changes], np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """A backward pass that makes the probabilities anew, and hides less."""
    masked, p = recipe.stages["masked_logits"], recipe.stages["probabilities"]
    top = np.argmax(p, -1, keepdims=True)
    most = np.take_along_axis(p, top, -1)
    total = np.take_along_axis(masked, top, -1) - np.log(np.where(most > 0, most, 1.0))
    kept = 1.0 if recipe.kept is None else recipe.kept
    without: dict[str, dict[str, Any]] = {
        "the causal mask": {"causal": False} if recipe.causal else {},
        "the window": {"window": None} if recipe.window is not None else {},
        **{f"`{name}`": {"masks": {n: m for n, m in recipe.masks.items() if n != name}}
           for name in recipe.masks},
        "any mask": {"causal": False, "window": None, "masks": {}},
    }  # fmt: skip
    for words, changes in without.items() if recipe.stages["probabilities"].size else ():
        logits = recipe.but(**changes).until("masked_logits")["masked_logits"]
        if np.array_equal(logits, masked):
            continue
        made = np.where(most > 0, np.exp(np.minimum(logits - total, 700.0)), 0.0)

        def softmax(p: np.ndarray, g: np.ndarray, made: np.ndarray = made) -> np.ndarray:
            return made * (g - np.sum(p * g, -1, keepdims=True))

        def weights(_: np.ndarray, made: np.ndarray = made) -> np.ndarray:
            return made * kept

        places: dict[str, Changes] = {
            "": {"softmax": softmax, "weights of value": weights},
            " for the gradient of the values": {"weights of value": weights},
            " for the softmax's derivative": {"softmax": softmax},
        }
        for where, change in places.items():
            detail = f"the probabilities are made anew without {words}{where}"
            yield "wrong jacobian", detail, vector(change)


def _joined(gradients: Arrays, reference: Arrays, names: list[str]) -> np.ndarray:
    """Gradients as one vector, those of each name by the usual size of the reference's."""
    parts = []
    for name in names:
        size = float(np.sqrt(np.mean(np.square(reference[name])))) or 1.0
        parts.append(np.nan_to_num(gradients[name]).reshape(-1) / size)
    return np.concatenate(parts)
