"""The arguments of a layer's call, as data: signatures, checks and folding are made from it.

An argument is declared here once. Its axes are named by letters: B the batch axes, H the query
heads, T the query's attention axes, S the key's.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Container
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """What an argument of the call is."""

    INPUT = "input"
    MASK = "mask"
    BIAS = "bias"
    FLAG = "flag"
    POSITIONS = "positions"
    SEGMENTS = "segments"
    OFFSET = "offset"
    SEED = "seed"
    CACHE = "cache"


_TYPES = {
    Kind.INPUT: "Array",
    Kind.MASK: "Array | None",
    Kind.BIAS: "Array | None",
    Kind.POSITIONS: "Array | None",
    Kind.SEGMENTS: "Array | None",
    Kind.OFFSET: "int | Array",
    Kind.SEED: "int | Array | None",
    Kind.CACHE: "Cache | None",
}
"""The types of arguments by kind; a flag's follows from its default."""


@dataclass(frozen=True)
class CallArgument:
    """One argument of the call.

    Args:
        name: Its name.
        kind: What it is: inputs and biases are floating, masks boolean, True = may attend,
            positions and segments integers.
        meaning: What it means, a sentence.
        axes: The forms that an array may have, each the letters of its axes; of a bias the full
            form, to which it broadcasts.
        default: The value where it is left out.
        hint: What to do about an array of another rank.
    """

    name: str
    kind: Kind
    meaning: str
    axes: tuple[str, ...] = ()
    default: Any = None
    hint: str = ""

    @property
    def annotation(self) -> str:
        """Its type, as in `anymha.layer.native.CallOptions`."""
        if self.name == "memory":
            return "Memory | Cache | None"
        if self.kind is Kind.FLAG:
            return "bool | None" if self.default is None else "bool"
        return _TYPES[self.kind]

    def form_of_rank(self, rank: int) -> str:
        """The form of arrays with so many axes, where B, T and S are one axis each."""
        return next(form for form in self.axes if len(form) == rank)


_MORE_AXES = "Pass what has more axes as `attention_mask`."

INPUTS = (
    CallArgument(
        "query", Kind.INPUT,
        "(B, T, D_q) floating; or a list ``[query, value]`` or ``[query, value, key]``. With "
        "`attention_axes`, any axes, features last.",
        axes=("BT",),
    ),
    CallArgument("value", Kind.INPUT, "(B, S, D_v) floating; default `query`.", axes=("BS",)),
    CallArgument("key", Kind.INPUT, "(B, S, D_k) floating; default `value`.", axes=("BS",)),
)  # fmt: skip

ARRAYS = (
    CallArgument(
        "attention_mask", Kind.MASK,
        "(T, S), (B, T, S) or (B, H, T, S) booleans, True = may attend.",
        axes=("TS", "BTS", "BHTS"),
        hint="Add axes of length 1 to broadcast.",
    ),
    CallArgument(
        "attention_bias", Kind.BIAS,
        "Floating, added to the logits; broadcasts to (B, H, T, S).",
        axes=("BHTS",),
    ),
    CallArgument(
        "query_mask", Kind.MASK,
        "(B, T) booleans; a query that is False attends to nothing.",
        axes=("BT",), hint=_MORE_AXES,
    ),
    CallArgument(
        "value_mask", Kind.MASK,
        "(B, S) booleans; a position that is False does not influence anything.",
        axes=("BS",), hint=_MORE_AXES,
    ),
    CallArgument(
        "key_mask", Kind.MASK, "(B, S) booleans, as `value_mask`.", axes=("BS",), hint=_MORE_AXES
    ),
    CallArgument(
        "segment_ids", Kind.SEGMENTS,
        "(B, T) integers, the sequence in the row that each query is of: it sees keys of the same "
        "id alone. A negative id is padding, which sees and is seen by nothing.",
        axes=("BT",), hint="Pass one id for each query.",
    ),
    CallArgument(
        "key_segment_ids", Kind.SEGMENTS,
        "(B, S) integers, likewise of the keys; default `segment_ids` in self-attention.",
        axes=("BS",), hint="Pass one id for each key.",
    ),
    CallArgument(
        "positions", Kind.POSITIONS,
        "(T,) or (B, T) integers, the queries' positions for `rotary` and `alibi`; default index + "
        "`query_offset`. Causality and windows go by the index all the same.",
        axes=("T", "BT"), hint="Pass one position for each query.",
    ),
    CallArgument(
        "key_positions", Kind.POSITIONS,
        "(S,) or (B, S) integers, likewise of the keys; default their index, also where "
        "`positions` are given.",
        axes=("S", "BS"), hint="Pass one position for each key.",
    ),
)  # fmt: skip

OPTIONS = (
    CallArgument(
        "cache", Kind.CACHE,
        "A `Cache` of `make_cache`: the positions of `query` are appended to it, those alone that "
        "`value_mask` (B, T) keeps, and each sees what stands at or before it. `attention_mask` "
        "and `attention_bias` have an axis of the cache's `max_length` positions for S.",
    ),
    CallArgument(
        "memory", Kind.CACHE,
        "A `Memory` of `make_memory`, in the place of `value` and `key`; or the `Cache` of another "
        "layer, to which that has appended these positions.",
    ),
    CallArgument(
        "return_attention_scores", Kind.FLAG, "Whether to return the probabilities too.",
        default=False,
    ),
    CallArgument(
        "return_activity_loss", Kind.FLAG,
        "Whether to return, last, the penalty of the activity regulariser.",
        default=False,
    ),
    CallArgument(
        "training", Kind.FLAG,
        "Whether dropout acts; default the framework's own mode, else False.",
    ),
    CallArgument(
        "use_causal_mask", Kind.FLAG,
        "Whether query i sees only keys ``j <= i + query_offset``.",
        default=False,
    ),
    CallArgument(
        "query_offset", Kind.OFFSET,
        "Position of the first query among the keys: an int, or integers (B,).",
        default=0,
    ),
    CallArgument(
        "seed", Kind.SEED, "Seed of the dropout; default one of the framework's own generator."
    ),
)  # fmt: skip

CALL_ARGUMENTS: tuple[CallArgument, ...] = (*INPUTS, *ARRAYS, *OPTIONS)
"""All of them, in the order of the signature; those after the inputs are keyword-only."""

BY_NAME = {argument.name: argument for argument in CALL_ARGUMENTS}
KEYWORDS = {argument.name: argument for argument in (*ARRAYS, *OPTIONS)}

PLACES = {"B": 0, "H": 1, "T": 2, "S": 3}
"""The place of each letter in (B, H, T, S)."""


def call_parameters() -> list[inspect.Parameter]:
    """The parameters of a layer's call, after `self`."""
    kinds = inspect.Parameter
    return [
        kinds(
            argument.name,
            kinds.POSITIONAL_OR_KEYWORD if argument.kind is Kind.INPUT else kinds.KEYWORD_ONLY,
            default=kinds.empty if argument.name == "query" else argument.default,
            annotation=argument.annotation,
        )
        for argument in CALL_ARGUMENTS
    ]


def call_documentation(without: Container[str] = ()) -> str:
    """The lines of the section "Args" of a layer's call, `without` some arguments."""
    return "\n".join(
        textwrap.fill(
            f"{argument.name}: {argument.meaning}",
            width=99,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
        for argument in CALL_ARGUMENTS
        if argument.name not in without
    )
