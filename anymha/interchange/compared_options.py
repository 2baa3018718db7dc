"""The options of a layer that change what a call computes, compared by what they mean.

Every field of `AttentionConfig` is such an option unless a table below says otherwise, so that an
option added later is compared too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable
from typing import Any

from anymha.attention.features.alibi import alibi_slopes
from anymha.attention.masks import FAR
from anymha.errors import LayoutError
from anymha.options.config import AttentionConfig
from anymha.options.training import OBJECTS

WEIGHTS_OPTIONS = (
    "num_heads", "key_dim", "value_dim", "num_key_value_heads", "use_bias", "output_shape",
    "query_features", "value_features", "key_features",
)  # fmt: skip
"""Options that the names and shapes of canonical weights show: other ones do not fit the layer."""
SAME_RESULTS = (
    *OBJECTS, "dropout", "dropout_rng", "dtype", "compute_dtype", "seed", "name", "memory_budget",
)  # fmt: skip
"""Options that leave the meaning of a call as it is: training, precision, memory."""
IGNORED_BY_LIBRARIES = ("dropout", "dropout_rng", "dtype", "seed", "name", "memory_budget",
                        "kernel_initializer", "bias_initializer")  # fmt: skip
"""Options that a library's layer has in its own way, or that are of no use once weights exist."""
ALL_OPTIONS = ("*",)
"""For a layout whose layers have every option."""
PRECISION = 1e-6
"""Relative difference up to which two numbers are one option: libraries store some in float32."""


def result_options(*configs: AttentionConfig) -> tuple[str, ...]:
    """The options that change what a call computes, and that weights do not show.

    Args:
        *configs: Whose options; default those of `AttentionConfig`.
    """
    skipped = (*WEIGHTS_OPTIONS, *SAME_RESULTS)
    return tuple(name for name in _names(configs) if name not in skipped)


def differing_options(
    config: AttentionConfig, other: AttentionConfig, *, unknown: Container[str] = ()
) -> tuple[str, ...]:
    """The options by which two layers of the same weights compute different results.

    Args:
        config: The options of one layer.
        other: Those of the other.
        unknown: Options whose values are not known, which are not compared.
    """
    names = result_options(config, other)
    return tuple(n for n in names if n not in unknown and not _same(config, other, n))


def changed_options(config: AttentionConfig) -> tuple[str, ...]:
    """The options that are not at their defaults, of those that change what a call computes."""
    return differing_options(config, _default_of(config))


def show_options(config: AttentionConfig, names: Iterable[str]) -> str:
    """Options as arguments: ``scale=0.5, sliding_window=3``."""
    return ", ".join(f"{name}={_meaning(config, name)!r}" for name in names)


def check_same_results(
    target: str,
    config: AttentionConfig,
    source: AttentionConfig,
    *,
    unknown: Container[str] = (),
) -> None:
    """Check that a layer computes with its weights what the layer computes that they are from.

    Args:
        target: The layer, in words.
        config: Its options.
        source: The options of the layer that the weights are from.
        unknown: Options that one of the two does not state.

    Raises:
        LayoutError: an option differs.
    """
    names = differing_options(config, source, unknown=unknown)
    if names:
        wanted = show_options(source, names)
        raise LayoutError(
            f"The weights are of a layer with {wanted}; {target} has {show_options(config, names)},"
            f" and the results would differ. Make the layer with {wanted}, or pass `dict(weights)` "
            "to set the arrays all the same."
        )


def check_supported(
    layout: str, config: AttentionConfig, supported: Container[str], *, training: bool = False
) -> None:
    """Check that a library's layer has all options that the config asks for.

    Args:
        layout: The layout's name.
        config: The config.
        supported: Options that its layers have.
        training: Whether options that change no results count too, as regularizers.

    Raises:
        LayoutError: the layer lacks an option that is not at its default.
    """
    if "*" in supported:
        return
    # The layout's own rule for the scale, whose message says how to fold it into the weights.
    names = [name for name in changed_options(config) if name != "scale"]
    if training:
        default = _default_of(config)
        names += [
            name
            for name in SAME_RESULTS
            if name not in IGNORED_BY_LIBRARIES and getattr(config, name) != getattr(default, name)
        ]
    lacking = [name for name in names if name not in supported]
    if lacking:
        default = show_options(_default_of(config), lacking[:1])
        raise LayoutError(
            f"A layer of {layout} has no option for {show_options(config, lacking)}. Make a layer "
            f"without, for example with `dataclasses.replace(config, {default})`; or convert the "
            "arrays alone, with `anymha.from_canonical(dict(weights), ...)` and no config."
        )


def _names(configs: tuple[AttentionConfig, ...]) -> list[str]:
    kinds = [type(config) for config in configs] or [AttentionConfig]
    return list(dict.fromkeys(field.name for kind in kinds for field in dataclasses.fields(kind)))


def _default_of(config: AttentionConfig) -> AttentionConfig:
    return type(config)(config.num_heads, config.key_dim)


def _meaning(config: AttentionConfig, name: str) -> Any:
    """The option's value; where it is the default None, what None stands for."""
    if name == "scale":
        return config.scale_value
    value = getattr(config, name, None)
    if name == "alibi" and value == alibi_slopes(config.num_heads):
        return True
    return None if name == "sliding_window" and value is not None and value > FAR else value


def _same(config: AttentionConfig, other: AttentionConfig, name: str) -> bool:
    if name == "scale" and config.scale is None and other.scale is None:
        return True  # widths that differ are seen in the shapes
    one, two = _meaning(config, name), _meaning(other, name)
    if name == "attention_axes":
        return _same_axes(one, two)
    numbers = isinstance(one, (int, float)) and isinstance(two, (int, float))
    if numbers and (isinstance(one, float) or isinstance(two, float)):
        return math.isclose(one, two, rel_tol=PRECISION)
    return one == two


def _same_axes(one: Any, two: Any) -> bool:
    """Whether two layers attend over the same axes, for inputs that both can take.

    None stands for all axes but the first and the last: (1,) or (-2,) of inputs (B, T, D).
    """
    if one is not None and two is not None:
        return one == two
    axes = two if one is None else one
    if axes is None:
        return True
    count = len(axes)
    return axes in (tuple(range(1, count + 1)), tuple(range(-count - 1, -1)))
