"""Files that people have: folders, shards, any name; and what is no weights is named."""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import types
import typing
import zipfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from anymha.errors import FileError
from anymha.interchange.detect import find_layer_groups
from anymha.interchange.files.formats import create_file, format_of, open_file
from tests.file_samples import (
    DATA,
    Arrays,
    announced,
    as_torch,
    by_flax,
    by_gguf,
    by_numpy,
    by_tensorflow,
    by_torch,
    by_torch_before_1_6,
    by_torch_distributed,
    by_torch_in_shards,
    in_keras_archive,
    same,
    sample,
    samples,
    write,
)
from tests.frameworks import required

ARRAYS = {"a.weight": sample("float32", (3, 4)), "a.bias": sample("float16", (4,))}


def read(path: Path) -> Arrays:
    with open_file(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def holds(path: Path, arrays: Arrays) -> bool:
    found = read(path)
    return set(found) == set(arrays) and all(same(found[n], a) for n, a in arrays.items())


def refused(path: Path) -> str:
    with pytest.raises(FileError) as error:
        open_file(path)
    return str(error.value)


@pytest.mark.parametrize("name", ["last.ckpt", "best.pth.tar", "weights", "a.safetensors", "x.dat"])
@pytest.mark.parametrize("written", [by_torch, by_torch_before_1_6])
def test_torch_files_of_any_name_are_read(tmp_path: Path, name: str, written) -> None:
    path, arrays = written(tmp_path)
    assert holds(path.rename(tmp_path / name), arrays)


@pytest.mark.parametrize("written", [by_numpy, by_flax, by_gguf])
def test_files_of_a_wrong_name_are_read(tmp_path: Path, written) -> None:
    path, arrays = written(tmp_path)
    suffix = ".h5" if written is not by_flax else ".MSGPACK"
    with open_file(path.rename(tmp_path / f"a{suffix}")) as reader:
        assert all(same(reader.read(name), array) for name, array in arrays.items())


def test_safetensors_named_as_torch_s_are_read(tmp_path: Path) -> None:
    safetensors.numpy.save_file(ARRAYS, tmp_path / "pytorch_model.bin")
    assert holds(tmp_path / "pytorch_model.bin", ARRAYS)
    assert format_of(tmp_path / "pytorch_model.bin").name == "safetensors"


def test_what_training_saves_besides_weights_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a checkpoint of PyTorch Lightning has it, whose classes are not imported."""
    torch = required("torch")
    module = types.ModuleType("pytorch_lightning.utilities.parsing")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", module.__name__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    omegaconf = types.ModuleType("omegaconf.dictconfig")
    omegaconf.DictConfig = type("DictConfig", (), {"__module__": omegaconf.__name__, "a": 1})
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, omegaconf.__name__, omegaconf)
    state = {"a.weight": as_torch(torch, ARRAYS["a.weight"])}
    saved = {
        "state_dict": state, "epoch": 3, "hyper_parameters": module.AttributeDict(width=8),
        "best": np.float64(0.5), "rng": np.arange(3), "options": argparse.Namespace(lr=0.1),
        "path": Path("x"), "counts": defaultdict(int, a=1), "seen": {1, 2},
        "betas": (1j, range(3), slice(1, 2), bytearray(b"x")), "any": typing.Any,
        "config": omegaconf.DictConfig(),
    }  # fmt: skip
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.ckpt"
        torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
        monkeypatch.delitem(sys.modules, module.__name__, raising=False)
        assert holds(path, {"state_dict.a.weight": ARRAYS["a.weight"]})
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_legacy_file_that_is_cut_is_told(tmp_path: Path) -> None:
    path, _ = by_torch_before_1_6(tmp_path)
    content = path.read_bytes()
    for size in (30, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "is not a torch file that can be read" in refused(path)


FOLDERS = {
    "model.safetensors": "safetensors",
    "pytorch_model.bin": "torch",
    "diffusion_pytorch_model.safetensors": "safetensors",
    "consolidated.00.pth": "torch",
    "weights.npz": "NumPy",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_by_its_file_of_weights(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ARRAYS)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert holds(tmp_path, ARRAYS)
    assert format_of(tmp_path).name == FOLDERS[name]


def test_safetensors_come_first_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "pytorch_model.bin", {"other": ARRAYS["a.bias"]})
    write(tmp_path / "model.safetensors", ARRAYS)
    assert holds(tmp_path, ARRAYS)


def test_a_folder_of_links_as_the_hub_s_cache_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    write(blobs / "x.safetensors", ARRAYS).rename(blobs / "0123")
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert holds(snapshot, ARRAYS)


def test_a_folder_of_shards_is_read_by_the_index(tmp_path: Path) -> None:
    _, arrays = by_torch_in_shards(tmp_path)
    assert format_of(tmp_path).name == "sharded torch"
    assert holds(tmp_path, arrays)


def test_a_folder_that_does_not_say_which_file_lists_them(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", ARRAYS)
    write(tmp_path / "two.npz", ARRAYS)
    assert refused(tmp_path) == (
        f"{tmp_path} holds 2 files that may be weights; name one of them: 'one.safetensors', "
        "'two.npz'."
    )


@pytest.mark.parametrize(
    "file",
    [
        "snapshots/0a1/model.safetensors",
        "checkpoint-500/pytorch_model.bin",
        "0_Model/a.safetensors",
    ],
)
def test_a_folder_whose_weights_lie_below_names_them(tmp_path: Path, file: str) -> None:
    """As a hub's cache, a trainer's output, a chain of modules."""
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    with pytest.raises(FileError, match=f"holds a file that may be weights; name it: '{file}'"):
        open_file(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.{}.pth",
        "layer_02-model_{}-model_states.pt",
        "reshard-model_part-{}.pt",
        "rank{}.safetensors",
        "model-rank-{}-part-0.safetensors",
    ],
)
def test_a_shard_of_layers_split_by_rank_is_refused(tmp_path: Path, name: str) -> None:
    """Its matrices have the names and forms of whole ones, with a part of the heads."""
    for rank in ("00", "01"):
        write(tmp_path / "a.safetensors", ARRAYS).replace(tmp_path / name.format(rank))
    assert "is one of 2 shards of a model that was split by rank" in refused(
        tmp_path / name.format("00")
    )


@pytest.mark.parametrize("names", [["consolidated.00.pth"], ["rank4.npz", "rank8.npz"]])
def test_a_file_of_one_rank_or_of_adapters_rank_is_read(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / f"a{Path(name).suffix}", ARRAYS).replace(tmp_path / name)
    assert holds(tmp_path / names[0], ARRAYS)


def test_a_folder_without_weights_lists_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "unet").mkdir()
    assert refused(tmp_path) == (
        f"{tmp_path} holds no file of weights that can be read, and is no Orbax, TensorFlow or "
        "torch checkpoint either. It holds 'notes.md', 'unet'."
    )


@pytest.mark.parametrize(
    ("file", "words"),
    {
        "Manifest.json": "is a Core ML package",
        "model_index.json": "is a pipeline of several models",
        "latest_checkpointed_iteration.txt": "is a Megatron checkpoint",
        "mp_rank_00/model_optim_rng.pt": "is a Megatron checkpoint",
    }.items(),
)
def test_a_folder_of_another_kind_is_named(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    assert words in refused(tmp_path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f1e\nsize 437951328\n"
FOREIGN = {
    "empty": ("model.safetensors", b"", "is empty: it has 0 bytes. Was its download broken off?"),
    "git-lfs": ("model.safetensors", LFS,
                "is a pointer of git-lfs, not the file of 437,951,328 bytes that it stands for. "
                "Fetch that with: git lfs pull."),
    "git-lfs onnx": ("model.onnx", LFS, "is a pointer of git-lfs"),
    "page": ("pytorch_model.bin", b"\n<!DOCTYPE html>\n<html>", "is a web page (HTML or XML), not"),
    "xml": ("a.h5", b'<?xml version="1.0"?><Error>', "is a web page (HTML or XML), not weights"),
    "answer": ("a.safetensors", b'{"error": "Repository not found"}',
               "is JSON, not weights; it says 'repository not found'."),
    "config": ("config.json", b'{"model_type": "bert"}',
               "is JSON, not weights; it is a model's configuration. Name the folder"),
    "tokenizer": ("tokenizer.json", b"{}", "is of a tokenizer, not weights"),
    "sentencepiece": ("tokenizer.model", b"\n\x0e", "is of a tokenizer, not weights"),
    "tflite": ("model.tflite", b"\x1c\0\0\0TFL3" + bytes(9), "is a TensorFlow Lite model"),
    "ctranslate2": ("model.bin", b"\x06\0\0\0\x10\0TransformerSpec\0", "is a CTranslate2 model"),
    "paddle": ("model.pdparams", b"\x80\x02}", "is a file of Paddle"),
    "core ml": ("a.mlmodel", b"\x08\x05", "is a Core ML model"),
    "megatron": ("mp_rank_01/model_optim_rng.pt", b"PK\3\4", "is a shard of a model that Megatron"),
    "deepspeed": ("mp_rank_00_model_states.pt", b"PK\3\4", "is a shard of a model that Megatron"),
    "ggml": ("ggml-model.bin", b"lmgg\0\0", "is of llama.cpp before GGUF"),
    "npy": ("a.npy", b"\x93NUMPY\x01\0", "is one array of NumPy (.npy), without names"),
    "gzip": ("a.npz", b"\x1f\x8b\x08\0", "is compressed. Unpack it first"),
    "pickle": ("model.pkl", b"\x80\x04\x95", "is a pickle, not a file of `torch.save`, and"),
    "data": ("model.ckpt-7.data-00000-of-00001", b"\1\2", "Name its `.index` file"),
    "distcp": ("__0_0.distcp", b"PK\3\4", "is a part of a torch distributed checkpoint"),
    "unknown": ("weights.dat", b"\1\2\3", "is of no known format, neither by its name nor by its"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_weights_is_named(tmp_path: Path, kind: str) -> None:
    name, content, words = FOREIGN[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    told = refused(path)
    assert words in told
    assert str(path) in told


def test_a_tar_archive_is_named(tmp_path: Path) -> None:
    import tarfile  # noqa: PLC0415

    with tarfile.open(tmp_path / "old.pth.tar", "w") as archive:
        archive.add(DATA / "README.md", "README.md")
    assert "is a tar archive. Unpack it first" in refused(tmp_path / "old.pth.tar")


def test_a_zip_archive_of_other_things_lists_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("model.safetensors", b"x")
    assert refused(tmp_path / "model.zip") == (
        f"{tmp_path / 'model.zip'} is a zip archive without weights of a known form. It holds "
        "'model.safetensors'. Unpack it first."
    )


def test_onnx_of_another_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes((DATA / "initializers.onnx").read_bytes())
    assert "query.kernel" in read(tmp_path / "model")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_shards_are_written_with_an_index(tmp_path: Path, suffix: str) -> None:
    arrays = samples("float64", "float32", separator=".")
    path = tmp_path / f"model{suffix}"
    with create_file(path, announced(arrays), {"x": "1"}, max_shard_bytes=100) as writer:
        for name in reversed(list(arrays)):
            writer.write(name, arrays[name])
    index = json.loads((tmp_path / f"model{suffix}.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0].startswith("model-00001-of-0000")
    assert len(files) > 2
    assert sorted(one.name for one in tmp_path.iterdir()) == [*files, f"model{suffix}.index.json"]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    for file in files:
        with open_file(tmp_path / file) as reader:
            large = max(tensor.bytes for tensor in reader.tensors.values())
            assert sum(t.bytes for t in reader.tensors.values()) <= max(100, large)
    assert holds(tmp_path, arrays)
    if suffix == ".safetensors":
        loaded = [safetensors.numpy.load_file(tmp_path / file) for file in files]
        assert holds(tmp_path, {name: array for one in loaded for name, array in one.items()})
        with open_file(tmp_path) as reader:
            assert reader.metadata == {"x": "1"}


def test_what_fits_one_file_is_not_split(tmp_path: Path) -> None:
    with create_file(tmp_path / "a.npz", announced(ARRAYS), max_shard_bytes=1000) as writer:
        for name, array in ARRAYS.items():
            writer.write(name, array)
    assert [one.name for one in tmp_path.iterdir()] == ["a.npz"]


def test_an_error_leaves_no_shard(tmp_path: Path) -> None:
    def fail() -> None:
        with create_file(tmp_path / "a.pt", announced(ARRAYS), max_shard_bytes=10) as writer:
            writer.write("a.bias", ARRAYS["a.bias"])
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_transformers_reads_the_shards(tmp_path: Path) -> None:
    transformers = required("transformers")
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8, vocab_size=9)  # fmt: skip
    config.save_pretrained(tmp_path)
    model = transformers.BertModel(config)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    path = tmp_path / "model.safetensors.index.json"
    with create_file(path, announced(arrays), {"format": "pt"}, max_shard_bytes=2000) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    found = transformers.BertModel.from_pretrained(tmp_path).state_dict()
    assert all(same(found[name].numpy(), array) for name, array in arrays.items())


def test_gguf_is_read(tmp_path: Path) -> None:
    """Plain tensors without the package gguf; texts and numbers of the metadata."""
    path, arrays = by_gguf(tmp_path)
    with open_file(path) as reader:
        assert all(same(reader.read(name), array) for name, array in arrays.items())
        assert reader.metadata["general.architecture"] == "llama"
        assert reader.metadata["llama.attention.head_count"] == "2"
        sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 3}
        assert reader.config == sizes
        assert reader.metadata["tensor types"] == "float32, float16, Q4_1, Q8_0, int32, bfloat16"
        if find_spec("gguf") is None:
            with pytest.raises(FileError, match=r"pip install 'anymha\[gguf\]'"):
                reader.read("eights")


def test_quantised_gguf_is_dequantised() -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    found = read(DATA / "sample.gguf")
    eights = np.arange(128, dtype=np.float32).reshape(2, 64)
    eights[:, ::32] = 127
    assert same(found["eights"], eights)
    assert same(found["fours"], np.tile(np.arange(16, dtype=np.float32), 8).reshape(2, 64))


def gguf(tensors: int = 0, values: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def text(content: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if size is None else size) + content


def entry(shape: tuple[int, ...], kind: int = 0, at: int = 0) -> bytes:
    return text(b"a") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gguf(version=1), "it has the version 1"),
        (gguf(2**60), "it ends too early"),
        (gguf(0, 2**60), "it ends too early"),
        (gguf(0, 1, text(b"", 2**60)), f"it has a name of {2**60} bytes"),
        (gguf(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, 2**61)), "it ends too early"),
        (gguf(0, 1, text(b"k") + struct.pack("<I", 77)), "a value of the kind 77"),
        (gguf(1, 0, entry((2**40, 4))), "reaches over the file's end"),
        (gguf(1, 0, entry((4,), at=2**63)), "reaches over the file's end"),
        (gguf(1, 0, entry((4,), kind=99)), "has the unknown type 99"),
        (gguf(1, 0, entry((2**50,), kind=2)), "reaches over the file's end"),
        (gguf(1, 0, entry((1,) * 9)), "has 9 axes"),
        (gguf(0, 1, text(b"split.count") + struct.pack("<IH", 2, 3)), "one of 3 parts of a model"),
    ],
)
def test_broken_gguf_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    assert words in refused(tmp_path / "a.gguf")


def extension(content: bytes) -> bytes:
    return b"\xc7" + bytes([len(content), 1]) + content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x81\xa1a", "it ends too early"),
        (b"\xdf\xff\xff\xff\xff", "it ends too early"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "it ends too early"),
        (b"\x81\xa1a" * 40 + b"\xc0", "its dicts are nested more than 32 deep"),
        (b"\x81\xa1a\xc1", "byte 3 is none of msgpack's"),
        (b"\x81\xc0\xc0", "a key is no text"),
        (b"\x81\xa1a\xc0\xc0", "there are bytes after its end"),
        (b"\x81\xa1a" + extension(b"\x93\x91\x05\xa7float32\xc4\x04aaaa"), "has 4 bytes"),
        (b"\x81\xa1a" + extension(b"\x93\x91\xff\xa7float32\xc4\x04aaaa"), "a shape that is none"),
        (b"\x81\xa1a" + extension(b"\x93\x91\x01\xa6object\xc4\x08aaaaaaaa"), "not numbers"),
        (b"\x82\xa1a" + (one := extension(b"\x93\x91\x01\xa7float32\xc4\x04aaaa")) + b"\xa1a" + one,
         "it has 'a' twice"),
        (b"\x81\xa1a\x82\xb9__msgpack_chunked_array__\xc3\xa5shape\x81\xa10\x05",
         "an array in chunks has no shape"),
    ],
)  # fmt: skip
def test_broken_msgpack_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.msgpack").write_bytes(content)
    assert words in refused(tmp_path / "a.msgpack")


def test_arrays_that_flax_splits_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    required("flax")
    import flax.serialization as serialization  # noqa: PLC0415

    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 40)
    arrays = {"n/long": np.arange(24.0).reshape(4, 6), "short": np.arange(3)}
    tree = {"n": {"long": arrays["n/long"]}, "short": arrays["short"]}
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(tree))
    assert holds(tmp_path / "a.msgpack", arrays)


def test_distributed_checkpoints_of_several_pieces_are_joined(tmp_path: Path) -> None:
    """Two processes, each with half of the rows."""
    required("torch")
    program = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
mesh = DeviceMesh("cpu", [0, 1])
whole = torch.arange(15.).reshape(5, 3)
dcp.save({{"w": distribute_tensor(whole, mesh, [Shard(0)])}}, checkpoint_id="{tmp_path}/dcp")
dist.destroy_process_group()
"""
    ranks = [subprocess.Popen([sys.executable, "-c", program, str(rank)]) for rank in (0, 1)]
    assert [one.wait(timeout=120) for one in ranks] == [0, 0]
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    assert holds(tmp_path / "dcp", {"w": np.arange(15, dtype=np.float32).reshape(5, 3)})


def test_distributed_checkpoints_that_are_cut_are_told(tmp_path: Path) -> None:
    path, _ = by_torch_distributed(tmp_path)
    (file,) = path.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert "ends within a piece of" in refused(path)
    file.unlink()
    assert "cannot be read: No such file" in refused(path)
    (path / ".metadata").write_bytes(b"cos\nsystem\n(S'x'\ntR.")
    assert "it holds os.system, which is code to run" in refused(path)


def test_checkpoints_of_tensorflow_have_several_names(tmp_path: Path) -> None:
    path, arrays = by_tensorflow(tmp_path)
    for name in (path.with_name("ckpt.index"), path, tmp_path):
        assert holds(name, arrays), name
    (tmp_path / "ckpt.data-00000-of-00001").unlink()
    assert "its data, ckpt.data-..., do not lie beside it" in refused(path)


@pytest.fixture(scope="module")
def keras_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one Keras model, saved whole in HDF5 and as a SavedModel."""
    required("keras")
    required("tensorflow")
    folder = tmp_path_factory.mktemp("keras")
    program = f"""
import os, warnings
warnings.simplefilter("ignore")
import keras, numpy as np
x = keras.Input((5, 8))
y = keras.layers.Dense(3)(keras.layers.MultiHeadAttention(2, 4, name="mha")(x, x))
model = keras.Model(x, y)
model.compile("adam", "mse")
model.fit(np.ones((2, 5, 8)), np.ones((2, 5, 3)), verbose=0)
model.save("{folder}/whole.h5")
model.export("{folder}/saved", verbose=False)
np.savez("{folder}/own.npz", **{{w.path: w.numpy() for w in model.get_layer("mha").weights}})
"""
    environment = {**__import__("os").environ, "KERAS_BACKEND": "tensorflow",
                   "TF_CPP_MIN_LOG_LEVEL": "3"}  # fmt: skip
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)
    return folder


@pytest.mark.parametrize(
    ("name", "prefix"), [("whole.h5", "model_weights/mha/mha/"), ("saved", "variables/mha/")]
)
def test_whole_keras_models_are_read(keras_model: Path, name: str, prefix: str) -> None:
    with open_file(keras_model / name) as reader:
        groups = find_layer_groups(reader.tensors, format_of(keras_model / name))
        (group,) = (one for one in groups if prefix in one.prefixes)
        assert "keras.MultiHeadAttention" in [fit.name for fit in group.fits]
        own = np.load(keras_model / "own.npz")
        for key in own.files:
            assert same(reader.read(prefix + key.removeprefix("mha/")), own[key])


def test_old_names_of_variables_lose_the_number_of_an_output(tmp_path: Path) -> None:
    """As `tf_model.h5` of Hugging Face has them."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    name = "bert/tf_bert_model/bert/encoder/layer_._0/attention/self/query/kernel"
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file[f"{name}:0"] = ARRAYS["a.weight"]
        file["a"], file["a:0"] = np.zeros(2), np.ones(2)
    found = read(tmp_path)
    assert same(found[name], ARRAYS["a.weight"])
    assert found["a"].tolist() == [0, 0]
    assert found["a:0"].tolist() == [1, 1]


def test_a_full_folder_for_temporary_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = in_keras_archive(tmp_path)
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "r+b"))  # noqa: SIM115
    told = refused(path)
    assert "its weights, " in told
    assert "No space left on device. Set TMPDIR to a folder with room." in told
    assert "broken" not in told
