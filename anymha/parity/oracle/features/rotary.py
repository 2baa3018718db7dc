"""Rotary positions: pairs of columns of queries and keys, turned by an angle for each position.

    (a, b) -> (a cos(m w) - b sin(m w), b cos(m w) + a sin(m w))      position m, frequency w

It acts on the projected heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants

BASES = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0, 1_000.0, 100.0)
"""Bases of models."""

DEFAULTS = {
    "dim": None,
    "base": 10_000.0,
    "layout": "half",
    "columns": "first",
    "scaling": None,
    "max_position_embeddings": None,
}

_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.5,
}


USUAL_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 8192,
}
"""Numbers that scalings have in most models."""

COARSE = (
    ("frequencies", "angles"),
    ("frequencies", "angles", "tables"),
    ("frequencies",),
    ("angles",),
    ("tables",),
    ("angles", "tables"),
    ("frequencies", "tables"),
    ("positions",),
    ("positions", "frequencies"),
    ("positions", "angles"),
)
"""What is in half precision together; the likeliest first."""


OF_BOTH = ", those of the queries for the keys too"
"""After a mistake with positions: beside it keys have those of the queries."""

ROWS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "the first sequence for all": lambda x: x[:1],
    "the last sequence for all": lambda x: x[-1:],
    "the sequence before": lambda x: np.roll(x, 1, 0),
    "the next sequence": lambda x: np.roll(x, -1, 0),
}
"""Whose positions, (1 or B, length), sequences may have by mistake; of two the last is as that
before it."""

SHIFT = 16
"""By up to so many positions queries may be shifted against keys."""

LONGEST_TABLE = 64
"""Up to so many positions every length of a table of angles is tried; beyond it powers of two."""


class RotarySection(Section):
    """The rotation with the fields of the value, by the names of `DEFAULTS`.

    Args:
        value: The option, or a dict of its fields.
        on: The stages that are turned.
        sign: -1 turns the other way.
        factor: Of cosines and sines; default that of the scaling.
        dtype: The half precision in which angles are computed; default none.
        places: The positions (1 or B, length) of stages that have others than the call's.
        by_head: Whether heads are counted in place of positions.
        exchanged: Whether cosines stand for sines, and sines for cosines.
        one_sign: Whether both sines are added (or, by `sign`, subtracted), which is no rotation.
        times: The factor of the angles of the stages, by name.
        twice: The stages that are turned twice.
        own: The rotation of stages that have one of their own.
        change: Other frequencies, from those of the value and its plain ones.
        rewritten: The stages whose turned pairs are written in the other layout.
        mixed: Whether each column has the angle that it has in the other layout.
    """

    option = "rotary"
    examples = ({"dim": 4, "base": 100.0, "scaling": _YARN},)
    usual = ({}, {"base": 500_000.0})
    left_out = "positions are missing"

    def __init__(
        self,
        value: Any,
        on: tuple[str, ...] = ("query", "key"),
        sign: int = 1,
        factor: float | None = None,
        dtype: Any = None,
        rounded: tuple[str, ...] = (),
        places: Arrays | None = None,
        by_head: bool = False,
        exchanged: bool = False,
        one_sign: bool = False,
        times: dict[str, float] | None = None,
        twice: tuple[str, ...] = (),
        own: Mapping[str, RotarySection] = MappingProxyType({}),
        change: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
        rewritten: tuple[str, ...] = (),
        mixed: bool = False,
    ) -> None:
        fields = value if isinstance(value, Mapping) else vars(value)
        super().__init__({**DEFAULTS, **fields})
        self.on, self.sign, self.dtype, self.own, self.change = on, sign, dtype, own, change
        self.rounded, self.by_head, self.exchanged = rounded, by_head, exchanged
        self.times, self.twice, self.first = times or {}, twice, -1 if one_sign else 1
        self.factor = attention_factor(self.value) if factor is None else factor
        self.places, self.rewritten, self.mixed = places or {}, rewritten, mixed

    @property
    def acts(self) -> tuple[str, ...]:
        """The stages that are turned."""
        return (*self.on, *self.own)

    def order(self) -> int:
        """After the norm."""
        return 1

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The turned heads."""
        if stage in self.own:
            return self.own[stage].forward(stage, array, recipe, stages)
        if stage not in self.on:
            return array
        one, two = self._pairs(array.shape[-1])
        cos, sin, _ = self._turns(stage, array, recipe)
        (cos, also), (sin, back) = self._of_columns(cos), self._of_columns(sin)
        for _ in range(1 + (stage in self.twice)):
            a, b, result = array[..., one], array[..., two], array.copy()
            result[..., one], result[..., two] = a * cos - self.first * b * sin, b * also + a * back
            array = result
        if stage in self.rewritten:
            columns = np.sort(np.concatenate([one, two]))
            array = _paired(array, None, columns, self.value["layout"] != "half")
        return array

    def backward(
        self,
        stage: str,
        gradient: np.ndarray,
        array: np.ndarray,
        recipe: Recipe,
        stages: Arrays,
        cancel: bool,
    ) -> np.ndarray:
        """Turned back."""
        if stage in self.own:
            return self.own[stage].backward(stage, gradient, array, recipe, stages, cancel)
        if stage not in self.on:
            return gradient
        one, two = self._pairs(array.shape[-1])
        cos, sin, _ = self._turns(stage, array, recipe)
        (cos, also), (back, sin) = self._of_columns(cos), self._of_columns(sin)
        back = -back
        if not cancel:
            cos, also, sin, back = (np.abs(each) for each in (cos, also, sin, back))
        a, b, result = gradient[..., one], gradient[..., two], gradient.copy()
        result[..., one], result[..., two] = a * cos + b * sin, b * also + a * back
        return result

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """Errors are turned too."""
        if stage not in self.on:
            return sizes
        if stage in self.own:
            return self.own[stage].sizes(stage, sizes, array, recipe, stages)
        one, two = self._pairs(array.shape[-1])
        cos, sin, _ = self._turns(stage, array, recipe)
        sizes = np.broadcast_to(sizes, array.shape)
        a, b, result = sizes[..., one], sizes[..., two], sizes.copy()
        result[..., one] = np.hypot(a * cos, b * sin)
        result[..., two] = np.hypot(b * cos, a * sin)
        return result

    def own_errors(
        self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray | float:
        """An angle that is off by d turns a pair of the size s by d s away.

        With u = eps / 2 the angle m w of a frequency w = base^-x is off by

            m w ((1 + 2 x ln(base)) u + 2 u + u)

        at most: the exponent x is rounded, ln(base) or the power has an error of its own, which
        its exponential multiplies by x ln(base); a power, its inverse and a scaling are three more
        roundings, the product with the position is one. In units of eps that is
        2 + x ln(base), times the angle: linear in the position. A frequency of 1 is exact, and so
        is its angle.
        """
        if stage in self.own:
            return self.own[stage].own_errors(stage, array, recipe, stages)
        if stage not in self.on:
            return 0.0
        one, two = self._pairs(array.shape[-1])
        angles = self._turns(stage, array, recipe)[2]
        own = self._frequencies(array, recipe)[..., None, :]
        exponents = np.arange(own.shape[-1]) / own.shape[-1]
        each = np.where(own == 1, 0.0, 2 + math.log(self.value["base"]) * exponents)
        result = np.zeros(array.shape)
        pairs = np.hypot(array[..., one], array[..., two])
        result[..., one] = result[..., two] = pairs * each * np.abs(angles) * self.factor
        return result

    def ported(self, ops: Any, place: str, array: Any, port: Any) -> Any:
        """The heads times a matrix for each position, with the faults below."""
        wrong, rotary = port.wrong, self.value
        rotary = DEFAULTS if "another rotary" in wrong else rotary
        alone = "rotary of the keys alone" in wrong and place == "query"
        if place not in ("query", "key") or "rotary left out" in wrong or alone:
            return array
        if "rotary along the heads" in wrong:
            heads = ops.permute_dims(array, (0, 2, 1, 3))
            own = replace(port, wrong={*port.wrong} - {"rotary along the heads"}, places={})
            return ops.permute_dims(self.ported(ops, place, heads, own), (0, 2, 1, 3))
        if "rotary before the split" in wrong:
            own = replace(port, wrong={*port.wrong} - {"rotary before the split"})
            shape = tuple(array.shape)
            heads = ops.reshape(array, (*shape[:2], 1, shape[2] * shape[3]))
            whole = RotarySection({**rotary, "dim": None})
            return ops.reshape(whole.ported(ops, place, heads, own), shape)
        _, length, _, d = array.shape
        r = d if rotary["dim"] is None else rotary["dim"]
        first = rotary["columns"] == "first"
        start = 0 if first != ("rotary on other columns" in wrong) else d - r
        in_halves = (rotary["layout"] == "half") != ("rotary layout swapped" in wrong)
        base = 10_000.0 if "another base" in wrong else rotary["base"]
        base = base**0.5 if "half the exponents" in wrong else base
        scaling = None if "rotary scaling left out" in wrong else rotary["scaling"]
        plain = {**rotary, "base": base, "scaling": scaling}
        factor = attention_factor(rotary)
        if "rotary factor left out" in wrong or "rotary scaling left out" in wrong:
            factor = 1.0
        if "rotary factor twice" in wrong:
            factor *= factor
        places = port.places.get(place)
        places = np.arange(length) if places is None else places
        places = np.atleast_2d(places).astype(np.float64)
        if "query positions off by one" in wrong and place == "query":
            places += 1
        if "query positions three later" in wrong and place == "query":
            places += 3
        if "queries at the end" in wrong and place == "query":
            places += port.inputs["key"].shape[1] - length
        turns = frequencies(plain, r, length)
        if "the ramp the other way round" in wrong:
            free = frequencies({**plain, "scaling": None}, r, length)
            turns = free + free / rotary["scaling"]["factor"] - turns
        numbers = np.multiply.outer(places, turns)  # (1 or B, T, r/2)
        if "rotary angles in bfloat16" in wrong:
            own = frequencies(plain, r, length).astype(ml_dtypes.bfloat16)
            numbers = np.multiply.outer(places.astype(ml_dtypes.bfloat16), own).astype(np.float64)
        if "rotary turned the other way" in wrong or (
            "keys turned the other way" in wrong and place == "key"):  # fmt: skip
            numbers = -numbers
        if "cosines and sines exchanged" in wrong:
            numbers = np.pi / 2 - numbers
        if "rotary positions halved" in wrong:
            numbers = numbers / 2
        if "rotary scaling multiplied" in wrong:
            numbers = numbers * rotary["scaling"]["factor"] ** 2
        matrices = np.zeros((*places.shape, d, d)) + np.eye(d)
        for pair, angle in enumerate(np.moveaxis(numbers, -1, 0)):
            i, j = (pair, pair + r // 2) if in_halves else (2 * pair, 2 * pair + 1)
            i, j = start + i, start + j
            matrices[..., i, i] = matrices[..., j, j] = factor * np.cos(angle)
            matrices[..., i, j] = factor * np.sin(angle)
            matrices[..., j, i] = -factor * np.sin(angle)
            if "rotary sines of one sign" in wrong:
                matrices[..., j, i] *= -1
        if "queries turned twice" in wrong and place == "query":
            matrices = matrices @ matrices
        if "queries written in another layout" in wrong and place == "query":
            order = start + np.arange(r).reshape((2, -1) if in_halves else (-1, 2)).T.reshape(-1)
            matrices[..., start : start + r] = matrices[..., order]
        dtype = ops.to_numpy(array).dtype
        return ops.matmul(array, ops.from_numpy(matrices.astype(dtype)))

    def _pairs(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The columns of the first and the second member of each pair."""
        r = width if self.value["dim"] is None else self.value["dim"]
        start, places = 0 if self.value["columns"] == "first" else width - r, np.arange(r // 2)
        if self.value["layout"] == "half":
            return start + places, start + places + r // 2
        return start + 2 * places, start + 2 * places + 1

    def _turns(
        self, stage: str, array: np.ndarray, recipe: Recipe
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cosines, sines and angles, (B or 1, T, 1, r/2)."""
        places = self.places.get(stage)
        places = recipe.places(stage) if places is None else places
        places = np.arange(array.shape[2])[None] if self.by_head else places
        own = self._frequencies(array, recipe)
        if {"frequencies", "angles"} <= {*self.rounded}:  # a product in that precision
            places = self._rounded("angles", places)
        places = self._rounded("positions", places)
        angles = places[..., None] * self._rounded("frequencies", own)
        angles = np.expand_dims(self._rounded("angles", angles), 1 if self.by_head else 2)
        angles = self.times.get(stage, 1.0) * angles
        cos, sin = (self._rounded("tables", f(angles) * self.factor) for f in (np.cos, np.sin))
        cos, sin = (sin, cos) if self.exchanged else (cos, sin)
        return cos, self.sign * sin, angles

    def _of_columns(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a table for each pair, (..., r/2), those of the first and of the second columns."""
        if not self.mixed:
            return table, table
        half = table.shape[-1]
        columns, order = np.arange(2 * half), self.value["layout"]
        angles = columns // 2 if order == "half" else columns % half
        one, two = (
            (angles[:half], angles[half:]) if order == "half" else (angles[::2], angles[1::2])
        )
        return table[..., one], table[..., two]

    def _rounded(self, what: str, array: np.ndarray) -> np.ndarray:
        return array.astype(self.dtype).astype(float) if what in self.rounded else array

    def _frequencies(self, array: np.ndarray, recipe: Recipe) -> np.ndarray:
        """(r/2,); or (B, 1, r/2), where each row is read alone and has a length of its own."""
        width, length = 2 * len(self._pairs(array.shape[-1])[0]), recipe.lengths[2]
        own = None if recipe.decoded is None else recipe.decoded.valid
        if own is None or own.shape[1] != length or own.all():
            right = frequencies(self.value, width, length)
            plain = {**self.value, "scaling": None}
            return self.change(right, frequencies(plain, width, length)) if self.change else right
        return np.stack([frequencies(self.value, width, n) for n in own.sum(1)])[:, None]

    def _with(self, recipe: Recipe, **wrong: Any) -> Recipe:
        return recipe.with_section(RotarySection(self.value, **wrong))

    def _but(self, recipe: Recipe, **fields: Any) -> Recipe:
        own = {**self.value, **fields}
        return recipe.with_section(RotarySection(own, factor=self.factor))

    def swapped(self, recipe: Recipe) -> Variants:
        """The pairs of the other layout."""
        other = "interleaved" if self.value["layout"] == "half" else "half"
        names = {"half": "halves", "interleaved": "interleaved pairs"}
        words = f"{names[other]} for {names[self.value['layout']]}"
        yield words, self._but(recipe, layout=other)
        words = f"{names[self.value['layout']]} with the cosines and sines of {names[other]}"
        yield words, self._with(recipe, mixed=True, factor=self.factor)
        words = f"{names[other]} with the cosines and sines of {names[self.value['layout']]}"
        own = {**self.value, "layout": other}
        yield words, recipe.with_section(RotarySection(own, mixed=True, factor=self.factor))

    def reversed(self, recipe: Recipe) -> Variants:
        """By the negative angle."""
        yield "", self._with(recipe, sign=-1, factor=self.factor)

    def exchanged_tables(self, recipe: Recipe) -> Variants:
        """(a, b) becomes (a sin - b cos, b sin + a cos)."""
        yield "", self._with(recipe, exchanged=True, factor=self.factor)

    def along_heads(self, recipe: Recipe) -> Variants:
        """As where heads and positions are exchanged after the rotation."""
        yield "over the heads", self._with(recipe, by_head=True, factor=self.factor)

    def of_other_exponents(self, recipe: Recipe) -> Variants:
        """Exponents of the base that are not 2i/dim of pair i."""
        width = recipe.weights["query.kernel"].shape[2]
        own, base = self.value["dim"] or width, self.value["base"]
        powers = {f"2i/{width}, by the width of a head,": own / width, f"i/{own}": 0.5,
                  f"4i/{own}": 2.0}  # fmt: skip
        if own > 2:
            powers |= {f"i/{own // 2 - 1}, from 1 down to 1/base,": own / (own - 2),
                       f"2i/{own - 1}": own / (own - 1)}  # fmt: skip
        for words, power in powers.items():
            if power != 1:
                yield (f"{words} in place of 2i/{own}, as of base {base**power:.6g}",
                       self._but(recipe, base=base**power))  # fmt: skip
        for words, first in ((f"2(i + 1)/{own}", 2), (f"(2i + 1)/{own}", 1)):
            times = dict.fromkeys(self.on, base ** (-first / own))
            yield f"{words} in place of 2i/{own}", self._with(
                recipe, times=times, factor=self.factor)  # fmt: skip
        inverse = self._with(recipe, change=lambda right, _: right[::-1], factor=self.factor)
        yield "in the reverse order of pairs", inverse

    def of_another_scaling(self, recipe: Recipe) -> Variants:
        """The kinds of scaling, or numbers of one, taken for each other."""
        scaling: dict[str, Any] = dict(self.value["scaling"] or {})
        kind, factor = scaling.get("rope_type"), scaling.get("factor")
        every = dict[str, dict[str, Any]]()
        for one, other in (("low_freq_factor", "high_freq_factor"), ("beta_fast", "beta_slow"),
                           ("short_factor", "long_factor")):  # fmt: skip
            both = {**USUAL_SCALING, **scaling}
            if one in scaling or (kind == "yarn" and one == "beta_fast"):
                words = f"{one} and {other} exchanged"
                every[words] = {one: both[other], other: both[one]}
        for name in ("short_factor", "long_factor"):
            if kind == "longrope":
                both = ("short_factor", "long_factor")
                every[f"{name} at every length"] = dict.fromkeys(both, scaling[name])
        for name, usual in USUAL_SCALING.items():
            if scaling.get(name, usual) != usual:
                every[f"{name} {usual} in place of {scaling[name]}"] = {name: usual}
        if kind == "yarn":
            cut = scaling.get("truncate", True)
            every[f"`truncate` is {not cut}, not {cut}"] = {"truncate": not cut}
        if kind in ("llama3", "yarn", "dynamic") and factor:
            words = f"all frequencies divided by {factor:g}, as by a linear scaling"
            every[words] = {"rope_type": "linear"}
        for words, changed in every.items():
            yield words, self._but(recipe, scaling={**scaling, **changed})
        if kind in ("llama3", "yarn") and factor:
            changes = {
                "those that it divides and those that it leaves exchanged":
                    lambda own, plain: plain + plain / factor - own,
                "the blend of divided and plain ones exchanged": lambda own, plain: np.where(
                    (own > plain / factor * (1 + 1e-9)) & (own < plain * (1 - 1e-9)),
                    plain + plain / factor - own, own),
                "no blend between, in part divided is left": lambda own, plain: np.where(
                    own <= plain / factor * (1 + 1e-9), own, plain),
                "no blend between, in part divided is divided": lambda own, plain: np.where(
                    own >= plain * (1 - 1e-9), own, plain / factor),
            }  # fmt: skip
            for words, change in changes.items():
                yield words, self._with(recipe, change=change, factor=self.factor)
        if kind in ("llama3", "yarn", "longrope"):
            yield "multiplied, not divided", self._with(
                recipe, change=lambda own, plain: plain**2 / own, factor=self.factor)  # fmt: skip

    def of_one_alone(self, recipe: Recipe) -> Variants:
        """A rotation that is wrong for the queries alone, or for the keys alone."""
        kind = type(self)
        for make in (kind.swapped, kind.reversed, kind.exchanged_tables, kind.along_heads,
                     kind.of_one_sign, kind.elsewhere, kind.unscaled, kind.of_another_scaling,
                     kind.by_a_factor, kind.based, kind.of_other_exponents):  # fmt: skip
            name, *_ = next(row for row in kind.mistakes if row[2] is make)
            for words, wrong in make(self, recipe):
                section = next(one for one in wrong.sections if isinstance(one, kind))
                detail = name.removeprefix("rotary ") + (f", {words}" if words else "")
                for stage in ("key", "query"):
                    yield f"the {stage} alone: {detail}", self._with(
                        recipe, own={stage: section}, factor=self.factor)  # fmt: skip

    def of_permuted_weights(self, recipe: Recipe) -> Variants:
        """Columns of kernels brought from pairs to halves, or back, where the layout is another."""
        weights = recipe.weights
        columns = np.sort(np.concatenate(self._pairs(weights["query.kernel"].shape[2])))
        for names, back, bias in itertools.product(
            (("query",), ("key",), ("query", "key")), (False, True), (True, False)
        ):
            own = weights[f"{names[0]}.kernel"].shape[1]
            every = [f"{name}.{part}" for name in names for part in ("kernel", "bias")]
            every = [n for n in every if n in weights and (bias or n.endswith("kernel"))]
            if not bias and f"{names[0]}.bias" not in weights:
                continue
            for heads in recipe.heads if len(names) == 1 and recipe.heads[0] > own else (own,):
                if weights[f"{names[0]}.kernel"][0].size % (2 * heads):
                    continue
                cut = None if heads == own else heads
                changed = {n: _paired(weights[n], cut, columns, back) for n in every}
                words = ("from halves to pairs", "from pairs to halves")[back]
                words = f"{' and '.join(names)}, {words}" + f", as of {cut} heads" * bool(cut)
                rest = ", the biases are right" * (not bias)
                yield words + rest, recipe.but(weights={**weights, **changed})
                if cut:  # permuted rightly, and back as of the queries' heads, or the other way
                    again = {n: _paired(a, None, columns, not back) for n, a in changed.items()}
                    yield f"{words}, and back as of {own}{rest}", recipe.but(
                        weights={**weights, **again})  # fmt: skip

    def elsewhere(self, recipe: Recipe) -> Variants:
        """The other end of the heads, or another number of columns."""
        width = recipe.weights["query.kernel"].shape[2]
        own = width if self.value["dim"] is None else self.value["dim"]
        other = "last" if self.value["columns"] == "first" else "first"
        if own < width:
            yield f"the {other}", self._but(recipe, columns=other)
        if (self.value["scaling"] or {}).get("rope_type") == "longrope":
            return  # which has a factor for each pair
        for dim in sorted({width - width % 2, width // 4 * 2, width // 8 * 2} - {own, 0}):
            yield f"{dim} of {width}, not {own}", self._but(recipe, dim=dim)

    def based(self, recipe: Recipe) -> Variants:
        """Another base."""
        for base in BASES:
            if base != self.value["base"]:
                words = f"{base:.9g} in place of {self.value['base']:.9g}"
                yield words, self._but(recipe, base=base)

    def written_in_another_layout(self, recipe: Recipe) -> Variants:
        """Pairs that are read in one layout and written in the other, of one of the two alone."""
        for stage in self.on:
            made = self._with(recipe, rewritten=(stage,), factor=self.factor)
            yield f"the {stage} alone", made

    def before_the_split(self, recipe: Recipe) -> Variants:
        """All heads turned as one, whose pairs and frequencies are those of the whole width."""
        if (self.value["scaling"] or {}).get("rope_type") == "longrope":
            return  # which has a factor for each pair
        for layout in dict.fromkeys((self.value["layout"], "half", "interleaved")):
            whole = _WholeSection({**self.value, "dim": None, "layout": layout}, factor=self.factor)
            words = {"half": "halves", "interleaved": "neighbours"}[layout]
            yield f"{words} of the whole width", recipe.with_section(whole)

    def coarse(self, recipe: Recipe) -> Variants:
        """Frequencies, angles, or cosines and sines, each or several in half precision."""
        for rounded in COARSE:
            words = " and ".join({"tables": "cosines and sines"}.get(n, n) for n in rounded)
            for dtype, (more, places) in itertools.product(
                (ml_dtypes.bfloat16, np.float16), _of_one_side(recipe).items()
            ):
                fields = {"dtype": dtype, "rounded": rounded, "places": places}
                made = self._with(recipe, **fields, factor=self.factor)
                yield f"{words} in {np.dtype(dtype).name}{more}", made

    def of_other_positions(self, recipe: Recipe) -> Variants:
        """Not those of the call, or those of another sequence, or of keys for queries."""
        right = {name: recipe.places(name) for name in ("query", "key")}
        others = dict[str, Arrays]()
        given = (recipe.positions, recipe.key_positions)
        indices = {name: np.arange(place.shape[1])[None] for name, place in right.items()}
        if any(one is not None and np.any(one) for one in given):
            others["not those of the call"] = indices
        elif recipe.offset is not None and np.any(recipe.offset):
            yield "the query offset left out", self._with(
                recipe, places={"query": indices["query"]}, factor=self.factor)  # fmt: skip
        others |= places_of_others(recipe)
        if recipe.lengths[1] == recipe.lengths[2]:
            others["those of the other of the two"] = {
                "query": right["key"], "key": right["query"]}  # fmt: skip
        for words, places in others.items():
            yield words, self._with(recipe, places=places, factor=self.factor)
            for name in right if OF_BOTH not in words else ():
                one = {name: places[name]}
                yield f"{words}, the {name} alone", self._with(
                    recipe, places=one, factor=self.factor)  # fmt: skip

    def within_a_table(self, recipe: Recipe) -> Variants:
        """Positions beyond a number are the last below it, or begin again."""
        right = {name: recipe.places(name) for name in ("query", "key")}
        most = max(int(places.max(initial=0)) for places in right.values())
        sizes = {*range(1, min(most, LONGEST_TABLE) + 1)}
        sizes |= {1 << power for power in range(most.bit_length()) if 1 << power <= most}
        for size in sorted(sizes, reverse=True):
            changes = {
                f"none beyond {size - 1}": {n: np.minimum(x, size - 1) for n, x in right.items()},
                f"they begin again after {size}": {n: x % size for n, x in right.items()},
            }  # fmt: skip
            for words, places in changes.items():
                for names in (("query", "key"), ("query",), ("key",)):
                    alone = "" if len(names) == 2 else f", the {names[0]} alone"
                    own = {name: places[name] for name in names}
                    yield words + alone, self._with(recipe, places=own, factor=self.factor)

    def shifted(self, recipe: Recipe) -> Variants:
        """Positions one too large or too small, or as at the end of the keys."""
        right = {name: recipe.places(name) for name in ("query", "key")}
        _, queries, keys = recipe.lengths
        if queries != keys:
            words = f"query {keys - queries:+d}, as at the end of the keys"
            moved = {"query": right["query"] + keys - queries}
            yield words, self._with(recipe, places=moved, factor=self.factor)
        for names in (("query",), ("key",), ("query", "key")):
            for by in (1, -1):
                words = f"{' and '.join(names)} {by:+d}"
                moved = {name: right[name] + by for name in names}
                yield words, self._with(recipe, places=moved, factor=self.factor)

    def shifted_more(self, recipe: Recipe) -> Variants:
        """Positions of queries further from those of keys than by one."""
        _, queries, keys = recipe.lengths
        lengths = {queries: "the number of queries", -queries: "the number of queries",
                   keys: "the number of keys", -keys: "the number of keys"}  # fmt: skip
        right = recipe.places("query")
        for by in sorted({*range(-SHIFT, SHIFT + 1), *lengths} - {-1, 0, 1}, key=abs):
            words = f"query {by:+d}{f', {lengths[by]}' if by in lengths else ''}"
            moved = {"query": right + by}
            yield words, self._with(recipe, places=moved, factor=self.factor)

    def without_its_factor(self, recipe: Recipe) -> Variants:
        """Cosines and sines as they are."""
        if self.factor != 1:
            yield "", self._with(recipe, factor=1.0)

    def with_its_factor_twice(self, recipe: Recipe) -> Variants:
        """The factor of cosines and sines squared."""
        if self.factor != 1:
            yield "", self._with(recipe, factor=self.factor**2)

    def unscaled(self, recipe: Recipe) -> Variants:
        """Frequencies without their scaling, with its factor or without."""
        if self.value["scaling"] is not None:
            plain = {**self.value, "scaling": None}
            for factor in sorted({1.0, self.factor}):
                yield "", recipe.with_section(RotarySection(plain, factor=factor))

    def alone(self, recipe: Recipe) -> Variants:
        """Queries turned and keys not, or the other way round."""
        for one, other in (("query", "key"), ("key", "query")):
            yield f"the {other} is not turned", self._with(recipe, on=(one,))
        if recipe.stages["value"].shape[-1] == recipe.stages["key"].shape[-1]:
            yield "the values are turned too", self._with(recipe, on=("query", "key", "value"))

    def of_one_sign(self, recipe: Recipe) -> Variants:
        """Both sines added, or both subtracted."""
        for words, sign in (("both are added, a minus is missing", 1), ("both subtracted", -1)):
            yield words, self._with(recipe, sign=sign, one_sign=True, factor=self.factor)

    def often(self, recipe: Recipe) -> Variants:
        """Queries, keys or both turned twice."""
        for words, names in (("the queries", self.on[:1]), ("the keys", self.on[1:2]),
                             ("queries and keys", self.on)):  # fmt: skip
            yield f"{words} twice", self._with(recipe, twice=names, factor=self.factor)

    def by_a_factor(self, recipe: Recipe) -> Variants:
        """Angles with a factor: that of a linear scaling the other way round, or that of turns."""
        scaling = self.value["scaling"] or {}
        every = {"by 2 pi, as of turns": 2 * math.pi}
        every |= {f"by 1/{n}, as by a linear scaling": 1 / n for n in (2, 4, 8)}
        if scaling.get("rope_type") == "linear":
            factor = float(scaling["factor"])
            every = {"by the scaling's factor, not divided by it": factor**2,
                     "by 1/factor of the scaling, twice": 1 / factor, **every}  # fmt: skip
        for words, factor in every.items():
            times = dict.fromkeys(self.on, factor)
            yield words, self._with(recipe, times=times, factor=self.factor)

    mistakes = (
        ("rotary layout swapped", "Pair column i with i + dim/2 in the layout \"half\", 2i with "
         "2i + 1 in \"interleaved\"; or permute the columns of the weights.", swapped),
        ("rotary turned the other way", "(a, b) becomes (a cos - b sin, b cos + a sin): exchange "
         "the signs of the sines.", reversed),
        ("rotary with cosines and sines exchanged", "(a, b) becomes (a cos - b sin, b cos + a "
         "sin): the first factor is the cosine.", exchanged_tables),
        ("rotary along another axis", "Positions are counted along the axis of positions: rotate "
         "(B, T, H, d) along T, or exchange the axes first.", along_heads),
        ("rotary sines of one sign", "One sine is subtracted, the other added: (a, b) becomes "
         "(a cos - b sin, b cos + a sin).", of_one_sign),
        ("rotary twice", "Rotate queries and keys once each.", often),
        ("rotary on other columns", "Rotate `dim` columns of each head, the `columns` that the "
         "option names.", elsewhere),
        ("rotary of queries or keys alone", "Rotate both, queries and keys.", alone),
        ("rotary of other positions", "Pass on `positions`, `key_positions` and `query_offset`: "
         "queries and keys, and each sequence, have positions of their own.", of_other_positions),
        ("rotary of other positions", "Pass on `positions`, `key_positions` and `query_offset`: "
         "queries and keys, and each sequence, have positions of their own.", within_a_table, True),
        ("rotary positions off by one", "Count positions from 0, and pass on `positions`, "
         "`key_positions` and `query_offset`.", shifted),
        ("rotary positions shifted", "Count the positions of queries and keys from the same place, "
         "and pass on `positions`, `key_positions` and `query_offset`.", shifted_more, True),
        ("rotary attention factor left out", "Multiply cosines and sines by the scaling's factor "
         "of attention.", without_its_factor),
        ("rotary attention factor twice", "Multiply cosines and sines by the scaling's factor of "
         "attention once.", with_its_factor_twice),
        ("rotary scaling left out", "Scale the frequencies as the option's `scaling` says.",
         unscaled),
        ("rotary angles multiplied", "An angle is a position times a frequency, in radians; a "
         "linear scaling divides it by its factor, once.", by_a_factor),
        ("rotary of another base", "Give both the same `base`.", based),
        ("rotary of other exponents", "The frequency of pair i of `dim` columns is "
         "base^(-2i/dim).", of_other_exponents),
        ("rotary of another scaling", "Scale each frequency as the option's `scaling` says: its "
         "kind, and its numbers by their names.", of_another_scaling),
        ("rotary of the query unlike that of the key", "Turn queries and keys alike: by the same "
         "pairs, direction, frequencies and columns.", of_one_alone, True),
        ("rotary columns of weights permuted", "Permute the columns of a checkpoint's kernels and "
         "biases of queries and keys alike, each by its own heads, where `layout` is another.",
         of_permuted_weights, True),
        ("rotary written in another layout", "Write the turned pairs to the columns from which "
         "they are read.", written_in_another_layout),
        ("rotary before the split into heads", "Split queries and keys into heads, and turn each "
         "head then: its pairs and frequencies are those of its own width.", before_the_split),
        ("rotary angles in half precision", "Compute positions times frequencies, cosines and "
         "sines in float32 at least.", coarse),
    )  # fmt: skip
    faults = (
        ("rotary left out", "rotary left out", "query"),
        ("another rotary", "another rotary", "query"),
        ("rotary layout swapped", "rotary layout swapped", "query"),
        ("rotary turned the other way", "rotary turned the other way", "query"),
        ("rotary sines of one sign", "rotary sines of one sign", "query"),
        ("queries at the end", "rotary positions off by one", "query"),
        ("rotary positions halved", "rotary angles multiplied", "query"),
        ("queries turned twice", "rotary twice", "query"),
        ("rotary on other columns", "rotary on other columns", "query"),
        ("rotary of the keys alone", "rotary of queries or keys alone", "query"),
        ("query positions off by one", "rotary positions off by one", "query"),
        ("query positions three later", "rotary positions shifted", "query"),
        ("rotary factor left out", "rotary attention factor left out", "query"),
        ("rotary factor twice", "rotary attention factor twice", "query"),
        ("rotary scaling left out", "rotary scaling left out", "query"),
        ("another base", "rotary of another base", "query"),
        ("the ramp the other way round", "rotary of another scaling", "query"),
        ("keys turned the other way", "rotary of the query unlike that of the key", "key"),
        ("queries written in another layout", "rotary written in another layout", "query"),
        ("rotary before the split", "rotary before the split into heads", "query"),
        ("rotary angles in bfloat16", "rotary angles in half precision", "query"),
    )


class _WholeSection(RotarySection):
    """The rotation of queries and keys before they are split into heads."""

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """All heads turned as one."""
        return self._as_one(super().forward, stage, array, recipe, stages)

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """Errors are turned too."""
        sizes = np.broadcast_to(sizes, array.shape)
        whole = array.reshape(*array.shape[:2], 1, -1)
        own = super().sizes(stage, sizes.reshape(whole.shape), whole, recipe, stages)
        return own.reshape(array.shape)

    def own_errors(
        self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray | float:
        """Those of the turned width."""
        return self._as_one(super().own_errors, stage, array, recipe, stages)

    def _as_one(self, method: Any, stage: str, array: np.ndarray, *rest: Any) -> Any:
        whole = method(stage, array.reshape(*array.shape[:2], 1, -1), *rest)
        return whole.reshape(array.shape) if np.ndim(whole) else whole


SECTION = RotarySection


def frequencies(rotary: Mapping[str, Any], width: int, length: int) -> np.ndarray:
    """(r/2,), by the definition of each scaling, for a call of that length."""
    base, most = rotary["base"], rotary["max_position_embeddings"]
    factor: Any
    s: dict[str, Any] = dict(rotary["scaling"] or {"rope_type": "default"})
    kind, factor = s["rope_type"], s.get("factor")
    first = s.get("original_max_position_embeddings", most)
    pairs = np.arange(width // 2)
    if kind == "dynamic" and width > 2:  # one pair turns by the position, whatever the base
        stretch = factor * max(length, most) / most - factor + 1
        base *= stretch ** (width / (width - 2))
    plain = base ** (-2 * pairs / width)
    if kind == "linear":
        return plain / factor
    if kind == "proportional":
        turned = int(s.get("partial_rotary_factor", 1.0) * width // 2)
        return np.where(pairs < turned, plain, 0) / s.get("factor", 1.0)
    if kind == "longrope":
        return plain / np.asarray(s["long_factor" if length > first else "short_factor"])
    turns = first * plain / (2 * np.pi) if first is not None else plain
    if kind == "llama3":
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        share = np.clip((turns - low) / (high - low), 0, 1)
        return share * plain + (1 - share) * plain / factor
    if kind == "yarn":
        factor = most / first if factor is None else factor
        often, seldom = s.get("beta_fast", 32), s.get("beta_slow", 1)
        # Of w = base^(-x/width) the column x that turns n times within `first` positions
        edges = [-width * math.log(2 * math.pi * n / first, base) / 2 for n in (often, seldom)]
        if s.get("truncate", True):
            edges = [math.floor(edges[0]), math.ceil(edges[1])]
        start, stop = max(edges[0], 0), min(edges[1], width - 1)
        share = np.clip((pairs - start) / ((stop - start) or 0.001), 0, 1)
        return (1 - share) * plain + share * plain / factor
    return plain


def attention_factor(rotary: Mapping[str, Any]) -> float:
    """The factor of cosines and sines."""
    s: dict[str, Any] = dict(rotary["scaling"] or {"rope_type": "default"})
    if s["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in s:
        return s["attention_factor"]
    most = rotary["max_position_embeddings"]
    first = s.get("original_max_position_embeddings", most)
    factor = s["factor"] if "factor" in s else most / first
    grown = math.log(max(factor, 1.0))
    if s["rope_type"] == "longrope":
        return math.sqrt(1 + grown / math.log(first))
    if s.get("mscale") and s.get("mscale_all_dim"):
        return (1 + 0.1 * s["mscale"] * grown) / (1 + 0.1 * s["mscale_all_dim"] * grown)
    return 1 + 0.1 * grown


def places_of_others(recipe: Recipe) -> dict[str, Arrays]:
    """The positions of other sequences of the batch, by whose they are."""
    others = dict[str, Arrays]()
    for more, sides in _of_one_side(recipe).items():
        places = {name: recipe.places(name) for name in ("query", "key")} | sides
        most = max(len(place) for place in places.values())
        for words, move in itertools.islice(ROWS.items(), min(most**2 - 1, len(ROWS))):
            others[f"those of {words}{more}"] = {n: move(x) for n, x in places.items()}
    return others


def _of_one_side(recipe: Recipe) -> dict[str, Arrays]:
    """Positions that may stand for a call's: none, or those of queries for keys; by their words."""
    own, keys = (recipe.places(name) for name in ("query", "key"))
    alike = own.shape[1] != keys.shape[1] or not np.any(own - keys)
    return {"": {}} if alike else {"": {}, OF_BOTH: {"key": own}}


def _paired(array: np.ndarray, heads: int | None, columns: np.ndarray, back: bool) -> np.ndarray:
    """A kernel or bias (.., H, d) with columns brought from halves to pairs, or `back`.

    Args:
        array: The weight.
        heads: Another number of heads by which it is cut, and then in all its columns.
        columns: The columns of a head that are permuted.
        back: From pairs to halves.
    """
    wide = array.reshape(*array.shape[:-2], heads or array.shape[-2], -1).copy()
    columns = np.arange(wide.shape[-1]) if heads else columns
    order = columns.reshape((-1, 2) if back else (2, -1)).T.reshape(-1)
    wide[..., columns] = wide[..., order]
    return wide.reshape(array.shape)
