"""The number of heads and their widths, from the shapes of a layer's arrays and stated sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anymha.errors import WeightsError
from anymha.interchange.packing import CODEGEN_BLOCKS, QKV, Piece, Sizes

HEADS_APART = ("heads", "einsum")
"""Forms whose heads have an axis of their own."""
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class StatedSizes:
    """Sizes that the caller states, or an extra array shows; None where unknown."""

    num_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None


def solve_sizes(layout: str, pieces: Sequence[Piece], shapes: Shapes, stated: StatedSizes) -> Sizes:
    """Find the sizes with which all shapes fit one another.

    Args:
        layout: The layout's name, for messages.
        pieces: The layout's arrays; the layer has those that `shapes` names.
        shapes: The arrays' shapes by name.
        stated: Sizes that are known otherwise.

    Raises:
        WeightsError: the shapes do not fit one another or the stated sizes, or leave sizes open.
    """
    kernels = {name: p for p in pieces if p.part == "kernel" for name in p.holds}
    for piece in pieces:
        _check_rank(piece, shapes)
    if kernels["query"].form in HEADS_APART:
        sizes = _of_heads(kernels, shapes)
    else:
        sizes = _of_matrices(layout, kernels, shapes, stated)
    _check_stated(kernels, shapes, sizes, stated)
    for piece in pieces:
        if piece.part == "bias" and piece.array in shapes:
            kernel = kernels[piece.holds[0]].array
            if kernel not in shapes:
                raise WeightsError(
                    f"`{piece.array}` needs `{kernel}` beside it. Missing: {kernel}."
                )
            _check_bias(piece, kernels[piece.holds[0]], shapes, sizes)
    return sizes


def possible_heads(pieces: Sequence[Piece], shapes: Shapes) -> list[StatedSizes]:
    """All numbers of query heads that divide their rows; for shapes that leave the number open."""
    kernels = {name: p for p in pieces if p.part == "kernel" for name in p.holds}
    if kernels["query"].form in HEADS_APART:
        return [StatedSizes()]
    mark = kernels["query"] if kernels["query"].holds == ("query",) else kernels["output"]
    shape = shapes[mark.array]
    rows = shape[mark.outputs] if len(shape) == 2 else 1
    return [StatedSizes(num_heads=heads) for heads in range(1, rows + 1) if rows % heads == 0] or [
        StatedSizes(1)
    ]


def _check_rank(piece: Piece, shapes: Shapes) -> None:
    shape = shapes.get(piece.array)
    if shape is None or piece.part == "bias" or piece.form not in HEADS_APART:
        return
    if piece.form == "einsum" and (
        len(shape) != piece.rank or shape[:-3] != (len(piece.holds),) * (len(piece.holds) > 1)
    ):
        first = f"{len(piece.holds)}, " if len(piece.holds) > 1 else ""
        raise WeightsError(
            f"`{piece.array}` must have shape ({first}heads, inputs, width). Received: shape "
            f"{shape}."
        )
    gate = piece.holds == ("gate",)
    if gate and len(shape) in (2, 3):
        return
    if piece.form == "heads" and len(shape) != 3 and (
        piece.rank is not None or len(shape) < 3 or gate
    ):  # fmt: skip
        outer = piece.rank is None and not gate
        form = "(heads, width, outputs)" if outer else "(inputs, heads, width)"
        raise WeightsError(f"`{piece.array}` must have shape {form}. Received: shape {shape}.")


def _of_heads(kernels: Mapping[str, Piece], shapes: Shapes) -> Sizes:
    of = {
        name: piece.heads_shape(shapes[piece.array])
        for name, piece in kernels.items()
        if piece.array in shapes
    }
    query, key, value = (of[name] for name in QKV)
    sizes = Sizes(query[1], key[1], query[2], value[2])
    for name, shape in of.items():
        split = sizes.split(name)
        at = 0 if name == "output" else 1
        first = query[:1] if name == "gate" else shape[:at]
        _check_fit(name, shape, (*first, *split, *shape[at + 2 :])[: len(shape)])
    return sizes


def _check_fit(projection: str, shape: Shape, expected: Shape) -> None:
    if shape != expected:
        raise WeightsError(
            f"The layers do not fit one another: `{projection}.kernel` has shape {shape}, "
            f"the others need {expected}."
        )


def _of_matrices(
    layout: str, kernels: Mapping[str, Piece], shapes: Shapes, stated: StatedSizes
) -> Sizes:  # fmt: skip
    query, key, output = kernels["query"], kernels["key"], kernels["output"]
    alone = query.holds == ("query",)
    # An array of several projections has more rows than heads; the output has as many inputs.
    mark = query if alone else output
    heads, head_dim = stated.num_heads, stated.head_dim
    if heads is None and head_dim is None:
        raise WeightsError(
            f"{layout} needs `num_heads`, the number of query heads (or `head_dim`, the width of "
            "each): its shapes do not show it. It is in the model's configuration."
        )
    if heads is None:
        heads = _rows(mark, shapes, 1) // max(head_dim or 0, 1)
    key_dim = _rows(mark, shapes, heads) // heads
    if key.holds == ("key",):
        shared = stated.num_key_value_heads
        if shared is None:
            rows = _rows(key, shapes, 1)
            shared = rows // key_dim if rows % key_dim == 0 and rows else heads
        width = _rows(key, shapes, shared) // shared
        inputs = shapes[key.array][1 - key.outputs]
        _check_fit("key", (inputs, shared, width), (inputs, shared, key_dim))
        value_dim = _rows(kernels["value"], shapes, shared) // shared
    else:
        shared = _shared_heads(key, shapes, heads, key_dim, stated.num_key_value_heads)
        value_dim = key_dim
    width = _rows(output, shapes, heads) // heads
    outputs = shapes[output.array][1 - output.outputs]
    _check_fit("output", (heads, width, outputs), (heads, value_dim, outputs))
    if (not alone or query.tiled) and heads % shared:
        raise WeightsError(
            f"`num_heads` must be a multiple of the number of key and value heads. Received: "
            f"{heads} query heads, and `{key.array}` has {shared} key heads."
        )
    sizes = Sizes(heads, shared, key_dim, value_dim)
    gate = kernels.get("gate")
    if gate is not None and gate.array in shapes:
        _check_gate(gate, query, shapes, sizes)
    return sizes


def _check_gate(gate: Piece, query: Piece, shapes: Shapes, sizes: Sizes) -> None:
    """Check the array of a gate, alone or with the queries, that has a number for each element."""
    shape, inputs = shapes[gate.array], shapes[query.array][1:]
    expected = (sizes.rows(gate.holds), *inputs)
    if shape != expected or len(shape) != 2:
        raise WeightsError(
            f"`{gate.array}` must be a matrix whose rows are {' and '.join(gate.holds)} of "
            f"{sizes.heads} heads of width {sizes.value_dim}, with the inputs of the queries. "
            f"Received: shape {shape}."
        )


def _rows(piece: Piece, shapes: Shapes, heads: int) -> int:
    """The number of rows (or columns) of one projection; `heads` must divide it."""
    shape = shapes[piece.array]
    rows = shape[piece.outputs] if len(shape) == 2 else -1
    if len(shape) != 2 or heads < 1 or rows % heads or rows < heads:
        axis = "columns" if piece.outputs else "rows"
        raise WeightsError(
            f"`{piece.array}` must be a matrix whose {axis} are {heads} heads of equal size. "
            f"Received: shape {shape}."
        )
    return rows


def _shared_heads(piece: Piece, shapes: Shapes, heads: int, width: int, stated: int | None) -> int:
    """The number of key and value heads, from an array of several projections."""
    rows = _rows(piece, shapes, 1)
    query = heads * width if "query" in piece.holds else 0
    shared = (rows - query) // (2 * width) if stated is None else stated
    fits = shared >= 1 and rows == query + 2 * shared * width
    if not fits or (piece.packing == "codegen" and (heads % CODEGEN_BLOCKS or shared != heads)):
        axis = "columns" if piece.outputs else "rows"
        queries = f"{heads} query heads and " if query else ""
        count = "K" if stated is None else f"{stated}"
        more = f", in {CODEGEN_BLOCKS} equal blocks" if piece.packing == "codegen" else ""
        raise WeightsError(
            f"`{piece.array}` must be a matrix whose {axis} are {queries}2 * {count} key and value "
            f"heads of width {width}{more}. Received: shape {shapes[piece.array]}. "
            "Check `num_heads` and `num_key_value_heads`."
        )
    return shared


def _check_stated(
    kernels: Mapping[str, Piece], shapes: Shapes, sizes: Sizes, stated: StatedSizes
) -> None:  # fmt: skip
    """Check that the shapes agree with the stated sizes."""
    facts = {
        "num_heads": (sizes.heads, "query"),
        "num_key_value_heads": (sizes.shared, "key"),
        "head_dim": (sizes.key_dim, "query"),
    }
    for name, (shown, projection) in facts.items():
        expected = getattr(stated, name)
        if expected is not None and expected != shown:
            array = kernels[projection].array
            raise WeightsError(
                f"`{name}` is {shown} by the shapes: `{array}` has shape {shapes[array]}. "
                f"Received: {name}={expected}."
            )


def _check_bias(piece: Piece, kernel: Piece, shapes: Shapes, sizes: Sizes) -> None:
    shape, kernel_shape = shapes[piece.array], shapes[kernel.array]
    if piece.form == "heads":
        expected = kernel_shape[2:] if piece.holds == ("output",) else kernel_shape[1:]
    elif piece.holds == ("output",):
        expected = (kernel_shape[1 - kernel.outputs],)
    elif piece.holds == kernel.holds:
        expected = (kernel_shape[kernel.outputs],)
    else:
        expected = (sizes.rows(piece.holds),)
    if shape != expected:
        raise WeightsError(
            f"`{piece.array}` must have shape {expected}, as `{kernel.array}` has shape "
            f"{kernel_shape}. Received: shape {shape}."
        )
