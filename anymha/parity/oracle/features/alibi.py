"""ALiBi: logits less a slope for each head times the distance of query and key."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from anymha.parity.oracle.features.rotary import places_of_others
from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants


def paper_slopes(heads: int) -> np.ndarray:
    """(H,): a geometric sequence; of H that is no power of 2, filled from one of twice as many."""
    n = 2 ** int(np.log2(heads))
    first = 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
    more = 2.0 ** (-8.0 * np.arange(1, 2 * n + 1) / (2 * n))
    return np.concatenate([first, more[::2]])[:heads]


def _other_slopes(slopes: np.ndarray) -> dict[str, np.ndarray]:
    """Sequences that stand in the place of the paper's, of as many heads."""
    heads = len(slopes)
    h, more = np.arange(1, heads + 1), 2 ** math.ceil(math.log2(heads))
    every = {"h from 0": 2.0 ** (-8 * (h - 1) / heads), "2^-h": 2.0**-h, "all 1": np.ones(heads)}
    if more > heads:
        longer = 2.0 ** (-8 * np.arange(1, more + 1) / more)
        mixed = np.concatenate([longer[1::2], longer[::2]])
        every |= {
            "2^(-8h/H), though H is no power of two": 2.0 ** (-8 * h / heads),
            "those of the next higher power of two, the first H": longer[:heads],
            "those of the next higher power of two, every other one first": mixed[:heads],
        }
    n = 2 ** int(math.log2(heads))
    if n < heads:
        for (words, start), (more_words, first) in itertools.product(
            (("from 1", 1), ("from 0", 0)), (("1, 3, ..", 1), ("2, 4, ..", 2), ("0, 2, ..", 0))
        ):
            parts = (np.arange(n) + start) / n, (first + 2 * np.arange(heads - n)) / (2 * n)
            words = f"2^(-8h/{n}), h {words}, then 2^(-8h/{2 * n}), h = {more_words}"
            every[words] = 2.0 ** (-8 * np.concatenate(parts))
    return every


