"""What a reference computes, and the mistakes by which a candidate differs from that.

A library may compute its output and the scores that it returns on different paths, with different
probabilities. Both are therefore explained on their own. And a reference may itself differ from
anymha's semantics: then a candidate that has these semantics is not the one to fix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from anymha.parity.diagnose.causes import Cause, Diagnosis
from anymha.parity.diagnose.diagnosis import Search
from anymha.parity.diagnose.model_steps import featured
from anymha.parity.diagnose.reported_stages import told_otherwise, with_told_bias
from anymha.parity.oracle.recipe import Arrays, Recipe
from anymha.parity.stages.limits import computed_dtype
from anymha.parity.stages.tolerance import eps
from anymha.parity.stages.trace import Trace, name_of_dtype


@dataclass(frozen=True)
class ReferenceSemantics:
    """What a reference computes."""

    trace: Trace  # Its results
    plain: Recipe  # The recipe of its weights and the call, as anymha means it
    recipe: Recipe | None  # The recipe that gives its output; None where no known one does
    scores: Recipe  # The recipe that gives the scores that it returns
    # How the recipe differs from the plain one; None where it does not
    reason: Diagnosis | None = None
    scores_reason: Diagnosis | None = None  # How the recipe of the scores differs from the recipe
    notes: tuple[str, ...] = ()  # Both in words

    def stages(self) -> Arrays:
        """Every stage in float64, and the "scores" that are returned."""
        return {**self._known.stages, "scores": self.scores.stages["probabilities"]}

    @property
    def _known(self) -> Recipe:
        return self.plain if self.recipe is None else self.recipe

    def diagnose(
        self,
        trace: Trace,
        reported: Arrays,
        wrong: Collection[str],
        gradients: Callable[[], Diagnosis] = Diagnosis,
    ) -> Diagnosis | None:
        """Why a candidate with these stages differs; None where no stage is wrong.

        `gradients` tells why where no value differs.
        """
        flow, scores = _flow_and_scores(reported)
        told = {name: array for name, array in flow.items() if self._tells(name, array)}
        if "output" in wrong and "output" not in told and not trace.random:
            # What gives NaN everywhere has the same output: the stages with numbers are judged.
            return self._of_stages(trace, told) if {*wrong} & {*told} else Diagnosis()
        other = self._in_another_dtype(trace, flow, wrong)
        if other is not None:
            return other
        if "scores" in wrong and any(name in flow for name in wrong) and not trace.random:
            both = self._search(self._known, trace, reported).diagnose(pairs=False)
            if both.explained:
                return both
        diagnosis = None
        if trace.random or any(name in flow for name in wrong):
            diagnosis = self._of_flow(trace, flow)
        elif wrong and "scores" not in wrong:
            return gradients()
        if diagnosis is not None and not (diagnosis.explained or diagnosis.small):
            diagnosis = self._of_a_stage_alone(trace, flow, wrong) or diagnosis
        if "scores" not in wrong:
            return diagnosis
        own = self._of_scores(trace, scores, diagnosis)
        if own is None:
            return diagnosis
        if diagnosis is None:
            return own
        known = {f"in the returned scores: {cause.name}" for cause in diagnosis.causes}
        if known & {cause.name for cause in own.causes}:
            return diagnosis  # the same mistake changes both
        remaining = max(diagnosis.remaining, own.remaining)
        causes = (*diagnosis.causes, *own.causes)
        return replace(diagnosis, causes=causes, remaining=remaining)

    def _tells(self, name: str, array: np.ndarray) -> bool:
        """Whether a stage has a number where the reference has one."""
        exact = self._known.stages[name]
        return exact.shape != array.shape or bool(np.any(np.isfinite(exact) & np.isfinite(array)))

    def _in_another_dtype(
        self, trace: Trace, reported: Arrays, wrong: Collection[str]
    ) -> Diagnosis | None:
        """Right values in another dtype than the reference's; None where it is not that."""
        names = name_of_dtype(self.trace.output), name_of_dtype(trace.output)
        alike = names[0] == names[1] or self.trace.output.shape != trace.output.shape
        if alike or {*wrong} != {"output"} or trace.random:
            return None
        cast = replace(trace, output=trace.output.astype(self.trace.output.dtype))
        if not self._search(self._known, cast, reported).fits():
            return None
        fix = f"Return the output in {names[0]}, that of the inputs."
        return Diagnosis.certain(f"returned in {names[1]}", "output", fix)

    def _of_a_stage_alone(
        self, trace: Trace, reported: Arrays, wrong: Collection[str]
    ) -> Diagnosis | None:
        """A stage that is not the one of which the right output is made; None if that is wrong."""
        output = {name: array for name, array in reported.items() if name == "output"}
        stage = next((name for name in wrong if name in reported), "output")
        if not output or stage == "output" or not self._search(self._known, trace, output).fits():
            return None
        if self._search(_of_told(self._known, reported), trace, output).fits():
            fix = "The output agrees: of this stage, what differs makes no difference to it."
            return Diagnosis.certain(f"another {stage} that gives the same output", stage, fix)
        verb = "are not those" if stage.endswith("s") else "is not that"
        fix = "The output agrees: report what the next stage is computed from."
        name = f"the reported {stage} {verb} of which the output is made"
        return Diagnosis.certain(name, stage, fix)

    def _of_flow(self, trace: Trace, reported: Arrays) -> Diagnosis:
        if self.reason is not None and self._search(self.plain, trace, reported).fits():
            return _of_the_reference(self.reason, self.plain)
        told = told_otherwise(self._known, trace, reported, self.trace)
        if told.causes:
            return told
        diagnosis = self._of_stages(trace, reported)
        if not diagnosis.explained and with_told_bias(self._known, reported):
            rest = {name: array for name, array in reported.items() if name != "logits"}
            told = self._of_stages(trace, rest)
            diagnosis = told if told.explained else diagnosis
        if diagnosis.explained or self.reason is None:
            return diagnosis
        plain = self._search(self.plain, trace, reported).diagnose()
        return plain if plain.explained else diagnosis

    def _of_stages(self, trace: Trace, reported: Arrays) -> Diagnosis:
        """The mistakes that explain the stages, or those but the projections.

        Projections may be reported before heads are split, as they are recorded in a module.
        """
        search = self._search(self._known, trace, reported)
        rest = {n: a for n, a in reported.items() if n not in ("query", "key", "value")}
        found = Diagnosis() if len(rest) == len(reported) else search.diagnose(pairs=False)
        if found.causes:
            return found
        if len(rest) == len(reported):
            return search.diagnose()
        later = self._search(self._known, trace, rest)
        # What is reported of the projections is not what it computes with; or all that is wrong.
        if later.fits() or self._search(_of_told(self._known, reported), trace, rest).fits():
            return search.diagnose()
        found = later.diagnose(pairs=False)
        projections = {n: a for n, a in reported.items() if n not in rest}
        right = self._search(self._known, trace, projections).fits()
        if found.causes and not right and self._is_no_scale(trace, projections, found):
            found = replace(found, remaining=np.inf)
        if found.causes:
            return found
        one, other = (later, search) if right else (search, later)
        found = one.diagnose()
        return found if found.explained else other.diagnose()

    def _is_no_scale(self, trace: Trace, projections: Arrays, found: Diagnosis) -> bool:
        """Whether a scale is found of queries or keys that are wrong themselves, and so their own.

        Those that are told before norms and rotary positions say nothing of it.
        """
        if not any(cause.name == "wrong scale" for cause in found.causes):
            return False
        bare = self._search(self._known.but(sections=()), trace, projections)
        shapes = (array.shape == self._known.stages[n].shape for n, array in projections.items())
        return all(shapes) and not bare.fits()

    def _search(self, recipe: Recipe, trace: Trace, reported: Arrays) -> Search:
        return Search(recipe, trace, reported, self.trace)

    def _of_scores(
        self, trace: Trace, reported: Arrays, flow: Diagnosis | None
    ) -> Diagnosis | None:
        """Why the returned scores differ, where the mistakes of the output do not explain it."""
        after = self._known if flow is None or flow.recipe is None else flow.recipe
        usual = self._search(after, trace, reported).fits()
        if usual and flow is not None:
            return None
        plain = self._search(self.plain, trace, reported)
        if self.scores_reason is not None and (usual or plain.fits()):
            if flow is not None:
                return None
            known = _of_the_reference(self.scores_reason, after)
            return replace(known, causes=tuple(replace(c, stage="scores") for c in known.causes))
        own = _returned(after.stages, trace, reported["scores"])
        if own is None and plain.fits():
            fix = "The scores are the right probabilities; the output is computed from others."
            name = "not the probabilities of its output"
            own = Diagnosis.certain(name, "scores", fix)
        own = own or self._search(self.scores, trace, reported).diagnose(pairs=False)
        causes = tuple(
            replace(cause, name=f"in the returned scores: {cause.name}", stage="scores")
            for cause in own.causes
        )
        return replace(own, causes=causes, recipe=after if causes else None)


