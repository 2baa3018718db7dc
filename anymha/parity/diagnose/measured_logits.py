"""Logits with factors or a bias of their own, where no known mistake gives the output.

Each logit depends on one of the numbers that are measured: the factor of its head, or the bias of
its key or of its distance. Gauss and Newton's steps find all of them together, by how the output
changes with each logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from anymha.parity.diagnose.causes import Cause
from anymha.parity.diagnose.deadline import Deadline
from anymha.parity.diagnose.distance_bias import taken_from
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.measured import number
from anymha.parity.diagnose.trials import EXPLAINED, first_change
from anymha.parity.oracle.features.alibi import AlibiSection, paper_slopes
from anymha.parity.oracle.recipe import Arrays, Recipe, Section, einsum, reads

MOST = 1 << 22
"""The most effects of logits on features of the output that are computed."""

MOST_NUMBERS = 512
"""No more numbers are measured together."""

SURE = 2
"""How many equations there must be for each number."""

SECONDS = 4.0
"""How long numbers are measured."""

STEPS = 80
"""How often the numbers are improved."""

FARTHEST = 2.0
"""No number is changed by more at once."""

SMALL = 1e-5
"""By how much a number is changed to see its effect."""

SETTLED = 1e-6
"""The numbers are found where a step takes no more than this share of the squared differences
that are left."""

CLEAR = 1e-3
"""Numbers that are no further apart are the same, as parts of the greatest one."""

SEEN = 1e-6
"""A number is told where it changes the output by more than this part of the greatest change."""

SHOWN = 12
"""How many numbers are told."""

SCALE = "wrong scale"
ADDED = "positions added"
BIAS = "wrong attention bias"
OTHER = "attention bias of other positions"
FIXES = {
    OTHER: "Give each distance of query and key its own place in the bias: in both directions, "
           "unless the reference has one for all that follows.",
    SCALE: "The logits are multiplied once, by 1/sqrt(width of a head) unless `scale` says "
           "otherwise, in all heads alike.",
    ADDED: "The layer adds no positions: give it an `attention_bias`, or leave the bias out.",
    BIAS: "The bias is added once, after the scale, to each head as it is.",
    "alibi of other slopes": "Give both the same `alibi`: its slopes by head.",
}  # fmt: skip


class FactorStep(Section):
    """Logits with factors (B, H, T, S), the value, after all other options."""

    option = "factors"

    @property
    def acts(self) -> tuple[str, ...]:
        """The logits."""
        return ("logits",)

    def order(self) -> int:
        """The last one."""
        return 9

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The logits times the factors."""
        return array * self.value if stage == "logits" else array

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """Errors are multiplied as the logits are."""
        return sizes * np.abs(self.value) if stage == "logits" else sizes


@dataclass(frozen=True)
class Form:
    """Logits that depend on numbers of their own."""

    name: str  # The name of the mistake
    make: Callable[[np.ndarray], Recipe]  # The recipe with these numbers
    right: np.ndarray  # The numbers of the reference
    of: np.ndarray  # Which number each logit depends on; broadcasts to (B, H, T, S)
    # Words for the numbers; the flags say which of them change the output
    words: Callable[[np.ndarray, np.ndarray], str]
    distances: np.ndarray | None = None  # Those of which the numbers are, for each head


def measured_logits(recipe: Recipe, evidence: Evidence) -> tuple[Cause, Recipe] | None:
    """The factors or the biases of logits with which the recipe gives what is reported."""
    got, exact = evidence.reported.get("output"), recipe.stages["output"]
    if got is None or got.shape != exact.shape or not np.all(np.isfinite([got, exact])):
        return None
    before, until = evidence.distance(recipe), Deadline(SECONDS)
    for form in _forms(recipe):
        found = _fitted(form, recipe, got, until)
        if found is None:
            continue
        made = form.make(found[0])
        if evidence.distance(made) <= EXPLAINED * before and max(
            evidence.errors(made).values()
        ) <= 1:  # fmt: skip
            stage = first_change(recipe, made)
            other = "" if form.distances is None else taken_from(
                recipe, form.distances, *(a.reshape(-1, form.distances.size) for a in found)
            )  # fmt: skip
            name, words = (OTHER, other) if other else (form.name, form.words(*found))
            return (Cause(name, words, stage, FIXES[name]), made) if stage else None
    return None


