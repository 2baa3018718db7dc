"""anymha's own files: safetensors with canonical names, and the configuration in the metadata.

The metadata has one entry, ``"anymha"``, JSON: ``{"format": 1, "layers": {PREFIX: OPTIONS}}``,
where the names of a layer's weights begin with its prefix and its options are those of
`anymha.AttentionConfig`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from anymha.errors import AnymhaError, ArgumentError, ConfigError, DtypeError, FileError
from anymha.framework.names import answers
from anymha.framework.registry import get_layer, get_ops
from anymha.interchange import caches
from anymha.interchange.files.formats import create_file, format_of, open_file
from anymha.interchange.files.json_text import parse_json
from anymha.interchange.files.paths import as_path, kind_of
from anymha.interchange.files.reader import Reader, Tensor
from anymha.interchange.layers import convert, get_weights, new_layer
from anymha.options.config import AttentionConfig
from anymha.text import listed, quoted, shown

if TYPE_CHECKING:
    from anymha.interchange import homes

PathLike = str | os.PathLike[str]
MaxBytes = int | None

ENTRY = "anymha"
FORMAT = 1
SUFFIX = ".safetensors"
_UNREADABLE = (
    ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


@answers(path="file f filename", layer="obj model")
def save(path: PathLike, layer: Any) -> None:
    """Write a layer to a ``.safetensors`` file: its weights, bit for bit, and its configuration.

    A `Cache` or a `Memory` is written likewise, so that decoding goes on another day.

    The file is written as a whole or not at all.

    Args:
        path: The file; its folder is made where there is none.
        layer: A layer of anymha in any framework, or one that `anymha.convert` takes; a `Cache`; or
            a `Memory`.

    Raises:
        ArgumentError: `layer` is not such a layer.
        WeightsError: the layer has no weights yet.
        ConfigError: an option is a function or an object of a framework, which a file cannot hold.
        FileError: the file cannot be written.

    Example:
        >>> import anymha, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "layer.safetensors"
        >>> save(path, anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy"))
        >>> load(path, backend="numpy").config.key_dim
        4
    """
    if isinstance(layer, (str, os.PathLike)) and not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(
            "`save` takes the path first: `save(path, layer)`. Received: "
            f"{type(path).__name__}, and then a path. Exchange them."
        )
    target = as_path("path", path)
    if not target.name.endswith(SUFFIX):
        raise FileError(f"`path` must end with {SUFFIX!r}. Received: {quoted(str(path))}.")
    arrays: Mapping[str, Any]
    if caches.is_held(layer):
        arrays, metadata = caches.arrays_of(layer), {ENTRY: json.dumps(caches.entry_of(layer))}
    else:
        caches.check_is_single(layer)
        plain = convert(layer, to="numpy")
        arrays, metadata = get_weights(plain), config_metadata({"": plain.config})
    tensors = {name: Tensor(array.shape, array.dtype) for name, array in arrays.items()}
    with create_file(target, tensors, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


@overload
def load(
    path: PathLike, backend: Literal["numpy"], *, prefix: str = ..., max_bytes: MaxBytes = ...
) -> homes.NumpyLayer: ...
@overload
def load(
    path: PathLike, backend: Literal["torch"] = ..., *, prefix: str = ..., max_bytes: MaxBytes = ...
) -> homes.TorchLayer: ...
@overload
def load(
    path: PathLike, backend: Literal["tensorflow"], *, prefix: str = ..., max_bytes: MaxBytes = ...
) -> homes.TensorflowLayer: ...
@overload
def load(
    path: PathLike, backend: Literal["jax"], *, prefix: str = ..., max_bytes: MaxBytes = ...
) -> homes.JaxLayer: ...
@overload
def load(
    path: PathLike, backend: Literal["keras"], *, prefix: str = ..., max_bytes: MaxBytes = ...
) -> homes.KerasLayer: ...
@overload
def load(
    path: PathLike, backend: Literal["flax"], *, prefix: str = ..., max_bytes: MaxBytes = ...
) -> homes.FlaxLayer: ...
@overload
def load(
    path: PathLike, backend: Literal["equinox"], *, prefix: str = ..., max_bytes: MaxBytes = ...
) -> homes.EquinoxLayer: ...
@overload
def load(path: PathLike, backend: str, *, prefix: str = ..., max_bytes: MaxBytes = ...) -> Any: ...
@answers(backend="to framework", path="file f filename")
def load(
    path: PathLike, backend: str = "torch", *, prefix: str = "", max_bytes: MaxBytes = None
) -> Any:
    """The layer of a file that `save` wrote, in any framework, bit for bit.

    Args:
        path: The file.
        backend: "numpy", "torch", "tensorflow", "jax", "keras", "flax", "equinox", or the name of
            a backend of others.
        prefix: What the names of the layer's weights begin with, where the file has several
            layers, as ``anymha convert --to anymha`` writes them.
        max_bytes: The most bytes that the arrays of the file may take together; default 100 times
            the bytes of the file, and 64 MiB always.

    Returns:
        The native layer, with the configuration and the dtype with which it was saved; of a file
        with a cache or a memory that, in arrays of the framework.

    Raises:
        FileError: the file cannot be read or is broken, or holds no layer of anymha with that
            prefix, or was written by a later anymha.
        ConfigError: its configuration has a value that it cannot have.
        DtypeError: the framework, as it is set up, cannot hold the weights' dtype.
        UnknownBackendError: no backend has this name.
        BackendNotInstalledError: its framework is not installed.

    Example:
        >>> import anymha, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "layer.safetensors"
        >>> anymha.save(path, anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy"))
        >>> layer = anymha.load(path, backend="numpy")
        >>> layer.weights["query.kernel"].shape, layer.config.num_heads
        ((8, 2, 4), 2)
    """
    source = as_path("path", path)
    get_ops(backend)
    if kind_of(source) != "nothing" and not format_of(source).metadata:
        raise FileError(
            f"`path` must end with {SUFFIX!r}. Received: {quoted(str(path))}. Write a file of this "
            f"library first: `anymha convert FILE new{SUFFIX} --to anymha`."
        )
    with open_file(source, max_bytes) as reader:
        entry = _entry(reader)
        if caches.is_entry(entry):
            return caches.read(reader, entry, backend)
        get_layer(backend)
        configs = read_configs(reader)
        if prefix not in configs:
            raise FileError(
                f"{shown(source)} holds no layer with the prefix {quoted(prefix)}. Pass `prefix` "
                f"as one of: {listed([quoted(known) for known in configs])}."
            )
        config = configs[prefix]
        names = _names(reader, prefix, configs)
        _check_fit(source, config, {name: reader.tensors[prefix + name] for name in names})
        weights = {name: reader.read(prefix + name) for name in names}
    layer = new_layer(backend, config, weights)
    dtype = get_weights(layer)["query.kernel"].dtype.name
    if dtype != config.dtype:
        raise DtypeError(
            f"{shown(source)} has weights of {config.dtype}, and the layer of {backend!r} can only "
            f"hold {dtype} as its framework is set up. Load it in another, or allow {config.dtype} "
            "first; in JAX with `jax.config.update('jax_enable_x64', True)`."
        )
    return layer


def config_metadata(configs: Mapping[str, AttentionConfig]) -> dict[str, str]:
    """The metadata of a file with these layers by prefix.

    Raises:
        ConfigError: an option is a function or an object, which a file cannot hold.
    """
    layers: dict[str, dict[str, Any]] = {}
    for prefix, config in configs.items():
        layers[prefix] = config.to_dict()
        for name, value in layers[prefix].items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"`{name}` must be a name, a config dict or an object that has one, to be "
                    f"saved in a file. Received: {value!r}."
                ) from error
    return {ENTRY: json.dumps({"format": FORMAT, "layers": layers})}


def read_configs(reader: Reader) -> dict[str, AttentionConfig]:
    """The configurations in a file of anymha by the layers' prefixes.

    Raises:
        FileError: there are none, or they were written by a later anymha.
        ConfigError: an option has a value that it cannot have.
    """
    path, entry = shown(reader.path), _entry(reader)
    if caches.is_entry(entry):
        raise FileError(
            f"{path} holds a cache or a memory, and no layer. Read it by `anymha.load`."
        )
    try:
        version, layers = entry["format"], entry["layers"]
        if type(version) is int and version > FORMAT:
            raise FileError(
                f"{path} has the format {quoted(version)}, and this anymha reads {FORMAT}. Install "
                "a later anymha."
            )
        if version != FORMAT or not all(isinstance(one, dict) for one in layers.values()):
            raise ValueError("it has another form")
        return {prefix: AttentionConfig.from_dict(options) for prefix, options in layers.items()}
    except AnymhaError as error:
        if isinstance(error, FileError):
            raise
        raise type(error)(f"{path}: {shown(error, 1000)}") from error
    except _UNREADABLE as error:
        raise FileError(
            f"{path} is broken: its entry {ENTRY!r} cannot be read ({shown(error)})."
        ) from error


def holds_cache(reader: Reader) -> bool:
    """Whether a file holds a cache or a memory.

    Raises:
        FileError: the entry of anymha in its metadata cannot be read.
    """
    return ENTRY in reader.metadata and caches.is_entry(_entry(reader))


def _entry(reader: Reader) -> Any:
    """What the metadata of a file of anymha says.

    Raises:
        FileError: there is nothing, or it cannot be read.
    """
    path = shown(reader.path)
    if ENTRY not in reader.metadata:
        raise FileError(
            f"{path} was not written by anymha: its metadata has no {ENTRY!r}. To convert weights "
            "of other libraries: anymha inspect FILE, then anymha convert."
        )
    try:
        return parse_json(reader.metadata[ENTRY].encode("utf-8"))
    except _UNREADABLE as error:
        raise FileError(
            f"{path} is broken: its entry {ENTRY!r} cannot be read ({shown(error)})."
        ) from error


def _names(reader: Reader, prefix: str, configs: Mapping[str, AttentionConfig]) -> list[str]:
    """What follows the prefix in the names of a layer; names of others may begin so too."""
    owned = {
        other + name
        for other, config in configs.items()
        if other != prefix
        for name in config.weight_shapes()
    }
    own = [name for name in reader.tensors if name.startswith(prefix) and name not in owned]
    return [name.removeprefix(prefix) for name in own]


def _check_fit(path: Path, config: AttentionConfig, weights: Mapping[str, Tensor]) -> None:
    """Check that the weights have the names, shapes and dtype of the configuration.

    Raises:
        FileError: they have not.
    """
    shapes = config.weight_shapes()
    missing = [name for name in shapes if name not in weights]
    unknown = [name for name in weights if name not in shapes]
    if missing or unknown:
        raise FileError(
            f"{shown(path)} does not hold the weights of its configuration. Missing: "
            f"{listed(missing)}. Unknown: {listed(unknown)}."
        )
    for name, shape in shapes.items():
        tensor = weights[name]
        if tensor.shape != shape or tensor.dtype.name != config.dtype:
            raise FileError(
                f"{shown(path)} does not fit its configuration: `{name}` must be {config.dtype} of "
                f"shape {shape}. Received: {tensor.dtype} of shape {tensor.shape}."
            )
