"""Safetensors in several files, with an index of JSON that assigns each tensor to a file.

References:
    Hugging Face, "transformers", documentation of `save_pretrained`, section "Sharded checkpoints".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from anymha.interchange.files.reader import Reader, open_stream
from anymha.interchange.files.safetensors import MAX_HEADER, SafetensorsReader

KIND = "an index of safetensors"


class ShardedReader(Reader):
    """The tensors of all files that an index names; each must have the tensors assigned to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND)
        self._files: dict[str, SafetensorsReader] = {}
        self._places = self._index()
        try:
            for file in dict.fromkeys(self._places.values()):
                self._files[file] = SafetensorsReader(path.parent / file)
            for name, file in self._places.items():
                if name not in self._files[file].tensors:
                    raise self.broken(f"{file} does not hold {name!r}, as the index says")
        except BaseException:
            self.close()
            raise
        self.tensors = {n: self._files[file].tensors[n] for n, file in self._places.items()}

    def _index(self) -> dict[str, str]:
        stream, size = open_stream(self.path)
        with stream:
            if size > MAX_HEADER:
                raise self.broken(f"it has {size} bytes, and {MAX_HEADER} are the most")
            try:
                index: Any = json.loads(stream.read().decode("utf-8"))
                json.dumps(index, ensure_ascii=False).encode("utf-8")
            except (ValueError, RecursionError) as error:
                raise self.broken(f"it is not JSON ({error})") from error
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not places:
            raise self.broken("it has no `weight_map` of file names by tensor")
        for file in places.values():
            if not isinstance(file, str) or not _is_plain(file):
                raise self.broken(f"it names {file!r}, which is no file next to it")
        return places

    def _read(self, name: str) -> np.ndarray:
        return self._files[self._places[name]].read(name)

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()


def _is_plain(file: str) -> bool:
    """Whether it names a file in the same folder."""
    return file.endswith(".safetensors") and not set(file) & set("/\\:\0")


def open_sharded(path: Path) -> ShardedReader:
    """The tensors of the files that an index names.

    Raises:
        FileError: one cannot be read, or is broken, or lies elsewhere.
    """
    return ShardedReader(path)