def reference_semantics_of(plain: Recipe, trace: Trace, reported: Arrays) -> ReferenceSemantics:
    """What a reference computes, from the recipe of its weights and its stages by name."""
    flow, scores = _flow_and_scores(reported)
    recipe, reason, notes = plain, None, []
    if not Search(plain, trace, flow).fits():
        more = featured(plain, trace, flow)
        if more is not None:
            return ReferenceSemantics(trace, more, more, more)
    if not Search(plain, trace, flow).fits():
        reason = Search(plain, trace, flow).diagnose()
        if reason.recipe is None or trace.random:
            note = (f"The reference, {trace.name}, is not plain attention of its weights: "
                    f"{reason}. Causes are not searched for.")  # fmt: skip
            return ReferenceSemantics(trace, plain, None, plain, reason, None,
                                      (note,))  # fmt: skip
        recipe = reason.recipe
        notes.append(f"The reference, {trace.name}, differs from anymha's semantics: {reason}.")
    if not scores or Search(recipe, trace, scores).fits():
        return ReferenceSemantics(trace, plain, recipe, recipe, reason, None, tuple(notes))
    own = Diagnosis()
    if not Search(plain, trace, scores).fits():
        own = _returned(recipe.stages, trace, reported["scores"]) or Search(
            plain, trace, scores
        ).diagnose(pairs=False)
    words = f": {own}" if own.causes else ""
    notes.append(
        f"The scores that {trace.name} returns are not the probabilities of its output{words}."
    )
    return ReferenceSemantics(trace, plain, recipe, own.recipe or plain, reason, own, tuple(notes))


