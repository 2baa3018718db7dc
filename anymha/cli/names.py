"""Implementations by name: objects in modules, backends, layouts of live layers, ONNX files."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymha.errors import AnymhaError, BackendNotInstalledError, UsageError
from anymha.framework.registry import BUILT_IN, LAYERS, backends, get_layer
from anymha.interchange.libraries import MAKERS
from anymha.parity.adapters import adapter_for
from anymha.parity.comparison.named_layers import LIVE, known_layer, make_named
from anymha.parity.stages.saved_case import SavedLayer

KERAS_ON = ("tensorflow", "torch", "jax", "openvino")
"""Keras's backends, each named as the package that it needs."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of the command line."""

    name: str  # Its name on the command line
    # The object to compare; None for a backend or a layout, for which a layer is made with the
    # weights of the others
    implementation: Any = None
    layer: SavedLayer | None = None  # Its options and weights, where they are known
    note: str = ""  # How these were found, if nobody has named them

    def make(self, layer: SavedLayer) -> Any:
        """The object to compare: itself, or a layer with these options and weights."""
        if self.implementation is not None:
            return self.implementation
        return make_named(self.name, layer)


def is_model(name: str) -> bool:
    """Whether a word of the command line is the path of a model."""
    return name.endswith(".onnx")


def implementation_named(name: str) -> Implementation:
    """The implementation that a word of the command line names.

    The word is ``module:object`` or ``file.py:object``, the name of a backend or of a layout, or
    the path of a model.

    Raises:
        UsageError: it names nothing, or an object that cannot be compared.
        BackendNotInstalledError: its framework is not installed.
    """
    settle_keras_backend()
    if is_model(name):
        adapter_for(Path(name))  # raises where it is not a model
        return Implementation(name, Path(name))
    known = {one.name: one for one in (*BUILT_IN, *LAYERS)}
    if name in LIVE:
        package = MAKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise BackendNotInstalledError(
                f"{name} needs {package}, which is not installed. Install it with: pip install "
                f"'anymha[{name.partition('.')[0]}]'."
            )
        return Implementation(name)
    if name in known or name in backends():
        get_layer(name)  # says which extra installs it
        return Implementation(name)
    if ":" not in name:
        homes = ", ".join((*known, *(n for n in backends() if n not in known)))
        raise UsageError(
            "An implementation is MODULE:OBJECT, FILE.py:OBJECT, a model of ONNX (FILE.onnx), a "
            f"backend ({homes}), or a layer of a library ({', '.join(LIVE)}). Received: {name}."
        )
    implementation = _object(name)
    return Implementation(name, implementation, *known_layer(implementation))


def _object(name: str) -> Any:
    """The named object, imported; called, where it is a class or a function without arguments."""
    path, _, attribute = name.rpartition(":")
    is_file = path.endswith(".py")
    if is_file and not Path(path).is_file():
        raise UsageError(
            f"{name} cannot be imported: there is no file {path}. The folder is {os.getcwd()}."
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = _module_of(Path(path)) if is_file else importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise UsageError(
                f"{name} cannot be imported: it needs {error.name}, which is not installed."
            ) from error
        raise UsageError(
            f"{name} cannot be imported: there is no module {error.name!r} here or among what is "
            f"installed. The folder is {os.getcwd()}."
        ) from error
    except (Exception, SystemExit) as error:  # whatever a module of the user's raises
        raise UsageError(
            f"{name} cannot be imported: {path} raised {type(error).__name__}: {error}."
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = (
                [n for n in vars(value) if not n.startswith("_")] if inspect.ismodule(value) else []
            )
            has = f" It has: {', '.join(names)}." if names else ""
            raise UsageError(f"{name} cannot be found: {path} has no {part!r}.{has}")
        value = getattr(value, part)
    if _makes(value):
        try:
            value = value()
        except (Exception, SystemExit) as error:  # whatever a function of the user's raises
            raise UsageError(
                f"{name} was called without arguments to make the object to compare, and raised "
                f"{type(error).__name__}: {error}."
            ) from error
    try:
        adapter_for(value)
    except AnymhaError as error:
        raise UsageError(f"{name} cannot be compared. {error}") from error
    return value


def _module_of(file: Path) -> Any:
    """The module of a file, which may import its neighbours, as a script may."""
    file = file.resolve()
    for module in [*sys.modules.values()]:
        if (path := getattr(module, "__file__", None)) and Path(path) == file:
            return module
    taken = importlib.util.find_spec(file.stem) if file.stem.isidentifier() else None
    if taken is None or taken.origin == str(file):
        name = file.stem
    else:
        name = f"{file.stem} of {file.parent}"  # another module has its name
    spec: Any = importlib.util.spec_from_file_location(name, file)
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _makes(value: Any) -> bool:
    """Whether the object is a class, or a function that can be called without arguments."""
    if inspect.isclass(value):
        return True
    if not inspect.isroutine(value):
        return False
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # of some functions that are written in C
        return False
    return all(
        one.default is not one.empty or one.kind is one.VAR_KEYWORD for one in parameters
    ) and not any(one.kind is one.VAR_POSITIONAL for one in parameters)


def settle_keras_backend() -> None:
    """Let Keras run on an installed framework, where the user has not chosen one.

    Keras takes the variable KERAS_BACKEND, else the entry of its file, else TensorFlow; it fails
    where that is not installed.
    """
    if "keras" in sys.modules or "KERAS_BACKEND" in os.environ:
        return
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    try:
        chosen = json.loads((home / "keras.json").read_text(encoding="utf-8"))["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        chosen = "tensorflow"
    installed = [name for name in KERAS_ON if importlib.util.find_spec(name)]
    if chosen in KERAS_ON and chosen not in installed and installed:
        os.environ["KERAS_BACKEND"] = installed[0]
