"""What the command line names: objects in modules, backends, layouts of live layers, ONNX files."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymha.errors import AnymhaError, BackendNotInstalledError, UsageError
from anymha.framework.registry import BUILT_IN, LAYERS, backends, get_layer
from anymha.interchange.layers import convert, get_weights, set_weights
from anymha.interchange.libraries import MAKERS
from anymha.options.config import AttentionConfig
from anymha.parity.adapters import subject
from anymha.parity.adapters.function import Function
from anymha.parity.stages.saved_case import Layer

LIVE = tuple(name for name, (module, _) in MAKERS.items() if module != "params")
"""The layouts of which layers can be made that stand alone."""

KERAS_ON = {"tensorflow": "tensorflow", "torch": "torch", "jax": "jax", "openvino": "openvino"}
"""The package that each of Keras's backends needs."""


@dataclass(frozen=True)
class Named:
    """One implementation of the command line.

    Args:
        name: As it was given.
        implementation: What can be compared; None for a backend or a layout, of which a layer is
            made with the weights of the others.
        held: Its options and weights, where it tells them.
    """

    name: str
    implementation: Any = None
    held: Layer | None = None

    def made(self, layer: Layer) -> Any:
        """What is compared: itself, or a layer with these options and weights.

        Raises:
            AnymhaError: a layer of this backend or layout cannot have them.
        """
        if self.implementation is not None:
            return self.implementation
        options = layer.config.to_dict()
        names = {"query_features": "query", "value_features": "value", "key_features": "key"}
        options |= {o: layer.weights[f"{name}.kernel"].shape[0] for o, name in names.items()}
        options["dtype"] = layer.weights["query.kernel"].dtype.name
        config = AttentionConfig.from_dict(options)
        ours = set_weights(get_layer("numpy")(**config.to_dict()), layer.weights)
        return convert(ours, to=self.name)

    @property
    def function(self) -> Callable[..., Any] | None:
        """The plain function that it is, if it is one."""
        if self.implementation is None or isinstance(self.implementation, Path):
            return None
        asked = subject(self.implementation)
        return asked.function if isinstance(asked, Function) else None


def named(name: str) -> Named:
    """What a word of the command line names.

    Args:
        name: ``module:object``, the name of a backend or of a layout, or the path of a model.

    Raises:
        UsageError: it names nothing, or what cannot be compared.
        BackendNotInstalledError: its framework is not installed.
    """
    settle_keras_backend()
    if name.endswith(".onnx"):
        subject(Path(name))  # says what is wrong with it
        return Named(name, Path(name))
    known = {one.name: one for one in (*BUILT_IN, *LAYERS)}
    if name in LIVE:
        package = MAKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise BackendNotInstalledError(
                f"{name} needs {package}, which is not installed. Install it with: pip install "
                f"'anymha[{name.partition('.')[0]}]'."
            )
        return Named(name)
    if name in known or name in backends():
        get_layer(name)  # says which extra installs it
        return Named(name)
    if ":" not in name:
        raise UsageError(
            f"An implementation is MODULE:OBJECT, a model of ONNX (FILE.onnx), a backend "
            f"({', '.join((*known, *(n for n in backends() if n not in known)))}), or a layer of a "
            f"library ({', '.join(LIVE)}). Received: {name}."
        )
    implementation = _object(name)
    return Named(name, implementation, _held(implementation))


def _object(name: str) -> Any:
    """What can be compared, imported; made, where it is a class or a function that makes it."""
    path, _, attribute = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise UsageError(
                f"{name} cannot be imported: it needs {error.name}, which is not installed."
            ) from error
        raise UsageError(
            f"{name} cannot be imported: there is no module {error.name!r} here or among what is "
            f"installed. The folder is {os.getcwd()}."
        ) from error
    except Exception as error:  # whatever a module of the user's raises
        raise UsageError(
            f"{name} cannot be imported: {path} raised {type(error).__name__}: {error}."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = (
                [n for n in vars(found) if not n.startswith("_")] if inspect.ismodule(found) else []
            )
            has = f" It has: {', '.join(names)}." if names else ""
            raise UsageError(f"{name} cannot be found: {path} has no {part!r}.{has}")
        found = getattr(found, part)
    if _makes(found):
        try:
            found = found()
        except Exception as error:  # whatever a function of the user's raises
            raise UsageError(
                f"{name} was called without arguments to make what is compared, and raised "
                f"{type(error).__name__}: {error}."
            ) from error
    try:
        subject(found)
    except AnymhaError as error:
        raise UsageError(f"{name} cannot be compared. {error}") from error
    return found


def _makes(found: Any) -> bool:
    """Whether it is to be called without arguments: a class, or a function that takes none."""
    if inspect.isclass(found):
        return True
    if not inspect.isroutine(found):
        return False
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # of some functions that are written in C
        return False
    return all(
        one.default is not one.empty or one.kind is one.VAR_KEYWORD for one in parameters
    ) and not any(one.kind is one.VAR_POSITIONAL for one in parameters)


def _held(implementation: Any) -> Layer | None:
    """Options and weights, where an implementation tells them."""
    told = getattr(subject(implementation), "told", None)
    if told is not None:
        return Layer(told.config, told.weights)
    try:
        weights = get_weights(implementation)
    except AnymhaError:
        return None
    config = getattr(weights, "config", None) or implementation.config
    return Layer(config, dict(weights))


def settle_keras_backend() -> None:
    """Let Keras run on a framework that is installed, where nobody has chosen one.

    Keras takes the variable KERAS_BACKEND, else what its file says, else TensorFlow; it fails where
    that is not installed.
    """
    if "keras" in sys.modules or "KERAS_BACKEND" in os.environ:
        return
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    try:
        chosen = json.loads((home / "keras.json").read_text(encoding="utf-8"))["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        chosen = "tensorflow"
    installed = [b for b, package in KERAS_ON.items() if importlib.util.find_spec(package)]
    if chosen in KERAS_ON and chosen not in installed and installed:
        os.environ["KERAS_BACKEND"] = installed[0]
