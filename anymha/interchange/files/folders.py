"""Folders of weights: which file in them holds the weights, or what else the folder is."""

from __future__ import annotations

from pathlib import Path

from anymha.errors import FileError
from anymha.interchange.files.sharded import INDEX
from anymha.text import quoted, shown

WEIGHTS = tuple(
    f"{stem}{suffix}{index}"
    for stem, suffix in (
        ("model", ".safetensors"), ("diffusion_pytorch_model", ".safetensors"),
        ("adapter_model", ".safetensors"), ("pytorch_model", ".bin"),
        ("diffusion_pytorch_model", ".bin"), ("adapter_model", ".bin"),
        ("flax_model", ".msgpack"), ("tf_model", ".h5"), ("model", ".weights.h5"),
    )
    for index in (INDEX, "")
)  # fmt: skip
"""The names that Hugging Face's libraries and Keras give the weights in a folder, best first."""

_MARKS = {
    "model.json": "is a model of TensorFlow.js",
    "Manifest.json": "is a Core ML package; export the weights from the model that it was made of",
    "inference.pdmodel": "is a Paddle model; export its weights in Paddle, as .npz",
    "model_index.json": "is a pipeline of several models; name the folder of one of them",
    "latest_checkpointed_iteration.txt": (
        "is a Megatron checkpoint; its layers are split over files by rank; merge them first, with "
        "Megatron's `tools/checkpoint/convert.py`"
    ),
}
BELOW = ("*/*", "snapshots/*/*")
"""Where files of weights lie in folders of folders: of a trainer, of a hub's cache."""
SHOWN = 8


def folder_kind(folder: Path) -> tuple[str, Path] | None:
    """The format's name and the path to open, of a folder that is itself a checkpoint."""
    for inner in (folder, folder / "default"):
        if (inner / "_METADATA").is_file():
            return "Orbax checkpoint", folder
    if (folder / ".metadata").is_file():
        return "torch distributed checkpoint", folder
    if (folder / "saved_model.pb").is_file():
        return "TensorFlow checkpoint", folder / "saved_model.pb"
    indices = sorted(folder.glob("*.index"))
    if len(indices) == 1:
        return "TensorFlow checkpoint", indices[0]
    return None


def refuse_folder(folder: Path, files: list[Path]) -> FileError:
    """The error for a folder that does not say which of its files to open.

    Args:
        folder: The folder.
        files: The files in it, or below it, that may hold weights.
    """
    inside = sorted(folder.iterdir())
    for name, words in _MARKS.items():
        if (folder / name).is_file():
            return FileError(f"{shown(folder)} {words}.")
    if any(one.name.startswith(("mp_rank_", "iter_")) and one.is_dir() for one in inside):
        return FileError(f"{shown(folder)} {_MARKS['latest_checkpointed_iteration.txt']}.")
    if not files:
        names = ", ".join(quoted(one.name) for one in inside[:SHOWN]) or "nothing"
        more = f", and {len(inside) - SHOWN} more" if len(inside) > SHOWN else ""
        return FileError(
            f"{shown(folder)} holds no file of weights that can be read, and is no Orbax, "
            f"TensorFlow or torch checkpoint either. It holds {names}{more}."
        )
    names = ", ".join(quoted(str(one.relative_to(folder))) for one in files[:SHOWN])
    more = ", ..." if len(files) > SHOWN else ""
    what = "a file that may be weights; name it" if len(files) == 1 else (
        f"{len(files)} files that may be weights; name one of them"
    )  # fmt: skip
    return FileError(f"{shown(folder)} holds {what}: {names}{more}.")
