"""Rules of layouts: each returns the reason why weights do not fit, or None where they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from anymha.errors import LayoutError
from anymha.interchange.forms import Form
from anymha.interchange.packing import CODEGEN_BLOCKS, QKV, Sizes
from anymha.options.config import AttentionConfig

Limit = Callable[[Sizes, Mapping[str, np.ndarray]], str | None]


def same_heads(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """One key and value head for each query head."""
    if sizes.shared == sizes.heads:
        return None
    return (
        f"it has one key head for each query head. Received: {sizes.heads} query heads, "
        f"{sizes.shared} key and value heads. Use a layout with grouped heads, as "
        "'keras.GroupQueryAttention' or 'transformers.llama'"
    )


def same_widths(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """Value heads as wide as key heads."""
    if sizes.value_dim == sizes.key_dim:
        return None
    return (
        f"its value heads are as wide as its key heads. Received: key heads of width "
        f"{sizes.key_dim}, value heads of width {sizes.value_dim}. Use a layout with both widths, "
        "as 'keras.MultiHeadAttention' or 'equinox.MultiheadAttention'"
    )


def vector_output(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """Outputs are vectors."""
    shape = weights["output.kernel"].shape
    if len(shape) == 3:
        return None
    return (
        f"its outputs are vectors. Received: `output.kernel` of shape {shape}. Use "
        "'keras.MultiHeadAttention', whose outputs may have more axes"
    )


def square(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """Inputs, all heads together and outputs are equally wide."""
    inputs, outputs = weights["query.kernel"].shape[0], weights["output.kernel"].shape[2:]
    inner = sizes.heads * sizes.key_dim
    if outputs == (inputs,) and inner == inputs:
        return None
    return (
        f"its `embed_dim` is the width of its queries, of all heads together and of its outputs. "
        f"Received: queries of width {inputs}, {sizes.heads} heads of width {sizes.key_dim}, "
        f"outputs of shape {outputs}. Use a layout with these widths, as "
        "'equinox.MultiheadAttention'"
    )


def output_as_query(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """Outputs are as wide as the queries."""
    inputs, outputs = weights["query.kernel"].shape[0], weights["output.kernel"].shape[2:]
    if outputs == (inputs,):
        return None
    return (
        f"its outputs are as wide as its queries. Received: queries of width {inputs}, outputs of "
        f"shape {outputs}. Use a layout with an output width, as 'equinox.MultiheadAttention'"
    )


def gate_of_each_element(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """A gate has a number for each number of the context."""
    gate = weights.get("gate.kernel")
    if gate is None or gate.ndim == 3:
        return None
    return (
        "its gate has a number for each of the heads' numbers, gate='elementwise'. Received: "
        f"`gate.kernel` of shape {gate.shape}, with one for each head"
    )


def with_gate(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """All layers have a gate."""
    if "gate.kernel" in weights:
        return None
    return "its layers have a gate. Received: no `gate.kernel`. Use the layout of a layer without"


def one_memory(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """Keys and values are made of inputs of one width."""
    return _one_width(("key", "value"), weights)


def one_input(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """Queries, keys and values are made of inputs of one width."""
    return _one_width(QKV, weights)


def blocks_of_heads(sizes: Sizes, weights: Mapping[str, np.ndarray]) -> str | None:
    """CodeGen's heads lie in four equal blocks."""
    if sizes.heads % CODEGEN_BLOCKS == 0:
        return None
    return f"its heads lie in {CODEGEN_BLOCKS} equal blocks. Received: {sizes.heads} heads"


def _one_width(names: Sequence[str], weights: Mapping[str, np.ndarray]) -> str | None:
    widths = [weights[f"{name}.kernel"].shape[0] for name in names]
    if len(set(widths)) == 1:
        return None
    return (
        f"it makes {', '.join(names)} of inputs of one width. Received: widths "
        f"{', '.join(map(str, widths))}. Use a layout with a kernel for each, as "
        "'keras.MultiHeadAttention'"
    )


def limits_of(form: Form) -> list[Limit]:
    """The rules that follow from a form's arrays."""
    rules: list[Limit] = []
    for piece in form.pieces:
        if piece.part == "kernel" and len(piece.holds) > 1:
            rules.append(same_widths)
            if "key" in piece.holds:
                rules.append(one_input if len(piece.holds) == 3 else one_memory)
        if piece.part == "kernel" and "gate" in piece.holds and not piece.optional:
            rules += [with_gate, gate_of_each_element]
        if piece.part == "kernel" and piece.packing == "codegen":
            rules += [same_heads, blocks_of_heads]
        if piece.part == "kernel" and piece.holds == ("output",) and piece.form != "heads":
            rules.append(vector_output)
    return list(dict.fromkeys(rules))


def choose_form(
    layout: str,
    forms: Sequence[Form],
    limits: Sequence[Limit],
    weights: Mapping[str, np.ndarray],
    sizes: Sizes,
    name: str | None,
) -> Form:
    """Choose the form to write: the named one, or else the first that can hold the weights.

    Raises:
        LayoutError: none can, and why; or the layout has no form of that name.
    """
    named = {form.name: form for form in forms}
    if name is not None and name not in named:
        raise LayoutError(
            f"`form` of {layout} must be one of {', '.join(map(repr, named))}. Received: {name!r}."
        )
    reasons = []
    for form in forms if name is None else [named[name]]:
        rules = dict.fromkeys([*limits, *form.limits, *limits_of(form)])
        reason = next(filter(None, (rule(sizes, weights) for rule in rules)), None)
        if reason is None:
            return form
        reasons.append(reason)
    raise LayoutError(f"{layout} cannot hold these weights: {reasons[-1]}.")


def check_scale(
    layout: str, own: float | str | None, sizes: Sizes, config: AttentionConfig
) -> None:
    """Check that the layout's layers scale the logits as the config states.

    Raises:
        LayoutError: they scale otherwise, and results would change.
    """
    if isinstance(own, str):
        return
    theirs = 1 / math.sqrt(sizes.key_dim) if own is None else own
    if not math.isclose(config.scale_value, theirs, rel_tol=1e-6):
        raise LayoutError(
            f"A layer of {layout} multiplies the logits by {theirs:g}; the config has "
            f"`scale` {config.scale_value:g}, and the results would change. Multiply "
            f"`query.kernel` and `query.bias` by {config.scale_value / theirs:g} first, and pass a "
            f"config with `scale` {theirs:g}."
        )