def _forms(recipe: Recipe) -> Iterator[Form]:
    """The forms that are measured, those of few numbers first."""
    (batch, queries, _), heads = recipe.lengths, recipe.heads[0]
    shapes = {"head": (1, heads, 1, 1), "sequence": (batch, 1, 1, 1), "query": (1, 1, queries, 1)}
    for place, shape in shapes.items():
        count = max(shape)
        if count > 1:
            for make, words in _factors_of(recipe, shape, place):
                of = np.arange(count).reshape(shape)
                yield Form(SCALE, make, np.ones(count), of, words)
    if recipe.bias is not None and heads > 1:
        yield Form(BIAS, lambda numbers: recipe.but(bias=numbers.reshape(1, heads, 1, 1)
                   * recipe.bias), np.ones(heads), _of_heads(heads),
                   partial(_factors, "head", ""))  # fmt: skip
    place = recipe.places("key")[:, None, None]
    apart = recipe.places("query")[:, None, :, None] - place
    own = recipe.options.get("alibi")
    for over, shape in (("key positions: a ramp, {} times the position", place),
                        ("the distance of query and key: {} times the distance", np.abs(apart))
                        )[: 1 if own else 2]:  # fmt: skip
        yield Form(ADDED, partial(_times_shape, recipe, shape), np.zeros(1),
                   np.zeros((1, 1, 1, 1), int), partial(_of_shape, over))  # fmt: skip
    if own is not None:
        slopes = paper_slopes(heads) if own is True else np.resize(np.asarray(own, float), heads)
        yield Form("alibi of other slopes", lambda numbers: recipe.with_section(
            AlibiSection(own, slopes=numbers)), slopes, _of_heads(heads), _slopes)  # fmt: skip
    else:
        distance = np.abs(apart).astype(np.float64)
        yield Form(ADDED, lambda numbers: _with_bias(
            recipe, -numbers.reshape(1, heads, 1, 1) * distance), np.zeros(heads),
            _of_heads(heads), _as_alibi)  # fmt: skip
    places, at = np.unique(recipe.places("key"), return_inverse=True)
    of_keys = at.reshape(recipe.places("key").shape)[:, None, None]
    steps, at = np.unique(apart, return_inverse=True)
    of_steps = at.reshape(apart.shape)
    every = ("key positions", places, of_keys), ("the distance of query and key", steps, of_steps)
    for by_head in (1, heads) if heads > 1 else (1,):
        for over, values, of in every:
            count = len(values)
            of = of + count * np.arange(by_head).reshape(1, by_head, 1, 1)
            make = partial(_biased, recipe, of)
            words = partial(_biases, over, values, by_head)
            steps_of = values if "distance" in over else None
            yield Form(ADDED, make, np.zeros(by_head * count), of, words, steps_of)


def _factors_of(recipe: Recipe, shape: tuple[int, ...], place: str) -> Iterator[tuple[Any, Any]]:
    """Factors of the products, and of what options such as a softcap make of them."""
    yield partial(_scaled, recipe, shape), partial(_factors, place, "")
    before = [section.option for section in recipe.sections if "logits" in section.acts]
    if before:
        late = lambda numbers: recipe.with_section(FactorStep(numbers.reshape(shape)))  # noqa: E731
        yield late, partial(_factors, place, f", after {' and '.join(before)}")


def _of_heads(heads: int) -> np.ndarray:
    """Which head each logit is of."""
    return np.arange(heads).reshape(1, heads, 1, 1)


def _scaled(recipe: Recipe, shape: tuple[int, ...], numbers: np.ndarray) -> Recipe:
    return recipe.after(("logits",), lambda x: numbers.reshape(shape) * x)


def _biased(recipe: Recipe, of: np.ndarray, numbers: np.ndarray) -> Recipe:
    return _with_bias(recipe, numbers[of])


def _with_bias(recipe: Recipe, more: np.ndarray) -> Recipe:
    return recipe.but(bias=more if recipe.bias is None else recipe.bias + more)


