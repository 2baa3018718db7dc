"""`anymha.find_layers` and `anymha.convert_file`: what they tell, choose and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anymha
import anymha.cli.verify
from anymha.cli.main import main
from anymha.errors import ArgumentError, FileError, UnknownLayoutError, UsageError
from anymha.framework.registry import Backend
from tests.file_samples import Arrays, write

D, H = 8, 2
BERT = ("self.query", "self.key", "self.value", "output.dense")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
OPT = ("q_proj", "k_proj", "v_proj", "out_proj")


def layer(prefix: str, *names: str, dtype: Any = np.float32) -> Arrays:
    rng = np.random.default_rng([*prefix.encode()])
    return {f"{prefix}{name}.weight": rng.standard_normal((D, D)).astype(dtype) for name in names}


def fused(prefix: str) -> Arrays:
    rng = np.random.default_rng(3)
    shapes = {"query_key_value": (3 * D, D), "dense": (D, D)}
    return {f"{prefix}{name}.weight": rng.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()}  # fmt: skip


def test_layers_of_a_file_are_told(tmp_path: Path) -> None:
    arrays = layer("e.0.", *BERT) | layer("e.1.", *BERT) | layer("d.0.", *LLAMA)
    for source in (write(tmp_path / "a.safetensors", arrays), str(tmp_path / "a.safetensors")):
        decoder, encoder = anymha.find_layers(source)
        assert (encoder.pattern, encoder.prefixes) == ("e.{i}.", ["e.0.", "e.1."])
        (fit,) = encoder.fits
        assert (fit.name, encoder.layout) == ("transformers.bert", "transformers.bert")
        assert fit.names == {f"{name}.weight": f"{name}.weight" for name in BERT}
        assert (fit.config, fit.needs) == (None, ())
        assert decoder.prefixes == ["d.0."]
        assert len(decoder.fits) > 5
        assert decoder.layout is None
        needs = {fit.name: fit.needs for fit in decoder.fits}
        assert "rotary" in needs["transformers.llama"][0]
        assert needs["transformers.vit"] == ()


def test_arrays_of_any_framework_and_nested_dicts_are_taken(installed: list[Backend]) -> None:
    arrays = layer("", *BERT)
    for backend in installed:
        native = {f"layer.0.{n}": backend.ops.from_numpy(a) for n, a in arrays.items()}
        (group,) = anymha.find_layers(native)
        assert (group.prefixes, group.layout) == (["layer.0."], "transformers.bert")
    nested: dict[str, Any] = {"block": {
        name: {"kernel": np.zeros(shape, ml_dtypes.bfloat16)}
        for name, shape in {"query": (D, H, 4), "key": (D, H, 4), "value": (D, H, 4),
                            "out": (H, 4, D)}.items()
    }}  # fmt: skip
    (group,) = anymha.find_layers(nested)
    assert "flax.nnx.MultiHeadAttention" in [fit.name for fit in group.fits]
    assert group.config is not None
    assert (group.config.num_heads, group.config.key_dim) == (H, 4)


@pytest.mark.parametrize("source", [None, 3, [np.ones(3)], {"a": "text"}, {"a": None}])
def test_what_holds_no_arrays_is_refused(source: Any) -> None:
    with pytest.raises(ArgumentError, match="`source` must"):
        anymha.find_layers(source)


def test_nothing_to_find_is_no_error_but_no_file_is(tmp_path: Path) -> None:
    assert anymha.find_layers({}) == []
    assert anymha.find_layers({"mlp.weight": np.ones((2, 2))}) == []
    with pytest.raises(FileError, match="there is no such file"):
        anymha.find_layers(tmp_path / "a.npz")


def test_file_is_converted_and_verified(tmp_path: Path, installed: list[Backend]) -> None:
    source = write(tmp_path / "a.safetensors", layer("e.0.", *BERT) | layer("e.1.", *BERT))
    done = anymha.convert_file(source, str(tmp_path / "b.safetensors"), num_heads=H)
    assert (done.layout, done.layers) == ("transformers.bert", {"e.0.": "e.0.", "e.1.": "e.1."})
    assert done.verification[0].startswith("Verified: 2 layers, back to transformers.bert")
    for backend in installed:
        assert any(f"anymha in {backend.name}" in line for line in done.verification)
    assert done.verification[-1].startswith("This proves the conversion, not the choice of layout")
    loaded = anymha.load(tmp_path / "b.safetensors", "numpy", prefix="e.1.")
    weights, config = anymha.to_canonical(layer("e.1.", *BERT) and {
        name.removeprefix("e.1."): array for name, array in layer("e.1.", *BERT).items()
    }, "transformers.bert", num_heads=H)  # fmt: skip
    assert loaded.config == config
    assert all(np.array_equal(loaded.weights[name], array) for name, array in weights.items())


@pytest.mark.parametrize("name", ["layot", "num_head", "overwrite", "clip"])
def test_an_unknown_option_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "a.safetensors", layer("e.0.", *BERT))
    for sizes in ({}, {"num_heads": H}):
        with pytest.raises(UsageError, match=f"`convert_file` has no argument.* name {name}"):
            anymha.convert_file(source, tmp_path / "b.safetensors", **sizes, **{name: "a"})


def test_options_are_those_of_the_command(tmp_path: Path) -> None:
    arrays = layer("e.0.", *LLAMA) | layer("d.0.", *LLAMA) | {"norm": np.ones(3, np.float32)}
    source = write(tmp_path / "a.safetensors", arrays)
    done = anymha.convert_file(
        source, tmp_path / "b.safetensors", layout="transformers.mistral", verify=False,
        prefix="d.{i}", to_prefix="x.{i}", others=True, head_dim=4, num_key_value_heads=2,
        sliding_window=3,
    )  # fmt: skip
    assert done.layers == {"d.0.": "x.0."}
    assert done.verification == []
    assert "norm" in done.copied
    config = anymha.load(tmp_path / "b.safetensors", "numpy", prefix="x.0.").config
    assert (config.num_heads, config.sliding_window) == (2, 3)


def test_several_layouts_must_be_named_and_one_need_not(tmp_path: Path) -> None:
    source, target = write(tmp_path / "a.safetensors", fused("h.0.")), tmp_path / "b.safetensors"
    with pytest.raises(UsageError) as error:
        anymha.convert_file(source, target, num_heads=H)
    for name in ("transformers.gpt_neox", "fused.blocks", "`layout=...`", "'h.{i}.'"):
        assert name in str(error.value)
    write(source, layer("e.0.", *BERT) | fused("h.0."))
    with pytest.raises(UsageError, match="name the layout"):
        anymha.convert_file(source, target, num_heads=H)
    done = anymha.convert_file(source, target, prefix="e.", num_heads=H, verify=False)
    assert done.layout == "transformers.bert"


def test_configuration_beside_the_file_decides_and_tells_the_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "model.safetensors", fused("h.0."))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt_neox", "num_attention_heads": H})
    )
    (group,) = anymha.find_layers(source)
    assert (group.layout, group.fits[0].name) == ("transformers.gpt_neox",) * 2
    assert len(group.fits) > 1, "the others are still listed"
    assert group.config is not None
    assert group.config.num_heads == H
    done = anymha.convert_file(source, tmp_path / "b.safetensors", verify=False)
    assert done.layout == "transformers.gpt_neox"
    assert f"Taken from the config.json beside the file: num_heads={H}." in done.notes
    stated = anymha.convert_file(source, tmp_path / "c.safetensors", num_heads=4, verify=False)
    assert not any("Taken" in note for note in stated.notes), "the caller's word counts"
    assert anymha.load(tmp_path / "c.safetensors", "numpy", prefix="h.0.").config.num_heads == 4
    assert main(["inspect", str(source)]) == 0
    assert (
        "Layout: transformers.gpt_neox (the config.json beside the file says so; its names and "
        "shapes also fit "
    ) in capsys.readouterr().out


PARTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "CLIP": ({"model_type": "clip", "text_config": {"num_attention_heads": H},
              "vision_config": {"num_attention_heads": 4, "model_type": "clip_vision_model"}},
             "text_model.encoder.layers.0.self_attn.", "vision_model.encoder.layers.0.self_attn."),
    "LLaVA": ({"model_type": "llava", "text_config": {"num_attention_heads": H},
               "vision_config": {"num_heads": 4}},
              "model.language_model.layers.0.self_attn.", "model.visual.layers.0.self_attn."),
    "encoder and decoder": ({"encoder": {"num_attention_heads": H}, "decoder": {"n_head": 4}},
                            "encoder.layers.0.self_attn.", "decoder.layers.0.self_attn."),
    "one within": ({"num_attention_heads": H, "vision_config": {"num_attention_heads": 4},
                    "text_config": {"hidden_size": 3}, "self_attn_config": {"clip": 3}},
                   "text_model.layers.0.self_attn.", "vision_tower.vision.layers.0.self_attn."),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_configurations_within_another_are_those_of_a_part_of_the_model(
    tmp_path: Path, case: str
) -> None:
    """Both parts have layers of the same shapes, and other numbers of heads."""
    config, two_heads, four_heads = PARTS[case]
    source = write(tmp_path / "model.safetensors", layer(two_heads, *OPT) | layer(four_heads, *OPT))
    (tmp_path / "config.json").write_text(json.dumps(config))
    heads = {two_heads: H, four_heads: 4}
    for group in anymha.find_layers(source):
        assert group.config is not None
        assert group.config.num_heads == heads[group.prefixes[0]]
    done = anymha.convert_file(source, tmp_path / "b.safetensors", layout="transformers.clip",
                               verify=False)  # fmt: skip
    for prefix, count in heads.items():
        loaded = anymha.load(tmp_path / "b.safetensors", "numpy", prefix=prefix)
        assert loaded.config.num_heads == count
    assert sum("Taken from the config.json beside the file" in note for note in done.notes) == 2


def test_a_part_that_the_name_does_not_tell_has_no_number_of_heads(tmp_path: Path) -> None:
    source = write(tmp_path / "model.safetensors", layer("layers.0.self_attn.", *OPT))
    parts = {f"{name}_config": {"num_attention_heads": H} for name in ("text", "vision")}
    (tmp_path / "config.json").write_text(json.dumps(parts))
    with pytest.raises(UsageError, match="needs `num_heads`"):
        anymha.convert_file(source, tmp_path / "b.npz", layout="transformers.clip")


def test_family_that_is_not_known_is_not_taken_for_one_with_its_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RoFormer has BERT's names, and rotates; RoBERTa has them, and BERT's attention."""
    source, target = write(tmp_path / "a.safetensors", layer("e.0.", *BERT)), tmp_path / "b.npz"
    same = dict.fromkeys(("roberta", "xlm-roberta", 7), "transformers.bert")
    for family, layout in {"roformer": None, "llama": None, **same}.items():
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": family, "num_attention_heads": H})
        )
        (group,) = anymha.find_layers(source)
        assert (group.layout, group.fits[0].name) == (layout, "transformers.bert")
        assert main(["inspect", str(source)]) == 0
        assert ("which is none of them" in capsys.readouterr().out) == (layout is None)
        if layout is None:
            with pytest.raises(UsageError, match=f"says transformers.{family}"):
                anymha.convert_file(source, target)
        else:
            assert anymha.convert_file(source, target, verify=False).layout == layout
        done = anymha.convert_file(source, target, layout="transformers.bert", verify=False)
        assert done.layout == "transformers.bert", "who names it is believed"
    anymha.convert_file(source, tmp_path / "ours.safetensors", num_heads=H, verify=False,
                        layout="transformers.bert")  # fmt: skip
    assert [group.layout for group in anymha.find_layers(tmp_path / "ours.safetensors")] == [
        "anymha"
    ], "our own names are no family's"


