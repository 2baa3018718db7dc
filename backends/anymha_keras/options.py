"""The constructor's options: which are the config's, which are Keras's, and how they are saved."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import keras

from anymha.errors import ConfigError
from anymha.framework.dtypes import DtypeLike, checked_dtype_name, output_dtype
from anymha.framework.validation import checked_flag
from anymha.layer.arguments import BY_NAME
from anymha.options.config import AttentionConfig
from anymha.options.option import Option
from anymha.options.other_names import unknown_options

INITIALIZERS = ("kernel_initializer", "bias_initializer")
OBJECTS = {
    **dict.fromkeys(INITIALIZERS, keras.initializers),
    "kernel_regularizer": keras.regularizers,
    "bias_regularizer": keras.regularizers,
    "activity_regularizer": keras.regularizers,
    "kernel_constraint": keras.constraints,
    "bias_constraint": keras.constraints,
}
IN_KERAS = {
    "num_heads", "key_dim", "value_dim", "dropout", "use_bias", "output_shape", "attention_axes",
    "seed", *OBJECTS,
}  # fmt: skip
"""Options that `keras.layers.MultiHeadAttention` has, in all versions."""


class DtypePolicy(Protocol):
    """What `keras.DTypePolicy` is for type checkers."""

    @property
    def variable_dtype(self) -> Any:
        """The dtype of weights."""
        ...


@dataclass(frozen=True)
class Given:
    """What a constructor was given.

    Args:
        config: The options of anymha.
        flash_attention: Whether the layer is to refuse what Keras's flash attention cannot do.
        policy: Keras's dtype policy.
        compute_dtype: The one passed beside the policy, if any.
        initializers: Keras's own initialisers, by option; none for those of anymha.
        of_layer: Arguments of every Keras layer.
    """

    config: AttentionConfig
    flash_attention: bool
    policy: Any
    compute_dtype: str | None
    initializers: Mapping[str, keras.initializers.Initializer]
    of_layer: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class KerasOptions(AttentionConfig):
    """What the constructor takes.

    Args:
        trainable: Whether the weights are trained.
        autocast: Whether Keras casts floating inputs to the policy's compute dtype.
        use_gate: Keras's name of ``gate="elementwise"``.
        flash_attention: The layer picks its kernel itself, and none changes the results. True also
            refuses dropout and scores, as Keras's layer does.
    """

    dtype: Option[DtypeLike | DtypePolicy | Mapping[str, Any] | None, str] = cast(Any, None)
    trainable: bool = True
    autocast: bool = True
    use_gate: bool = False
    flash_attention: bool | None = None


OF_LAYER = {*inspect.signature(keras.layers.Layer.__init__).parameters, "input_dim", "input_shape"}
"""Arguments of every Keras layer."""


def read_options(args: tuple[Any, ...], options: dict[str, Any]) -> Given:
    """What a constructor was given, by place and by name."""
    flash = _flag(options, "flash_attention")
    gate = _flag(options, "use_gate") and options.setdefault("gate", "elementwise")
    if gate and gate != "elementwise":
        raise ConfigError(
            "`use_gate` is Keras's name of gate='elementwise'. Received: use_gate=True, "
            f"gate={gate!r}. Pass one of them."
        )
    fields = {field.name for field in dataclasses.fields(AttentionConfig)}
    of_layer = {name: options.pop(name) for name in list(options) if name not in fields}
    unknown = [name for name in of_layer if name not in OF_LAYER]
    if unknown:
        known = [field.name for field in dataclasses.fields(KerasOptions)]
        raise unknown_options(unknown, known, BY_NAME)
    for name, kind in OBJECTS.items():
        if name in options:
            options[name] = _deserialized(kind, options[name])
    policy, compute = _policy(options.pop("dtype", None), options.pop("compute_dtype", None))
    config = AttentionConfig(*args, **options, **core_dtypes(policy, compute))
    if flash and config.dropout > 0:  # in Keras's words
        raise ConfigError(
            "Dropout is not supported when flash attention is enabled. Please set dropout to 0.0 "
            "to use flash attention."
        )
    given = dict(zip(list(inspect.signature(AttentionConfig).parameters), args, strict=False))
    given |= options
    own = {name: given[name] for name in INITIALIZERS if _is_own(given.get(name))}
    return Given(config, flash, policy, compute, own, of_layer)


def _flag(options: dict[str, Any], name: str) -> bool:
    """Take an option that is True or False out of `options`; None and absent are False.

    Raises:
        ConfigError: it is neither.
    """
    return checked_flag(options.pop(name, None) or False, name, error=ConfigError)


def _policy(dtype: Any, compute_dtype: Any) -> tuple[Any, str | None]:
    """Keras's policy, and the dtype to compute in where that is not the policy's.

    Raises:
        ConfigError: the policy quantises, or the two do not go together.
    """
    policy = keras.dtype_policies.get(dtype)
    if policy.quantization_mode is not None:
        raise ConfigError(
            f"`dtype` must be a policy of floating dtypes. Received: {policy.name!r} with the "
            f"quantisation {policy.quantization_mode!r}. Call `quantize` of the model, or pass a "
            "`keras.dtype_policies.DTypePolicyMap` that names the projections."
        )
    if compute_dtype is None:
        return policy, None
    compute = checked_dtype_name(compute_dtype, "compute_dtype")
    if policy.name == "float32" and compute in ("float16", "bfloat16"):
        return keras.DTypePolicy(f"mixed_{compute}"), None
    if output_dtype(policy.variable_dtype, compute) != policy.compute_dtype:
        raise ConfigError(
            "`dtype` and `compute_dtype` must give results of the policy's dtype, "
            f"{policy.compute_dtype}. Received: dtype={policy.name!r}, compute_dtype={compute!r}. "
            f"Pass dtype={policy.name!r} alone."
        )
    return policy, compute


def core_dtypes(policy: Any, compute_dtype: str | None) -> dict[str, str | None]:
    """The config's `dtype` and `compute_dtype` for a policy, or for a layer that has one."""
    mixed = policy.compute_dtype != policy.variable_dtype
    compute = compute_dtype or (policy.compute_dtype if mixed else None)
    return {"dtype": policy.variable_dtype, "compute_dtype": compute}


def saved(config: AttentionConfig, initializers: Mapping[str, Any]) -> dict[str, Any]:
    """The options for `get_config`; those that Keras's layer has not, unless at their defaults."""
    found = config.to_dict()
    for name in ("dtype", "compute_dtype", "name"):
        del found[name]
    least = AttentionConfig(config.num_heads, config.key_dim)
    for name in found.keys() - IN_KERAS:
        if getattr(config, name) == getattr(least, name):
            del found[name]
    if found.get("gate") == "elementwise":
        del found["gate"]
        found["use_gate"] = True
    for name in OBJECTS:
        value = initializers.get(name, found[name])
        if callable(value):
            found[name] = keras.saving.serialize_keras_object(value)
    return found


def _deserialized(kind: Any, value: Any) -> Any:
    """Keras's object of what Keras has serialised, which has a "module"; else the value."""
    return kind.get(dict(value)) if isinstance(value, Mapping) and "module" in value else value


def _is_own(value: Any) -> bool:
    """Whether the user gave an instance of Keras's initialisers."""
    return isinstance(value, keras.initializers.Initializer)
