"""Recognise what a file is by its first bytes, also what nothing here can read."""

from __future__ import annotations

import re
from pathlib import Path

from anymha.errors import FileError
from anymha.interchange.files.archive import Archive
from anymha.interchange.files.json_text import parse_json
from anymha.interchange.files.reader import open_stream
from anymha.text import quoted, shown

HEAD = 4096
SHOWN = 4
TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickle of the magic number with which files of torch before 1.6 begin."""
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ONNX = re.compile(rb"\x08[\x03-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]")
"""The version of ONNX, as a field of protobuf, and another field of a model."""
_USER_BLOCKS = (0, 512, 1024, 2048)


def head_of(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        FileError: it cannot be read.
    """
    stream, _ = open_stream(path)
    with stream:
        return stream.read(HEAD)


def is_zip(head: bytes) -> bool:
    """Whether a zip archive begins so."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def is_torch(head: bytes) -> bool:
    """Whether a file of torch begins so, a zip archive or the form before 1.6."""
    return is_zip(head) or head.startswith(TORCH_LEGACY)


def is_hdf5(head: bytes) -> bool:
    """Whether an HDF5 file begins so."""
    return any(head[at:].startswith(_HDF5) for at in _USER_BLOCKS)


def is_gguf(head: bytes) -> bool:
    """Whether a GGUF file begins so."""
    return head.startswith(b"GGUF")


def is_safetensors(head: bytes) -> bool:
    """Whether a safetensors file begins so: the length of a header, which is JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def is_json(head: bytes) -> bool:
    """Whether a JSON object begins so."""
    return head.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"{")


def is_onnx(head: bytes) -> bool:
    """Whether a message of protobuf may begin so: a field that is a number or a span."""
    return bool(head) and head[0] & 7 in (0, 2)


def is_msgpack(head: bytes) -> bool:
    """Whether a dict of msgpack begins so."""
    return bool(head) and (0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))


def format_name(path: Path, head: bytes) -> str | None:
    """The name of the format of `formats.FORMATS` that has a file with these first bytes."""
    if is_zip(head):
        return _zip_name(path)
    tests = {"torch": is_torch, "Keras weights (HDF5)": is_hdf5, "GGUF": is_gguf,
             "safetensors": is_safetensors, "ONNX": _ONNX.match}  # fmt: skip
    return next((name for name, test in tests.items() if test(head)), None)


def _zip_name(path: Path) -> str | None:
    archive = Archive(path, "a zip")
    archive.close()
    names = archive.sizes
    if "model.weights.h5" in names:
        return "Keras model"
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return "torch"
    return "NumPy" if names and all(name.endswith(".npy") for name in names) else None


def refuse_by_name(path: Path) -> None:
    """Raise the error for a file that, by its name, is only a part or no weights at all.

    Raises:
        FileError: it is one.
    """
    for pattern, words in _NAMES.items():
        if re.search(pattern, path.as_posix(), re.IGNORECASE):
            raise FileError(f"{shown(path)} is {words}.")
    rank = _RANK.search(path.name)
    if rank is None:
        return
    begin, end = path.name[: rank.start(1)], path.name[rank.end(1) :]
    names = [one.name for one in path.parent.iterdir() if one.name.startswith(begin)]
    ranks = {name[len(begin) : len(name) - len(end)] for name in names if name.endswith(end)}
    if {0, 1} <= {int(one) for one in ranks if one.isdecimal()}:
        raise FileError(
            f"{shown(path)} is one of {len(ranks)} shards of a model that was split by rank: none "
            "of its layers is whole in it. Merge the shards first, with their own tools."
        )


