"""The parts of a layout: forms, extra arrays, and needs of the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anymha.interchange.compared_options import result_options
from anymha.interchange.layer_config import LayerConfig
from anymha.interchange.packing import Piece

OPTION_OF = {"query_norm": "query_key_norm", "key_norm": "query_key_norm", "sinks": "sinks"}
"""The options that have weights, by what the weights' canonical names begin with."""
FEATURE_WEIGHTS = (
    *(f"{name}_norm.{part}" for name in ("query", "key") for part in ("scale", "bias")),
    "sinks",
)
"""The canonical names of the weights of options."""


@dataclass(frozen=True)
class Extra:
    """An array that is no kernel or bias of a projection: the canonical form lacks it.

    Args:
        array: Its name, relative to the layer.
        need: The step of the forward pass that needs it, in words; None for a buffer that follows
            from the sizes, as a causal mask.
        required: Whether every layer of the layout has it.
        shows: A size that its shape shows, and the axis: ``("head_dim", 0)``, ``("num_heads", 1)``.
        weight: The canonical name of the weight of an option that it is, as "sinks"; empty for
            none. It is that weight where the option's value is known, and an extra array before.
    """

    array: str
    need: str | None = None
    required: bool = False
    shows: tuple[str, int] | None = None
    weight: str = ""

    @property
    def option(self) -> str:
        """The option whose weight it is; empty for none."""
        return OPTION_OF.get(self.weight.partition(".")[0], "")


@dataclass(frozen=True)
class Need:
    """A step of a family's forward pass besides plain attention, whatever the arrays.

    A need is an option of `AttentionConfig` where it has one of that name: then the caller, or the
    live layer, states its value, and the converted layer has it. Until then it stays in words.

    Args:
        option: The option's name, which may be one that `AttentionConfig` does not have yet.
        text: The need in words.
        key: The name of its value in the family's `config.json` and its live layers.
        order: Of rotary positions, the elements of a head that turn together: "halves" or "pairs".
        partial: Whether they turn a part of each head alone.
        example: What to pass for it, with dots for what only the model knows.
    """

    option: str
    text: str
    key: str = ""
    order: str = ""
    partial: bool = False
    example: str = "..."

    def words(self) -> str:
        """The need in words, and how to meet it where that is possible."""
        if self.option not in result_options():
            return self.text
        source = f", which is `{self.key}` in the model's config.json" if self.key else ""
        return f"{self.text} (pass `{self.option}={self.example}`{source})"

    def stated(self, layer: LayerConfig) -> dict[str, Any]:
        """The option's value by its name, where the model's configuration states it; else empty."""
        has = bool(self.key) and self.key in layer
        return {self.option: layer[self.key]} if has else {}


@dataclass(frozen=True)
class Form:
    """One set of names and shapes; a layout has as many as its library.

    Args:
        pieces: The arrays.
        name: A name that tells it from the layout's other forms.
        limits: Rules of `anymha.interchange.limits` besides the layout's.
    """

    pieces: tuple[Piece, ...]
    name: str = ""
    limits: tuple[Any, ...] = ()

    def names(self) -> tuple[str, ...]:
        """The arrays' names, kernels and biases."""
        return tuple(piece.array for piece in self.pieces)

    def required(self) -> tuple[str, ...]:
        """The names of the kernels that are always there."""
        kernels = (piece for piece in self.pieces if piece.part == "kernel")
        return tuple(piece.array for piece in kernels if not piece.optional)
