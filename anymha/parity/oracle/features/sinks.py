"""Sinks: a further logit in the softmax of each row, one for each head, whose column is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants, reads


class SinksSection(Section):
    """The weight "sinks" (H), times `factor`, in the sum of each row.

    `turned` reverses the heads; `shifted` adds the row's greatest logit; `behind`: it joins the sum
    of the probabilities, which is 1. `function` is taken of the sinks. The share of a sink is lost,
    but for the `valued`: it is that of a value, the first or the last one.
    """

    option = "sinks"
    examples = (True,)

    def __init__(
        self,
        value: Any,
        factor: float = 1.0,
        scaled: bool = False,
        turned: bool = False,
        shifted: bool = False,
        function: Callable[[np.ndarray], np.ndarray] | None = None,
        behind: bool = False,
        valued: int | None = None,
    ) -> None:
        super().__init__(value)
        self.function, self.behind, self.valued = function, behind, valued
        self.factor, self.scaled, self.turned, self.shifted = factor, scaled, turned, shifted

    @property
    def acts(self) -> tuple[str, ...]:
        """The probabilities; the context too where a sink has a value."""
        return ("probabilities",) if self.valued is None else ("probabilities", "context")

    def order(self) -> int:
        """Before a gate."""
        return -1

    def _shares(self, recipe: Recipe, stages: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """The probability of the sink, and that of all keys, (B, H, T, 1).

        The second is no difference from 1: in rows that are nearly all sink, nothing were left.
        """
        masked = stages["masked_logits"]
        sinks = np.resize(recipe.weights["sinks"], masked.shape[1])[:, None, None]
        sinks = sinks[::-1] if self.turned else sinks
        sinks = sinks if self.function is None else self.function(sinks)
        if self.behind:
            share = np.broadcast_to(np.exp(sinks) / (np.exp(sinks) + 1), (*masked.shape[:3], 1))
            return share, 1.0 - share
        sinks = self.factor * sinks * (recipe.scale if self.scaled else 1.0)
        greatest = np.max(masked, axis=-1, keepdims=True, initial=-np.inf)
        if self.shifted:
            sinks = sinks + np.where(greatest > -np.inf, greatest, 0.0)
        peak = np.maximum(greatest, sinks)
        own, keys = np.exp(sinks - peak), np.sum(np.exp(masked - peak), axis=-1, keepdims=True)
        return own / (own + keys), keys / (own + keys)

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """What the sink leaves of each probability."""
        if stage == "context" and self.valued is not None:
            value = stages["value"][:, self.valued, reads(recipe)]
            return array + self._shares(recipe, stages)[0].swapaxes(1, 2) * value[:, None]
        if stage != "probabilities":
            return array
        return array * self._shares(recipe, stages)[1]

    def own_gradients(
        self,
        stage: str,
        gradient: np.ndarray,
        array: np.ndarray,
        recipe: Recipe,
        stages: Arrays,
        cancel: bool,
    ) -> Arrays:
        """Of the sinks: each probability falls by itself times the share of the sink.

        The gradient of the logits is that of any softmax, of the probabilities as they are then.
        """
        if stage != "probabilities":
            return {}
        rows = np.sum(stages[stage] * gradient, axis=-1, keepdims=True)
        own = np.sum(self._shares(recipe, stages)[0] * rows, axis=(0, 2, 3))
        return {"sinks": -own if cancel else own}

    def ported(self, ops: Any, place: str, array: Any, port: Any) -> Any:
        """The probabilities with the sink, with the faults below."""
        wrong = port.wrong
        if place == "context" and "sinks with a value" in wrong:
            rest = 1.0 - ops.sum(port.shares, axis=-1, keepdims=True)
            last = port.values[:, :, -1:]
            return array + ops.permute_dims(rest * last, (0, 2, 1, 3))
        if place != "probabilities" or "sinks left out" in wrong:
            return array
        sinks = np.array(port.weights["sinks"], np.float64)
        if "sinks scaled" in wrong:
            sinks = sinks * port.scale
        if "sinks of the other heads" in wrong:
            sinks = sinks[::-1]
        if "sinks with the other sign" in wrong:
            sinks = -sinks
        if "sinks of zero" in wrong:
            sinks = 0.0 * sinks
        if "sinks exponentiated" in wrong:
            sinks = np.exp(sinks)
        logits = port.masked_logits
        if "sinks not shifted" in wrong:
            top = ops.max(logits, axis=-1, keepdims=True)
            logits = logits - ops.where(top > -np.inf, top, 0.0)
        sinks = np.ascontiguousarray(sinks.reshape(1, -1, 1, 1)).astype(np.float32)
        own = ops.exp(ops.astype(ops.from_numpy(sinks), logits.dtype))
        if "sinks behind the softmax" in wrong:
            return array / (1.0 + own)
        total = ops.sum(ops.exp(logits), axis=-1, keepdims=True)
        return array * (total / (total + own))

    def scaled_too(self, recipe: Recipe) -> Variants:
        """Scaled as the logits are."""
        yield "", recipe.with_section(SinksSection(self.value, scaled=True))

    def of_other_heads(self, recipe: Recipe) -> Variants:
        """In the reverse order of heads."""
        yield "reversed", recipe.with_section(SinksSection(self.value, turned=True))

    def with_the_other_sign(self, recipe: Recipe) -> Variants:
        """Their negatives."""
        yield "", recipe.with_section(SinksSection(self.value, factor=-1.0))

    def of_zero(self, recipe: Recipe) -> Variants:
        """A logit of zero, the softmax of "plus one"."""
        words = "each row has a logit of zero more: 1 is added to its sum"
        yield words, recipe.with_section(SinksSection(self.value, factor=0.0))

    def beside_the_maximum(self, recipe: Recipe) -> Variants:
        """Its exponential as it is, beside those of logits less the greatest of the row."""
        yield "", recipe.with_section(SinksSection(self.value, shifted=True))

    def of_another_function(self, recipe: Recipe) -> Variants:
        """As if the weight were the exponential of the logit, or its logarithm."""
        for words, function in (
            ("the exponential of the sinks", np.exp),
            ("the logarithm of the sinks", lambda x: np.log(np.maximum(x, 1e-300))),
        ):
            yield words, recipe.with_section(SinksSection(self.value, function=function))

    def behind_the_softmax(self, recipe: Recipe) -> Variants:
        """The probabilities divided by 1 and the sink's exponential."""
        yield "", recipe.with_section(SinksSection(self.value, behind=True))

    def with_a_value(self, recipe: Recipe) -> Variants:
        """The sink's column kept, as a key that has a value of another."""
        for words, at in (("the last key's", -1), ("the first key's", 0)):
            yield words, recipe.with_section(SinksSection(self.value, valued=at))

    mistakes = (
        ("sinks scaled", "Let the sinks join the softmax as they are: neither scaled nor capped.",
         scaled_too),
        ("sinks of the other heads", "Give each query head its own sink.", of_other_heads),
        ("sinks with the other sign", "The sink's exponential joins the sum of each row.",
         with_the_other_sign),
        ("sinks of zero", "Load the sinks' weights: zeros are the softmax with 1 more in its sum.",
         of_zero),
        ("sinks not shifted by the maximum", "Take the row's maximum off the sink too, or let the "
         "maximum include it.", beside_the_maximum),
        ("sinks of another function", "The weight is a logit: the sum of each row has its "
         "exponential.", of_another_function),
        ("sinks behind the softmax", "The sink's exponential joins the sum of those of the "
         "logits, within the softmax.", behind_the_softmax),
        ("sinks with a value", "Drop the sink's column behind the softmax: it has no value.",
         with_a_value),
    )  # fmt: skip
    faults = (
        ("sinks left out", "sinks left out", "probabilities"),
        ("sinks scaled", "sinks scaled", "probabilities"),
        ("sinks of the other heads", "sinks of the other heads", "probabilities"),
        ("sinks with the other sign", "sinks with the other sign", "probabilities"),
        ("sinks of zero", "sinks of zero", "probabilities"),
        ("sinks not shifted", "sinks not shifted by the maximum", "probabilities"),
        ("sinks exponentiated", "sinks of another function", "probabilities"),
        ("sinks behind the softmax", "sinks behind the softmax", "probabilities"),
        ("sinks with a value", "sinks with a value", "context"),
    )


SECTION = SinksSection
