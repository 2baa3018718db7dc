"""Options that models' own configurations state: live layers, files, and arrays alone."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import LayoutError, WeightsError
from anymha.interchange.compared_options import differing_options
from anymha.interchange.layouts import from_canonical, get_layout, to_canonical
from anymha.interchange.model_config import family_of, stated_options
from anymha.parity import compare
from tests.file_samples import write
from tests.layout_samples import Size, by_name
from tests.peer_layers import family_examples, need

SIZE = Size(H=4, K=2, d=6, v=6, D=12, S=12, U=12, O=12)
GRADIENTS = [
    "llama, with biases", "llama, dynamic", "llama, longrope", "llama, yarn", "qwen3", "gemma2",
    "gemma3, local", "gemma3, global", "olmo2", "cohere", "gptj", "codegen", "glm", "gpt_oss",
    "bloom", "mpt", "phi", "falcon, grouped", "falcon, with ALiBi", "gpt_neox", "llama4",
    "hunyuan_v1_dense", "exaone4", "glm4_moe", "starcoder2",
    "smollm3, without positions", "modernbert, with a window", "granite", "qwen3_next, with biases",
    "qwen3_next, Qwen3.5", "qwen3_next, Qwen3.5 MoE", "afmoe", "afmoe, without positions",
    "hrm_text, with biases",
]  # fmt: skip


@pytest.fixture(scope="module")
def families() -> Any:
    with family_examples() as module:
        yield module


def layer_of(families: Any, name: str) -> Any:
    """The example's live layer, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        return families.FAMILIES[name]()[0].float()


@pytest.mark.parametrize("name", GRADIENTS)
def test_outputs_and_gradients_are_those_of_the_model_s_own_layer(families: Any, name: str) -> None:
    layer = layer_of(families, name)
    ours = anymha.convert(layer, to="torch")
    x = families.random_inputs().astype(np.float32)
    report = compare(layer, ours, x, use_causal_mask=True)
    assert report.passed, report
    measured = {stage.name for stage in report.stages}
    assert {f"gradient of {name}" for name in ("query", *anymha.get_weights(ours))} <= measured


FILES = ["llama, llama3", "qwen3", "gemma3, local", "gemma3, global", "cohere", "glm", "gpt_oss",
         "phi", "gpt_neox", "falcon, with ALiBi", "olmo2", "llama4", "qwen3_next",
         "qwen3_next, Qwen3.5 MoE", "afmoe", "hrm_text, with biases"]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FILES)
def test_file_with_its_configuration_becomes_the_same_layer(
    families: Any, tmp_path: Path, name: str, dtype: str
) -> None:
    torch, save_file = need("torch"), need("safetensors.torch").save_file
    layer = layer_of(families, name).to(getattr(torch, dtype))
    layer.config.save_pretrained(tmp_path)
    prefix = f"model.layers.{layer.layer_idx}.self_attn."
    arrays = {prefix + n: x.contiguous() for n, x in layer.state_dict().items()}
    save_file(arrays, tmp_path / "model.safetensors")
    (group,) = anymha.find_layers(tmp_path / "model.safetensors")
    assert group.layout == f"transformers.{name.partition(',')[0]}"
    assert group.fits[0].needs == ()
    target = tmp_path / "ours.safetensors"
    done = anymha.convert_file(tmp_path / "model.safetensors", target, verify=True)
    assert any(f"{group.layout} itself: " in line for line in done.verification)
    assert not any("Besides attention" in note for note in done.notes)
    live = anymha.get_weights(layer)
    for config in (group.config, anymha.load(target, "numpy", prefix=prefix).config):
        assert differing_options(config, live.config) == ()
    loaded = anymha.get_weights(anymha.load(target, "numpy", prefix=prefix))
    assert {n: a.tobytes() for n, a in loaded.items()} == {n: a.tobytes() for n, a in live.items()}