def _times_shape(recipe: Recipe, shape: np.ndarray, numbers: np.ndarray) -> Recipe:
    return _with_bias(recipe, float(numbers[0]) * shape)


def _fitted(
    form: Form, recipe: Recipe, got: np.ndarray, until: Deadline
) -> tuple[np.ndarray, np.ndarray] | None:
    """The numbers nearest to an output, and which of them change it; None of too little."""
    batch, queries, keys = recipe.lengths
    of = np.broadcast_to(form.of, recipe.stages["logits"].shape)
    used = np.unique(of[np.broadcast_to(recipe.seen, of.shape)])
    kernel = recipe.weights["output.kernel"]
    free = min(kernel.shape[-1], recipe.heads[0] * min(kernel.shape[1], max(keys - 1, 0)))
    if not 0 < SURE * len(used) <= batch * queries * free or len(used) > MOST_NUMBERS:
        return None
    numbers = form.right.astype(np.float64)
    made, room = form.make(numbers), 1e-3
    left = (got - made.stages["output"]).reshape(-1)
    begun, slopes = float(left @ left), np.zeros((0, 0))
    for _ in range(STEPS):
        effects, places = _effects(form, made, numbers, of, used)
        if not np.all(np.isfinite(effects)) or until.over:
            return None
        slopes = effects.T @ effects
        along, sizes = effects.T @ left[places], np.diag(slopes).max(initial=0.0)
        for _ in range(8):
            more = np.diag(room * np.diag(slopes) + 1e-12 * sizes)
            step = np.linalg.lstsq(slopes + more, along, rcond=None)[0]
            nearer = numbers.copy()
            nearer[used] += np.clip(step, -FARTHEST, FARTHEST)
            other = form.make(nearer)
            rest = (got - other.stages["output"]).reshape(-1)
            if rest @ rest < left @ left:  # false of NaN too
                break
            room = max(10 * room, 1e-8)
        else:
            break
        gained, size = float(left @ left - rest @ rest), float(left @ left)
        numbers, made, left, room = nearer, other, rest, room / 10
        if gained < SETTLED * size:
            break
    if not float(left @ left) <= EXPLAINED**2 * begun:
        return None
    told = np.zeros(len(numbers), bool)
    told[used] = np.diag(slopes) > SEEN * np.diag(slopes).max()
    return numbers, told


