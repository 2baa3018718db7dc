"""A wrong keyword is answered with the right one, in every home, also for the names of peers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.errors import ArgumentError, ConfigError, UnknownOptionError
from anymha.framework.registry import BUILT_IN, LAYERS, get_layer
from anymha.layer import other_names as of_call
from anymha.layer.arguments import BY_NAME
from anymha.options import constraints, initializers, regularizers
from anymha.options import other_names as of_options
from anymha.options.config import AttentionConfig
from anymha.parity import compare, declare, decoding
from tests.frameworks import required
from tests.support import normal

HOMES = [backend.name for backend in (*BUILT_IN, *LAYERS)]
OPTIONS = [field.name for field in fields(AttentionConfig)]
OWN = {
    "torch": ["device"],
    "jax": ["key"],
    "flax": ["rngs", "deterministic"],
    "equinox": ["key", "inference"],
    "keras": ["trainable", "autocast", "use_gate", "flash_attention"],
}
"""What the constructors of the homes have beside the options."""

TO_PASS = {
    # torch
    "embed_dim": "query_features", "kdim": "key_features", "vdim": "value_features",
    "bias": "use_bias", "batch_first": "Leave it out", "add_bias_kv": "Leave it out",
    "add_zero_attn": "Leave it out",
    # Flax
    "in_features": "query_features", "qkv_features": "key_dim", "out_features": "output_shape",
    "dropout_rate": "dropout", "decode": "cache", "kernel_init": "kernel_initializer",
    # Equinox
    "query_size": "query_features", "key_size": "key_features", "value_size": "value_features",
    "output_size": "output_shape", "qk_size": "key_dim", "vo_size": "value_dim",
    "dropout_p": "dropout", "use_query_bias": "use_bias", "use_output_bias": "use_bias",
    # Haiku
    "model_size": "output_shape", "w_init": "kernel_initializer", "with_bias": "use_bias",
    # transformers
    "hidden_size": "query_features", "num_attention_heads": "num_heads",
    "attention_dropout": "dropout",
    # x-transformers
    "dim": "query_features", "heads": "num_heads", "dim_head": "key_dim",
    "kv_heads": "num_key_value_heads",
    # misspelled, or of the call
    "num_head": "num_heads", "key_dims": "key_dim", "use_biases": "use_bias",
    "query_featrues": "query_features", "emb_dim": "query_features", "dropuot": "dropout",
    # diffusers, timm, Llama, T5, BERT, GPT-2, flash-attn, xformers
    "query_dim": "query_features", "out_dim": "output_shape", "out_bias": "use_bias",
    "proj_bias": "use_bias", "attention_bias": "Pass `use_bias`",
    "upcast_attention": "compute_dtype", "upcast_softmax": "compute_dtype",
    "use_cache": "make_cache", "attention_sinks": "sinks",
    "model_dim": "query_features", "dim_context": "value_features",
    "cross_attention_dim": "value_features", "talking_heads": "cannot do that",
    "block_size": "any length", "cache_size": "make_cache", "norm_layer": "no such part",
    "fused_attn": "Leave it out", "qk_norm": "query_key_norm", "rms_norm_eps": "query_key_norm",
    "proj_drop": "after the call", "alibi_pos_bias": "alibi=True", "rotary_pos_emb": "rotary=True",
    "rope": "rotary=True", "logit_softclamp_value": "softcap", "query_pre_attn_scalar": "`scale`",
    "softmax_scale": "`scale`", "d_k": "key_dim", "d_v": "value_dim", "mask": "attention_mask",
    "attn_mask": "attention_mask", "d_kv": "key_dim", "resid_pdrop": "after the call",
    "num_heads_kv": "num_key_value_heads", "dim_model": "query_features",
    "numHeads": "Pass `num_heads`, if", "keydim": "Pass `key_dim`, if",
    # of another meaning than any name that resembles them
    "value_dims_of": "It takes: num_heads", "query_scale": "It takes: num_heads",
    "key_heads": "It takes: num_heads", "mask_features": "It takes: num_heads",
}  # fmt: skip
"""By a wrong option what the answer names."""

TO_PASS_IN_CALL = {
    "key_padding_mask": "value_mask=~key_padding_mask", "attn_mask": "attention_mask=~attn_mask",
    "need_weights": "return_attention_scores", "average_attn_weights": "Leave it out",
    "is_causal": "use_causal_mask", "inputs_q": "query", "inputs_k": "key", "inputs_v": "value",
    "mask": "attention_mask", "decode": "cache", "hidden_states": "query",
    "output_attentions": "return_attention_scores", "past_key_values": "cache",
    "position_ids": "`positions`", "key_": "key", "attn_bias": "attention_bias",
    "dropout": "the constructor: MultiHeadAttention(..., dropout=...)",
    "softcap": "the constructor", "attention_maks": "attention_mask", "querry": "query",
    "return_attention_score": "return_attention_scores",
    "dropout_p": "the layer with `dropout`", "position_bias": "Pass `attention_bias`",
    "memory_mask": "attention_mask=~memory_mask", "query_segment_ids": "Pass `segment_ids`",
    "query_positions": "`positions`", "key_value": "Pass `value`", "return_cache": "make_cache",
    "return_lse": "dot_product_attention", "q": "Pass `query`", "k": "Pass `key`",
    "v": "Pass `value`", "freqs_cis": "`rotary`", "src_mask": "attention_mask=~src_mask",
    "block_mask": "attention_mask", "query_heads": "It takes: ",
    "memory_lengths": "It takes: ",
}  # fmt: skip
"""By a wrong argument of the call what the answer names."""


def home(name: str) -> Any:
    if name != "numpy":
        required(name)
    return get_layer(name)


def answer(call: Callable[[], Any], error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize("name", HOMES)
def test_wrong_options_are_answered_in_every_home(name: str) -> None:
    layer = home(name)
    for wrong, right in TO_PASS.items():
        told = answer(lambda wrong=wrong: layer(2, 4, **{wrong: 8}), UnknownOptionError)
        assert told.startswith(f"MultiHeadAttention has no option `{wrong}`. "), told
        assert right in told, told
        assert "\n" not in told


def test_wrong_options_are_answered_by_config_and_by_name() -> None:
    for wrong, right in TO_PASS.items():
        for call in (
            lambda wrong=wrong: AttentionConfig(2, 4, **{wrong: 8}),
            lambda wrong=wrong: AttentionConfig(2, **{wrong: 8}),
            lambda wrong=wrong: anymha.MultiHeadAttention(2, 4, **{wrong: 8}, backend="numpy"),
        ):
            assert right in answer(call, UnknownOptionError)


@pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow", "keras", "flax"])
def test_a_key_of_jax_is_answered_by_the_seed(name: str) -> None:
    told = answer(lambda: home(name)(2, 4, query_features=8, key=1), UnknownOptionError)
    assert told.endswith("Only JAX's and Equinox's layers have it. Pass `seed`, an int.")


@pytest.mark.parametrize("name", HOMES)
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda layer, x: layer.make_cache(2, max_len=3), "`make_cache` takes no `max_len`"),
        (lambda layer, x: layer.make_cache(2, max_len=3), "Pass `max_length`."),
        (lambda layer, x: layer.make_cache(2, 3, device="cpu"), "where the layer's weights are"),
        (lambda layer, x: layer.make_cache(2), "missing a required argument: 'max_length'"),
        (lambda layer, x: layer.make_memory(x, values=x), "Received: values="),
        (lambda layer, x: layer.make_cache(1, 3).truncate(length=1), "Pass `lengths`."),
        (lambda layer, x: layer.make_cache(1, 3).reorder(beam_idx=[0]), "Pass `indices`."),
        (lambda layer, x: layer.with_canonical_weights(w={}), "It takes: weights."),
    ],
)
def test_wrong_arguments_of_methods_are_answered_in_every_home(
    name: str, call: Any, told: str
) -> None:
    layer = home(name)(2, 4, query_features=8, seed=0)
    assert told in answer(lambda: call(layer, _array(name)), ArgumentError)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: anymha.Rotary(theta=1e4), "`Rotary` takes no `theta`. Received: theta=10000.0. "
         "Pass `base`."),
        (lambda: anymha.Rotary(layuot="half"), "Pass `layout`, if that is meant."),
        (lambda: anymha.QueryKeyNorm(epsilon=1e-6), "Pass `eps`."),
        (lambda: initializers.Constant(val=1), "`Constant` takes no `val`. Received: val=1."),
        (lambda: regularizers.L2(weight=1), "It takes: l2."),
        (lambda: constraints.NonNeg(low=1), "It takes: nothing."),
        (lambda: constraints.MaxNorm(max_vale=1), "Pass `max_value`, if that is meant."),
    ],
)  # fmt: skip
def test_wrong_fields_of_option_classes_are_answered(made: Any, told: str) -> None:
    assert told in answer(made, UnknownOptionError)


@pytest.mark.parametrize("name", HOMES)
def test_wrong_fields_in_dicts_are_answered(name: str) -> None:
    for option, field, right in (
        ("rotary", "rope_theta", "base"), ("query_key_norm", "epsilon", "eps"),
    ):  # fmt: skip
        told = answer(lambda o=option, f=field: home(name)(2, 4, **{o: {f: 1e-4}}), ConfigError)
        assert told.startswith(f"`{option}`: "), told
        assert told.endswith(f"Pass `{right}`."), told


def test_several_wrong_options_are_answered_together() -> None:
    told = answer(lambda: AttentionConfig(embed_dim=8, heads=2), UnknownOptionError)
    assert told == (
        "MultiHeadAttention has no options `embed_dim`, `heads`. Pass it as `query_features`, the "
        "width of the query input, with `key_dim` = embed_dim / num_heads. Pass `num_heads`, the "
        "number of query heads."
    )


def test_an_option_that_resembles_none_is_answered_with_all() -> None:
    told = answer(lambda: AttentionConfig(2, 4, nonsense=1), UnknownOptionError)
    assert told == f"MultiHeadAttention has no option `nonsense`. It takes: {', '.join(OPTIONS)}."


def test_arguments_of_the_call_are_told_to_be_such() -> None:
    told = answer(
        lambda: get_layer("numpy")(2, 4, return_attention_scores=True), UnknownOptionError
    )
    assert told.endswith("Pass `return_attention_scores` to the layer's call.")


def test_the_error_is_of_both_kinds() -> None:
    for kind in (ConfigError, ArgumentError, ValueError, TypeError, anymha.AnymhaError):
        assert issubclass(UnknownOptionError, kind)


def test_missing_options_are_named() -> None:
    told = answer(lambda: AttentionConfig(num_heads=2), ArgumentError)
    assert told == (
        "`key_dim` must be passed: `num_heads` is the number of query heads, `key_dim` the width "
        "of each. Received: num_heads. Pass e.g. MultiHeadAttention(num_heads=8, key_dim=64)."
    )


def test_options_of_dicts_are_answered() -> None:
    with pytest.raises(ConfigError, match=r"`heads`: Pass `num_heads`, the number of query heads"):
        AttentionConfig.from_dict({"heads": 2, "key_dim": 4})


def test_a_layer_without_a_backend_is_told_of_backends() -> None:
    told = answer(lambda: anymha.MultiHeadAttention(2, 4, framework="torch"), ArgumentError)
    assert told == (
        "`backend` must be passed, one of 'numpy', 'torch', 'tensorflow', 'jax', 'keras', 'flax', "
        "'equinox'. Received: 2, 4, framework. Pass e.g. backend='numpy'."
    )


@pytest.mark.parametrize("name", HOMES)
def test_wrong_arguments_of_the_call_are_answered_in_every_home(name: str) -> None:
    layer = home(name)(2, 4, query_features=8, **({"key": None} if name == "jax" else {}), seed=0)
    array = _array(name)
    for wrong, right in TO_PASS_IN_CALL.items():
        told = answer(lambda wrong=wrong: layer(array, **{wrong: array}), ArgumentError)
        assert told.startswith(f"The call has no argument `{wrong}`. "), told
        assert right in told, told
    told = answer(lambda: layer(inputs_q=array), ArgumentError)
    assert told == "The call has no argument `inputs_q`. Pass `query`, the first argument."
    if name != "flax":
        told = answer(lambda: layer(array, deterministic=True), ArgumentError)
        assert "training=False is deterministic=True" in told


def _array(name: str) -> Any:
    array = normal((1, 3, 8), "x")
    if name == "keras":
        return required("keras").ops.convert_to_tensor(array)
    names = {"flax": "jax", "equinox": "jax"}
    backend = next(b for b in BUILT_IN if b.name == names.get(name, name))
    return backend.ops.from_numpy(array)


def test_functions_answer_wrong_arguments() -> None:
    config = AttentionConfig(2, 4)
    weights = {n: np.ones(shape) for n, shape in config.weight_shapes(8).items()}
    x, heads = np.ones((1, 3, 8)), np.ones((1, 3, 2, 4))
    for wrong, right in TO_PASS_IN_CALL.items():
        told = answer(
            lambda wrong=wrong: anymha.multi_head_attention(
                weights, x, config=config, **{wrong: x}
            ),
            ArgumentError,
        )
        assert right in told
    for wrong, right in {
        "attn_mask": "mask", "dropout_p": "dropout", "attention_mask": "mask",
        "use_causal_mask": "is_causal", "need_weights": "return_scores", "biases": "bias",
        "sliding_window": "window=(w - 1, w - 1)", "enable_gqa": "Leave it out",
        "key_padding_mask": "value_mask=~key_padding_mask", "return_score": "return_scores",
    }.items():  # fmt: skip
        told = answer(
            lambda wrong=wrong: anymha.dot_product_attention(heads, heads, heads, **{wrong: None}),
            ArgumentError,
        )
        assert f"`{right}`" in told or right in told, told
    told = answer(lambda: anymha.dot_product_attention(q=heads, k=heads, v=heads), ArgumentError)
    assert told.startswith("`dot_product_attention` has no argument `q`, `k`, `v`.")
    told = answer(lambda: anymha.dot_product_attention(heads, heads), ArgumentError)
    assert told == (
        "`query`, `key` and `value` must be arrays. Received: no `value`. Pass all three."
    )


@pytest.mark.parametrize(
    ("peers", "right"),
    [
        (of_options.PEERS, OPTIONS),
        (of_call.PEERS, list(BY_NAME)),
        (of_call.FUNCTION_PEERS, list(BY_NAME)),
    ],
    ids=["options", "call", "function"],
)
def test_answers_are_about_wrong_names_and_name_right_ones(
    peers: Mapping[str, str], right: list[str]
) -> None:
    function = ["bias", "is_causal", "mask", "return_scores", "window", "dropout"]
    known = {*OPTIONS, *BY_NAME, *function}
    for name, told in peers.items():
        assert name not in right or peers is of_call.FUNCTION_PEERS, f"{name} is right"
        assert told.endswith("."), told
        for code in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", told):
            elsewhere = code in ("dtype", "autocast")  # of another library, and said to be
            assert code in known or elsewhere or code in told.partition(": ")[0], (name, code)


def test_own_arguments_of_the_homes_are_answered_elsewhere() -> None:
    for own in {name for names in OWN.values() for name in names}:
        told = answer(lambda own=own: AttentionConfig(2, 4, **{own: 1}), UnknownOptionError)
        assert "It takes" not in told, told


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda path, layer: anymha.load(path, to="numpy"), "Pass `backend`"),
        (lambda path, layer: anymha.load(path, bakend="numpy"), "Pass `backend`, if that is meant"),
        (lambda path, layer: anymha.load(path, num_heads=2), "It takes: path, backend, prefix"),
        (lambda path, layer: anymha.convert(layer, backend="numpy"), "Pass `to`"),
        (lambda path, layer: anymha.save(filename=path, layer=layer), "Pass `path`"),
        (lambda path, layer: anymha.save(layer, path), "`save` takes the path first"),
        (lambda path, layer: anymha.save(path), "missing a required argument: 'layer'"),
        (lambda path, layer: anymha.set_weights(layer, state_dict={}), "Pass `weights`."),
        (lambda path, layer: anymha.set_weights(layer, {}, strict=True), "Received: strict."),
        (lambda path, layer: anymha.get_weights(model=layer), "Pass `layer`."),
        (lambda path, layer: anymha.to_canonical({}, lay="x"), "argument: 'layout'"),
        (lambda path, layer: anymha.from_canonical({}, layot="x"), "Pass `layout`, if"),
        (lambda path, layer: anymha.find_layers(path, path=path), "Pass `source`."),
        (lambda path, layer: anymha.rotate(path, path, theta=1.0), "anymha.Rotary(base=...)"),
        (lambda path, layer: anymha.merge_attention([], lse=[]), "Pass `lses`."),
        (lambda path, layer: layer.config.weight_shapes(embed_dim=8), "Pass `query_features`."),
        (lambda path, layer: compare(layer, layer, input=path), "`input`: Pass `inputs`, if"),
        (lambda path, layer: declare(layer, state_dict={}), "Pass `weights`."),
        (lambda path, layer: decoding(layer, piece=3), "It takes: step, make_cache, steps"),
    ],
)
def test_wrong_arguments_of_functions_are_answered(call: Any, told: str, tmp_path: Path) -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
    path = tmp_path / "layer.safetensors"
    anymha.save(path, layer)
    with pytest.raises(ArgumentError) as error:
        call(path, layer)
    assert told in str(error.value)
    assert anymha.load(path, "numpy").config.key_dim == 4
