"""Rotary positions: pairs of columns of queries and keys, turned by an angle for each position.

    (a, b) -> (a cos(m w) - b sin(m w), b cos(m w) + a sin(m w))      position m, frequency w

The product of a query and a key then depends on the difference of their positions alone.

References:
    J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from anymha.attention.features.base import Feature, FeatureOptions
from anymha.attention.features.frequencies import (
    attention_factor,
    dynamic_ratio,
    frequencies,
    original_length,
)
from anymha.errors import ConfigError, UnknownOptionError
from anymha.framework.dtypes import dtype_name, working_dtype
from anymha.framework.names import answers
from anymha.framework.protocol import Array, Dim, Ops
from anymha.framework.shapes import is_known

LAYOUTS = ("half", "interleaved")
COLUMNS = ("first", "last")
REAL = ("float32", "float64")
_ORIGINAL = "original_max_position_embeddings"
SCALING_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        (),
        ("factor", _ORIGINAL, "attention_factor", "mscale", "mscale_all_dim", "beta_fast",
         "beta_slow", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "longrope": (("short_factor", "long_factor"), ("factor", _ORIGINAL, "attention_factor")),
    "proportional": ((), ("factor", "partial_rotary_factor")),
}  # fmt: skip
"""By "rope_type" the fields that it needs, and those that it may have."""


class Scaling(Mapping[str, Any]):
    """A scaling of frequencies: a mapping that does not change, and that has a hash."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


