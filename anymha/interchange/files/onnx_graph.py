"""The projections in a graph of ONNX, and the names that their arrays had before the export.

Exporters fold the transposition of a linear layer's weight into it, and name the result anew, as
``onnx::MatMul_1582`` or ``val_19``; and they merge equal arrays, so that one bias may serve several
layers. The layer's name is that of the node, where torch's tracer made it, or that of a bias which
no other node has. Where the two contradict each other, or nothing is certain, the new name stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

ANONYMOUS = re.compile(r"((onnx::)?(MatMul|Gemm)|val)_\d+(_quantized)?")
"""The names that exporters give to arrays that they changed."""
_SCOPE = re.compile(r"/(.+)/MatMul")
_WEIGHT, _BIAS = "weight", "bias"


@dataclass
class Node:
    """A node: its operator, its own name, and the names of its inputs and outputs."""

    operator: str = ""
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def former_names(
    nodes: Iterable[Node], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, bool]]:
    """The arrays that had other names before the export.

    Args:
        nodes: The graph's nodes.
        shapes: The shapes of its arrays, by name.

    Returns:
        The array's name, and whether it is transposed, by the former name. The name of a matrix
        that has a former name is used no more.
    """
    nodes = list(nodes)
    uses = Counter(name for node in nodes for name in node.inputs)
    readers = {name: node for node in nodes for name in node.inputs}
    found: dict[str, tuple[str, bool]] = {}
    for node in nodes:
        if node.operator not in ("MatMul", "Gemm") or len(node.inputs) < 2 or not node.outputs:
            continue
        matrix = node.inputs[1]
        if len(shapes.get(matrix, ())) != 2:
            continue
        bias = _bias(node, readers, uses, shapes)
        folded = node.operator == "MatMul" and ANONYMOUS.fullmatch(matrix) is not None
        weight = _former(node, matrix, bias, uses) if folded else matrix
        if weight is None or (folded and (weight in shapes or weight in found)):
            continue
        if folded:
            found[weight] = matrix, True
        beside = weight.removesuffix(_WEIGHT) + _BIAS
        if bias and weight.endswith(_WEIGHT) and beside not in shapes and beside not in found:
            found[beside] = bias, False
    return found


def _bias(
    node: Node, readers: Mapping[str, Node], uses: Counter[str], shapes: Mapping[str, tuple]
) -> str | None:
    """The array that is added to what a node makes, if it is as long as a row of it."""
    names = node.inputs[2:3]
    result = node.outputs[0]
    if not names and uses[result] == 1 and readers[result].operator == "Add":
        names = [name for name in readers[result].inputs if name != result]
    return next((name for name in names if len(shapes.get(name, ())) == 1), None)


def _former(node: Node, matrix: str, bias: str | None, uses: Counter[str]) -> str | None:
    """The name that a matrix had, by its node and the bias after it; None if it is not certain."""
    scope = _SCOPE.fullmatch(node.name)
    by_node = f"{scope[1].replace('/', '.')}.{_WEIGHT}" if scope else None
    by_bias = None
    if bias is not None and bias.endswith(_BIAS):
        by_bias = bias.removesuffix(_BIAS) + _WEIGHT
    if by_node == by_bias:
        return by_node
    if uses[matrix] > 1 or (bias is not None and uses[bias] == 1 and by_node and by_bias):
        return None  # one layer that is called twice, or merged ones; or a contradiction
    return by_node or (by_bias if bias is not None and uses[bias] == 1 else None)
