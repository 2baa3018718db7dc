"""Versions, and the switches that change what a float32 product is; nothing is imported for it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from anymha.version import __version__

PACKAGES = (
    "numpy", "torch", "tensorflow", "jax", "keras", "flax", "equinox", "haiku", "transformers",
    "onnxruntime",
)  # fmt: skip

FLAGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "torch float32 matmul precision": ("torch", lambda m: m.get_float32_matmul_precision()),
    "torch TF32 in CUDA products": ("torch", lambda m: m.backends.cuda.matmul.allow_tf32),
    "torch default dtype": ("torch", lambda m: str(m.get_default_dtype()).removeprefix("torch.")),
    "TensorFlow TF32": (
        "tensorflow",
        lambda m: m.config.experimental.tensor_float_32_execution_enabled(),
    ),
    "TF_ENABLE_ONEDNN_OPTS": ("tensorflow", lambda m: os.environ.get("TF_ENABLE_ONEDNN_OPTS")),
    "jax_default_matmul_precision": ("jax", lambda m: m.config.jax_default_matmul_precision),
    "jax_enable_x64": ("jax", lambda m: m.config.jax_enable_x64),
    "Keras backend": ("keras", lambda m: m.config.backend()),
    "Keras floatx": ("keras", lambda m: m.config.floatx()),
}
"""For each switch its module, and how it is read."""


@dataclass(frozen=True)
class Environment:
    """The versions and switches under which a comparison ran."""

    versions: dict[str, str]  # By package, of those that were imported
    flags: dict[str, str]  # Switches that change the precision of products, by name, in words


def environment() -> Environment:
    """The versions and switches of the packages that are imported already; nothing is imported."""
    versions = own_versions()
    for name in PACKAGES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            versions[name] = version
    flags = {}
    for words, (name, read) in FLAGS.items():
        module = sys.modules.get(name)
        if module is not None:
            value = _read(read, module)
            if value is not None:
                flags[words] = value
    if "NVIDIA_TF32_OVERRIDE" in os.environ:
        flags["NVIDIA_TF32_OVERRIDE"] = os.environ["NVIDIA_TF32_OVERRIDE"]
    return Environment(versions, flags)


def own_versions() -> dict[str, str]:
    """The versions of anymha and Python, and the platform."""
    return {
        "anymha": __version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of packages, by name, as their installation has them; nothing is imported."""
    versions = {}
    for package in packages:
        for name in (package, f"{package}-cpu"):  # as "tensorflow-cpu", which installs tensorflow
            try:
                versions[package] = importlib.metadata.version(name)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions


def _read(read: Callable[[Any], Any], module: Any) -> str | None:
    """A switch in words; None where this version of the package does not have it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a package that renames its switches
            value = read(module)
    except Exception:  # a package may be half imported, or refuse: the report goes on without it
        return None
    return {None: "not set", True: "on", False: "off"}.get(value, str(value))
