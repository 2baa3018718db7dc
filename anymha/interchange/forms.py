"""The parts of a layout: forms, extra arrays, and needs of the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anymha.interchange.compared_options import result_options
from anymha.interchange.packing import Piece


@dataclass(frozen=True)
class Extra:
    """An array that is no kernel or bias of a projection: the canonical form lacks it.

    Args:
        array: Its name, relative to the layer.
        need: The step of the forward pass that needs it, in words; None for a buffer that follows
            from the sizes, as a causal mask.
        required: Whether every layer of the layout has it.
        shows: A size that its shape shows, and the axis: ``("head_dim", 0)``, ``("num_heads", 1)``.
    """

    array: str
    need: str | None = None
    required: bool = False
    shows: tuple[str, int] | None = None


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
    """

    option: str
    text: str
    key: str = ""
    order: str = ""
    partial: bool = False

    def words(self) -> str:
        """The need in words, and how to meet it where that is possible."""
        if self.option not in result_options():
            return self.text
        source = f", which is `{self.key}` in the model's config.json" if self.key else ""
        return f"{self.text} (pass `{self.option}=...`{source})"


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