STATED: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any], str]] = {
    "Mistral's window": ({"model_type": "mistral", "sliding_window": 3}, LLAMA,
                         {"sliding_window": 3}, ""),
    "no window": ({"model_type": "mistral", "sliding_window": None}, LLAMA,
                  {"sliding_window": None}, ""),
    "a window that is off": ({"model_type": "qwen2", "sliding_window": 3}, LLAMA,
                             {"sliding_window": None}, ""),
    "a window of some layers": ({
        "model_type": "qwen2", "sliding_window": 3, "use_sliding_window": True,
        "max_window_layers": 2,
    }, LLAMA, {"sliding_window": None}, ""),
    "a window of this layer": ({
        "model_type": "qwen2", "sliding_window": 3, "use_sliding_window": True,
        "max_window_layers": 0,
    }, LLAMA, {"sliding_window": 3}, ""),
    "a window by layers' types": ({
        "model_type": "mistral", "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
    }, LLAMA, {"sliding_window": 3}, ""),
    "a window of no layer": ({"model_type": "mistral", "sliding_window": 3,
                              "layer_types": ["full_attention"]}, LLAMA,
                             {"sliding_window": None}, ""),
    "a window that the family lacks": ({"model_type": "llama", "sliding_window": 3}, LLAMA,
                                       {"sliding_window": None}, "sliding window of 3 keys"),
    "GPT-Neo's window": ({"model_type": "gpt_neo", "attention_layers": ["global", "local"],
                          "window_size": 3}, OPT, {"sliding_window": None, "scale": 1.0}, ""),
    "GPT-Neo's window of types": ({"model_type": "gpt_neo", "window_size": 3,
                                   "attention_types": [[["global", "local"], 1]]}, OPT,
                                  {"sliding_window": None}, "sliding window of 3 keys"),
    "GPT-Neo without": ({"model_type": "gpt_neo", "attention_types": [[["global"], 2]]}, OPT,
                        {"sliding_window": None, "scale": 1.0}, ""),
    "Gemma 2's factor": ({"model_type": "gemma2", "query_pre_attn_scalar": 16}, LLAMA,
                         {"scale": 0.25}, ""),
    "GPT-2 without a factor": ({"model_type": "gpt2", "scale_attn_weights": False}, (),
                               {"scale": 1.0}, ""),
    "GPT-2's factor by layers": ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
                                 (), {"scale": None}, "scale_attn_by_inverse_layer_idx"),
}  # fmt: skip


