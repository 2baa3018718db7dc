"""Options that are objects, in the forms that Keras takes: by name, by config dict, as an instance.

An initialiser, regulariser or constraint is a frozen dataclass with the name, the fields and the
defaults of the Keras class. Two with equal fields are equal, and hash alike.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anymha.attention.features.base import FeatureOptions
from anymha.errors import ConfigError
from anymha.framework.names import answers
from anymha.framework.validation import checked_axes, checked_choice

Table = Mapping[str, type["ConfigObject"]]
"""Classes by every name that they have."""


@dataclass(frozen=True)
class ConfigObject:
    """The base: an object that is no more than its fields.

    Attributes:
        name: The class's name in snake case, as Keras has it.
        aliases: Other names that Keras takes for it.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()

    def refusal(self, rank: int) -> str:
        """Why it cannot act on an array of that rank; empty where it can."""
        return ""

    def _check_number(self, field: str, low: float = -math.inf, high: float = math.inf) -> None:
        """Store the field as a float, if it is a finite number in [low, high]."""
        value: Any = getattr(self, field)
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        number = float(value) if real else math.nan
        if not math.isfinite(number) or not low <= number <= high:
            ranges = [f"of at least {low:g}"] * (low > -math.inf)
            ranges += [f"of at most {high:g}"] * (high < math.inf)
            wanted = " ".join(["a finite number", " and ".join(ranges)]).strip()
            raise ConfigError(f"`{field}` must be {wanted}. Received: {value!r}.")
        object.__setattr__(self, field, number)

    def _check_choice(self, field: str, *choices: str) -> None:
        checked_choice(getattr(self, field), choices, field)


def table(*classes: type[ConfigObject]) -> dict[str, type[ConfigObject]]:
    """The classes by all of their names; their constructors answer wrong names from now on."""
    for cls in classes:
        answers()(cls)
    return {name: cls for cls in classes for name in (cls.name, cls.__name__, *cls.aliases) if name}


def resolved(value: Any, known: Table, argument: str, *, optional: bool = True) -> Any:
    """An option in its one form: an object of `known`, a callable of the user's, or None.

    Args:
        value: A name; a dict of "class_name" and "config"; an object of `known` or of Keras; a
            class of these; or a callable.
        known: The classes by name.
        argument: The option's name, for error messages.
        optional: Whether None is a value.

    Raises:
        ConfigError: it is none of these, or has a field with a value that it cannot have.
    """
    if value is None and optional:
        return None
    if isinstance(value, type):
        value = value()
    if isinstance(value, tuple(known.values())):
        return value
    if isinstance(value, str):
        return _made(value, {}, known, argument)
    if isinstance(value, Mapping) and isinstance(value.get("class_name"), str):
        return _made(value["class_name"], value.get("config") or {}, known, argument)
    if _is_of_keras(value) and type(value).__name__ in known:
        return _made(type(value).__name__, _config_of(value, known), known, argument)
    if not callable(value):
        raise ConfigError(
            f"`{argument}` must be one of {_names(known)}; or a dict of 'class_name' and "
            f"'config'; or an object of this kind; or callable. Received: {value!r}."
        )
    try:
        hash(value)
    except TypeError:
        raise ConfigError(
            f"`{argument}` must be hashable, since the config is. Received: {value!r}. "
            "Give its class a `__hash__`, or pass a function."
        ) from None
    return value


def described(value: Any) -> Any:
    """An option for JSON: a name where all fields have their defaults, else Keras's config dict.

    Of a feature's value it is the dict of the fields. Callables of the user's stay as they are.
    """
    if isinstance(value, FeatureOptions):
        return value.to_dict()
    if not isinstance(value, ConfigObject):
        return value
    fields = dataclasses.fields(value)
    config = {field.name: getattr(value, field.name) for field in fields}
    if all(config[field.name] == field.default for field in fields):
        return value.name
    lists = {name: list(v) if isinstance(v, tuple) else v for name, v in config.items()}
    return {"class_name": type(value).__name__, "config": lists}


def checked_places(value: Any, argument: str) -> Any:
    """`value` as an axis or a tuple of different axes; None stays None."""
    axes = checked_axes(value, argument)
    return axes if axes is None or isinstance(value, (tuple, list)) else axes[0]


def _made(name: str, config: Any, known: Table, argument: str) -> ConfigObject:
    if name not in known:
        raise ConfigError(f"`{argument}` must be one of {_names(known)}. Received: {name!r}.")
    cls = known[name]
    try:
        return cls(**config)
    except ConfigError as error:
        raise ConfigError(f"`{argument}`, {cls.__name__}: {error}") from None


def _config_of(value: Any, known: Table) -> dict[str, Any]:
    """The fields of an object of Keras, of which its config may lack some (as `gain`)."""
    names = [field.name for field in dataclasses.fields(known[type(value).__name__])]
    held = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return held | value.get_config()


def _is_of_keras(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in ("keras", "tf_keras")


def _names(known: Table) -> str:
    return ", ".join(sorted({repr(cls.name) for cls in known.values()}))
