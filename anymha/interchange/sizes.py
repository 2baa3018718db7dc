"""How many heads of which width a layer has: from the shapes of its arrays, and what is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anymha.errors import WeightsError
from anymha.interchange.packing import CODEGEN_BLOCKS, QKV, Piece, Sizes

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Told:
    """What the caller says, or an array beside the kernels; None where nobody does."""

    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None


def solve(layout: str, pieces: Sequence[Piece], shapes: Shapes, told: Told) -> Sizes:
    """The sizes with which all shapes fit one another.

    Args:
        layout: The layout's name, for messages.
        pieces: The layout's arrays, of which those in `shapes` are there.
        shapes: The arrays' shapes by name.
        told: What is known beside them.

    Raises:
        WeightsError: the shapes do not fit one another or what was told, or do not tell enough.
    """
    kernels = {name: p for p in pieces if p.part == "kernel" for name in p.holds}
    for piece in pieces:
        _check_rank(piece, shapes)
    if kernels["query"].form == "heads":
        sizes = _of_heads(kernels, shapes)
    else:
        sizes = _of_matrices(layout, kernels, shapes, told)
    _check_told(kernels, shapes, sizes, told)
    for piece in pieces:
        if piece.part == "bias" and piece.array in shapes:
            _check_bias(piece, kernels[piece.holds[0]], shapes, sizes)
    return sizes


def possible_heads(pieces: Sequence[Piece], shapes: Shapes) -> list[Told]:
    """The numbers of query heads that divide the rows in which they lie, where shapes tell none."""
    kernels = {name: p for p in pieces if p.part == "kernel" for name in p.holds}
    if kernels["query"].form == "heads":
        return [Told()]
    mark = kernels["query"] if kernels["query"].holds == ("query",) else kernels["output"]
    shape = shapes[mark.array]
    rows = shape[mark.outputs] if len(shape) == 2 else 1
    return [Told(num_heads=heads) for heads in range(1, rows + 1) if rows % heads == 0] or [Told(1)]


def _check_rank(piece: Piece, shapes: Shapes) -> None:
    shape = shapes.get(piece.array)
    if shape is None or piece.part == "bias" or piece.form != "heads":
        return
    if len(shape) != 3 and (piece.rank is not None or len(shape) < 3):
        form = "(heads, width, outputs)" if piece.rank is None else "(inputs, heads, width)"
        raise WeightsError(f"`{piece.array}` must have shape {form}. Received: shape {shape}.")


def _of_heads(kernels: Mapping[str, Piece], shapes: Shapes) -> Sizes:
    query, key, value = (shapes[kernels[name].array] for name in QKV)
    sizes = Sizes(query[1], key[1], query[2], value[2])
    for name, piece in kernels.items():
        shape, split = shapes[piece.array], sizes.split(name)
        at = 0 if name == "output" else 1
        _check_fit(name, shape, (*shape[:at], *split, *shape[at + 2 :]))
    return sizes


def _check_fit(projection: str, shape: Shape, wanted: Shape) -> None:
    if shape != wanted:
        raise WeightsError(
            f"The layers do not fit one another: `{projection}.kernel` has shape {shape}, "
            f"the others need {wanted}."
        )


def _of_matrices(
    layout: str, kernels: Mapping[str, Piece], shapes: Shapes, told: Told
) -> Sizes:  # fmt: skip
    query, key, output = kernels["query"], kernels["key"], kernels["output"]
    alone = query.holds == ("query",)
    # Where the query's rows lie among others, the output's inputs are as many.
    mark = query if alone else output
    heads, head_dim = told.num_heads, told.head_dim
    if heads is None and head_dim is None:
        raise WeightsError(
            f"{layout} needs `num_heads`, the number of query heads (or `head_dim`, the width of "
            "each): its shapes do not tell it. It stands in the model's configuration."
        )
    if heads is None:
        heads = _rows(mark, shapes, 1) // max(head_dim or 0, 1)
    key_dim = _rows(mark, shapes, heads) // heads
    if key.holds == ("key",):
        shared = told.num_key_value_heads
        if shared is None:
            rows = _rows(key, shapes, 1)
            shared = rows // key_dim if rows % key_dim == 0 and rows else heads
        width = _rows(key, shapes, shared) // shared
        inputs = shapes[key.array][1 - key.outputs]
        _check_fit("key", (inputs, shared, width), (inputs, shared, key_dim))
        value_dim = _rows(kernels["value"], shapes, shared) // shared
    else:
        shared = _shared_of(key, shapes, heads, key_dim, told.num_key_value_heads)
        value_dim = key_dim
    width = _rows(output, shapes, heads) // heads
    outputs = shapes[output.array][1 - output.outputs]
    _check_fit("output", (heads, width, outputs), (heads, value_dim, outputs))
    if (not alone or query.tiled) and heads % shared:
        raise WeightsError(
            f"`num_heads` must be a multiple of the number of key and value heads. Received: "
            f"{heads} query heads, and `{key.array}` has {shared} key heads."
        )
    return Sizes(heads, shared, key_dim, value_dim)


def _rows(piece: Piece, shapes: Shapes, heads: int) -> int:
    """The rows (or columns) in which the heads of one projection lie; they must divide them."""
    shape = shapes[piece.array]
    rows = shape[piece.outputs] if len(shape) == 2 else -1
    if len(shape) != 2 or heads < 1 or rows % heads or rows < heads:
        axis = "columns" if piece.outputs else "rows"
        raise WeightsError(
            f"`{piece.array}` must be a matrix whose {axis} are {heads} heads of equal size. "
            f"Received: shape {shape}."
        )
    return rows


def _shared_of(piece: Piece, shapes: Shapes, heads: int, width: int, told: int | None) -> int:
    """Key and value heads, from an array that holds several projections."""
    rows = _rows(piece, shapes, 1)
    query = heads * width if "query" in piece.holds else 0
    shared = (rows - query) // (2 * width) if told is None else told
    whole = shared >= 1 and rows == query + 2 * shared * width
    if not whole or (piece.packing == "codegen" and (heads % CODEGEN_BLOCKS or shared != heads)):
        axis = "columns" if piece.outputs else "rows"
        held = f"{heads} query heads and " if query else ""
        count = "K" if told is None else f"{told}"
        more = f", in {CODEGEN_BLOCKS} equal blocks" if piece.packing == "codegen" else ""
        raise WeightsError(
            f"`{piece.array}` must be a matrix whose {axis} are {held}2 * {count} key and value "
            f"heads of width {width}{more}. Received: shape {shapes[piece.array]}. "
            "Check `num_heads` and `num_key_value_heads`."
        )
    return shared


def _check_told(
    kernels: Mapping[str, Piece], shapes: Shapes, sizes: Sizes, told: Told
) -> None:  # fmt: skip
    """That the shapes say nothing else than the caller."""
    facts = {
        "num_heads": (sizes.heads, "query"),
        "num_key_value_heads": (sizes.shared, "key"),
        "head_dim": (sizes.key_dim, "query"),
    }
    for name, (found, projection) in facts.items():
        wanted = getattr(told, name)
        if wanted is not None and wanted != found:
            array = kernels[projection].array
            raise WeightsError(
                f"`{name}` is {found} by the shapes: `{array}` has shape {shapes[array]}. "
                f"Received: {name}={wanted}."
            )


def _check_bias(piece: Piece, kernel: Piece, shapes: Shapes, sizes: Sizes) -> None:
    shape, beside = shapes[piece.array], shapes[kernel.array]
    if piece.form == "heads":
        wanted = beside[2:] if piece.holds == ("output",) else beside[1:]
    elif piece.holds == ("output",):
        wanted = (beside[1 - kernel.outputs],)
    elif piece.holds == kernel.holds:
        wanted = (beside[kernel.outputs],)
    else:
        wanted = (sizes.rows(piece.holds),)
    if shape != wanted:
        raise WeightsError(
            f"`{piece.array}` must have shape {wanted}, as `{kernel.array}` has shape {beside}. "
            f"Received: shape {shape}."
        )