BASE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 8,
        "max_position_embeddings": 64}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OLD: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "llama": ({}, (0,)),
    "llama linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, (0,)),
    "qwen2 yarn": ({"rope_theta": 1e6, "rope_scaling": YARN}, (0,)),
    "qwen3 windows": ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3,
                       "head_dim": 8, "rms_norm_eps": 1e-6}, (0, 2, 3, 7)),
    "mistral": ({"rope_theta": 1e6, "sliding_window": 7}, (0,)),
    "mixtral": ({}, (0,)),
    "phi": ({"partial_rotary_factor": 0.5, "qk_layernorm": True, "layer_norm_eps": 1e-5}, (0,)),
    "phi3": ({"original_max_position_embeddings": 8, "pad_token_id": 0, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}, (0,)),
    "gpt_neox": ({"rotary_emb_base": 5000, "rotary_pct": 0.5}, (0,)),
    "glm": ({"head_dim": 8, "partial_rotary_factor": 0.5}, (0,)),
    "cohere2": ({"sliding_window": 5, "sliding_window_pattern": 3}, (0, 1, 2)),
    "gemma2": ({"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 30.0,
                "query_pre_attn_scalar": 12}, (0, 1)),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 5, "rope_theta": 5e5,
                     "rope_local_base_freq": 3e4, "sliding_window_pattern": 2,
                     "query_pre_attn_scalar": 12, "rms_norm_eps": 1e-6,
                     "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, (0, 1)),
    "gpt_oss": ({"head_dim": 8, "sliding_window": 5, "rope_theta": 1e5, "rope_scaling": {
        **YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}}, (0, 1)),
    "modernbert": ({"global_rope_theta": 8e4, "local_rope_theta": 5e3, "local_attention": 10,
                    "global_attn_every_n_layers": 4}, (0, 1, 4)),
    "smollm3": ({"no_rope_layer_interval": 3, "rope_theta": 1e6}, (0, 2)),
    "llama4_text": ({"head_dim": 8, "use_qk_norm": True, "rms_norm_eps": 1e-5}, (0, 3)),
    "granite": ({"attention_multiplier": 0.25}, (0,)),
    "olmo2": ({"rms_norm_eps": 1e-6}, (0,)),
    "olmo3": ({"rms_norm_eps": 1e-6, "sliding_window": 5, "rope_theta": 3e5, "rope_scaling": {
        **YARN, "rope_type": "yarn"}}, (0, 3)),
    "flex_olmo": ({"rms_norm_eps": 1e-6}, (0,)),
    "glm4": ({"head_dim": 8}, (0,)),
    "granitemoe": ({"attention_multiplier": 0.25}, (0,)),
    "qwen3_moe": ({"head_dim": 8, "rms_norm_eps": 1e-6}, (0,)),
    "exaone4": ({"head_dim": 8, "rms_norm_eps": 1e-5, "sliding_window": 5,
                 "sliding_window_pattern": 4}, (0, 3)),
    "hunyuan_v1_dense": ({"head_dim": 8, "rms_norm_eps": 1e-5}, (0,)),
    "glm4_moe": ({"head_dim": 8, "rms_norm_eps": 1e-5, "use_qk_norm": True}, (0,)),
    "starcoder2": ({"sliding_window": 5}, (0,)),
    "cohere": ({"use_qk_norm": True, "layer_norm_eps": 1e-5}, (0,)),
    "qwen3_next": ({"head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e7}, (0, 3)),
    "qwen3_next half": ({"head_dim": 8, "rms_norm_eps": 1e-6, "partial_rotary_factor": 0.5}, (3,)),
    "qwen3_5_text": ({"head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e7}, (3,)),
    "afmoe": ({"head_dim": 8, "rms_norm_eps": 1e-5, "sliding_window": 5,
               "global_attn_every_n_layers": 3}, (0, 2, 3)),
    "hrm_text": ({"head_dim": 8}, (0,)),
    "falcon": ({"alibi": True}, (0,)),
    "falcon rotary": ({"alibi": False, "rope_theta": 3e4}, (0,)),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_configuration_of_any_age_means_what_transformers_reads(name: str) -> None:
    transformers = need("transformers")
    more, numbers = OLD[name]
    family = name.partition(" ")[0]
    raw = {"model_type": family, **BASE, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new = transformers.AutoConfig.for_model(family, **json.loads(json.dumps({**BASE, **more})))
    layout = get_layout(family_of(raw))
    for number in numbers:
        ours = stated_options(raw, layout, number)
        theirs = stated_options(new.to_dict(), layout, number)
        assert "rotary" in ours
        for option in (*layout.supported, "rotary"):
            assert ours.get(option) == theirs.get(option), (option, number)


UNKNOWN: dict[str, dict[str, Any]] = {
    "axes of images": {"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}},
    "another kind": {"rope_scaling": {"type": "su", "factor": 2.0}},
    "a layer whose number is not known": {"model_type": "gemma3_text"},
    "no family": {"model_type": None},
    "a field that is missing": {"rope_scaling": {"type": "linear"}},
    "no text": {"rope_theta": "10000"},
}


@pytest.mark.parametrize("said", UNKNOWN.values(), ids=UNKNOWN)
def test_rotary_positions_of_another_kind_are_not_stated(said: dict[str, Any]) -> None:
    config = {"model_type": "llama", **BASE, **said}
    options = stated_options(config, get_layout("transformers.llama"), None)
    assert "rotary" not in options
    weights, _ = to_canonical(by_name("transformers.llama").arrays(SIZE), "transformers.llama",
                              num_heads=4)  # fmt: skip
    (need_in_words,) = weights.needs
    assert "(pass `rotary=anymha.Rotary(base=..., layout='half')`)" in need_in_words


HOSTILE: dict[str, Any] = {
    "a text": "x", "a number": -1, "a huge number": 10**30, "a list": [1, "x", None], "none": None,
    "not a number": float("nan"), "a dict": {"full_attention": {"rope_theta": []}, "x": 1},
}  # fmt: skip
FIELDS = (
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "head_dim",
    "layer_types", "rms_norm_eps", "layer_norm_eps", "alibi", "attn_config", "sliding_window",
    "no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern", "max_window_layers",
    "rotary_dim", "num_attention_heads", "query_pre_attn_scalar", "use_qk_norm", "model_type",
    "local_attention", "attention_layers", "global_attn_every_n_layers", "alibi_bias_max",
    "max_position_embeddings", "original_max_position_embeddings", "hidden_size",
)  # fmt: skip
FAMILIES = ("llama", "gemma3", "modernbert", "smollm3", "falcon", "mpt", "gptj", "llama4", "qwen3",
            "gpt_neo", "qwen3_next", "afmoe")  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_configuration_of_another_form_states_nothing_and_raises_nothing(value: Any) -> None:
    for family in FAMILIES:
        layout = get_layout(f"transformers.{family}")
        for field in FIELDS:
            for number in (None, 0, 10**6):
                config = {"model_type": family, **BASE, "alibi": True, field: value}
                options = stated_options(config, layout, number)
                assert set(options) <= {"num_heads", "num_key_value_heads", "head_dim",
                                        *layout.supported, "scale"}  # fmt: skip


def test_model_that_its_configuration_does_not_describe_is_not_run(tmp_path: Path) -> None:
    need("transformers")
    arrays = by_name("transformers.llama").arrays(SIZE, False)
    source = write(tmp_path / "a.safetensors", {f"l.0.{n}": a for n, a in arrays.items()})
    stated = {"model_type": "llama", **BASE, "hidden_size": 2**40, "head_dim": 6}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    done = anymha.convert_file(source, tmp_path / "b.safetensors", verify=True)
    (line,) = [line for line in done.verification if "not run: transformers.llama" in line]
    assert "by the configuration it has other arrays: q_proj.weight" in line


def test_passed_options_meet_the_needs_of_arrays_alone() -> None:
    arrays = by_name("transformers.qwen3").arrays(SIZE, dtype=np.float64)
    rotary, norm = anymha.Rotary(base=500.0), anymha.QueryKeyNorm(eps=1e-5)
    weights, config = to_canonical(arrays, "transformers.qwen3", rotary=rotary, query_key_norm=norm)
    assert (weights.needs, weights.lost, weights.extras) == ((), (), {})
    assert (config.rotary, config.query_key_norm) == (rotary, norm)
    np.testing.assert_array_equal(weights["key_norm.scale"], arrays["k_norm.weight"])
    back = from_canonical(weights, "transformers.qwen3")
    assert {n: a.tobytes() for n, a in back.items()} == {n: a.tobytes() for n, a in arrays.items()}
    layer = anymha.MultiHeadAttention(backend="numpy", **config.to_dict())
    plain = dataclasses.replace(config, query_key_norm=None)
    other = anymha.MultiHeadAttention(backend="numpy", **plain.to_dict())
    x = np.random.default_rng(0).standard_normal((2, 5, 12))
    normed = anymha.set_weights(layer, weights)(x)
    bare = {n: array for n, array in weights.items() if "norm" not in n}
    assert np.abs(normed - anymha.set_weights(other, bare)(x)).max() > 1e-3


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "another norm": ("gemma3", {"query_key_norm": "rms"}, "scale='one_plus_weight'"),
    "no place": ("llama", {"query_key_norm": "rms"}, r"lack query_norm\.scale, key_norm\.scale"),
    "another order": ("glm", {"rotary": anymha.Rotary(4)}, "must have layout='interleaved'"),
    "a part": ("llama", {"rotary": anymha.Rotary(4)}, "rotates all columns"),
    "the last columns": ("phi", {"rotary": anymha.Rotary(4, columns="last")}, "the first columns"),
}


@pytest.mark.parametrize(("family", "options", "text"), WRONG.values(), ids=WRONG)
def test_options_that_a_family_cannot_have_are_refused(
    family: str, options: dict[str, Any], text: str
) -> None:
    sample = by_name(f"transformers.{family}")
    with pytest.raises((LayoutError, WeightsError), match=text):
        to_canonical(sample.arrays(SIZE, False), sample.layout, num_heads=4, **options)


ORDERS: dict[str, dict[str, Any]] = {
    "all columns": {"rotary": {"layout": "interleaved"}},
    "a part": {"rotary": {"layout": "interleaved", "dim": 4, "base": 100.0}},
    "the last columns": {"rotary": {"layout": "interleaved", "dim": 4, "columns": "last"}},
    "a norm of each head": {"rotary": {"layout": "interleaved"}, "query_key_norm": {
        "kind": "layer", "over": "heads", "use_bias": True}},
    "a norm of all heads": {"rotary": {"layout": "interleaved"}, "query_key_norm": {
        "over": "width"}},
    "a norm after": {"rotary": {"layout": "interleaved", "dim": 4}, "query_key_norm": {
        "after_rotary": True}},
}  # fmt: skip


@pytest.mark.parametrize("options", ORDERS.values(), ids=ORDERS)
def test_weights_go_into_a_layer_of_the_other_order_and_back(options: dict[str, Any]) -> None:
    sizes = {"num_heads": 4, "num_key_value_heads": 2, "key_dim": 6, "query_features": 12}
    pairs = anymha.AttentionConfig(**sizes, **options, dtype="float64")
    halves = dataclasses.replace(pairs, rotary=dataclasses.replace(pairs.rotary, layout="half"))
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal(shape) for n, shape in pairs.weight_shapes().items()}
    one = anymha.MultiHeadAttention(backend="numpy", **pairs.to_dict())
    other = anymha.MultiHeadAttention(backend="numpy", **halves.to_dict())
    one = anymha.set_weights(one, values)
    other = anymha.set_weights(other, anymha.get_weights(one))
    x = rng.standard_normal((2, 5, 12))
    np.testing.assert_allclose(other(x), one(x), rtol=0, atol=1e-12)
    assert np.abs(anymha.set_weights(other, values)(x) - one(x)).max() > 1e-3, "order matters"
    back = anymha.set_weights(one, anymha.get_weights(anymha.set_weights(
        other, anymha.get_weights(one))))  # fmt: skip
    found = anymha.get_weights(back)
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in values.items()}


def test_gptj_becomes_a_layer_in_halves_and_an_array_of_phi() -> None:
    arrays = by_name("transformers.gptj").arrays(
        Size(H=4, K=4, d=6, v=6, D=24, S=24, U=24, O=24), dtype=np.float64
    )
    rotary = anymha.Rotary(4, layout="interleaved")
    weights, config = to_canonical(arrays, "transformers.gptj", num_heads=4, rotary=rotary)
    layer = anymha.MultiHeadAttention(backend="numpy", **config.to_dict())
    layer = anymha.set_weights(layer, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", anymha.errors.BiasWarning)
        phi = from_canonical(weights, "transformers.phi")
    assert phi.config.rotary == anymha.Rotary(4)
    again, halves = to_canonical(phi, "transformers.phi", num_heads=4, rotary=phi.config.rotary)
    other = anymha.MultiHeadAttention(backend="numpy", **halves.to_dict())
    x = np.random.default_rng(0).standard_normal((2, 5, 24))
    found = anymha.set_weights(other, again)(x)
    np.testing.assert_allclose(found, layer(x), rtol=0, atol=1e-12 * np.abs(found).max())
    with pytest.raises(LayoutError, match="rotates all columns"):
        from_canonical(weights, "transformers.llama")


def test_meta_s_rows_go_into_a_layer_in_halves_without_their_base() -> None:
    arrays = by_name("meta.llama").arrays(SIZE, dtype=np.float64)
    unknown, _ = to_canonical(arrays, "meta.llama", num_heads=4)
    rotary = anymha.Rotary(base=300.0, layout="interleaved")
    known, config = to_canonical(arrays, "meta.llama", num_heads=4, rotary=rotary)
    options = {**config.to_dict(), "rotary": anymha.Rotary(base=300.0)}
    x = np.random.default_rng(0).standard_normal((2, 5, 12))
    outputs = [
        anymha.set_weights(anymha.MultiHeadAttention(backend="numpy", **options), weights)(x)
        for weights in (known, unknown)
    ]
    np.testing.assert_array_equal(*outputs)


def test_kinds_of_layers_are_groups_of_their_own(tmp_path: Path) -> None:
    arrays = by_name("transformers.gemma3").arrays(SIZE, False)
    names = {f"m.layers.{i}.a.{n}": array for i in range(4) for n, array in arrays.items()}
    source = write(tmp_path / "a.safetensors", names)
    stated = {"model_type": "gemma3_text", "sliding_window": 3, "sliding_window_pattern": 2,
              "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-6}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(stated))
    local, global_ = anymha.find_layers(source)
    assert [group.prefixes for group in (local, global_)] == [
        ["m.layers.0.a.", "m.layers.2.a."],
        ["m.layers.1.a.", "m.layers.3.a."],
    ]
    assert [group.config.sliding_window for group in (local, global_)] == [3, None]
    assert [group.config.rotary.base for group in (local, global_)] == [1e4, 1e6]
    target = tmp_path / "b.safetensors"
    done = anymha.convert_file(source, target, verify=False)
    assert list(done.layers) == [f"m.layers.{i}.a." for i in range(4)]
    notes = [note for note in done.notes if note.startswith("Taken from the config.json")]
    assert [note.partition(":")[0].rpartition("about ")[2] for note in notes] == [
        "m.layers.0.a., m.layers.2.a.",
        "m.layers.1.a., m.layers.3.a.",
    ]
    for i in range(4):
        config = anymha.load(target, "numpy", prefix=f"m.layers.{i}.a.").config
        assert (config.sliding_window, config.rotary.base) == ((None, 1e6) if i % 2 else (3, 1e4))
        assert config.query_key_norm == anymha.QueryKeyNorm(scale="one_plus_weight")
    back = anymha.convert_file(target, tmp_path / "c.safetensors", to="transformers.gemma3")
    assert back.verification
    assert (tmp_path / "c.safetensors").read_bytes() == source.read_bytes()


def test_temperature_of_llama_4_is_refused_in_words(families: Any) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = families.part("llama4", "Llama4TextConfig")(num_hidden_layers=4, **sizes)
    layer = families.part("llama4", "Llama4TextAttention")(config, layer_idx=3)
    with pytest.raises(LayoutError, match="multiplied by a number for each position"):
        anymha.convert(layer, to="numpy")
    assert anymha.convert(layer, to="numpy", weights_only=True).config.rotary is None


def test_layer_of_another_model_takes_no_weights_of_other_positions(families: Any) -> None:
    layer, other = layer_of(families, "llama"), layer_of(families, "llama, yarn")
    with pytest.raises(LayoutError, match=r"rotary=Rotary\(.*yarn"):
        anymha.set_weights(layer, anymha.get_weights(other))
    anymha.set_weights(layer, dict(anymha.get_weights(other)))


def test_family_that_is_another_one_has_its_layout(families: Any) -> None:
    config = families.settled(
        families.part("mixtral", "MixtralConfig")(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
        )
    )
    layer = families.ready(families.part("mixtral", "MixtralAttention")(config, layer_idx=0))
    weights = anymha.get_weights(layer)
    assert (weights.layout, weights.needs) == ("transformers.mistral", ())
    assert weights.config.rotary.base == 1e6
    x = families.random_inputs().astype(np.float32)
    assert compare(layer.float(), anymha.convert(layer, to="torch"), x, use_causal_mask=True).passed


@pytest.mark.parametrize(
    ("name", "option"), [("qwen3", "query_key_norm"), ("gpt_oss", "sinks"), ("bloom", "alibi")]
)
def test_option_that_ours_lacks_is_named(families: Any, name: str, option: str) -> None:
    layer = layer_of(families, name)
    weights = anymha.get_weights(layer)
    lacking = {option: None if option == "query_key_norm" else False}
    plain = dataclasses.replace(weights.config, **lacking)
    known = plain.weight_shapes()
    ours = anymha.set_weights(
        anymha.MultiHeadAttention(backend="numpy", **plain.to_dict()),
        {name: array for name, array in weights.items() if name in known},
    )
    x = families.random_inputs().astype(np.float32)
    report = compare(ours, layer, x, use_causal_mask=True)
    assert str(report.diagnosis).startswith(f"{option} not asked for")