@pytest.mark.parametrize(("said", "names", "options", "note"), STATED.values(), ids=STATED)
def test_what_the_configuration_says_of_results_is_done_or_told(
    said: dict[str, Any], names: tuple[str, ...], options: dict[str, Any], note: str, tmp_path: Path
) -> None:
    arrays = layer("h.0.attn.", *names) if names else {
        "h.0.attn.c_attn.weight": np.ones((D, 3 * D), np.float32),
        "h.0.attn.c_proj.weight": np.ones((D, D), np.float32),
    }  # fmt: skip
    source, target = write(tmp_path / "a.safetensors", arrays), tmp_path / "b.safetensors"
    (tmp_path / "config.json").write_text(json.dumps({**said, "num_attention_heads": H}))
    layout = f"transformers.{said['model_type']}"
    done = anymha.convert_file(source, target, layout=layout, verify=False)
    config = anymha.load(target, "numpy", prefix="h.0.attn.").config
    assert {name: getattr(config, name) for name in options} == options
    told = [text for text in done.notes if "and the layers made" in text]
    assert len(told) == bool(note)
    assert all(note in text for text in told)
    again = anymha.convert_file(
        source, target, layout=layout, verify=False, sliding_window=2, scale=0.5
    )
    assert not any("and the layers made" in text for text in again.notes), "the caller's word"


