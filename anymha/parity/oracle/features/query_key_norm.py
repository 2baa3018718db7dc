"""Norms of queries and keys: the projected heads divided by a size of theirs.

    rms:   x / sqrt(mean(x^2) + eps);  layer: the same of x - mean(x);  l2: x / max(|x|, eps)

over each head or over all heads, times w or 1 + w, plus a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants

DEFAULTS = {
    "kind": "rms",
    "over": "head",
    "scale": "weight",
    "use_bias": False,
    "eps": 1e-6,
    "after_rotary": False,
}
EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12, 1e-3, 1e-4, 1e-2)
BOTH = ("query", "key")


class QueryKeyNormSection(Section):
    """The norm with the fields of the value, in the order of `DEFAULTS`.

    `names` are the projections that are normalised, `by` those whose weights they take where these
    are others'; `eps_at`: "root" for an epsilon within the root, "sum" for one that is added to it.
    `twice` are normalised again; the bias of those in `bare` is added after the norm.
    """

    option = "query_key_norm"
    examples = (
        {"kind": "rms", "eps": 0.1},
        {"kind": "l2", "over": "heads", "scale": "one_plus_weight", "eps": 0.5},
        {"kind": "layer", "over": "width", "use_bias": True},
    )
    usual = ({"kind": "l2"}, {"kind": "layer"}, {})

    def __init__(
        self, value: Any, names: tuple[str, ...] = BOTH, by: Mapping[str, str] | None = None,
        eps_at: str = "", twice: tuple[str, ...] = (), bare: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        fields = value if isinstance(value, Mapping) else vars(value)
        super().__init__({**DEFAULTS, **fields})
        self.names, self.by, self.eps_at = names, by or {}, eps_at
        self.twice, self.bare = twice, bare

    @property
    def acts(self) -> tuple[str, ...]:
        """The stages that are normalised."""
        return self.names

    def order(self) -> int:
        """Before rotary positions, or after them."""
        return 2 if self.value["after_rotary"] else 0

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The normalised heads."""
        if stage not in self.names:
            return array
        weight, bias = self._weights(stage, array, recipe.weights)
        late = self._late(stage, recipe)
        array = array - late
        for _ in range(1 + (stage in self.twice)):
            array = self._parts(array)[0] * weight + bias
        return array + late

    def backward(
        self,
        stage: str,
        gradient: np.ndarray,
        array: np.ndarray,
        recipe: Recipe,
        stages: Arrays,
        cancel: bool,
    ) -> np.ndarray:
        """With y = x / r the gradient of x is (g - y mean(g y)) / r, its own mean taken off."""
        if stage not in self.names:
            return gradient
        even, divisor, grows = self._parts(array - self._late(stage, recipe))
        weight = self._weights(stage, array, recipe.weights)[0]
        sign = -1.0 if cancel else 1.0
        if not cancel:
            even, weight = np.abs(even), np.abs(weight)
        gradient = gradient * weight
        axes = self._axes
        along = np.sum(gradient * even, axes, keepdims=True)
        if self.value["kind"] != "l2":
            along = along / self._count(array)
        gradient = (gradient + sign * grows * even * along) / divisor
        if self.value["kind"] == "layer":
            gradient = gradient + sign * np.mean(gradient, axes, keepdims=True)
        return gradient

    def own_gradients(
        self,
        stage: str,
        gradient: np.ndarray,
        array: np.ndarray,
        recipe: Recipe,
        stages: Arrays,
        cancel: bool,
    ) -> Arrays:
        """Of the weights and the biases of the norm."""
        if stage not in self.names:
            return {}
        even = self._parts(array - self._late(stage, recipe))[0]
        every = {"scale": gradient * (even if cancel else np.abs(even)), "bias": gradient}
        found = {}
        for part, terms in every.items():
            own = recipe.weights.get(f"{stage}_norm.{part}")
            if own is not None:
                by_head = terms.sum((0, 1))
                each = own.size == array.shape[-1] != by_head.size
                found[f"{stage}_norm.{part}"] = (by_head.sum(0) if each else by_head).reshape(
                    own.shape
                )
        return found

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """Errors are divided as the numbers are, those of the divisor come on top."""
        if stage not in self.names:
            return sizes
        late = self._late(stage, recipe)
        even, divisor, _ = self._parts(array - late)
        weight, bias = self._weights(stage, array, recipe.weights)
        own = sizes / divisor
        squares = np.sum(np.square(even * own), self._axes, keepdims=True)
        count = 1.0 if self.value["kind"] == "l2" else self._count(array)
        mean = np.zeros(1)
        if self.value["kind"] == "layer":
            mean = np.sqrt(np.sum(np.square(own), self._axes, keepdims=True)) / count
        spread = np.hypot(np.hypot(own, mean), np.hypot(even, even * np.sqrt(squares) / count))
        return np.hypot(spread * np.abs(weight), np.abs(bias) + np.abs(late))

    def _late(self, stage: str, recipe: Recipe) -> Any:
        """The bias of a projection that is added after the norm."""
        return recipe.weights.get(f"{stage}.bias", 0.0) if stage in self.bare else 0.0

    def _parts(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The heads without weights, what they are divided by, and whether that grows with them."""
        kind, eps, axes = self.value["kind"], self.value["eps"], self._axes
        if kind == "layer":
            x = x - np.mean(x, axes, keepdims=True)
        if kind == "l2":
            length = np.sqrt(np.sum(x**2, axes, keepdims=True))
            divisor = np.maximum(length, eps)
            if self.eps_at:
                divisor = length + eps if self.eps_at == "sum" else np.sqrt(length**2 + eps)
            return x / divisor, divisor, (length > eps).astype(float)
        count = self._count(x)
        mean = np.mean(x**2, axes, keepdims=True) * count / (count - self.value.get("less", 0))
        divisor = np.sqrt(mean) + eps if self.eps_at == "sum" else np.sqrt(mean + eps)
        return x / divisor, divisor, np.ones(1)

    @property
    def _axes(self) -> tuple[int, ...]:
        return {"width": (-2, -1), "axis of heads": (-2,), "axis of positions": (-3,)}.get(
            self.value["over"], (-1,)
        )

    def _count(self, x: np.ndarray) -> int:
        """How many numbers are normalised together."""
        return int(np.prod([x.shape[axis] for axis in self._axes]))

    def _weights(self, stage: str, x: np.ndarray, weights: Arrays) -> tuple[Any, Any]:
        """What the heads are multiplied with, and what is added; they broadcast to (.., H, d_k)."""

        def own(part: str) -> np.ndarray | None:
            array = weights.get(f"{self.by.get(stage, stage)}_norm.{part}")
            if array is None or array.size in (1, x.shape[-1]):
                return array
            return array.reshape(x.shape[-2:])

        weight, bias = own("scale"), own("bias")
        scale = self.value["scale"]
        if weight is None or scale == "none":
            weight = np.ones(1)
        elif scale == "one_plus_weight":
            weight = 1 + weight
        return weight, np.zeros(1) if bias is None else bias

    def ported(self, ops: Any, place: str, array: Any, port: Any) -> Any:
        """The normalised heads, with the faults below."""
        wrong, value = port.wrong, dict(self.value)
        alone = {f"norm of the {name} alone" for name in BOTH if name != place}
        every = (*BOTH, "value") if "norm of the values too" in wrong else BOTH
        if place not in every or "query_key_norm left out" in wrong or alone & {*wrong}:
            return array
        if "norm twice" in wrong:
            once = replace(port, wrong={*wrong} - {"norm twice"})
            array = self.ported(ops, place, array, once)
        if "norm before the bias" in wrong:
            bias = ops.from_numpy(np.ascontiguousarray(port.weights[f"{place}.bias"][None, None]))
            right = replace(port, wrong={*wrong} - {"norm before the bias"})
            return bias + self.ported(ops, place, array - bias, right)
        if "norm of scaled queries" in wrong and place == "query":
            array = array * float(array.shape[-1]) ** -0.5
        if "another kind of norm" in wrong:
            value |= {"kind": "l2", "eps": 1e-6}
        if "norm with another epsilon" in wrong:
            value["eps"] = 1e-5
        if "norm with the mean" in wrong:
            value["kind"] = "layer"
        if "norm over another width" in wrong:
            value["over"] = "width"
        shape = tuple(array.shape)
        x = ops.reshape(array, (*shape[:2], -1)) if value["over"] == "width" else array
        count = x.shape[-1]
        if value["kind"] == "layer":
            x = x - ops.sum(x, axis=-1, keepdims=True) / count
        axis = 2 if "norm along the heads" in wrong else -1
        count = x.shape[axis]
        total = ops.sum(x * x, axis=axis, keepdims=True)
        if value["kind"] == "l2":
            root = ops.sqrt(total)
            x = x / ops.where(root > value["eps"], root, value["eps"])
        elif "norm's epsilon added to the root" in wrong:
            x = x / (ops.sqrt(total / count) + value["eps"])
        else:
            less = "norm by n - 1" in wrong
            x = x / ops.sqrt(total / (count - less) + value["eps"])
        x = ops.reshape(x, shape)
        source = "key" if place == "value" else place
        if "norms exchanged" in wrong:
            source = "key" if place == "query" else "query"
        if "norm by the query's weight" in wrong:
            source = "query"
        weight = port.weights.get(f"{source}_norm.scale")
        if weight is not None and "norm without its weight" not in wrong:
            plus = (value["scale"] == "one_plus_weight") != ("norm by 1 + weight" in wrong)
            weight = weight + 1 if plus else weight
            shown = (1, 1, 1, -1) if weight.size == shape[-1] else (1, 1, *shape[2:])
            x = x * ops.from_numpy(np.ascontiguousarray(weight.reshape(shown)))
        return x

    def _but(self, recipe: Recipe, **fields: Any) -> Recipe:
        return recipe.with_section(QueryKeyNormSection({**self.value, **fields}, self.names))

    def of_one(self, recipe: Recipe) -> Variants:
        """The queries, or the keys, as they are; or the values normalised too."""
        for name in BOTH:
            alone = QueryKeyNormSection(self.value, (name,))
            yield f"the {name} alone", recipe.with_section(alone)
        if recipe.stages["value"].shape[-1] == recipe.stages["key"].shape[-1]:
            for words, source in (("", "value"), *((f", by the weight of the {n}", n) for n in (
                    ("key", "query") if _has_weights(recipe) else ()))):  # fmt: skip
                every = QueryKeyNormSection(self.value, (*BOTH, "value"), {"value": source})
                yield f"of the values too{words}", recipe.with_section(every)

    def by_the_weight_of_another(self, recipe: Recipe) -> Variants:
        """The weights of queries and keys exchanged, or one for both."""
        if not _has_weights(recipe) or self.value["scale"] == "none":
            return
        for words, by in (
            ("those of queries and keys are exchanged", {"query": "key", "key": "query"}),
            ("that of the queries for the keys too", {"key": "query"}),
            ("that of the keys for the queries too", {"query": "key"}),
        ):
            made = QueryKeyNormSection(self.value, self.names, by)
            yield words, recipe.with_section(made)

    def over_another(self, recipe: Recipe) -> Variants:
        """Statistics of all heads in place of those of each, or the other way round."""
        by_head = self.value["over"] != "width"
        over, words = ("width", "all heads together") if by_head else ("head", "each head")
        yield f"over {words}", self._but(recipe, over=over)
        for over in ("axis of heads", "axis of positions"):
            yield f"along the {over}", self._but(recipe, over=over)

    def by_another_weight(self, recipe: Recipe) -> Variants:
        """1 + w in place of w, or the other way round, or no weight."""
        if self.value["scale"] == "none" or not _has_weights(recipe):
            return
        plus = self.value["scale"] == "one_plus_weight"
        words, scale = ("w in place of 1 + w", "weight") if plus else (
            "1 + w in place of w", "one_plus_weight")  # fmt: skip
        yield words, self._but(recipe, scale=scale)
        yield "without a weight", self._but(recipe, scale="none")
        for name in (f"{place}_norm.scale" for place in self.names):
            own = recipe.weights.get(name)
            if own is not None and len(self.names) > 1:
                place = name.partition("_")[0]
                neutral, other = np.full_like(own, 0.0 if plus else 1.0), own + (-1 if plus else 1)
                for told, weight in ((f"that of the {place} left out", neutral),
                                     (f"{words} for the {place} alone", other)):  # fmt: skip
                    yield told, recipe.but(weights={**recipe.weights, name: weight})

    def with_another_epsilon(self, recipe: Recipe) -> Variants:
        """Others that models use; or that of the option in another place."""
        places = {"sum": "added to the root, not within it"}
        if self.value["kind"] == "l2":
            places = {"sum": "added to the length, not its least", "root": "within the root"}
        for eps_at, words in places.items() if self.value["eps"] else ():
            yield words, recipe.with_section(
                QueryKeyNormSection(self.value, self.names, eps_at=eps_at))  # fmt: skip
        for eps in EPSILONS:
            if eps != self.value["eps"]:
                yield f"{eps:g} in place of {self.value['eps']:g}", self._but(recipe, eps=eps)

    def with_another_mean(self, recipe: Recipe) -> Variants:
        """The mean taken off, or not."""
        if self.value["kind"] != "l2":
            centred = self.value["kind"] == "layer"
            words = "it is not taken off" if centred else "it is taken off"
            yield words, self._but(recipe, kind="rms" if centred else "layer")

    def with_another_variance(self, recipe: Recipe) -> Variants:
        """The squares divided by n - 1, as `torch.var` divides them."""
        if self.value["kind"] != "l2":
            yield "divided by n - 1 in place of n", self._but(recipe, less=1)

    def on_the_other_side(self, recipe: Recipe) -> Variants:
        """After the rotation in place of before it, or the other way round."""
        if any(section.option == "rotary" for section in recipe.sections):
            behind = not self.value["after_rotary"]
            words = "after it" if behind else "before it"
            yield words, self._but(recipe, after_rotary=behind)

    def by_the_weight_of_another_head(self, recipe: Recipe) -> Variants:
        """Weights of all heads (H, d), of which each head takes another's."""
        width = recipe.weights["query.kernel"].shape[2]
        weights = {n: w for n, w in recipe.weights.items() if "_norm." in n and w.size > width}
        changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "that of the first head for all": lambda w: w[:1] + 0 * w,
            "that of the last head for all": lambda w: w[-1:] + 0 * w,
            "in the reverse order of heads": lambda w: w[::-1],
            "that of the next head": lambda w: np.roll(w, -1, 0),
            "(d, H) in place of (H, d)": lambda w: w.reshape(w.shape[::-1]).T,
        }
        for words, change in changes.items():
            for names in (BOTH, *((name,) for name in BOTH)):
                own = {n: w for n, w in weights.items() if n.startswith(names)}
                wrong = {n: change(w.reshape(-1, width)).reshape(w.shape) for n, w in own.items()}
                if any(not np.array_equal(w, own[n]) for n, w in wrong.items()):
                    detail = words if len(names) > 1 else f"{words}, of the {names[0]} alone"
                    yield detail, recipe.but(weights={**recipe.weights, **wrong})

    def often(self, recipe: Recipe) -> Variants:
        """Queries, keys or both normalised twice."""
        for words, names in (("queries and keys", BOTH), ("the query alone", BOTH[:1]),
                             ("the key alone", BOTH[1:])):  # fmt: skip
            yield words, recipe.with_section(
                QueryKeyNormSection(self.value, self.names, twice=names))  # fmt: skip

    def before_the_bias(self, recipe: Recipe) -> Variants:
        """The bias of a projection added after the norm."""
        there = tuple(name for name in BOTH if f"{name}.bias" in recipe.weights)
        if self.value["after_rotary"] and "rotary" in recipe.options:
            return  # which has turned the bias
        for names in dict.fromkeys((there, there[:1], there[1:])):
            if names:
                yield f"of {' and '.join(names)}", recipe.with_section(
                    QueryKeyNormSection(self.value, self.names, bare=names))  # fmt: skip

    def after_the_scale(self, recipe: Recipe) -> Variants:
        """Of queries that are scaled, which the norm takes off again."""
        if recipe.scale not in (0, 1) and not self.value["after_rotary"]:
            free = recipe.but(scale=1.0)
            yield "it takes the scale off again", free.after(("query",), lambda x: recipe.scale * x)

    mistakes = (
        ("query_key_norm of one projection", "Normalise queries and keys, and not the values.",
         of_one),
        ("query_key_norm over another width", "Take the statistics over each head's numbers, or "
         "over all heads together, as `over` says.", over_another),
        ("query_key_norm by another weight", "Multiply by w, by 1 + w or by nothing, as `scale` "
         "says.", by_another_weight),
        ("query_key_norm by the weight of another", "Queries and keys have a weight each: give "
         "each its own.", by_the_weight_of_another),
        ("query_key_norm with another epsilon", "Give both the same `eps`, within the root.",
         with_another_epsilon),
        ("query_key_norm with another mean", "The layer norm takes the mean off, the RMS norm does "
         "not.", with_another_mean),
        ("query_key_norm with another variance", "Divide the sum of the n squares by n: "
         "`correction=0` in torch.", with_another_variance),
        ("query_key_norm on the other side of rotary", "Normalise before the rotation, or after "
         "it where `after_rotary` says so.", on_the_other_side),
        ("query_key_norm by the weight of another head", "Where heads are normalised with weights "
         "(H, d), give each head its own.", by_the_weight_of_another_head),
        ("query_key_norm twice", "Normalise queries and keys once each.", often),
        ("query_key_norm before the bias", "Add the bias of the projection, and normalise then.",
         before_the_bias),
        ("query_key_norm of scaled queries", "Normalise first, and scale then: a norm takes a "
         "factor off.", after_the_scale),
    )  # fmt: skip
    faults = (
        ("query_key_norm left out", "query_key_norm left out", "query"),
        ("another kind of norm", "another query_key_norm", "query"),
        ("norm of the query alone", "query_key_norm of one projection", "key"),
        ("norm of the key alone", "query_key_norm of one projection", "query"),
        ("norm over another width", "query_key_norm over another width", "query"),
        ("norm by 1 + weight", "query_key_norm by another weight", "query"),
        ("norm without its weight", "query_key_norm by another weight", "query"),
        ("norm with another epsilon", "query_key_norm with another epsilon", "query"),
        ("norm with the mean", "query_key_norm with another mean", "query"),
        ("norm by n - 1", "query_key_norm with another variance", "query"),
        ("norm by the query's weight", "query_key_norm by the weight of another", "key"),
        ("norm along the heads", "query_key_norm over another width", "query"),
        ("norm of the values too", "query_key_norm of one projection", "value"),
        ("norm twice", "query_key_norm twice", "query"),
        ("norm before the bias", "query_key_norm before the bias", "query"),
        ("norm of scaled queries", "query_key_norm of scaled queries", "query"),
        ("norm's epsilon added to the root", "query_key_norm with another epsilon", "query"),
    )


def _has_weights(recipe: Recipe) -> bool:
    return any(f"{name}_norm.scale" in recipe.weights for name in BOTH)


SECTION = QueryKeyNormSection
