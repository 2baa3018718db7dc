"""Which backend an array or a name belongs to. No framework is imported before it is needed.

Backends of others are found by the entry point group "anymha.backends": its name is the backend's,
its value a package with a module `ops` and, if it has a native layer, a class
`MultiHeadAttention`. Beside its functions the module has `array_modules`, the top-level modules in
which the array types are defined, and may have `framework`, the framework's top-level module.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from anymha.errors import (
    ArgumentError,
    BackendNotInstalledError,
    MixedBackendsError,
    UnknownBackendError,
    WeightsError,
)

ENTRY_POINTS = "anymha.backends"


@dataclass(frozen=True)
class Backend:
    """A backend by name.

    Args:
        name: Its name, as in ``backend="torch"``.
        package: The package that holds its `ops` and its layer.
        framework: The top-level module of the framework.
        array_modules: Top-level modules in which the framework's array types are defined.
    """

    name: str
    package: str
    framework: str
    array_modules: tuple[str, ...]

    @property
    def installed(self) -> bool:
        """Whether the framework can be imported, without importing it."""
        return importlib.util.find_spec(self.framework) is not None

    @property
    def ops(self) -> Any:
        """The module of its functions.

        Raises:
            BackendNotInstalledError: the framework is not installed.
        """
        return self._module("ops")

    @property
    def has_layer(self) -> bool:
        """Whether it has a native layer beside its functions."""
        return hasattr(self._module(), "MultiHeadAttention")

    @property
    def layer(self) -> Any:
        """Its native layer class.

        Raises:
            BackendNotInstalledError: the framework is not installed.
            UnknownBackendError: the backend has functions only.
        """
        if not self.has_layer:
            raise UnknownBackendError(
                f"The backend {self.name!r} has no native layer, only functions. "
                "Call `anymha.multi_head_attention` with its arrays."
            )
        return self._module().MultiHeadAttention

    def missing(self) -> BackendNotInstalledError:
        """The error that says how to install its framework."""
        return BackendNotInstalledError(
            f"The backend {self.name!r} needs {self.framework}, which is not installed. "
            f"Install it with: pip install 'anymha[{self.name}]'."
        )

    def _module(self, name: str = "") -> ModuleType:
        if not self.installed:
            raise self.missing()
        return sys.modules[_load(f"{self.package}.{name}" if name else self.package)]


def _load(path: str) -> str:
    importlib.import_module(path)
    return path


BUILT_IN = (
    Backend("numpy", "anymha_numpy", "numpy", ("numpy",)),
    Backend("torch", "anymha_torch", "torch", ("torch",)),
    Backend("tensorflow", "anymha_tensorflow", "tensorflow", ("tensorflow",)),
    Backend("jax", "anymha_jax", "jax", ("jax", "jaxlib")),
)

LAYERS = (
    Backend("keras", "anymha_keras", "keras", ()),
    Backend("flax", "anymha_flax", "flax", ()),
    Backend("equinox", "anymha_equinox", "equinox", ()),
)
"""Packages of a layer alone, whose arrays are another backend's, found at the call."""


def explain_missing(package: str, error: ModuleNotFoundError) -> None:
    """Raise the error that names the extra, where a package's import failed for its framework.

    Args:
        package: The package, as "anymha_torch".
        error: The error of its import.

    Raises:
        BackendNotInstalledError: the framework is not installed.
    """
    for home in (*BUILT_IN, *LAYERS):
        if home.package == package and (error.name or "").partition(".")[0] == home.framework:
            raise home.missing() from error


@cache
def backends() -> dict[str, Backend]:
    """All backends by name: the built-in ones, and others found by entry point."""
    found = {backend.name: backend for backend in BUILT_IN}
    return found | {name: _plugged_in(point) for name, point in _entry_points().items()}


OTHER_NAMES = {
    "pytorch": "torch", "pt": "torch", "tf": "tensorflow", "np": "numpy", "jnp": "jax",
    "tf.keras": "keras", "nnx": "flax", "linen": "flax", "eqx": "equinox", "hk": "haiku",
}  # fmt: skip
"""What backends are called elsewhere."""


def get_backend(name: str, *beside: str) -> Backend:
    """The backend of that name; only its own modules are imported.

    The error's message lists the names in `beside` too.

    Raises:
        UnknownBackendError: there is none; the message has the names that there are.
        BackendNotInstalledError: the package that brings it cannot be imported.
    """
    for backend in BUILT_IN:
        if backend.name == name:
            return backend
    others = _entry_points()
    if name not in others:
        names = (*(built_in.name for built_in in BUILT_IN), *beside, *others)
        known = ", ".join(map(repr, names))
        meant = OTHER_NAMES.get(str(name).lower())
        told = f" Pass {meant!r}." if meant in names else ""
        raise UnknownBackendError(f"A backend is one of {known}. Received: {name!r}.{told}")
    return _plugged_in(others[name])


