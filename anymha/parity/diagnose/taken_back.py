"""How a cache is truncated wrongly: recipes that see positions which were to be taken back.

They are tried where a comparison without `truncate` agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from anymha.parity.diagnose.evidence import Evidence
from anymha.parity.diagnose.wrong_caches import facts_of, given, in_window
from anymha.parity.oracle.decoded import Decoded
from anymha.parity.oracle.recipe import Recipe

EMPTY = -1
"""Stands for the column of a slot that holds zeros."""

Lengths = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The lengths (B,) behind a truncation, from those that are held and the right ones."""


@dataclass
class _Truncated:
    """A buffer whose rows are truncated wrongly, and what the queries of each call find in it.

    Draft `call * drafted + d` is a copy of column d, read before a call and to be taken back.
    """

    recipe: Recipe
    facts: Decoded
    lengths: Lengths
    cleared: int = 0  # How many of the last positions that are kept are cleared
    newest: bool = False  # Whether the last positions are kept in place of the first
    held: list[list[int]] = field(init=False)  # Of each row the column in each slot
    places: np.ndarray = field(init=False)  # (B, T): the slot of each column
    drafts: np.ndarray = field(init=False)  # (B, drafts): that of each draft
    contents: list[list[list[int]]] = field(init=False)  # Of each call and row

    def __post_init__(self) -> None:
        facts, (rows, length) = self.facts, self.facts.valid.shape
        calls = int(facts.calls[-1]) + 1
        self.held = [[] for _ in range(rows)]
        self.places = facts.places.copy()
        self.drafts, self.contents = np.zeros((rows, calls * facts.drafted), int), []
        for call in range(calls):
            columns = np.flatnonzero(facts.calls == call)
            if call:
                self._draft(call, range(min(facts.drafted, columns[0])))
                self._truncate(facts.begins[:, columns[0]])
            for row, held in enumerate(self.held):
                for column in columns[facts.valid[row, columns]]:
                    self.places[row, column] = len(held)
                    held.append(int(column))
            self.contents.append([held.copy() for held in self.held])
        self.length = length

    def _draft(self, call: int, columns: range) -> None:
        for row, held in enumerate(self.held):
            for column in columns:
                if self.facts.valid[row, column]:
                    draft = call * self.facts.drafted + column
                    self.drafts[row, draft] = len(held)
                    held.append(len(self.facts.calls) + draft)

    def _truncate(self, right: np.ndarray) -> None:
        before = np.array([len(held) for held in self.held])
        for row, count in enumerate(np.maximum(self.lengths(before, right), 0)):
            held = self.held[row]
            kept = held[max(len(held) - count, 0) :] if self.newest else held[:count]
            kept += [EMPTY] * (count - len(kept))
            for slot in range(max(count - self.cleared, 0), count):
                kept[slot] = EMPTY
            self.held[row] = kept

    def made(self) -> Recipe:
        """The recipe: behind the columns stand the drafts, and zeros of each slot."""
        recipe, facts, length = self.recipe, self.facts, self.length
        most = max(len(held) for rows in self.contents for held in rows)
        rows, drafts = self.drafts.shape
        slots = np.broadcast_to(np.arange(most), (rows, most))
        columns = np.concatenate([
            np.arange(length), np.tile(np.arange(facts.drafted), drafts // facts.drafted),
            np.zeros(most, int),
        ])  # fmt: skip
        seen = np.zeros((rows, length, len(columns)), bool)
        for at, call in enumerate(facts.calls):
            for row in range(rows):
                for slot, column in enumerate(self.contents[call][row][: self.places[row, at] + 1]):
                    seen[row, at, length + drafts + slot if column == EMPTY else column] = True
        counted = np.concatenate([self.places, self.drafts, slots], axis=1)
        seen &= in_window(recipe, self.places[..., None] - counted[:, None])
        own = given(recipe, self.places, facts.places)
        keys = counted + own[:, :1] - self.places[:, :1]
        masks = {n: mask for n, mask in recipe.masks.items() if n == "query_mask"}
        inputs = {n: x if n == "query" else x[:, columns] for n, x in recipe.inputs.items()}
        wrong = recipe.but(
            inputs=inputs, masks={**masks, "cache": seen[:, None]}, causal=False, window=None,
            decoded=None, positions=own, key_positions=keys,
        )  # fmt: skip
        holds = (np.arange(len(columns)) < length + drafts)[:, None, None]
        return wrong.after(("key", "value"), lambda heads: heads * holds)


def _ways(recipe: Recipe, facts: Decoded) -> Iterator[tuple[str, _Truncated]]:
    """Words, and the buffer that is truncated so."""
    first = 0 if facts.turned is None else int(facts.turned[0])  # that stands first behind call 0
    last = len(facts.valid) - 1 if facts.turned is None else int(facts.turned[-1])
    read = facts.drafted
    told: dict[str, Lengths] = {
        "one position too many is taken back": lambda held, right: right - 1,
        "one position too few is taken back": lambda held, right: np.minimum(right + 1, held),
        "one position more than is right is counted": lambda held, right: right + 1,
        "nothing is taken back": lambda held, right: held,
        "all is taken back": lambda held, right: 0 * right,
        "two positions too many are taken back": lambda held, right: right - 2,
        "three positions too many are taken back": lambda held, right: right - 3,
        "two positions more than is right are counted": lambda held, right: right + 2,
    }
    for count in range(1, read + 3):
        words = f"{count} of each row are taken back, whatever its length"
        told[words] = lambda held, right, count=count: held - count
    for of, row in {
        "row 0": lambda x: x[first], "the last row": lambda x: x[last], "the longest row": np.max,
        "the shortest row": np.min, "the row before": lambda x: np.roll(x, 1),
        "the row behind": lambda x: np.roll(x, -1),
    }.items() if len(facts.valid) > 1 else ():  # fmt: skip
        told[f"to the length of {of}"] = lambda held, right, row=row: row(right) + 0 * right
        words = f"to the length of {of}, where the row is longer"
        told[words] = lambda held, right, row=row: np.minimum(row(right), held)
        words = f"as many of each row are taken back as of {of}"
        told[words] = lambda held, right, row=row: held - row(held - right)
    for words, lengths in told.items():
        yield words, _Truncated(recipe, facts, lengths)
    yield ("the last position that is kept is cleared",
           _Truncated(recipe, facts, lambda held, right: right, cleared=1))  # fmt: skip
    if "alibi" not in recipe.options:  # where a key's distance would follow its slot
        yield ("the newest positions are kept, not the first ones",
               _Truncated(recipe, facts, lambda held, right: right, newest=True))  # fmt: skip


def how_truncated(recipe: Recipe, evidence: Evidence) -> str:
    """In what way `truncate` is wrong, in words; empty where none gives the numbers."""
    facts = facts_of(recipe)
    if facts is None or not facts.drafted or recipe.positions is not None:
        return ""
    for words, buffer in _ways(recipe, facts) if recipe.segments is None else ():
        if max(evidence.errors(buffer.made()).values()) <= 1:
            return words
    return ""