def _effects(
    form: Form, made: Recipe, numbers: np.ndarray, of: np.ndarray, used: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How some of the output changes with each number that is used, and which of it.

    A context changes with a logit by its share times the value's distance from the context.
    """
    stages, kernel = made.stages, made.weights["output.kernel"]
    later = form.make(numbers + SMALL)
    logits, more = (one.until("masked_logits")["masked_logits"] for one in (made, later))
    seen = np.isfinite(logits)
    slope = np.subtract(more, logits, out=np.zeros_like(logits), where=seen) / SMALL
    weights = stages["dropped_probabilities"] * slope  # [B, H, T, S]
    few = max(1, min(kernel.shape[-1], MOST // max(weights.size, 1)))
    features = np.linspace(0, kernel.shape[-1] - 1, few).astype(int)
    kernel = kernel[:, :, features]
    values = einsum("bshv,hvo->bsho", stages["value"][:, :, reads(made)], kernel)
    context = einsum("bthv,hvo->btho", stages["context"], kernel)
    batch, queries = of.shape[0], of.shape[2]
    at = np.searchsorted(used, of)
    at = np.where((at < len(used)) & seen, at, 0)
    weights = np.where(seen, weights, 0.0)
    effects = np.zeros((batch, queries, len(used), len(features)))
    b, t = np.indices((batch, queries))
    for head in range(of.shape[1]):
        for key in range(of.shape[3]):
            apart = values[:, None, key, head] - context[:, :, head]  # [B, T, O]
            effects[b, t, at[:, head, :, key]] += weights[:, head, :, key, None] * apart
    flat = effects.swapaxes(2, 3).reshape(-1, len(used))  # [B * T * O, n]
    places = np.arange(batch * queries)[:, None] * made.weights["output.kernel"].shape[-1]
    return flat, (places + features).reshape(-1)


def _listed(numbers: np.ndarray, told: np.ndarray) -> str:
    """The first numbers; those that change nothing as "any"."""
    words = [number(float(n)) if one else "any" for n, one in zip(numbers, told, strict=True)]
    return ", ".join(words[:SHOWN]) + ", ..." * (len(words) > SHOWN)


def _factors(place: str, rest: str, numbers: np.ndarray, told: np.ndarray) -> str:
    each = {"sequence": "sequence of the batch"}.get(place, place)
    return f"of its own in each {each}: {_listed(_short(numbers), told)} times{rest}"


def _of_shape(over: str, numbers: np.ndarray, told: np.ndarray) -> str:
    times = number(float(_short(numbers)[0]))
    return f"to the logits, a bias of its own over {over.format(times)}"


def _slopes(numbers: np.ndarray, told: np.ndarray) -> str:
    return f"measured: {_listed(_short(numbers), told)}"


def _as_alibi(numbers: np.ndarray, told: np.ndarray) -> str:
    return f"to the logits, as ALiBi of slopes of its own: {_listed(_short(numbers), told)}"


def _biases(
    over: str, values: np.ndarray, by_head: int, numbers: np.ndarray, told: np.ndarray
) -> str:
    """What is added at each key position or distance: a known function, or the numbers."""
    rows = numbers.reshape(by_head, -1)
    flags = told.reshape(by_head, -1)
    own, seen = rows[0], flags[0]
    values = values.astype(np.float64)
    first = f"to the logits, a bias of its own over {over}"
    first += " in each head" * (by_head > 1)
    if by_head > 1:
        slopes = [_times(values, row, flag) for row, flag in zip(rows, flags, strict=True)]
        if "positions" in over and all(one is not None for one in slopes):
            each = ", ".join(number(float(one or 0.0)) for one in slopes)
            return f"{first}: a ramp, {each} times the position"
    elif "distance" in over:
        known = {"distance, squared": values**2,
                 "logarithm of 1 + distance": np.log1p(np.abs(values)),
                 "distance of keys before the query": np.maximum(values, 0.0),
                 "distance of keys after the query": np.maximum(-values, 0.0),
                 "root of the distance": np.sqrt(np.abs(values))}  # fmt: skip
        for words, shape in known.items():
            times = _times(shape, own, seen)
            if times is not None:
                return f"{first}: {number(times)} times the {words}"
    # A number that all have changes nothing: the median is taken for zero.
    least = np.median(own[seen]) if seen.any() else 0.0
    shown = _short(own - least)
    odd = np.flatnonzero(seen & (np.abs(shown) > CLEAR * np.abs(shown).max(initial=0.0)))
    if by_head == 1 and len(odd) <= 2 < seen.sum():
        told_at = (f"{number(float(shown[at]))} at {number(float(values[at]))}" for at in odd)
        return f"{first}: {', '.join(told_at)}, 0 elsewhere"
    shown = _short(own - own[np.argmax(seen)])
    begin = f" from {number(float(values[0]))} on" if values.size and values[0] else ""
    return f"{first}: {_listed(shown, seen)}{begin}" + ", in head 0" * (by_head > 1)


def _times(shape: np.ndarray, numbers: np.ndarray, told: np.ndarray) -> float | None:
    """How many times a shape numbers are, but for a constant; None where they are not."""
    x, y = shape[told], numbers[told]
    if x.size < 3 or np.ptp(x) == 0:
        return None
    columns = np.stack([x, np.ones_like(x)], -1)
    found = np.linalg.lstsq(columns, y, rcond=None)[0]
    near = np.abs(y - columns @ found).max() <= CLEAR * max(np.ptp(y), CLEAR)
    return float(_short(found[:1])[0]) if near else None


def _short(numbers: np.ndarray) -> np.ndarray:
    """Numbers of three digits where that is within a part in a thousand."""
    short = np.round(numbers, 3)
    near = np.abs(short - numbers) <= CLEAR * np.maximum(np.abs(numbers), 0.1)
    return np.where(near, short + 0.0, numbers)
