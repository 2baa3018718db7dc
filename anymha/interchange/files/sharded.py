"""Safetensors in several files, with an index of JSON that assigns each tensor to a file.

References:
    Hugging Face, "transformers", documentation of `save_pretrained`, section "Sharded checkpoints".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from anymha.interchange.files.json_text import parse_json
from anymha.interchange.files.reader import Reader, open_stream
from anymha.interchange.files.safetensors import MAX_HEADER, SafetensorsReader
from anymha.text import quoted, shown

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
                    raise self.broken(
                        f"{shown(file)} does not hold {quoted(name)}, as the index says"
                    )
            self.set_tensors((n, self._files[file].tensors[n]) for n, file in self._places.items())
        except BaseException:
            self.close()
            raise

    def _index(self) -> dict[str, str]:
        stream, size = open_stream(self.path)
        with stream:
            if size > MAX_HEADER:
                raise self.broken(f"it has {size} bytes, and {MAX_HEADER} are the most")
            try:
                index: Any = parse_json(stream.read())
            except ValueError as error:
                raise self.broken(f"it is not JSON ({shown(error)})") from error
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not places:
            raise self.broken("it has no `weight_map` of file names by tensor")
        for file in places.values():
            if not isinstance(file, str) or not _is_plain(file):
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


def _is_plain(file: str) -> bool:
    """Whether it names a file in the same folder."""
    return file.endswith(".safetensors") and not set(file) & set("/\\:\0")


def open_sharded(path: Path) -> ShardedReader:
    """The tensors of the files that an index names.

    Raises:
        FileError: one cannot be read, or is broken, or lies elsewhere.
    """
    return ShardedReader(path)
