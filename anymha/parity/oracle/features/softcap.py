"""Softcap: logits that stay between -c and c.

    logits -> c * tanh(logits / c)

It acts on the scaled logits, before the bias and the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anymha.parity.oracle.recipe import Arrays, Recipe, Section, Variants, allowed


class SoftcapSection(Section):
    """The logits bounded by c, the value: ``outer * bounds(inner * logits)``.

    By default ``c * tanh(logits / c)``; `at` is the stage whose numbers are bounded.
    """

    option = "softcap"
    examples = (0.6,)
    usual = (50.0, 30.0, 20.0, 15.0)

    def __init__(
        self,
        value: float,
        inner: float | None = None,
        outer: float | None = None,
        at: str = "logits",
        bounds: Callable[[np.ndarray], np.ndarray] = np.tanh,
    ) -> None:
        super().__init__(value)
        self.inner = 1 / value if inner is None else inner
        self.outer = value if outer is None else outer
        self.at, self.bounds = at, bounds

    @property
    def acts(self) -> tuple[str]:
        """The stage whose numbers are bounded."""
        return (self.at,)

    def forward(self, stage: str, array: np.ndarray, recipe: Recipe, stages: Arrays) -> np.ndarray:
        """The bounded logits."""
        return self.outer * self.bounds(self.inner * array) if stage == self.at else array

    def backward(
        self,
        stage: str,
        gradient: np.ndarray,
        array: np.ndarray,
        recipe: Recipe,
        stages: Arrays,
        cancel: bool,
    ) -> np.ndarray:
        """The slope of c tanh(l / c) is 1 - tanh(l / c)^2, a difference that may cancel."""
        if stage != self.at:
            return gradient
        squared = np.tanh(self.inner * array) ** 2
        slope = 1 - squared if cancel else np.sqrt(1 + squared**2)
        return gradient * self.inner * self.outer * slope

    def sizes(
        self, stage: str, sizes: np.ndarray, array: np.ndarray, recipe: Recipe, stages: Arrays
    ) -> np.ndarray:
        """Errors before the tanh shrink by its slope; the tanh itself is rounded."""
        if stage != self.at:
            return sizes
        bounded = np.tanh(self.inner * array)
        slope = self.inner * self.outer * (1 - bounded**2)
        return np.hypot(slope * sizes, self.outer * bounded)

    def ported(self, ops: Any, place: str, array: Any, port: Any) -> Any:
        """The bounded logits, with the faults below."""
        cap, wrong = self.value, port.wrong
        late = {"bias": "biased_logits", "masks": "masked_logits"}
        places = [late[name] for name in late if f"softcap after the {name}" in wrong]
        if place != (places or ["logits"])[0] or "softcap left out" in wrong:
            return array
        if "another softcap" in wrong:
            cap = 30.0
        if "softcap before the scale" in wrong:
            cap *= port.scale
        if "softcap clips" in wrong:
            return ops.where(array > cap, cap, ops.where(array < -cap, -cap, array))
        bounded = ops.tanh(array if "softcap not divided" in wrong else array / cap)
        return bounded if "softcap not multiplied" in wrong else bounded * cap

    def too_late(self, recipe: Recipe) -> Variants:
        """Bounded after the bias; or after the masks, so that masked logits become -c."""
        uncapped = recipe.without_section(self.option)
        step = recipe.steps["masked_logits"]

        def biased(recipe: Recipe, stages: Arrays) -> np.ndarray:
            logits = self.outer * np.tanh(self.inner * step(recipe, stages))
            return np.where(allowed(recipe), logits, -np.inf)

        if recipe.bias is not None:
            yield "after the bias", uncapped.stepping("masked_logits", biased)
        if not np.all(allowed(recipe)):
            late = SoftcapSection(self.value, at="masked_logits")
            yield "after the masks, which it undoes", recipe.with_section(late)

    def unscaled(self, recipe: Recipe) -> Variants:
        """The products bounded before they are scaled."""
        if recipe.scale not in (0, 1):
            cap = self.value * recipe.scale
            yield "", recipe.with_section(SoftcapSection(self.value, 1 / cap, cap))

    def without_factors(self, recipe: Recipe) -> Variants:
        """Not divided by c before the tanh, or not multiplied by c after it."""
        for words, inner, outer in (
            ("not divided by it before the tanh", 1.0, self.value),
            ("not multiplied by it after the tanh", 1 / self.value, 1.0),
            ("neither divided nor multiplied by it", 1.0, 1.0),
        ):
            yield words, recipe.with_section(SoftcapSection(self.value, inner, outer))

    def clipped(self, recipe: Recipe) -> Variants:
        """Cut off at c in place of a tanh."""
        clipping = SoftcapSection(self.value, bounds=lambda x: np.clip(x, -1, 1))
        yield "", recipe.with_section(clipping)

    mistakes = (
        ("softcap too late", "The softcap acts on the scaled logits, before bias and masks.",
         too_late),
        ("softcap before the scale", "Scale the products first, then take c * tanh(logits / c).",
         unscaled),
        ("softcap without its factors", "The softcap is c * tanh(logits / c): divide by c before "
         "the tanh, multiply by c after it.", without_factors),
        ("softcap by clipping", "The softcap is c * tanh(logits / c), not a clip to [-c, c].",
         clipped),
    )  # fmt: skip
    faults = (
        ("softcap left out", "softcap left out", "logits"),
        ("another softcap", "another softcap", "logits"),
        ("softcap after the bias", "softcap too late", "logits"),
        ("softcap after the masks", "softcap too late", "logits"),
        ("softcap before the scale", "softcap before the scale", "logits"),
        ("softcap not divided", "softcap without its factors", "logits"),
        ("softcap not multiplied", "softcap without its factors", "logits"),
        ("softcap clips", "softcap by clipping", "logits"),
    )


SECTION = SoftcapSection