@pytest.mark.parametrize("text", ["no json", "[1]", '{"model_type": "llama"}', "", "[" * 5000])
def test_configuration_of_another_model_or_none_at_all_decides_nothing(
    tmp_path: Path, text: str
) -> None:
    source = write(tmp_path / "model.safetensors", fused("h.0."))
    (tmp_path / "config.json").write_text(text)
    (group,) = anymha.find_layers(source)
    assert (group.layout, group.config) == (None, None)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layout of that name": ({"layout": "bert"}, UnknownLayoutError, "Did you mean"),
    "no target of that name": ({"to": "bert"}, UnknownLayoutError, "Did you mean"),
    "another layout": ({"layout": "transformers.gpt2"}, UsageError, "holds no layer of the layout"),
    "no such prefix": ({"prefix": "x."}, UsageError, "whose names begin with 'x.'"),
    "heads are open": ({}, UsageError, "needs `num_heads`"),
    "heads that do not divide": ({"num_heads": 3}, UsageError, "of equal size"),
    "no option of that name": ({"num_heads": H, "num_head": 2}, UsageError, "num_head"),
    "an option that the target lacks": (
        {"num_heads": H, "sliding_window": 3, "to": "equinox.MultiheadAttention"},
        UsageError, "has no option for sliding_window=3",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "text"), WRONG.values(), ids=WRONG)
