"""What a layer's names show besides its layout: buffers, quantisation, adapters, further steps.

An array that the layout does not know may be a buffer, which means nothing; or it may change what
the layer computes, and then converting the others alone would be silently wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from anymha.framework.dtypes import FLOATING
from anymha.interchange.files.onnx_graph import ANONYMOUS
from anymha.text import quoted, shown

Shapes = Mapping[str, tuple[int, ...]]

_SEPARATOR = re.compile(r"[./]")
MASKS = {"bias", "masked_bias", "mask", "attn_mask", "causal_mask", "tril"}
_FAR = -1000.0
"""At most what a mask adds to a logit that is not to count."""
_BUFFERS = {
    "position_ids", "relative_position_index", "num_batches_tracked", "seed_generator_state",
    "_extra_state", "version", "_float_tensor",
}  # fmt: skip
_STATES = {"rngs", "seed_generator"}
_ROTARY = {
    "inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "cos", "sin", "freqs", "freqs_cis",
    "freqs_cos", "freqs_sin", "embed_positions",
}  # fmt: skip
_SLOT = re.compile(
    r".*[./](kernel|bias|weight)[./]((adam|adamw|lamb)_[mv]|(Adam|AdamW|Momentum|RMSProp|Adagrad|"
    r"Adadelta|Ftrl|LAMB)(_\d+)?|ExponentialMovingAverage)",
    re.DOTALL,
)
"""An average that an optimiser of TensorFlow keeps of a variable or its gradients."""
_STEP = re.compile(r"bias|scale|scaling|zero_point|temperature|slopes|alibi|sink|gate|relative|rel_"
                   r"|adapter|sub_?(layer_?)?(norm|ln)|lambda_(q|k|init)")  # fmt: skip
_MLP = re.compile(r"(ffn|mlp|moe|gate_(up_)?proj)")
_NORM = re.compile(r"norm|ln(?![a-z])")
_QK_NORM = re.compile(r"(^|_)(q|k|v|qk|query|key|value)_?(layer_?)?(norm|ln)")
_ATTENTION = re.compile(r"att(entio)?n|mha", re.IGNORECASE)
"""What the module of an attention layer is called; another one may be a whole block."""
_DROPOUT = re.compile(r"drop")
_NORM_AFTER = re.compile(r"layer_?norm", re.IGNORECASE)
"""The norm after the output projection, in a module of both, as in BERT."""
_PROJECTED = re.compile(r"(^|_)(q|k|v|qk|kv|qkv|query|key|value)(?![a-z])")

_MARKS = {
    r"(weight_)?quantized": "quantised (ONNX int8)",
    r"weight[._](absmax|quant_map|nested_absmax|nested_quant_map|quant_state[._].*)": (
        "quantised (bitsandbytes 4 bit)"
    ),
    r"SCB|weight_format": "quantised (bitsandbytes int8)",
    r"g_idx": "quantised (GPTQ)",
    r"qweight|qzeros": "quantised (GPTQ or AWQ)",
    r"weight_packed|weight_shape|weight_g_idx|weight_zero_point": (
        "quantised (compressed-tensors)"
    ),
    r"weight_scales?(_inv|_2)?|input_scale": "quantised ({dtype} with scales)",
    r"W_q": "quantised (HQQ)",
    r"codebooks|codes": "quantised (AQLM)",
    r"weight[._]_(data|scale|zeropoint)|weight_qtype": "quantised (quanto)",
    r"_packed_params([._].*)?": "quantised (torch)",
    r"(lora_(a|b|down|up|embedding_a|embedding_b|magnitude_vector)|base_layer|hada_w\d.*"
    r"|lokr_w\d.*|ia3_l|dora_scale|lora[._](down|up))([._].*)?": "LoRA adapter",
}
"""What an array of a projection shows by the end of its name, the surest first."""
_MARK = re.compile(
    r"(?P<module>.*?)[._/](?:"
    + "|".join(f"(?P<m{n}>{mark})" for n, mark in enumerate(_MARKS))
    + ")",
    re.IGNORECASE | re.DOTALL,  # else a name's end in a new line is tried from each separator
)
MLA_REASON = (
    "Multi-head latent attention (DeepSeek's `kv_a_proj_with_mqa`) cannot be converted: its keys "
    "and values pass through a shared low-rank projection and a norm, and its heads mix rotated "
    "and plain parts, for which the canonical form has no place."
)
ADVICE = {
    "quantised": "Convert the model before it was quantised, or dequantise it first.",
    "LoRA adapter": "Merge the adapter into its model first (peft: `merge_and_unload`).",
}


def changed_modules(names: Iterable[str], dtypes: Mapping[str, str]) -> dict[str, str]:
    """The modules whose weights are quantised or have an adapter, and which, by their names.

    Args:
        names: All names of a file or a layer.
        dtypes: The dtypes' names by the arrays' names, as far as they are known.
    """
    marks = list(_MARKS.values())
    found: dict[str, int] = {}
    for name in names:
        match = _MARK.fullmatch(name)
        if match is not None:
            number = next(n for n in range(len(marks)) if match[f"m{n}"] is not None)
            module = match["module"]
            found[module] = min(number, found.get(module, number))
    words = {}
    for module, number in found.items():
        dtype = dtypes.get(f"{module}.weight", "few bits")
        dtype = f"fp8, {dtype}," if dtype.startswith("float8") else dtype
        words[module] = marks[number].format(dtype=dtype)
    return words


def remarks_on(tensors: Mapping[str, Any]) -> list[str]:
    """What the names of a file say about all of it: quantised or adapted, or named anew by ONNX.

    Args:
        tensors: The file's tensors by name.
    """
    kinds: dict[str, list[str]] = {}
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    for module, words in changed_modules(tensors, dtypes).items():
        kinds.setdefault(words, []).append(module)
    remarks = [
        f"{len(modules)} matrices are no plain weights, as {quoted(modules[0])}: {words}."
        for words, modules in kinds.items()
    ]
    latent = [name for name in tensors if "kv_a_proj_with_mqa" in name]
    if latent:
        remarks.append(f"{MLA_REASON} It is in {len(latent)} arrays, as {quoted(latent[0])}.")
    renamed = [name for name in tensors if ANONYMOUS.fullmatch(name)]
    if renamed:
        remarks.append(
            f"The exporter renamed {len(renamed)} matrices ({shown(renamed[0])}, ...): "
            "which projections they are cannot be told from their names. Convert the file "
            "that was exported."
        )
    return remarks


def not_floats(dtypes: Mapping[str, str]) -> str | None:
    """What weights of other dtypes than floats are: quantised; None where all are floats."""
    wrong = sorted({dtype for dtype in dtypes.values() if dtype not in FLOATING})
    return f"quantised ({', '.join(wrong)})" if wrong else None


def refusal(words: str) -> str:
    """The sentence that refuses a layer which is quantised or has an adapter."""
    kind = words.partition(" (")[0]
    return f"it is no plain layer: {words}. {ADVICE[kind]}"


def is_buffer(name: str, shape: tuple[int, ...], rotary: bool) -> bool:
    """Whether an array means nothing to a layer: a mask, tables of angles, states of training.

    Args:
        name: Its name, relative to the layer.
        shape: Its shape.
        rotary: Whether the layer rotates queries and keys; else tables of angles mean something.
    """
    parts = _SEPARATOR.split(name)
    leaf = parts[-1]
    if leaf == "masked_bias":
        return set(shape) <= {1}
    if leaf in MASKS:
        square = len(shape) >= 2 and shape[-1] == shape[-2] and set(shape[:-2]) <= {1}
        return square and (leaf != "bias" or len(parts) == 1)
    if _SLOT.fullmatch(name):
        return True
    return leaf in _BUFFERS or not _STATES.isdisjoint(parts) or (rotary and leaf in _ROTARY)


def may_be_mask(name: str, dtype: np.dtype) -> bool:
    """Whether the values alone tell if a buffer is a causal mask, or a learned bias of its name."""
    *before, leaf = _SEPARATOR.split(name)
    if leaf == "masked_bias" or (leaf == "bias" and before):
        return False
    return leaf in MASKS and dtype.name not in ("bool", "uint8")


def learned(name: str, array: np.ndarray) -> str | None:
    """Why an array under a mask's name is no causal mask by its values; None where it is one.

    A mask has a 1, or a 0 where the others are far below, where a query sees a key: nowhere after
    its own position. An array of one value changes nothing.
    """
    if array.ndim < 2 or not may_be_mask(name, array.dtype):
        return None
    values = np.unique(array)
    if values.size <= 1:
        return None
    low, high = values[0], values[-1]
    either = values.size == 2 and ((low, high) == (0, 1) or (high == 0 and low <= _FAR))
    if either and not np.triu(array == high, 1).any():
        return None
    return f"`{name}` is no causal mask by its values, but may be a learned bias of the logits"


def is_own(name: str, modules: Iterable[str], prefix: str) -> bool:
    """Whether a name after a layer's prefix is the layer's.

    Without a prefix it may be any other module's: the layer's are those beside the projections, or
    within one of the layer's own modules, as ``self.q_norm.weight`` beside ``self.query``.
    """
    parts = _SEPARATOR.split(name)
    return (
        bool(prefix) or len(parts) <= 2 or any(_homes(parts, modules))
    )  # the root's name is empty


def _homes(parts: list[str], modules: Iterable[str]) -> list[str]:
    """The layer's own modules that an array is in: the names that projections' names begin with."""
    homes = {tuple(_SEPARATOR.split(module)[:-1]) for module in modules}
    return [".".join(home) for home in homes if tuple(parts[: len(home)]) == home]


def changes_results(name: str, modules: Iterable[str], prefix: str) -> str | None:
    """Why an array that a layout does not know may change what its layers compute; else None.

    In the module of an attention layer, and in those within it that hold projections, any array
    may. In a module that may be a whole block, the array's name must say so.

    Args:
        name: The array's name, relative to the layer.
        modules: The names of the projections.
        prefix: What the names of the layer begin with.
    """
    parts = _SEPARATOR.split(name)
    path = "/".join(parts)
    modules = list(modules)
    homes = [_SEPARATOR.split(module) for module in modules]
    for home in homes:
        if path.startswith("/".join(home) + "/"):
            return f"`{name}` belongs to the projection `{'.'.join(home)}`"
    if not is_own(name, modules, prefix):
        return None
    beside = any(parts[:-1] == home[: len(parts) - 1] for home in homes)
    if beside and _STEP.search(parts[-1].lower()):
        return f"`{name}` is a bias or a scale beside the projections"
    inside = [part.lower() for part in parts[:-1]]
    if any((_NORM.search(part) and _PROJECTED.search(part)) or _QK_NORM.search(part)
           for part in inside):  # fmt: skip
        return f"`{name}` is a norm of queries, keys or values"
    if parts[-1] in _ROTARY:
        return f"`{name}` shows rotary positions"
    within = [home for home in _homes(parts, modules) if home or is_attention(prefix)]
    steps = any(map(_STEP.search, inside)) and not any(map(_MLP.match, inside))
    if steps or (within and not _after_the_output(parts, homes)):
        return f"`{name}` is a step of the attention"
    return None


def is_attention(prefix: str) -> bool:
    """Whether a prefix ends with the module of an attention layer, whatever its number."""
    words = [part for part in _SEPARATOR.split(prefix) if part and not part.isdecimal()]
    return bool(words) and _ATTENTION.search(words[-1]) is not None


def of_mlp(names: Iterable[str], prefix: str) -> str | None:
    """Why an array named as an MLP's is no part of an attention layer; None where it may be one.

    In the module of an attention layer, as in arrays without any prefix, it is a gate.

    Args:
        names: The names of the layer's arrays.
        prefix: What they begin with in the file.
    """
    if not prefix or is_attention(prefix):
        return None
    found = (name for name in names if _MLP.match(name.lower()))
    reasons = (f"`{name}` is an MLP's in a module that has other layers too." for name in found)
    return next(reasons, None)


def _after_the_output(parts: list[str], homes: list[list[str]]) -> bool:
    """Whether an array is a state of dropout, or a norm in the output projection's own module."""
    output = homes[-1][:-1] if homes else []
    apart = bool(output) and output not in [home[:-1] for home in homes[:-1]]
    behind = apart and parts[: len(output)] == output and len(parts) == len(output) + 2
    return any(_DROPOUT.search(part) for part in parts) or (
        behind and _NORM_AFTER.fullmatch(parts[-2]) is not None
    )
