"""Steps of models' attention that are no option of anymha: rotary positions, norms, sinks.

A reference may have them: a module of a model, whose arrays for them are known, or a function that
turns queries and keys as most models do. `featured` finds the recipe that it computes; mistakes
with these steps stand in their sections.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from anymha.parity.diagnose.distance_bias import without_rows
from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants, allowed
from anymha.parity.stages.trace import Trace

Turns = tuple[np.ndarray, np.ndarray, bool]
"""Cosines and sines of positions, and whether neighbours are turned together."""

BASE = 10_000.0
"""The base of rotary positions."""

CLEAR = 1e-4
"""How far measured biases of two sequences may be apart."""

EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12, 1e-3, 0.0)


class RotaryStep(Section):
    """Heads turned by their positions.

    The value: cosines and sines (1 or B, T, d / 2), and whether neighbours are turned together
    (else halves). `names` are the projections, `axis` that of the positions, `own` the values of
    projections that have others.
    """

    option = "rotary"

    def __init__(self, value: Turns,
                 names: tuple[str, ...] = ("query", "key"), axis: int = 1,
                 own: Mapping[str, Turns] = MappingProxyType({})) -> None:  # fmt: skip
        super().__init__(value)
        self.names, self.axis, self.own = names, axis, own

    @property
    def acts(self) -> tuple[str, ...]:
        """The projections that are turned."""
        return self.names

    def order(self) -> int:
        """After the norms."""
        return 1

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The turned heads."""
        if stage not in self.names:
            return array
        one, two, cos, sin = self._parts(stage, array)
        return self._joined(one * cos - two * sin, one * sin + two * cos, array)

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """A turned number is a sum of two."""
        if stage not in self.names:
            return sizes
        one, two, cos, sin = self._parts(stage, sizes)
        turned = np.hypot(one * cos, two * sin), np.hypot(one * sin, two * cos)
        return self._joined(*turned, array)

    def _parts(self, stage: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """The two parts of (B, T, H, d) that are turned together, and cosines and sines."""
        cos, sin, pairs = self.own.get(stage, self.value)
        length, half = x.shape[self.axis], cos.shape[-1]
        cos, sin = (a[:, np.arange(length) % a.shape[1]] for a in (cos, sin))
        cos, sin = (a[:, :, None] if self.axis == 1 else a[:, None] for a in (cos, sin))
        turned = x[..., : 2 * half]
        split = turned.reshape(*x.shape[:-1], *((half, 2) if pairs else (2, half)))
        one, two = (split[..., i] if pairs else split[..., i, :] for i in (0, 1))
        return one, two, cos, sin

    def _joined(self, one: np.ndarray, two: np.ndarray, x: np.ndarray) -> np.ndarray:
        turned = np.stack([one, two], -1 if self.value[2] else -2)
        turned = turned.reshape(*one.shape[:-1], -1)
        return np.concatenate([turned, x[..., turned.shape[-1] :]], -1)

    def of_other_arrays(self, recipe: Recipe) -> Variants:
        """Other projections turned."""
        for words, names in {
            "values are turned too": ("query", "key", "value"),
            "the queries alone are turned": ("query",),
            "the keys alone are turned": ("key",),
        }.items():
            yield words, recipe.with_section(RotaryStep(self.value, names))

    def along_heads(self, recipe: Recipe) -> Variants:
        """Positions counted along another axis."""
        yield (
            "positions are counted over the heads",
            recipe.with_section(RotaryStep(self.value, self.names, axis=2)),
        )

    def otherwise(self, recipe: Recipe) -> Variants:
        """Other pairs, another direction, base or start of the positions."""
        cos, sin, pairs = self.value
        other = "by halves in place of pairs" if pairs else "by pairs in place of halves"
        yield other, recipe.with_section(RotaryStep((cos, sin, not pairs)))
        yield "in the other direction", recipe.with_section(RotaryStep((cos, -sin, pairs)))
        length, half = cos.shape[1:]
        width = recipe.weights["query.kernel"].shape[2]
        for base in (BASE, 500_000.0, 1_000_000.0, 100_000.0, 5_000.0, 1_000.0, 100.0):
            for size, start in ((half, 0), (half, 1), (width // 2, 0), (width // 4, 0)):
                made = rotary_of(length, size, pairs, base, start)
                words = f"base {base:g}, the first {2 * size} features, positions from {start}"
                yield words, recipe.with_section(made)
        for factor in (2.0, 4.0, 8.0, 0.5):
            made = _of_positions(self.value, factor)
            if made is not None:
                yield f"positions divided by {factor:g}", recipe.with_section(RotaryStep(made))
        for name, sign in (("query", 1), ("key", -1)):
            back = RotaryStep(self.value, own={name: (cos, -sin, pairs)})
            yield f"in the other direction for the {name} alone", recipe.with_section(back)
            for by in (1, 2, 3, -1, -2, -3):
                made = _of_positions(self.value, start=by * sign)
                if made is not None:
                    words = f"the positions of queries begin {by} after those of keys"
                    yield words, recipe.with_section(RotaryStep(self.value, own={name: made}))

    mistakes = (
        ("rotary of other arrays", "Turn queries and keys, not values.", of_other_arrays),
        ("rotary along another axis", "Count the positions along the time, not along the heads: "
         "exchange the axes before or after.", along_heads),
        ("another rotary", "Turn by the same positions, base, width and pairs.", otherwise),
    )  # fmt: skip

    @property
    def left_out(self) -> str:
        """Words for a candidate without it."""
        return "missing: queries and keys are not turned by their positions"


def _of_positions(value: Turns, factor: float = 1.0, start: float = 0.0) -> Turns | None:
    """Rotary positions from another start, whose angles are divided; None of one position alone."""
    cos, sin, pairs = value
    if cos.shape[1] < 2:
        return None
    step = np.angle(cos[:, 1] + 1j * sin[:, 1]) - np.angle(cos[:, 0] + 1j * sin[:, 0])
    angle = (start + np.arange(cos.shape[1]))[None, :, None] * step[:, None] / factor
    return np.cos(angle), np.sin(angle), pairs


class NormStep(Section):
    """Queries and keys divided by their root mean square, or normalized, before they are turned.

    The value: the weights of queries and keys, (d,) or (H * d,), epsilon, and whether the mean is
    subtracted.
    """

    option = "query_key_norm"

    def __init__(self, value: tuple[Arrays, float, bool]) -> None:
        super().__init__(value)

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The normalized heads."""
        if stage not in self.value[0]:
            return array
        centre, factor = self._factor(stage, array)
        return (array - centre) * factor

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """Errors are divided as the numbers are."""
        return sizes * np.abs(self._factor(stage, array)[1]) if stage in self.value[0] else sizes

    def _factor(self, stage: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights, epsilon, centred = self.value
        weight = weights[stage]
        axes = -1 if weight.size in (1, x.shape[-1]) else (-2, -1)
        shape = x.shape[-1:] if axes == -1 else x.shape[-2:]
        weight = np.broadcast_to(weight, shape) if weight.size == 1 else weight.reshape(shape)
        centre = x.mean(axes, keepdims=True) if centred else np.zeros(1)
        spread = np.mean((x - centre) ** 2, axes, keepdims=True)
        return centre, weight / np.sqrt(spread + epsilon)

    def otherwise(self, recipe: Recipe) -> Variants:
        """Another epsilon, other weights, another mean, one of the two alone."""
        weights, epsilon, centred = self.value
        for other in EPSILONS:
            if other != epsilon:
                made = NormStep((weights, other, centred))
                yield f"epsilon {other:g} in place of {epsilon:g}", recipe.with_section(made)
        kinds = {"with the mean subtracted" if not centred else "without the mean": weights}
        for words, own in kinds.items():
            yield words, recipe.with_section(NormStep((own, epsilon, not centred)))
        for words, own in {
            "without its weights": {name: np.ones(1) for name in weights},
            "with 1 more in its weights": {name: 1 + w for name, w in weights.items()},
            "with 1 less in its weights": {name: w - 1 for name, w in weights.items()},
            "of the queries alone": {"query": weights["query"]},
            "of the keys alone": {"key": weights["key"]},
            "with the weights of queries and keys exchanged": {
                "query": weights["key"], "key": weights["query"]},
        }.items():  # fmt: skip
            if all(w.size == weights[name].size or w.size == 1 for name, w in own.items()):
                yield words, recipe.with_section(NormStep((own, epsilon, centred)))

    mistakes = (
        ("another query_key_norm", "Normalize queries and keys alike in both: epsilon, weights, "
         "mean.", otherwise),
    )  # fmt: skip

    @property
    def left_out(self) -> str:
        """Words for a candidate without it."""
        return "the norm of queries and keys is missing"


class SinkStep(Section):
    """One more logit for each head, the value (H,), in the sum of the softmax."""

    option = "sinks"

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The probabilities beside the sink's."""
        if stage != "probabilities":
            return array
        logits, sink = stages["masked_logits"], self.value[:, None, None]
        top = np.maximum(logits.max(-1, keepdims=True), sink)
        weights = np.exp(logits - top)
        return weights / (weights.sum(-1, keepdims=True) + np.exp(sink - top))

    def otherwise(self, recipe: Recipe) -> Variants:
        """Sinks of other heads, or of another sign."""
        yield "subtracted", recipe.with_section(SinkStep(-self.value))
        yield "zeros", recipe.with_section(SinkStep(0 * self.value))
        yield (
            "the first head's for all",
            recipe.with_section(SinkStep(self.value[:1] + 0 * self.value)),
        )
        yield "in reverse", recipe.with_section(SinkStep(self.value[::-1]))

    mistakes = (("other sinks", "Give each head its own sink.", otherwise),)

    @property
    def left_out(self) -> str:
        """Words for a candidate without it."""
        return "no sink takes part in the softmax"


def featured(plain: Recipe, trace: Trace, reported: Arrays) -> Recipe | None:
    """The recipe with such steps that gives what a reference reports; None where none does."""
    evidence = Evidence(trace, reported)
    every = itertools.product(_norms(trace), _rotaries(plain, trace), _sinks(trace))
    for sections in every:
        recipe = plain
        for section in sections:
            recipe = recipe if section is None else recipe.with_section(section)
        with np.errstate(all="ignore"):
            for one in (recipe, *_biased(recipe, trace)):
                if one is not plain and max(evidence.errors(one).values()) <= 1:
                    return one
    return None


def rotary_of(
    length: int, half: int, pairs: bool, base: float = BASE, start: float = 0, factor: float = 1.0
) -> RotaryStep:
    """Rotary positions as most models have them."""
    angle = (
        (start + np.arange(length))[:, None] / factor * base ** (-np.arange(half) / max(half, 1))
    )
    return RotaryStep((np.cos(angle)[None], np.sin(angle)[None], pairs))


def _rotaries(plain: Recipe, trace: Trace) -> Iterator[RotaryStep | None]:
    yield None
    _, queries, keys = plain.lengths
    width = plain.weights["query.kernel"].shape[2]
    for pairs in (False, True):
        if "cos" in trace.extras:
            cos, sin = (np.asarray(trace.extras[n], np.float64) for n in ("cos", "sin"))
            if np.all(cos == cos[:1]):
                cos, sin = cos[:1], sin[:1]
            half = cos.shape[-1] // 2 if cos.shape[-1] == width else cos.shape[-1]
            yield RotaryStep((cos[..., :half], sin[..., :half], pairs))
        if width % 2 == 0:
            yield rotary_of(max(queries, keys), width // 2, pairs)


def _norms(trace: Trace) -> Iterator[NormStep | None]:
    yield None
    found: Arrays = {}
    for name, array in trace.extras.items():
        for projection, starts in (("query", "q"), ("key", "k")):
            if name.startswith(starts) and "norm" in name and name.endswith("weight"):
                found[projection] = np.asarray(array, np.float64)
    if set(found) == {"query", "key"}:
        more = {name: 1 + weight for name, weight in found.items()}
        for epsilon, centred in itertools.product(EPSILONS[:2], (False, True)):
            yield NormStep((found, epsilon, centred))
            yield NormStep((more, epsilon, centred))


def _sinks(trace: Trace) -> Iterator[SinkStep | None]:
    yield None
    for name, array in trace.extras.items():
        if "sink" in name and array.ndim == 1:
            yield SinkStep(np.asarray(array, np.float64))


def _biased(recipe: Recipe, trace: Trace) -> Iterator[Recipe]:
    """The recipe with the bias of positions that the returned scores of all sequences share."""
    scores, logits = trace.scores, recipe.stages["logits"]
    if scores is None or scores.shape != logits.shape or len(logits) < 2:
        return
    seen = np.broadcast_to(allowed(recipe), logits.shape) & (scores > 0)
    bias = np.where(seen, np.log(np.where(seen, scores, 1.0)) - logits, 0.0)
    common = np.asarray(seen.all(0, keepdims=True))
    count = np.maximum(common.sum(-1, keepdims=True), 1)
    bias = bias - np.where(common, bias, 0.0).sum(-1, keepdims=True) / count
    mean = np.where(common, bias, 0.0).mean(0, keepdims=True)
    if np.max(np.abs(np.where(common, bias - mean, 0.0))) < CLEAR * max(np.max(np.abs(mean)), 1.0):
        mean = without_rows(np.where(common, mean, 0.0), common)
        yield replace(recipe, bias=np.where(common, mean, 0.0), known={})