def test_wrong_calls_are_told_and_nothing_is_written(
    tmp_path: Path, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    source, target = write(tmp_path / "a.safetensors", layer("e.0.", *BERT)), tmp_path / "b.npz"
    with pytest.raises(kind) as error:
        anymha.convert_file(source, target, **options)
    assert text in str(error.value)
    assert list(tmp_path.iterdir()) == [source]


def test_found_difference_is_an_error_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anymha.cli.verify, "_ours", lambda *_: np.full((2, 7, D), 1e-3))
    source = write(tmp_path / "a.safetensors", layer("e.0.", *BERT))
    with pytest.raises(anymha.AnymhaError, match="gives another output"):
        anymha.convert_file(source, tmp_path / "b.npz", num_heads=H)
    assert list(tmp_path.iterdir()) == [source]


def test_rows_are_permuted_between_the_two_orders_of_rotary_positions(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", layer("l.0.", "wq", "wk", "wv", "wo"))
    done = anymha.convert_file(
        source, tmp_path / "b.safetensors", to="transformers.llama", num_heads=H,
        layout="meta.llama",
    )  # fmt: skip
    assert done.verification
    assert any("element i of a head turns with element i + half" in note for note in done.notes)
    back = anymha.convert_file(
        tmp_path / "b.safetensors", tmp_path / "c.safetensors", layout="transformers.llama",
        to="meta.llama", num_heads=H,
    )  # fmt: skip
    assert back.verification
    assert (tmp_path / "c.safetensors").read_bytes() == source.read_bytes()


def test_limit_of_bytes_is_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", layer("e.0.", *BERT))
    target = tmp_path / "b.safetensors"
    for call in (
        lambda: anymha.find_layers(source, max_bytes=100),
        lambda: anymha.convert_file(source, target, num_heads=H, max_bytes=100),
    ):
        with pytest.raises(FileError, match="more than is allowed"):
            call()
    assert not target.exists()


def test_shards_and_trials_are_written_from_python(tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", layer("e.0.", *BERT) | layer("f.0.", *BERT))
    options: dict[str, Any] = {"num_heads": H, "verify": False, "max_shard_bytes": 600}
    prefixes = ["e.", "f."]
    trial = anymha.convert_file(source, tmp_path / "b.safetensors", dry_run=True, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]
    done = anymha.convert_file(source, tmp_path / "b.safetensors", prefix=prefixes, **options)
    assert trial.files == done.files
    assert done.files[0].name == "b.safetensors.index.json"
    assert all(path.exists() for path in done.files)
    assert list(done.layers) == ["e.0.", "f.0."]


@pytest.mark.parametrize(
    ("shared", "layout", "fits"),
    [
        (H, "keras.MultiHeadAttention", ["keras.MultiHeadAttention", "keras.GroupQueryAttention"]),
        (1, "keras.GroupQueryAttention", ["keras.GroupQueryAttention"]),
    ],
)
def test_layouts_that_mean_the_same_are_no_choice(
    shared: int, layout: str, fits: list[str], tmp_path: Path, capsys: Any
) -> None:
    heads = {"query": H, "key": shared, "value": shared}
    arrays: Arrays = {f"a/{n}/kernel": np.ones((D, k, 4), np.float32) for n, k in heads.items()}
    arrays["a/attention_output/kernel"] = np.ones((H, 4, D), np.float32)
    (group,) = anymha.find_layers(arrays)
    assert (group.layout, [fit.name for fit in group.fits]) == (layout, fits)
    main(["inspect", str(write(tmp_path / "a.safetensors", arrays))])
    assert f"Layout: {layout} (all its names and shapes fit, and " in capsys.readouterr().out