class AlibiSection(Section):
    """The distances, each times the slope of its head.

    Args:
        value: True, or the slopes.
        factor: Multiplies all of it.
        one_sided: Whether keys after the query have no distance.
        signed: Whether they have a negative one.
        power: The power to which the slopes are raised.
        shift: What is added to the positions of the queries.
        by_index: Whether positions are indices, whatever the call says.
        slopes: Other slopes (H), or (B, H).
        early: Whether it comes before a softcap.
    """

    option = "alibi"
    examples = (True,)
    ignores_a_constant = True

    def __init__(
        self,
        value: Any,
        factor: float = 1.0,
        one_sided: bool = False,
        power: float = 1.0,
        shift: int = 0,
        by_index: bool = False,
        slopes: np.ndarray | None = None,
        early: bool = False,
        signed: bool = False,
    ) -> None:
        super().__init__(value)
        self.slopes, self.early, self.signed = slopes, early, signed
        self.shift, self.by_index = shift, by_index
        self.factor, self.one_sided, self.power = factor, one_sided, power

    @property
    def acts(self) -> tuple[str, ...]:
        """The logits."""
        return ("logits",)

    def order(self) -> int:
        """After a softcap."""
        return -1 if self.early else 1

    def _bias(self, recipe: Recipe) -> np.ndarray:
        """(1 or B, H, T, S)."""
        queries, keys = (
            np.arange(n)[None] if self.by_index else recipe.places(name).astype(np.float64)
            for name, n in zip(("query", "key"), recipe.lengths[1:], strict=True)
        )
        queries = queries + self.shift
        return self.of_distance(queries[:, :, None] - keys[:, None], recipe.heads[0])

    def of_distance(self, distance: np.ndarray, heads: int) -> np.ndarray:
        """What is added (1 or B, H, T, S) where keys are so far before queries (1 or B, T, S)."""
        slopes = self._own_slopes(heads) if self.slopes is None else self.slopes
        if slopes.ndim == 1:
            slopes = np.resize(slopes, heads)  # a mistake may have another number of heads
        if not self.signed:
            distance = np.maximum(distance, 0.0) if self.one_sided else np.abs(distance)
        return -self.factor * (slopes**self.power)[..., None, None] * distance[:, None]

    def _own_slopes(self, heads: int) -> np.ndarray:
        return paper_slopes(heads) if self.value is True else np.array(self.value, np.float64)

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The logits and the bias."""
        return array + self._bias(recipe) if stage == "logits" else array

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """The bias is one more term."""
        return np.hypot(sizes, self._bias(recipe)) if stage == "logits" else sizes

    def ported(self, ops: Any, place: str, array: Any, port: Any) -> Any:
        """The biased logits, with the faults below."""
        wrong = port.wrong
        early = "alibi before the scale" in wrong
        if place != "logits" or "alibi left out" in wrong:
            return array
        _, heads, queries, keys = array.shape
        slopes = paper_slopes(int(heads)) if self.value is True else np.array(self.value)
        if "alibi of other slopes" in wrong:
            slopes = slopes**0.5
        if "alibi slopes reversed" in wrong:
            slopes = slopes[::-1]
        if "alibi slopes from 0" in wrong:
            slopes = np.array([0.5 ** (8 * h / heads) for h in range(heads)])
        i, j = np.arange(int(queries))[:, None], np.arange(int(keys))
        i = i + ("alibi positions off by one" in wrong)
        distance = (
            np.maximum(i - j, 0) if "alibi towards the past alone" in wrong else np.abs(i - j)
        )
        bias = -slopes[:, None, None] * distance
        if early:
            bias = bias * port.scale
        if "alibi added" in wrong:
            bias = -bias
        return array + ops.astype(ops.from_numpy(bias[None].astype(np.float32)), array.dtype)

    def with_the_other_sign(self, recipe: Recipe) -> Variants:
        """The bias added in place of subtracted."""
        yield "", recipe.with_section(AlibiSection(self.value, factor=-1.0))

    def towards_the_past(self, recipe: Recipe) -> Variants:
        """No distance for keys after the query, or a negative one."""
        yield "", recipe.with_section(AlibiSection(self.value, one_sided=True))
        words = "with its sign: keys after the query gain by theirs"
        yield words, recipe.with_section(AlibiSection(self.value, signed=True))

    def of_other_slopes(self, recipe: Recipe) -> Variants:
        """Of another order of heads, or another sequence."""
        right = np.resize(self._own_slopes(recipe.heads[0]), recipe.heads[0])
        every = {"reversed, of the heads in the other order": right[::-1]}
        every |= _other_slopes(right) if self.value is True else {}
        for words, slopes in every.items():
            if not np.allclose(slopes, right):
                yield words, recipe.with_section(AlibiSection(self.value, slopes=slopes))
        batch, (heads, _) = recipe.lengths[0], recipe.heads
        if batch > 1:
            words = "batch and heads exchanged: each slope for B rows in turn, of B * H"
            turned = right.repeat(batch).reshape(batch, heads)
            yield words, recipe.with_section(AlibiSection(self.value, slopes=turned))
        for power, words in ((0.5, "2^(-4h/H)"), (2.0, "2^(-16h/H)")):
            yield words, recipe.with_section(AlibiSection(self.value, power=power))

    def before_the_scale(self, recipe: Recipe) -> Variants:
        """Added to the products, which are scaled then."""
        yield "", recipe.with_section(AlibiSection(self.value, factor=recipe.scale))

    def before_the_softcap(self, recipe: Recipe) -> Variants:
        """Bounded together with the logits."""
        if "softcap" in recipe.options:
            yield "", recipe.with_section(AlibiSection(self.value, early=True))

    def of_other_positions(self, recipe: Recipe) -> Variants:
        """Positions one too large or too small, or not those of the call."""
        given = (recipe.positions, recipe.key_positions, recipe.offset)
        if any(one is not None and np.any(one) for one in given):
            only = all(one is None or not np.any(one) for one in given[:2])
            words = "the query offset left out" if only else "not those of the call"
            yield words, recipe.with_section(AlibiSection(self.value, by_index=True))
        for words, places in places_of_others(recipe).items():
            yield words, recipe.but(positions=places["query"], key_positions=places["key"])
        more = recipe.lengths[2] - recipe.lengths[1]
        for shift in dict.fromkeys((1, -1, more) if more else (1, -1)):
            end = ", as at the end of the keys" if shift == more else ""
            words = f"query {shift:+d}{end}"
            yield words, recipe.with_section(AlibiSection(self.value, shift=shift))

    mistakes = (
        ("alibi added", "Subtract the slope times the distance from the logits.",
         with_the_other_sign),
        ("alibi towards the past alone", "The distance is absolute: keys after the query have one "
         "too.", towards_the_past),
        ("alibi of other slopes", "The slopes are 2^(-8h/H), h = 1 .. H; of H that is no power of "
         "two, those of the next lower one and every other one of twice as many.", of_other_slopes),
        ("alibi before the scale", "Scale the products first, then subtract slope times distance.",
         before_the_scale),
        ("alibi before the softcap", "Cap the scaled logits, and subtract slope times distance "
         "then.", before_the_softcap),
        ("alibi of other positions", "Count positions from 0, and pass on `positions`, "
         "`key_positions` and `query_offset`.", of_other_positions),
    )  # fmt: skip
    faults = (
        ("alibi left out", "alibi left out", "logits"),
        ("alibi added", "alibi added", "logits"),
        ("alibi towards the past alone", "alibi towards the past alone", "logits"),
        ("alibi of other slopes", "alibi of other slopes", "logits"),
        ("alibi slopes reversed", "alibi of other slopes", "logits"),
        ("alibi slopes from 0", "alibi of other slopes", "logits"),
        ("alibi before the scale", "alibi before the scale", "logits"),
        ("alibi positions off by one", "alibi of other positions", "logits"),
    )


SECTION = AlibiSection
