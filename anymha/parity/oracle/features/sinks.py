"""Sinks: a further logit in the softmax of each row, one for each head, whose column is dropped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants, reads

MOST_HEADS = 4
"""Up to so many heads all their orders are tried."""


class SinksSection(Section):
    """The weight "sinks" (H), times `factor`, in the sum of each row.

    `order` are the heads whose sinks each head has; `shifted` adds the row's greatest logit;
    `behind`: it joins the sum of the probabilities, which is 1. `function` is taken of the sinks;
    `plain`: they themselves, not their exponentials, are in the sum, beside the exponentials of
    logits less the greatest where it is `shifted`, which may be the sink where it is `joined`. The
    share of a sink is lost, but for the `valued`: it is that of a value, the first or the last one.
    `dropped` is the column of a key that is lost in its place, the first or the last: the sink
    stands at the other end. `moved` gives what is added to the sink, from the row's greatest logit
    (zero where it sees nothing) and that of the row with the sink. `log_base` is the logarithm of
    what stands in place of e in the softmax.
    """

    option = "sinks"
    examples = (True,)

    def __init__(
        self,
        value: Any,
        factor: float = 1.0,
        scaled: bool = False,
        order: np.ndarray | None = None,
        shifted: bool = False,
        function: Callable[[np.ndarray], np.ndarray] | None = None,
        behind: bool = False,
        valued: int | None = None,
        plain: bool = False,
        dropped: int | None = None,
        joined: bool = False,
        moved: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
        log_base: float = 1.0,
    ) -> None:
        super().__init__(value)
        self.function, self.behind, self.valued = function, behind, valued
        self.factor, self.scaled, self.heads, self.shifted = factor, scaled, order, shifted
        self.plain, self.dropped, self.joined = plain, dropped, joined
        self.moved, self.log_base = moved, log_base

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
        masked = masked if self.log_base == 1 else self.log_base * masked
        sinks = np.resize(recipe.weights["sinks"], masked.shape[1])[:, None, None]
        sinks = sinks if self.heads is None else sinks[np.resize(self.heads, len(sinks))]
        logit = sinks
        sinks = sinks if self.function is None else self.function(sinks)
        if self.behind:
            share = np.broadcast_to(np.exp(sinks) / (np.exp(sinks) + 1), (*masked.shape[:3], 1))
            return share, 1.0 - share
        sinks = self.factor * self.log_base * sinks * (recipe.scale if self.scaled else 1.0)
        greatest = np.max(masked, axis=-1, keepdims=True, initial=-np.inf)
        if self.shifted:
            sinks = sinks + np.where(greatest > -np.inf, greatest, 0.0)
        if self.moved is not None:
            top = np.where(greatest > -np.inf, greatest, 0.0)
            sinks = sinks + self.moved(top, np.maximum(greatest, logit))
        if self.plain:
            top = np.where(greatest > -np.inf, greatest, 0.0)
            own = sinks - top if self.shifted else sinks * np.exp(-top)  # the greatest is in both
            if self.joined:
                top, own = np.maximum(greatest, logit), sinks
            keys = np.sum(np.exp(masked - top), axis=-1, keepdims=True)
            return own / (own + keys), keys / (own + keys)
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
        own, keys = self._shares(recipe, stages)
        if self.dropped is None:
            return array * keys
        whole = [array * keys, own] if self.dropped == 0 else [own, array * keys]
        whole = np.concatenate(whole, -1)
        return whole[..., 1:] if self.dropped == 0 else whole[..., :-1]

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
        if "sinks by group" in wrong:
            sinks = sinks.reshape(2, -1).T.reshape(-1)
        if "sinks with the other sign" in wrong:
            sinks = -sinks
        if "sinks of zero" in wrong:
            sinks = 0.0 * sinks
        if "sinks exponentiated" in wrong:
            sinks = np.exp(sinks)
        if "sinks twice" in wrong:
            sinks = sinks + np.log(2)
        logits = port.masked_logits
        if "sinks not shifted" in wrong:
            top = ops.max(logits, axis=-1, keepdims=True)
            logits = logits - ops.where(top > -np.inf, top, 0.0)
        sinks = np.ascontiguousarray(sinks.reshape(1, -1, 1, 1)).astype(np.float32)
        own = ops.exp(ops.astype(ops.from_numpy(sinks), logits.dtype))
        if "sinks after the softmax" in wrong:
            return array / (1.0 + own)
        if "sinks not exponentiated" in wrong:
            own = ops.astype(ops.from_numpy(sinks), logits.dtype)
        total = ops.sum(ops.exp(logits), axis=-1, keepdims=True)
        if "first column dropped" in wrong:
            whole = ops.concat([ops.exp(logits), own + 0.0 * total], axis=-1)
            return whole[..., 1:] / (total + own)
        return array * (total / (total + own))

    def scaled_too(self, recipe: Recipe) -> Variants:
        """Scaled or capped as the logits are."""
        yield "", recipe.with_section(SinksSection(self.value, scaled=True))
        cap = recipe.options.get("softcap")
        if cap is not None:
            capped = SinksSection(self.value, function=lambda x: cap * np.tanh(x / cap))
            yield "by the softcap too", recipe.with_section(capped)

    def several_times(self, recipe: Recipe) -> Variants:
        """In the sum of each part of the keys."""
        for count in (2, 3, 4):
            more = SinksSection(self.value, function=lambda x, n=count: x + np.log(n))
            yield f"{count} times in the sum, as of {count} parts", recipe.with_section(more)

    def of_other_heads(self, recipe: Recipe) -> Variants:
        """In another order of heads, or one for several heads."""
        count, shared = recipe.heads
        heads, group, right = np.arange(count), count // shared, np.arange(count)
        orders = {"reversed": heads[::-1], "the first head's for all": 0 * heads}
        if 1 < shared < count:
            orders |= {
                "laid out as (H / K, K), not (K, H / K)": heads.reshape(shared, group).T.ravel(),
                "laid out as (K, H / K), not (H / K, K)": heads.reshape(group, shared).T.ravel(),
                "one for each key head, the first of its group": heads // group * group,
                "one for each key head, the first K": heads // group,
                "the first K, tiled": heads % shared,
            }
        orders |= {f"{n} on": np.roll(heads, n) for n in range(1, min(count, 17))}
        if count <= MOST_HEADS:
            orders |= {f"to {', '.join(map(str, order))}": np.array(order)
                       for order in itertools.permutations(range(count))}  # fmt: skip
        for words, order in orders.items():
            if not np.array_equal(order, right):
                yield words, recipe.with_section(SinksSection(self.value, order=order))

    def not_exponentiated(self, recipe: Recipe) -> Variants:
        """The weight itself in the sum, or its absolute value, as a sum must not be negative."""
        for what, function in (("itself", None), ("its absolute value", np.abs)):
            for words, shifted in (
                ("", False),
                (", beside those of logits less the maximum", True),
            ):
                yield f"{what} in the sum{words}", recipe.with_section(SinksSection(
                    self.value, shifted=shifted, plain=True, function=function))  # fmt: skip
            words = ", beside those of logits less the maximum, which the sink may be"
            yield f"{what} in the sum{words}", recipe.with_section(SinksSection(
                self.value, plain=True, joined=True, function=function))  # fmt: skip

    def in_another_column(self, recipe: Recipe) -> Variants:
        """The column of a key dropped after the softmax in place of the sink's."""
        for words, at in (("the sink is the last column, the first is dropped", 0),
                          ("the sink is the first column, the last is dropped", -1)):  # fmt: skip
            yield words, recipe.with_section(SinksSection(self.value, dropped=at))

    def with_the_other_sign(self, recipe: Recipe) -> Variants:
        """Their negatives."""
        yield "", recipe.with_section(SinksSection(self.value, factor=-1.0))

    def of_zero(self, recipe: Recipe) -> Variants:
        """A logit of zero, the softmax of "plus one"."""
        words = "each row has a logit of zero more: 1 is added to its sum"
        yield words, recipe.with_section(SinksSection(self.value, factor=0.0))

    def beside_the_maximum(self, recipe: Recipe) -> Variants:
        """Its exponential as it is, beside those of logits less the greatest; or the other way."""
        yield "", recipe.with_section(SinksSection(self.value, shifted=True))
        for words, moved in {
            "the maximum, which the sink may be, is taken off the logits alone": (
                lambda top, joined: joined),
            "the maximum of all rows is taken off the logits alone": lambda top, _: top.max(),
            "the maximum of each head is taken off the logits alone": (
                lambda top, _: top.max((0, 2), keepdims=True)),
            "the maximum of each sequence and head is taken off the logits alone": (
                lambda top, _: top.max(2, keepdims=True)),
            "the maximum is taken off the sink alone": lambda top, _: -top,
            "the maximum, which the sink may be, is taken off the sink alone": (
                lambda _, joined: -joined),
        }.items():  # fmt: skip
            yield words, recipe.with_section(SinksSection(self.value, moved=moved))

    def of_another_function(self, recipe: Recipe) -> Variants:
        """As if the weight were the exponential of the logit, or its logarithm."""
        for words, function in (
            ("the exponential of the sinks", np.exp),
            ("the logarithm of the sinks", lambda x: np.log(np.maximum(x, 1e-300))),
            ("powers of 2 in place of e, of the sinks alone", lambda x: np.log(2) * x),
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
        ("sinks counted several times", "Add the sink's exponential to the sum of a row once, not "
         "in each part of the keys.", several_times),
        ("sinks of the other heads", "Give each query head its own sink.", of_other_heads),
        ("sinks with the other sign", "The sink's exponential joins the sum of each row.",
         with_the_other_sign),
        ("sinks of zero", "Load the sinks' weights: zeros are the softmax with 1 more in its sum.",
         of_zero),
        ("sinks not shifted by the maximum", "Take the row's maximum off the sink too, or let the "
         "maximum include it.", beside_the_maximum),
        ("sinks of another function", "The weight is a logit: the sum of each row has its "
         "exponential.", of_another_function),
        ("sinks not exponentiated", "The weight is a logit: its exponential joins the sum of each "
         "row.", not_exponentiated),
        ("sinks in the column of a key", "Drop the column after the softmax in which the sink "
         "stands.", in_another_column),
        ("sinks after the softmax", "The sink's exponential joins the sum of those of the "
         "logits, within the softmax.", behind_the_softmax),
        ("sinks with a value", "Drop the sink's column after the softmax: it has no value.",
         with_a_value),
    )  # fmt: skip
    faults = (
        ("sinks left out", "sinks left out", "probabilities"),
        ("sinks scaled", "sinks scaled", "probabilities"),
        ("sinks twice", "sinks counted several times", "probabilities"),
        ("sinks of the other heads", "sinks of the other heads", "probabilities"),
        ("sinks with the other sign", "sinks with the other sign", "probabilities"),
        ("sinks of zero", "sinks of zero", "probabilities"),
        ("sinks by group", "sinks of the other heads", "probabilities"),
        ("sinks not exponentiated", "sinks not exponentiated", "probabilities"),
        ("first column dropped", "sinks in the column of a key", "probabilities"),
        ("sinks not shifted", "sinks not shifted by the maximum", "probabilities"),
        ("sinks exponentiated", "sinks of another function", "probabilities"),
        ("sinks after the softmax", "sinks after the softmax", "probabilities"),
        ("sinks with a value", "sinks with a value", "context"),
    )


SECTION = SinksSection