def _of_told(recipe: Recipe, reported: Arrays) -> Recipe:
    """The recipe that computes with the projections that are reported."""
    for name in ("query", "key", "value"):
        got = reported.get(name)
        if got is not None and got.shape == recipe.stages[name].shape:
            recipe = recipe.stepping(name, lambda _, __, got=got: got)
    return recipe


def _flow_and_scores(reported: Arrays) -> tuple[Arrays, Arrays]:
    """The reported stages, and the returned scores, apart."""
    scores = {name: array for name, array in reported.items() if name == "scores"}
    return {name: array for name, array in reported.items() if name not in scores}, scores


def _of_the_reference(reason: Diagnosis, recipe: Recipe) -> Diagnosis:
    """The candidate has anymha's semantics: the cause lies in the reference."""
    causes = tuple(
        replace(cause, name=f"in the reference: {cause.name}",
                fix="The candidate is plain attention of these weights. " + _turned(cause.fix))
        for cause in reason.causes
    )  # fmt: skip
    if not causes:
        fix = "Compare the outputs alone, or take the candidate's scores."
        name = "in the reference: its scores are not the probabilities of its output"
        causes = (Cause(name, "", "scores", fix),)
    return Diagnosis(causes, reason.remaining if reason.causes else 0.0, (), recipe)


def _turned(fix: str) -> str:
    """What a mistake's fix says of the candidate, said of the reference, and the other way."""
    sides = {"candidate": "reference", "reference": "candidate"}
    return re.sub("candidate|reference", lambda found: sides[found.group()], fix)


def _returned(exact: Arrays, trace: Trace, scores: np.ndarray) -> Diagnosis | None:
    """The change of the probabilities before they were returned; None where no known one fits."""
    whole, near = exact["probabilities"], 64 * eps(computed_dtype(trace))
    if scores.ndim == 3 and scores.shape == (whole.shape[0], *whole.shape[2:]):
        if np.allclose(scores, whole.mean(1), rtol=0, atol=near, equal_nan=True):
            fix = "Ask for the scores of each head: `average_attn_weights=False` in torch."
            return Diagnosis.certain("averaged over the heads", "scores", fix)
    elif scores.shape == whole.shape:
        dropped = exact["dropped_probabilities"]
        changed = not np.allclose(dropped, whole, rtol=0, atol=near, equal_nan=True)
        if changed and np.allclose(scores, dropped, rtol=0, atol=near, equal_nan=True):
            fix = "Return the probabilities as they are before dropout."
            return Diagnosis.certain("taken after dropout", "scores", fix)
    return None
