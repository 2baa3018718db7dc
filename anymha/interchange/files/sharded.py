"""Weights in several files of one format, with an index of JSON that assigns each tensor to a file.

References:
    Hugging Face, "transformers", documentation of `save_pretrained`, section "Sharded checkpoints".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from anymha.interchange.files.atomic_write import atomic_file
from anymha.interchange.files.json_text import parse_json
from anymha.interchange.files.reader import Create, Reader, Tensor, Writer, open_stream
from anymha.interchange.files.siblings import MAX_INDEX
from anymha.text import quoted, shown

KIND = "an index of shards"
INDEX = ".index.json"
MAX_SHARDS = 10_000


class ShardedReader(Reader):
    """The tensors of all files that an index names; each must have the tensors assigned to it.

    Args:
        path: The index.
        open_shard: Opens a file.
        suffixes: The ends that the files' names may have.
    """

    def __init__(self, path: Path, open_shard: Any, suffixes: tuple[str, ...]) -> None:
        super().__init__(path, KIND)
        self._files: dict[str, Reader] = {}
        self._places = self._index(suffixes)
        try:
            for file in dict.fromkeys(self._places.values()):
                self._files[file] = open_shard(path.parent / file)
            for name, file in self._places.items():
                if name not in self._files[file].tensors:
                    raise self.broken(
                        f"{shown(file)} does not hold {quoted(name)}, as the index says"
                    )
            self.set_tensors((n, self._files[file].tensors[n]) for n, file in self._places.items())
        except BaseException:
            self.close()
            raise
        metadata = [reader.metadata for reader in self._files.values()]
        if all(one == metadata[0] for one in metadata):
            self.metadata = metadata[0]

    def _index(self, suffixes: tuple[str, ...]) -> dict[str, str]:
        stream, size = open_stream(self.path)
        with stream:
            if size > MAX_INDEX:
                raise self.broken(f"it has {size} bytes, and {MAX_INDEX} are the most")
            try:
                index: Any = parse_json(stream.read())
            except ValueError as error:
                raise self.broken(f"it is not JSON ({shown(error)})") from error
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not places:
            raise self.broken("it has no `weight_map` of file names by tensor")
        files = {str(file): file for file in places.values()}  # no other value has such an end
        if len(files) > MAX_SHARDS:
            raise self.broken(f"it names {len(files)} files, and {MAX_SHARDS} are the most")
        for name, file in files.items():
            if set(name) & set("/\\:\0") or not name.endswith(suffixes):
                raise self.broken(f"it names {quoted(file)}, which is no file next to it")
        return places

    def _read(self, name: str) -> np.ndarray:
        return self._files[self._places[name]].read(name)

    def files(self) -> list[Path]:
        """The index, and the files that it names."""
        return [self.path, *(file.path for file in self._files.values())]

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()


class _ShardedWriter:
    def __init__(self, writers: Mapping[str, Writer]) -> None:
        self._writers = writers

    def write(self, name: str, array: np.ndarray) -> None:
        """Write an announced tensor to its shard."""
        self._writers[name].write(name, array)


def shard_index(path: Path) -> Path:
    """The index of the shards of a file: ``model.safetensors.index.json`` of model.safetensors."""
    return path if path.name.endswith(INDEX) else path.with_name(path.name + INDEX)


def split_shards(
    path: Path, tensors: Mapping[str, Tensor], max_bytes: int
) -> dict[Path, dict[str, Tensor]]:
    """The tensors of each shard, in their order; one that is larger than a shard has its own.

    Args:
        path: The file whose shards they are: ``model-00001-of-00003.safetensors`` and so on.
        tensors: Shape and dtype by name.
        max_bytes: The most bytes of tensors in a shard.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.bytes
    name = path.name.removesuffix(INDEX)
    stem, dot, suffix = name.rpartition(".")
    return {
        path.with_name(f"{stem}-{number:05}-of-{len(shards):05}{dot}{suffix}"): shard
        for number, shard in enumerate(shards, 1)
    }


@contextmanager
def create_sharded(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    create: Create,
    max_bytes: int,
) -> Iterator[Writer]:
    """New shards and their index, which are there once all tensors are; the index comes last.

    Args:
        path: The index.
        tensors: Shape and dtype by name.
        metadata: Texts besides the tensors, which each shard has.
        create: Begins a shard.
        max_bytes: The most bytes of tensors in a shard.

    Raises:
        FileError: one cannot be written.
    """
    shards = split_shards(path, tensors, max_bytes)
    places = {name: file.name for file, shard in shards.items() for name in shard}
    total = sum(tensor.bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    with ExitStack() as stack:
        stream = stack.enter_context(atomic_file(path))  # ends, and appears, last
        stream.write(json.dumps(index, indent=2, ensure_ascii=False).encode("utf-8"))
        writers = {}
        for file, shard in shards.items():
            writers |= dict.fromkeys(shard, stack.enter_context(create(file, shard, metadata)))
        yield _ShardedWriter(writers)
