"""What a reference means, and by which mistakes a candidate differs from that.

A library computes its output and the scores that it returns on different paths: what its scores
show need not be what its output saw. Both are therefore explained on their own. And a reference may
itself differ from anymha's meaning: then a candidate that has this meaning is not the one to mend.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.diagnosis import Search
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.limits import computed_dtype
from anymha.parity.stages.trace import Trace, name_of_dtype
from anymha.parity.stages.units import eps


@dataclass(frozen=True)
class Meaning:
    """What a reference computes.

    Args:
        trace: What it gave.
        plain: What anymha means by its weights and the call.
        recipe: What it computes; None where no recipe that is known gives its output.
        scores: What gives the scores that it returns.
        reason: How the recipe differs from the plain one; None where it does not.
        scores_reason: How that of the scores differs from the recipe.
        notes: Both in words.
    """

    trace: Trace
    plain: Recipe
    recipe: Recipe | None
    scores: Recipe
    reason: Diagnosis | None = None
    scores_reason: Diagnosis | None = None
    notes: tuple[str, ...] = ()

    def stages(self) -> Arrays:
        """Every stage in float64, and the "scores" that are returned."""
        return {**self._known.stages, "scores": self.scores.stages["probabilities"]}

    @property
    def _known(self) -> Recipe:
        return self.plain if self.recipe is None else self.recipe

    def diagnosed(self, trace: Trace, told: Arrays, wrong: Collection[str]) -> Diagnosis | None:
        """Why a candidate differs; None where nothing does.

        Args:
            trace: The candidate's.
            told: What it told, by stage.
            wrong: The stages that differ.
        """
        flow = {name: array for name, array in told.items() if name != "scores"}
        scores = {name: array for name, array in told.items() if name == "scores"}
        found = None
        if trace.random or any(name in flow for name in wrong):
            found = self._of_flow(trace, flow)
        elif wrong and "scores" not in wrong:
            return _beside_the_values(wrong)
        if found is not None and not found.explained:
            found = _of_another_dtype(self.trace, trace, found, wrong)
        if "scores" not in wrong:
            return found
        own = self._of_scores(trace, scores, found)
        if own is None:
            return found
        if found is None:
            return own
        known = {f"in the returned scores: {cause.name}" for cause in found.causes}
        if known & {cause.name for cause in own.causes}:
            return found  # they come of the same mistake
        remaining = max(found.remaining, own.remaining)
        return replace(found, causes=(*found.causes, *own.causes), remaining=remaining)

    def _of_flow(self, trace: Trace, told: Arrays) -> Diagnosis:
        if self.reason is not None and Search(self.plain, trace, told, self.trace).fits():
            return _of_the_reference(self.reason, self.plain)
        found = Search(self._known, trace, told, self.trace).diagnose()
        if not found.causes and "query" in told and len(told) > 1:
            found = self._after_projections(trace, told)
        if found.explained or self.reason is None:
            return found
        plain = Search(self.plain, trace, told, self.trace).diagnose()
        return plain if plain.explained else found

    def _after_projections(self, trace: Trace, told: Arrays) -> Diagnosis:
        """The same without the projections: what tells them may stand before heads are split."""
        rest = {name: a for name, a in told.items() if name not in ("query", "key", "value")}
        return Search(self._known, trace, rest, self.trace).diagnose()

    def _of_scores(self, trace: Trace, told: Arrays, found: Diagnosis | None) -> Diagnosis | None:
        """Why the returned scores differ, where the mistakes found do not explain it."""
        after = self._known if found is None or found.recipe is None else found.recipe
        usual = Search(after, trace, told, self.trace).fits()
        if usual and found is not None:
            return None
        if self.scores_reason is not None and (
            usual or Search(self.plain, trace, told, self.trace).fits()
        ):
            if found is not None:
                return None
            known = _of_the_reference(self.scores_reason, after)
            return replace(known, causes=tuple(replace(c, stage="scores") for c in known.causes))
        own = _returned(after.stages, trace, told["scores"])
        if own is None and Search(self.plain, trace, told, self.trace).fits():
            cure = "They are the probabilities that anymha means; its output saw others."
            own = Diagnosis((Cause("others than its output saw", "", "scores", cure),), 0.0)
        own = own or Search(self.scores, trace, told, self.trace).diagnose(pairs=False)
        causes = tuple(_in_scores(cause) for cause in own.causes)
        return replace(own, causes=causes, recipe=after if causes else None)


def meaning_of(plain: Recipe, trace: Trace, told: Arrays) -> Meaning:
    """What a reference computes.

    Args:
        plain: What anymha means by its weights and the call.
        trace: The reference's.
        told: What it told, by stage.
    """
    flow = {name: array for name, array in told.items() if name != "scores"}
    scores = {name: array for name, array in told.items() if name == "scores"}
    recipe, reason, notes = plain, None, []
    if not Search(plain, trace, flow).fits():
        reason = Search(plain, trace, flow).diagnose()
        if reason.recipe is None or trace.random:
            told_note = f"The reference, {trace.name}, is not plain attention of its weights: "
            return Meaning(trace, plain, None, plain, reason, None,
                           (told_note + f"{reason}. Causes are not looked for.",))  # fmt: skip
        recipe = reason.recipe
        notes.append(f"The reference, {trace.name}, differs from anymha's meaning: {reason}.")
    if not scores or Search(recipe, trace, scores).fits():
        return Meaning(trace, plain, recipe, recipe, reason, None, tuple(notes))
    own = Diagnosis()
    if not Search(plain, trace, scores).fits():
        own = _returned(recipe.stages, trace, told["scores"]) or Search(
            plain, trace, scores
        ).diagnose(pairs=False)
    words = f": {own}" if own.causes else ""
    notes.append(f"The scores that {trace.name} returns are not its output's probabilities{words}.")
    return Meaning(trace, plain, recipe, own.recipe or plain, reason, own, tuple(notes))


def _of_the_reference(reason: Diagnosis, recipe: Recipe) -> Diagnosis:
    """The candidate is as anymha means it: what the reference does otherwise is the cause."""
    causes = tuple(
        replace(cause, name=f"in the reference: {cause.name}",
                cure="The candidate has anymha's meaning. " + cause.cure)
        for cause in reason.causes
    )  # fmt: skip
    if not causes:
        cure = "Compare the outputs alone, or take the candidate's scores."
        causes = (Cause("in the reference: other scores than its output saw", "", "scores", cure),)
    return Diagnosis(causes, reason.remaining if reason.causes else 0.0, (), recipe)


def _beside_the_values(wrong: Collection[str]) -> Diagnosis:
    """Every value agrees: weights that play no part in them, or the gradients alone, do not."""
    first = next(iter(wrong))
    if not first.startswith("gradient"):
        return Diagnosis()
    cure = ("The forward pass agrees: look for a tensor that is detached, a gradient of your own, "
            "or a factor that the backward pass leaves out.")  # fmt: skip
    return Diagnosis((Cause("the gradients alone differ", "", first, cure),), 0.0)


def _of_another_dtype(
    meant: Trace, trace: Trace, found: Diagnosis, wrong: Collection[str]
) -> Diagnosis:
    """Right values in a wider dtype than was meant; else what was found."""
    names = name_of_dtype(meant.output), name_of_dtype(trace.output)
    alike = names[0] == names[1] or meant.output.shape != trace.output.shape
    if alike or set(wrong) - {"output"} or found.causes:
        return found
    cure = f"Return the output in {names[0]}, that of the inputs."
    return Diagnosis((Cause(f"returned in {names[1]}", "", "output", cure),), 0.0)


def _in_scores(cause: Cause) -> Cause:
    return replace(cause, name=f"in the returned scores: {cause.name}", stage="scores")


def _returned(honest: Arrays, trace: Trace, scores: np.ndarray) -> Diagnosis | None:
    """What was done to the probabilities before they were returned."""
    whole, near = honest["probabilities"], 64 * eps(computed_dtype(trace))
    if scores.ndim == 3 and scores.shape == (whole.shape[0], *whole.shape[2:]):
        if np.allclose(scores, whole.mean(1), rtol=0, atol=near, equal_nan=True):
            cure = "Ask for the scores of each head: `average_attn_weights=False` in torch."
            return Diagnosis((Cause("averaged over the heads", "", "scores", cure),), 0.0)
    elif scores.shape == whole.shape:
        dropped = honest["dropped_probabilities"]
        changed = not np.allclose(dropped, whole, rtol=0, atol=near, equal_nan=True)
        if changed and np.allclose(scores, dropped, rtol=0, atol=near, equal_nan=True):
            cure = "Return the probabilities as they are before dropout."
            return Diagnosis((Cause("taken after dropout", "", "scores", cure),), 0.0)
    return None