@answers(
    base="theta rope_theta rope_base max_wavelength",
    dim="rotary_dim head_dim key_dim width partial_rotary_factor rotary_pct",
    layout="interleaved is_neox_style rotate_half traditional",
    scaling="rope_scaling rope_parameters rope_type factor scaling_factor",
    max_position_embeddings="max_positions max_seq_len original_max_position_embeddings",
)
@dataclass(frozen=True)
class Rotary(FeatureOptions):
    """Rotary positions, the option `rotary` of the layer; frozen, hashable, and checked.

    Args:
        dim: How many columns of each head are rotated, an even number; default all d_k of queries
            (B, T, H, d_k) and keys (B, S, K, d_k).
        base: The base of the frequencies ``base^(-2i/dim)``, `rope_theta` in model configs.
        layout: "half" for pairs of columns (i, i + dim/2), as Llama; "interleaved" for pairs
            (2i, 2i + 1), as GPT-J.
        columns: Whether the "first" or the "last" columns of a head are rotated.
        scaling: The frequencies' scaling, a dict as in model configs: "rope_type" ("default",
            "linear", "dynamic", "yarn", "llama3", "longrope" or "proportional") and its fields;
            default none.
        max_position_embeddings: The model config's number, which some scalings need.

    Raises:
        ConfigError: a field has a value that it cannot have.

    Example:
        >>> Rotary(dim=64, base=500000.0, scaling={"rope_type": "linear", "factor": 2.0}).base
        500000.0
    """

    dim: int | None = None
    base: float = 10000.0
    layout: Literal["half", "interleaved"] = "half"
    columns: Literal["first", "last"] = "first"
    scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        def store(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.dim is not None:
            store("dim", _whole(self.dim, "dim"))
            _check_even(self.dim)
        store("base", _number(self.base, "base", above=1.0))
        for name, known in (("layout", LAYOUTS), ("columns", COLUMNS)):
            if getattr(self, name) not in known:
                raise _wrong(name, f"one of {', '.join(map(repr, known))}", getattr(self, name))
        most = self.max_position_embeddings
        if most is not None:
            store("max_position_embeddings", _whole(most, "max_position_embeddings"))
        if self.scaling is not None:
            store("scaling", _checked_scaling(self))

    @property
    def scaled(self) -> Mapping[str, Any]:
        """The scaling, of type "default" where there is none."""
        return _NONE if self.scaling is None else self.scaling

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies depend on the length of the call."""
        return self.scaled["rope_type"] in ("dynamic", "longrope")

    def width(self, key_dim: int) -> int:
        """How many columns are rotated of heads of this width.

        Raises:
            ConfigError: there are not so many, or a field does not fit their number.
        """
        width = key_dim if self.dim is None else self.dim
        if width > key_dim:
            raise _wrong("dim", f"at most the width of the heads, {key_dim}", self.dim)
        _check_even(width)
        kind = self.scaled["rope_type"]
        if kind == "dynamic" and width == 2:
            raise _wrong("dim", 'above 2 with the scaling "dynamic", which divides by dim - 2', 2)
        for name in ("short_factor", "long_factor") if kind == "longrope" else ():
            count = len(self.scaled[name])
            if count != width // 2:
                raise ConfigError(
                    f"`scaling`: `{name}` must have a number for each rotated pair of columns, "
                    f"{width // 2}. Received: {count} numbers."
                )
        return width

    def frequencies(self, width: int, dtype: str, length: int | None) -> tuple[float, ...]:
        """The angle by which one position more turns each pair.

        Args:
            width: The number of columns that are rotated.
            dtype: "float32" or "float64".
            length: The length of the call; None for a short one.
        """
        most = self.max_position_embeddings
        return frequencies(self.base, width, self.scaled, most, dtype, length)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        scaling = None
        if self.scaling is not None:
            lists = {n: list(v) if isinstance(v, tuple) else v for n, v in self.scaling.items()}
            scaling = lists
        return {**super().to_dict(), "scaling": scaling}


_NONE = Scaling({"rope_type": "default"})

COS, SIN = "rotary.cos", "rotary.sin"
"""The names of the tables (1 or B, T, 1, r/2) that `RotaryPositions.by_position` makes."""


@dataclass(frozen=True)
class RotaryPositions(Feature):
    """The rotation of queries and keys.

    Args:
        rotary: The option.
        width: How many columns are rotated.
        short: The frequencies of a short call, by dtype; a compiler sees numbers.
        long: Those of a long one, where they differ.
        factor: The factor of cosines and sines.
    """

    option = "rotary"
    counts_positions = True

    rotary: Rotary
    width: int
    short: Mapping[str, tuple[float, ...]] = field(compare=False, repr=False)
    long: Mapping[str, tuple[float, ...]] = field(compare=False, repr=False)
    factor: float = field(compare=False, repr=False)

    @classmethod
    def of_heads(cls, rotary: Rotary, key_dim: int) -> Self:
        """The rotation of heads of this width.

        Raises:
            ConfigError: the option does not fit them.
        """
        width, scaling, most = rotary.width(key_dim), rotary.scaled, rotary.max_position_embeddings
        beyond = None
        if scaling["rope_type"] == "longrope":
            beyond = original_length(scaling, most) + 1

        def made(length: int | None) -> dict[str, tuple[float, ...]]:
            return {name: rotary.frequencies(width, name, length) for name in REAL}

        factor = attention_factor(scaling, most)
        return cls(rotary, width, made(None), made(beyond), factor)

    @classmethod
    def checked(cls, value: Any) -> Rotary | None:
        """`value` as a `Rotary`; None and False give None, True the default, a dict its fields.

        Raises:
            ConfigError: it is none of these, or a field has a value that it cannot have.
        """
        if value is None or value is False:
            return None
        if value is True:
            return Rotary()
        if isinstance(value, Rotary):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                "`rotary` must be an `anymha.Rotary`, a dict of its fields, True for its defaults, "
                f"or None for no rotary positions. Received: {value!r}."
            )
        try:
            return Rotary(**{str(name): each for name, each in value.items()})
        except UnknownOptionError as error:
            raise ConfigError(f"`rotary`: {error}") from None

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """The feature where the config has rotary positions."""
        if config.rotary is None:
            return None
        return cls.of_heads(config.rotary, config.key_dim)

    def by_position(self, ops: Ops, positions: Array, like: Array) -> dict[str, Array]:
        """The cosines and sines, unless these depend on the length."""
        if self.depends_on_length:
            return {}
        cos, sin = self.tables(ops, positions, 0, like)
        return {COS: cos, SIN: sin}

    def heads(
        self, ops: Ops, query: Array, key: Array, arrays: Mapping[str, Array]
    ) -> tuple[Array, Array]:
        """Queries and keys, turned by the angles of `positions` and `key_positions`."""
        if COS in arrays:
            tables = arrays[COS], arrays[SIN]
            return self.turned(ops, query, *tables), self.turned(ops, key, *tables)
        length = 0
        if self.depends_on_length:
            length = arrays.get("lengths", ops.shape(key)[1])
        places, key_places = arrays["positions"], arrays["key_positions"]
        tables = self.tables(ops, places, length, query)
        key_tables = tables if key_places is places else self.tables(ops, key_places, length, key)
        return self.turned(ops, query, *tables), self.turned(ops, key, *key_tables)

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies do."""
        return self.rotary.depends_on_length

    def free_columns(self, width: int) -> tuple[bool, ...]:
        """Those that are not turned."""
        still = [not angle for angle in self.short["float64"]]
        in_halves = self.rotary.layout == "half"
        pairs = still * 2 if in_halves else [one for one in still for _ in range(2)]
        rest = [True] * (width - self.width)
        return tuple(pairs + rest if self.rotary.columns == "first" else rest + pairs)

    def why_not_fused(self, capabilities: Any) -> str | None:
        """A kernel takes queries and keys that are turned already."""
        return None

    def tables(self, ops: Ops, positions: Array, length: Dim, like: Array) -> tuple[Array, Array]:
        """Cosines and sines (1 or B, T, 1, r/2), in float32 at least.

        Args:
            ops: The backend.
            positions: Integers (1 or B, T).
            length: The length of the call, where the frequencies depend on it.
            like: An array beside which they are made, of the dtype that is rotated.
        """
        dtype = working_dtype(ops, like)
        batch, count = ops.shape(positions)
        places = ops.reshape(ops.astype(positions, dtype), (batch, count, 1, 1))
        angles = places * self._frequencies(ops, length, dtype, ops.device(like))
        cos, sin = ops.cos(angles), ops.sin(angles)
        return (cos, sin) if self.factor == 1 else (cos * self.factor, sin * self.factor)

    def turned(self, ops: Ops, x: Array, cos: Array, sin: Array) -> Array:
        """`x` (B, T, H, d), its columns turned; half precision is rounded once, at the end."""
        dtype, d = x.dtype, x.shape[-1]
        if dtype != cos.dtype:
            x = ops.astype(x, cos.dtype)
        r, half = self.width, self.width // 2
        start = 0 if self.rotary.columns == "first" else d - r
        parts = [x[..., :start]] if start else []
        if self.rotary.layout == "half":
            one, two = x[..., start : start + half], x[..., start + half : start + r]
            parts += [one * cos - two * sin, two * cos + one * sin]
        else:
            lengths = ops.shape(x)[:3]
            pairs = ops.reshape(x[..., start : start + r], (*lengths, half, 2))
            one, two = pairs[..., 0:1], pairs[..., 1:2]
            shape = (*ops.shape(cos), 1)
            cos, sin = ops.reshape(cos, shape), ops.reshape(sin, shape)
            both = ops.concat([one * cos - two * sin, two * cos + one * sin], axis=-1)
            parts.append(ops.reshape(both, (*lengths, r)))
        if start + r < d:
            parts.append(x[..., start + r :])
        x = parts[0] if len(parts) == 1 else ops.concat(parts, axis=-1)
        return x if x.dtype == dtype else ops.astype(x, dtype)

    def _frequencies(self, ops: Ops, length: Dim, dtype: Any, device: Any) -> Array:
        """(1, 1, 1, r/2); (B, 1, 1, r/2) where `length` is (B,), by the framework's functions."""
        rotary, name = self.rotary, dtype_name(dtype)

        def made(numbers: tuple[float, ...]) -> Array:
            array = ops.asarray(numbers, dtype=dtype, device=device)
            return ops.reshape(array, (1, 1, 1, len(numbers)))

        if not rotary.depends_on_length:
            return made(self.short[name])
        is_tracing = ops.capabilities.is_tracing
        if is_known(length) and not (is_tracing is not None and is_tracing()):
            return made(rotary.frequencies(self.width, name, length))
        if ops.is_array(length) and len(length.shape) == 1:
            count = ops.astype(length, dtype)
        else:
            places = ops.arange(0, length, dtype=ops.int32, device=device)
            count = ops.sum(ops.astype(places, dtype) * 0.0 + 1.0, axis=0, keepdims=True)
        count = ops.reshape(count, (-1, 1, 1, 1))
        scaling, most = rotary.scaled, rotary.max_position_embeddings
        if scaling["rope_type"] == "longrope":
            first = float(original_length(scaling, most))
            return ops.where(count > first, made(self.long[name]), made(self.short[name]))
        assert most is not None  # `Rotary` has checked it
        ratio = dynamic_ratio(ops.where(count > float(most), count, float(most)), scaling, most)
        powers = tuple(-2 * i / (self.width - 2) for i in range(self.width // 2))
        return made(self.short[name]) * ops.exp(made(powers) * ops.log(ratio))


def _checked_scaling(rotary: Rotary) -> Scaling | None:
    given, most = rotary.scaling, rotary.max_position_embeddings
    if not isinstance(given, Mapping):
        raise _wrong("scaling", 'a dict of "rope_type" and its fields', given)
    values = {name: value for name, value in given.items() if value is not None}
    kind = values.pop("type", None)  # its name in older configs
    kind = values.pop("rope_type", kind)
    if kind not in SCALING_FIELDS:
        known = ", ".join(map(repr, SCALING_FIELDS))
        raise ConfigError(f"`scaling` must have a 'rope_type' of {known}. Received: {kind!r}.")
    needed, other = SCALING_FIELDS[kind]
    base = values.pop("rope_theta", rotary.base)
    if base != rotary.base:
        raise ConfigError(
            "`scaling` must have no 'rope_theta' but that of `base`. Received: "
            f"rope_theta={base!r}, base={rotary.base!r}. Pass `base={base!r}`."
        )
    lacking = [name for name in needed if name not in values]
    unknown = [str(name) for name in values if name not in (*needed, *other)]
    if lacking or unknown:
        words = f"Add {', '.join(map(repr, lacking))}. " if lacking else ""
        words += f"Leave out {', '.join(map(repr, unknown))}." if unknown else ""
        raise ConfigError(
            f"`scaling` of rope_type {kind!r} must have {', '.join(needed) or 'no field'}, and may "
            f"have {', '.join(other) or 'no other'}. Received: {dict(given)!r}. {words.strip()}"
        )
    for name, value in values.items():
        place = f"`scaling`: `{name}`"
        if name in ("short_factor", "long_factor"):
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"{place} must be a list of numbers. Received: {value!r}.")
            values[name] = tuple(_number(one, name, above=0.0) for one in value)
        elif name == _ORIGINAL:
            values[name] = _whole(value, name)
        elif name == "truncate":
            if not isinstance(value, bool):
                raise ConfigError(f"{place} must be True or False. Received: {value!r}.")
        else:
            low = -math.inf if name.startswith("mscale") else 0.0
            values[name] = _number(value, name, above=low)
    needs_most = kind == "dynamic" or (
        kind in ("yarn", "longrope", "llama3")
        and (_ORIGINAL not in values or (kind != "llama3" and "factor" not in values))
    )
    if needs_most and most is None:
        fields = "" if kind == "dynamic" else f", or 'factor' and {_ORIGINAL!r} in `scaling`"
        raise ConfigError(
            f"`scaling` of rope_type {kind!r} needs `max_position_embeddings`{fields}. Received: "
            "none. Pass it, as the model's config has it."
        )
    if kind == "yarn" and "factor" not in values and _ORIGINAL not in values:
        raise ConfigError(
            f"`scaling` of rope_type 'yarn' needs 'factor', or {_ORIGINAL!r}. Received: neither."
        )
    if kind == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        raise ConfigError(
            "`scaling`: `low_freq_factor` must be below `high_freq_factor`. Received: "
            f"{values['low_freq_factor']!r} and {values['high_freq_factor']!r}."
        )
    if values.get("partial_rotary_factor", 1.0) > 1:
        raise _wrong("partial_rotary_factor", "at most 1", values["partial_rotary_factor"])
    return Scaling({"rope_type": kind, **values})


def _wrong(name: str, wanted: str, value: Any) -> ConfigError:
    return ConfigError(f"`{name}` of `rotary` must be {wanted}. Received: {value!r}.")


def _check_even(width: int | None) -> None:
    if width is not None and width % 2:
        raise ConfigError(
            f"`rotary` must rotate an even number of columns, pairs of them. Received: {width}. "
            "Pass an even `dim`."
        )


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise _wrong(name, "a whole number, at least 1", value)
    return value.__index__()


def _number(value: Any, name: str, above: float) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > above):
        more = f" above {above:g}" if above > -math.inf else ""
        raise _wrong(name, f"a finite number{more}", value)
    return number
