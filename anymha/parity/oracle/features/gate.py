"""Gate: the context times the sigmoid of a projection of the query input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants, einsum, softmax

Function = Callable[[np.ndarray], np.ndarray]

PROJECTIONS = ("value", "query", "key")


def sigmoid(y: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-y)), without an exponential above 1."""
    small = np.exp(-np.abs(y))
    return np.where(y >= 0, 1.0, small) / (1.0 + small)


def _over(axis: int) -> tuple[Function, Function]:
    """The softmax over an axis of (B, T, H, d), and its slope."""

    def function(y: np.ndarray) -> np.ndarray:
        return softmax(y, axis if y.ndim > 3 else -1)

    return function, lambda y: function(y) * (1 - function(y))


FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "sigmoid": (sigmoid, lambda y: sigmoid(y) * sigmoid(-y)),
    "none": (lambda y: y, np.ones_like),
    "silu": (lambda y: y * sigmoid(y), lambda y: sigmoid(y) * (1 + y * sigmoid(-y))),
    "tanh": (np.tanh, lambda y: 1 - np.tanh(y) ** 2),
    "1 - sigmoid": (lambda y: sigmoid(-y), lambda y: -sigmoid(y) * sigmoid(-y)),
    "sigmoid, twice": (lambda y: sigmoid(y) ** 2, lambda y: 2 * sigmoid(y) ** 2 * sigmoid(-y)),
    "relu": (lambda y: np.maximum(y, 0.0), lambda y: np.where(y > 0, 1.0, 0.0)),
    "hard sigmoid": (lambda y: np.clip(y / 6 + 0.5, 0, 1), lambda y: np.full_like(y, 1 / 6)),
    "hard sigmoid, x / 5 + 1 / 2": (
        lambda y: np.clip(y / 5 + 0.5, 0, 1),
        lambda y: np.full_like(y, 1 / 5),
    ),
    "softmax over the width": _over(-1),
    "softmax over the heads": _over(-2),
    "exponential": (np.exp, np.exp),
    "softplus": (lambda y: np.logaddexp(0.0, y), sigmoid),
    "1 + sigmoid": (lambda y: 1 + sigmoid(y), lambda y: sigmoid(y) * sigmoid(-y)),
    "2 sigmoid": (lambda y: 2 * sigmoid(y), lambda y: 2 * sigmoid(y) * sigmoid(-y)),
    "1 + the projection": (lambda y: 1 + y, np.ones_like),
}
"""Each function, and its slope."""


