"""What a layout is made of: its forms, and the arrays beside the projections."""

from __future__ import annotations

from dataclasses import dataclass

from anymha.interchange.packing import Piece


@dataclass(frozen=True)
class Extra:
    """An array beside the four projections, which the canonical form has no place for.

    Args:
        array: Its name, relative to the layer.
        need: What the forward pass needs it for; None for a buffer that holds nothing of its own,
            as a causal mask.
        required: Whether every layer of the layout has it.
        tells: What its shape tells, and on which axis: ``("head_dim", 0)``, ``("num_heads", 1)``.
    """

    array: str
    need: str | None = None
    required: bool = False
    tells: tuple[str, int] | None = None


@dataclass(frozen=True)
class Form:
    """One set of names and shapes; a layout has several where its library has.

    Args:
        pieces: The arrays.
        name: What tells it from the layout's other forms.
    """

    pieces: tuple[Piece, ...]
    name: str = ""

    def names(self) -> tuple[str, ...]:
        """The arrays' names, kernels and biases."""
        return tuple(piece.array for piece in self.pieces)

    def required(self) -> tuple[str, ...]:
        """The names of the kernels, which are always there."""
        return tuple(piece.array for piece in self.pieces if piece.part == "kernel")