def refuse(path: Path, head: bytes) -> None:
    """Raise the error for a file whose first bytes are those of something else.

    Raises:
        FileError: they are.
    """
    if not head:
        raise FileError(f"{shown(path)} is empty: it has 0 bytes. Was its download broken off?")
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"^size (\d{1,18})$", head, re.MULTILINE)
        real = f" of {int(size[1]):,} bytes" if size else ""
        raise FileError(
            f"{shown(path)} is a pointer of git-lfs, not the file{real} that it stands for. Fetch "
            "that with: git lfs pull."
        )
    text = head.lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        raise FileError(
            f"{shown(path)} is a web page (HTML or XML), not weights: the server answered the "
            "download with a page, often an error or a request to log in."
        )
    if is_zip(head):
        archive = Archive(path, "a zip")
        archive.close()
        names = ", ".join(map(quoted, list(archive.sizes)[:SHOWN])) or "nothing"
        raise FileError(
            f"{shown(path)} is a zip archive without weights of a known form. It holds {names}. "
            "Unpack it first."
        )
    if is_json(head):
        raise FileError(f"{shown(path)} is JSON, not weights{_json_words(text)}.")
    for test, words in _CONTENTS.items():
        if re.match(test, head, re.DOTALL):
            raise FileError(f"{shown(path)} is {words}.")


def _json_words(text: bytes) -> str:
    if b'"model_type"' in text or b'"architectures"' in text:
        return "; it is a model's configuration. Name the folder, or the file of weights beside it"
    try:
        answer = parse_json(text)
    except ValueError:
        return ""
    error = answer.get("error") or answer.get("message")
    return f"; it says {str(error)[:100]!r}" if error else ""


_EXPORT = "export the weights from the model that it was made of"
_PADDLE = "a file of Paddle; export its weights in Paddle, as .npz"
_TOKENIZER = "of a tokenizer, not weights"
_RANK = re.compile(r"(?:^consolidated\.|-model_|model_part-|(?:^|[-_.])rank[-_]?)(\d+)")
"""The rank in the name of one of the shards of Meta, DeepSpeed, metaseq, TensorRT-LLM, vLLM."""
_NAMES = {
    r"(^|/)(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json$": _TOKENIZER,
    r"(^|/)(vocab|merges)\.txt$|(^|/)(tokenizer|spiece|sentencepiece\.bpe)\.model$": _TOKENIZER,
    r"\.tiktoken$": _TOKENIZER,
    r"\.(pdparams|pdopt|pdmodel|pdiparams)$": _PADDLE,
    r"\.(mlmodel|mlpackage)$": f"a Core ML model; {_EXPORT}",
    r"(^|/)mp_rank_\d+[^/]*(/[^/]*)?$": (
        "a shard of a model that Megatron or DeepSpeed split by rank: none of its layers is whole "
        "in it. Merge the shards first, with their own tools"
    ),
    r"\.data-\d{5}-of-\d{5}$": (
        "the data of a TensorFlow checkpoint. Name its `.index` file, which lies beside it"
    ),
    r"\.distcp$": "a part of a torch distributed checkpoint. Name its folder",
}
"""Files that are known by their names, and what they are."""
_CONTENTS = {
    rb".{4}TFL3": f"a TensorFlow Lite model; {_EXPORT}",
    rb".{4}ET\d\d": f"an ExecuTorch program; {_EXPORT}",
    rb"[\x01-\x20]\0\0\0.{2}[A-Za-z0-9_]*Spec\0": f"a CTranslate2 model; {_EXPORT}",
    rb"ggml|lmgg|fmgg|tjgg|algg": "of llama.cpp before GGUF; convert it with an old llama.cpp",
    rb"\x93NUMPY": (
        "one array of NumPy (.npy), without names. Save named arrays with `numpy.savez`"
    ),
    rb"\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!": "compressed. Unpack it first",
    rb".{257}ustar": "a tar archive. Unpack it first",
    rb"\x80[\x02-\x05]": (
        "a pickle, not a file of `torch.save`, and no code of a file is run. Load it where it was "
        "made, and save its arrays with `numpy.savez`"
    ),
}
"""First bytes of files that are not read, and what they are."""