class GateSection(Section):
    """The gate of a value, "elementwise" or "head".

    `function` is applied to what the projection of `source` gives, an input or "projected" for the
    projected queries or the "context", or to the context "itself"; the result multiplies the stage
    `place`, or is `added` to it. `columns`: the gates of heads are those of columns; `bare`: they
    multiply the output before its bias.
    """

    option = "gate"
    ignores_a_constant = True
    examples = ("elementwise", "head")
    usual = ("elementwise", "head")

    def __init__(
        self, value: Any, function: str = "sigmoid", source: str = "query", place: str = "context",
        added: bool = False, columns: bool = False, bare: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(value)
        self.added, self.columns, self.bare = added, columns, bare
        self.function, self.source, self.place = function, source, place

    @property
    def acts(self) -> tuple[str, ...]:
        """The context; or where a mistake puts the gate."""
        return (self.place,)

    def _input(self, recipe: Recipe, stages: Arrays, array: np.ndarray) -> np.ndarray:
        """What is projected, (B, T, D)."""
        if self.source not in ("projected", "context"):
            return recipe.inputs[self.source]
        heads = stages["query"] if self.source == "projected" else array
        return heads.reshape(*heads.shape[:2], -1)

    def _projected(
        self, recipe: Recipe, stages: Arrays, array: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the projection gives (B, T, H, d_v or 1), and the size of its terms."""
        if self.source == "itself":
            return array, np.abs(array)
        x, kernel = self._input(recipe, stages, array), recipe.weights["gate.kernel"]
        bias = recipe.weights.get("gate.bias", np.zeros(kernel.shape[1:]))
        if kernel.ndim == 2:
            kernel, bias = kernel[..., None], bias[..., None]
        elif self.value == "head":  # a mistake: the first number of each head for all of it
            kernel, bias = kernel[..., :1], bias[..., :1]
        y = einsum("btd,dhv->bthv", x, kernel) + bias
        squares = einsum("btd,dhv->bthv", x * x, kernel * kernel) + bias * bias
        size = np.maximum(np.sqrt(squares), np.abs(y))
        if self.columns:
            y, size = y.swapaxes(-1, -2), size.swapaxes(-1, -2)
        if self.place == "output":
            y, size = (array.reshape(*array.shape[:2], -1) for array in (y, size))
        return y, size

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The stage times the gate."""
        if stage != self.place:
            return array
        y, _ = self._projected(recipe, stages, array)
        gate = FUNCTIONS[self.function][0](y)
        if self.bare:
            bias = recipe.weights.get("output.bias", 0.0)
            return (array - bias) * gate + bias
        return array + gate if self.added else array * gate

    def backward(
        self,
        stage: str,
        gradient: np.ndarray,
        array: np.ndarray,
        recipe: Recipe,
        stages: Arrays,
        cancel: bool,
    ) -> np.ndarray:
        """The gate is a factor; its own error comes from the terms of its projection."""
        if stage != self.place:
            return gradient
        y, size = self._projected(recipe, stages, array)
        function, slope = FUNCTIONS[self.function]
        if cancel:
            return gradient * function(y)
        return gradient * (np.abs(function(y)) + np.abs(slope(y)) * size)

    def own_gradients(
        self,
        stage: str,
        gradient: np.ndarray,
        array: np.ndarray,
        recipe: Recipe,
        stages: Arrays,
        cancel: bool,
    ) -> Arrays:
        """Of kernel and bias of the projection, and of the query through it."""
        if stage != "context" or self.place != "context" or self.columns:
            return {}
        y, size = self._projected(recipe, stages, array)
        slope, x = FUNCTIONS[self.function][1](y), self._input(recipe, stages, array)
        kernel = recipe.weights["gate.kernel"]
        if not cancel:
            array, x, kernel = np.abs(array), np.abs(x), np.abs(kernel)
            slope = np.abs(slope) * (1 + size)
        own = gradient * array
        if y.shape[-1] == 1:  # one number multiplies all of a head
            own = own.sum(-1, keepdims=True)
        own = own * slope
        if kernel.ndim == 2:
            own, axes = own[..., 0], "h"
        else:
            own, axes = np.broadcast_to(own, (*own.shape[:3], kernel.shape[2])), "hv"
        return {
            "gate.kernel": einsum(f"btd,bt{axes}->d{axes}", x, own),
            "gate.bias": own.sum((0, 1)),
            self.source: einsum(f"bt{axes},d{axes}->btd", own, kernel),
        }

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """Errors are multiplied too, and those of the gate come on top."""
        if stage != self.place:
            return sizes
        y, own = self._projected(recipe, stages, array)
        function, slope = FUNCTIONS[self.function]
        if self.added:
            return np.hypot(sizes, np.abs(slope(y)) * own)
        return np.hypot(sizes * np.abs(function(y)), np.abs(array * slope(y)) * own)

    def ported(self, ops: Any, place: str, array: Any, port: Any) -> Any:
        """The context times the gate, with the faults below."""
        wrong = port.wrong
        after = "gate after the output" in wrong
        usual = {"gate of the values": "value", "gate of the queries": "query"}
        right = next((own for name, own in usual.items() if name in wrong), "context")
        if place != ("output" if after else right) or "gate left out" in wrong:
            return array
        kernel, bias = port.weights["gate.kernel"], port.weights.get("gate.bias")
        if "gate of the heads reversed" in wrong:
            kernel, bias = kernel[:, ::-1], bias if bias is None else bias[::-1]
        if "gate transposed" in wrong:
            kernel = kernel.reshape(len(kernel), -1).T.reshape(kernel.shape)
        batch, length, *axes = array.shape
        flat = kernel.reshape(len(kernel), -1)
        x = port.inputs["query"]
        if "gate of the projected queries" in wrong:
            x = ops.reshape(port.projected, (batch, length, len(kernel)))
        if "gate of the values" in wrong:
            x = port.inputs["value"]
        if "gate of the projected context" in wrong:
            x = ops.reshape(array, (batch, length, len(kernel)))
        y = ops.tensordot(x, ops.from_numpy(np.ascontiguousarray(flat)), axes=1)
        if bias is not None and "gate bias left out" not in wrong:
            y = y + ops.from_numpy(np.ascontiguousarray(bias.reshape(-1)))
        share = 1.0 + ops.exp(y * -1.0)
        if "gate without sigmoid" in wrong:
            share = 1.0 + 0.0 * y
        elif "gate by relu" in wrong:
            y, share = ops.where(y > 0, y, 0.0), 1.0 + 0.0 * y
        elif "gate by a hard sigmoid" in wrong:
            y, share = y + 3.0, 6.0 + 0.0 * y
            y = ops.where(y > 6, 6.0, ops.where(y > 0, y, 0.0))
        elif not ({"gate by silu"} & {*wrong}):
            y = 1.0 + 0.0 * y
        gate = y / share
        if not after:
            gate = ops.reshape(gate, (batch, length, axes[0], kernel[0, 0].size))
        if "another gate" in wrong:
            gate = gate[..., :1]
        if "gate of the context itself" in wrong:
            gate = 1.0 / (1.0 + ops.exp(array * -1.0))
        return array + gate if "gate added" in wrong else array * gate

    def by_another_function(self, recipe: Recipe) -> Variants:
        """The projection as it is, or another function of it."""
        for name in FUNCTIONS:
            if name != self.function:
                yield name, recipe.with_section(GateSection(self.value, name))
        yield "added, not multiplied", recipe.with_section(GateSection(self.value, added=True))
        projection = GateSection(self.value, "none", added=True)
        yield "none, and added, not multiplied", recipe.with_section(projection)

    def of_another_stage(self, recipe: Recipe) -> Variants:
        """On a projection, by the gate of its own input or of the query's, where these fit."""
        width = 1 if self.value == "head" else recipe.weights["gate.kernel"].shape[-1]
        for place in PROJECTIONS:
            shape = recipe.stages[place].shape
            for source in dict.fromkeys((place, "query")):
                x = recipe.inputs[source]
                if shape[2] != recipe.heads[0] or width not in (1, shape[-1]) or (
                    x.shape[1:] != (shape[1], len(recipe.weights["gate.kernel"]))):  # fmt: skip
                    continue
                words = f"of the {place}" + ("" if source == place else ", by the query input")
                if source == place or not np.array_equal(x, recipe.inputs[place]):
                    made = GateSection(self.value, source=source, place=place)
                    yield words, recipe.with_section(made)

    def of_another_input(self, recipe: Recipe) -> Variants:
        """Of the values, of the keys, or of the projected queries, where these fit."""
        query = recipe.inputs["query"]
        for name in ("value", "key"):
            if recipe.inputs[name].shape == query.shape:
                yield name, recipe.with_section(GateSection(self.value, source=name))
        yield "the context itself", recipe.with_section(GateSection(self.value, source="itself"))
        if recipe.weights["query.kernel"][0].size == query.shape[-1]:
            words = "the projected queries"
            yield words, recipe.with_section(GateSection(self.value, source="projected"))
        if recipe.stages["context"][0, 0].size == query.shape[-1]:
            words = "the context, projected as the query input is"
            yield words, recipe.with_section(GateSection(self.value, source="context"))

    def after_the_output(self, recipe: Recipe) -> Variants:
        """On the output, where that is as wide as all heads."""
        if recipe.weights["gate.kernel"][0].size == recipe.weights["output.kernel"].shape[-1]:
            yield "", recipe.with_section(GateSection(self.value, place="output"))
            if np.any(recipe.weights.get("output.bias", 0.0)):
                made = GateSection(self.value, place="output", bare=True)
                yield "before its bias", recipe.with_section(made)

    def without_its_bias(self, recipe: Recipe) -> Variants:
        """Without its bias, or with that twice."""
        bias = recipe.weights.get("gate.bias")
        if bias is not None:
            rest = {name: w for name, w in recipe.weights.items() if name != "gate.bias"}
            yield "", recipe.but(weights=rest)
            yield "twice", recipe.but(weights={**recipe.weights, "gate.bias": 2 * bias})

    def of_other_heads(self, recipe: Recipe) -> Variants:
        """Heads in another order, or with heads and widths exchanged."""

        def changed(change: Function) -> Recipe:
            own = {n: w for n, w in recipe.weights.items() if n.startswith("gate.")}
            turned = {n: change(w) for n, w in own.items()}
            return recipe.but(weights={**recipe.weights, **turned})

        kernel = recipe.weights["gate.kernel"]
        if kernel.ndim == 2 and kernel.shape[1] == recipe.stages["context"].shape[-1]:
            words = "the gate of head h multiplies column h of every head"
            yield words, recipe.with_section(GateSection(self.value, columns=True))
        at = 1 - kernel.ndim  # the axis of the heads, from the end
        yield "reversed", changed(lambda w: np.flip(w, at))
        for steps in range(1, kernel.shape[1]):
            yield f"rolled by {steps}", changed(lambda w, steps=steps: np.roll(w, steps, at))
        if kernel.ndim == 3:
            heads, width = kernel.shape[1:]
            yield (
                "(d_v, H) in place of (H, d_v)",
                changed(lambda w: w.reshape(*w.shape[:-2], width, heads).swapaxes(-1, -2)),
            )

    def transposed(self, recipe: Recipe) -> Variants:
        """Of a kernel that is square, read as (out, in) in place of (in, out)."""
        kernel = recipe.weights["gate.kernel"]
        matrix = kernel.reshape(len(kernel), -1)
        if len(matrix) == matrix.shape[1]:
            turned = {"gate.kernel": matrix.T.reshape(kernel.shape)}
            yield "", recipe.but(weights={**recipe.weights, **turned})

    def split_wrongly(self, recipe: Recipe) -> Variants:
        """One projection of queries and gates, cut by head where it lies by block, or back."""
        weights = recipe.weights
        if weights["gate.kernel"].shape != weights["query.kernel"].shape:
            return
        for words, at in (
            ("by block in place of by head", -2),
            ("by head in place of by block", -3),
        ):
            changed: Arrays = {}
            for part in ("kernel", "bias"):
                names = [f"{name}.{part}" for name in ("query", "gate")]
                if not weights.keys() >= {*names}:
                    continue
                pair = [weights[name] for name in names]
                packed = np.stack(pair, at)  # (H, 2, d), or (2, H, d)
                *front, _, _, width = packed.shape
                heads = pair[0].shape[-2]
                shape = (2, heads, width) if at == -2 else (heads, 2, width)
                again = np.moveaxis(packed.reshape(*front, *shape), -3 if at == -2 else -2, 0)
                changed |= {f"query.{part}": again[0], f"gate.{part}": again[1]}
            yield words, recipe.but(weights={**weights, **changed})

    mistakes = (
        ("gate of another function", "The gate is sigmoid(query . W + b).", by_another_function),
        ("gate of another input", "Project the layer's query input to the gate.",
         of_another_input),
        ("gate of another stage", "Multiply the context, and no projection.", of_another_stage),
        ("gate after the output", "Multiply by the gate before the output's projection.",
         after_the_output),
        ("gate bias left out", "Add the gate's own bias, once, before the sigmoid.",
         without_its_bias),
        ("gate of other heads", "Give each head its own columns of the gate's kernel.",
         of_other_heads),
        ("gate transposed", "Transpose the gate's kernel, as those of the other projections.",
         transposed),
        ("query and gate split wrongly", "A kernel of queries and gates lies by head (query, gate "
         "of each head, as in Qwen3-Next) or by block: split it as it was packed.", split_wrongly),
    )  # fmt: skip
    faults = (
        ("gate left out", "gate left out", "context"),
        ("another gate", "another gate", "context"),
        ("gate without sigmoid", "gate of another function", "context"),
        ("gate by silu", "gate of another function", "context"),
        ("gate of the projected queries", "gate of another input", "context"),
        ("gate of the projected context", "gate of another input", "context"),
        ("gate by relu", "gate of another function", "context"),
        ("gate by a hard sigmoid", "gate of another function", "context"),
        ("gate added", "gate of another function", "context"),
        ("gate of the context itself", "gate of another input", "context"),
        ("gate of the values", "gate of another stage", "value"),
        ("gate of the queries", "gate of another stage", "query"),
        ("gate after the output", "gate after the output", "context"),
        ("gate bias left out", "gate bias left out", "context"),
        ("gate of the heads reversed", "gate of other heads", "context"),
        ("gate transposed", "gate transposed", "context"),
        ("query and gate split wrongly", "query and gate split wrongly", "query"),
    )


SECTION = GateSection