def homes() -> list[str]:
    """The names of all backends, and of all packages that bring a layer alone; imports none."""
    return [*(one.name for one in (*BUILT_IN, *LAYERS)), *_entry_points()]


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of backends of others; the names of the built-in ones stay theirs."""
    taken = {backend.name for backend in BUILT_IN}
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return {point.name: point for point in points if point.name not in taken}


@cache
def _plugged_in(point: importlib.metadata.EntryPoint) -> Backend:
    try:
        ops = importlib.import_module(f"{point.value}.ops")
        array_modules = tuple(ops.array_modules)
    except (ImportError, AttributeError) as error:
        raise BackendNotInstalledError(
            f"The backend {point.name!r} of the package {point.value} does not work: {error}. "
            "Install what it needs, or uninstall the package."
        ) from error
    framework = getattr(ops, "framework", point.value)
    return Backend(point.name, point.value, framework, array_modules)


def get_layer(name: str) -> Any:
    """The native layer class of a backend, or of a package that brings a layer alone.

    Raises:
        UnknownBackendError: there is none; the message has the names that there are.
        BackendNotInstalledError: its framework is not installed.
    """
    alone = {package.name: package for package in LAYERS}
    return (alone[name] if name in alone else get_backend(name, *alone)).layer


def get_ops(name: str) -> Any:
    """The functions for the arrays of a backend, or of a package that brings a layer alone.

    Raises:
        UnknownBackendError: there is none; the message has the names that there are.
        BackendNotInstalledError: its framework is not installed.
    """
    alone = [package.name for package in LAYERS]
    return get_layer(name).ops if name in alone else get_backend(name, *alone).ops


def backend_of(array: Any) -> Backend:
    """The backend of an array, by its type.

    Raises:
        ArgumentError: no backend handles this type.
    """
    name = _name_of_type(type(array))
    return _MET[name]


def as_numpy(array: Any) -> Any:
    """An array of any framework, or what has one as a variable has, in NumPy, bit for bit.

    Raises:
        ArgumentError: it is no array.
    """
    try:
        backend = backend_of(array)
    except ArgumentError:
        if not hasattr(array, "__array__"):
            raise
        return array.__array__()
    return backend.ops.to_numpy(array)


def named_arrays(weights: Any, argument: str = "weights") -> dict[str, Any]:
    """A dict of arrays of any framework by name, in NumPy.

    Raises:
        ArgumentError: it is none, or a value is no array.
        WeightsError: an array is not of real numbers.
    """
    check_named(weights, argument)
    arrays = {name: as_numpy(array) for name, array in weights.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise WeightsError(
                f"`{name}` must be of real numbers. Received: dtype {array.dtype}. Cast it first."
            )
    return arrays


def check_named(weights: Any, argument: str) -> None:
    """Refuse what is no dict.

    Raises:
        ArgumentError: with what to pass.
    """
    if not isinstance(weights, Mapping):
        raise ArgumentError(
            f"`{argument}` must be a dict of arrays by name. Received: "
            f"{type(weights).__module__}.{type(weights).__qualname__}. Pass "
            "`anymha.get_weights(layer)` of a layer, or give each array its name."
        )


_NAMES: dict[type, str] = {}
"""The name of the backend of each type of array that has been met."""
_MET: dict[str, Backend] = {}
"""Those backends by name."""


def _name_of_type(kind: type) -> str:
    if kind not in _NAMES:
        backend = _backend_of_type(kind)
        _MET[backend.name] = backend
        _NAMES[kind] = backend.name
    return _NAMES[kind]


def _backend_of_type(kind: type) -> Backend:
    roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
    # Backends of others are imported only for arrays that no built-in one handles.
    found = _match(BUILT_IN, roots) or _match(backends().values(), roots)
    if found is not None:
        return found
    raise ArgumentError(
        f"Expected an array of {', '.join(backends())}. Received: "
        f"{kind.__module__}.{kind.__qualname__}."
    )


def _match(candidates: Iterable[Backend], roots: list[str]) -> Backend | None:
    for root in roots:
        for backend in candidates:
            if root in backend.array_modules:
                return backend
    return None


def common_ops(arrays: Iterable[tuple[str, Any]]) -> Any:
    """The functions of the one backend to which all the named arrays belong.

    Raises:
        MixedBackendsError: they belong to several.
        ArgumentError: one belongs to none.
    """
    found: dict[str, Backend] = {}
    for name, array in arrays:
        try:
            found[name] = backend_of(array)
        except ArgumentError as error:
            raise ArgumentError(f"`{name}`: {error} Make an array of it first.") from None
    if len({backend.name for backend in found.values()}) != 1:
        listed = ", ".join(f"`{name}` of {backend.name}" for name, backend in found.items())
        raise MixedBackendsError(
            f"The arrays of one call must be of one framework. Received: {listed}. Convert them "
            "first."
        )
    return next(iter(found.values())).ops


# What `torch.compiler.assume_constant_result` sets: `torch.compile` cannot trace an import or the
# bases of a type, and so calls these while it traces. It takes no objects from them, only names.
for _function in (_load, _name_of_type):
    _function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
