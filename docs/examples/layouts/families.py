"""A small layer of each family of transformers, its output, and ours from its converted weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import forward
import numpy as np
import torch

import anymha

H, K, D, T = 4, 2, 32, 6  # heads, key heads, width, length
HEAD = D // H


def random_inputs(width: int = D) -> np.ndarray:
    """Inputs (2, T, width), float64."""
    return np.random.default_rng(0).standard_normal((2, T, width))


def part(family: str, name: str) -> Any:
    """A class of a family, of its model or of its configuration."""
    kind = "configuration" if name.endswith("Config") else "modeling"
    module = importlib.import_module(f"transformers.models.{family}.{kind}_{family}")
    return getattr(module, name)


def settled(config: Any) -> Any:
    """The configuration, with the plain implementation of attention."""
    config._attn_implementation = "eager"
    return config


def ready(layer: torch.nn.Module) -> Any:
    """The layer in float64, all its weights random."""
    generator = torch.Generator().manual_seed(0)
    layer = layer.double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator)
    return layer


def called(function: Callable[..., Any], *args: Any, **options: Any) -> np.ndarray:
    """What a module gives, its output alone."""
    with torch.no_grad():
        found = function(*args, **options)
    return (found[0] if isinstance(found, tuple) else found).numpy()


def causal(window: int = T) -> torch.Tensor:
    """The additive mask (1, 1, T, T) that the plain implementations take.

    Args:
        window: How many keys a query sees, itself and those before.
    """
    lowest = torch.finfo(torch.float32).min
    seen = torch.ones(T, T).tril() * torch.ones(T, T).triu(1 - window)
    return torch.zeros(T, T).double().masked_fill(seen == 0, lowest)[None, None]


Pair = tuple[Any, np.ndarray, np.ndarray]


def plain(layer: Any, call: Callable[[torch.Tensor], np.ndarray], **options: Any) -> Pair:
    """A layer whose attention is anymha's own: its output, and that of the converted layer."""
    x = random_inputs()
    converted = anymha.convert(layer, to="numpy", weights_only=bool(options.pop("bias", 0)))
    return layer, call(torch.from_numpy(x)), converted(x, **options)


def bert() -> Pair:
    """BERT; its residual and norm, which come after, are left out."""
    config = part("bert", "BertConfig")(hidden_size=D, num_attention_heads=H)
    layer = ready(part("bert", "BertAttention")(settled(config)))
    return plain(layer, lambda x: called(lambda y: layer.output.dense(layer.self(y)[0]), x))


def vit() -> Pair:
    """ViT."""
    config = part("vit", "ViTConfig")(hidden_size=D, num_attention_heads=H)
    layer = ready(part("vit", "ViTAttention")(settled(config)))
    return plain(layer, lambda x: called(layer, x))


def clip() -> Pair:
    """CLIP's vision."""
    config = part("clip", "CLIPVisionConfig")(hidden_size=D, num_attention_heads=H)
    layer = ready(part("clip", "CLIPAttention")(settled(config)))
    return plain(layer, lambda x: called(layer, x))


def bart() -> Pair:
    """BART."""
    config = settled(part("bart", "BartConfig")(d_model=D, encoder_attention_heads=H))
    layer = ready(part("bart", "BartAttention")(D, H, config=config))
    return plain(layer, lambda x: called(layer, x))


def whisper() -> Pair:
    """Whisper, whose keys have no bias."""
    config = settled(part("whisper", "WhisperConfig")(d_model=D, encoder_attention_heads=H))
    layer = ready(part("whisper", "WhisperAttention")(D, H, config=config))
    return plain(layer, lambda x: called(layer, x))


def opt() -> Pair:
    """OPT."""
    config = part("opt", "OPTConfig")(hidden_size=D, num_attention_heads=H)
    layer = ready(part("opt", "OPTAttention")(settled(config), layer_idx=0))
    return plain(layer, lambda x: called(layer, x, attention_mask=causal()), use_causal_mask=True)


def gpt2() -> Pair:
    """GPT-2."""
    config = part("gpt2", "GPT2Config")(n_embd=D, n_head=H)
    layer = ready(part("gpt2", "GPT2Attention")(settled(config), layer_idx=0))
    return plain(layer, lambda x: called(layer, x, attention_mask=causal()), use_causal_mask=True)


def gpt2_across() -> Pair:
    """GPT-2 across to an encoder, with kernels of another form."""
    config = part("gpt2", "GPT2Config")(n_embd=D, n_head=H)
    layer = part("gpt2", "GPT2Attention")(settled(config), is_cross_attention=True, layer_idx=0)
    layer, x = ready(layer), random_inputs()
    memory = np.random.default_rng(1).standard_normal((2, T + 3, D))
    theirs = called(layer, torch.from_numpy(x), encoder_hidden_states=torch.from_numpy(memory))
    return layer, theirs, anymha.convert(layer, to="numpy")(x, memory)


def gpt_bigcode(multi_query: bool = True) -> Pair:
    """GPT-BigCode, one key head for all or one for each."""
    config = part("gpt_bigcode", "GPTBigCodeConfig")(n_embd=D, n_head=H, multi_query=multi_query)
    layer = ready(part("gpt_bigcode", "GPTBigCodeAttention")(settled(config), layer_idx=0))
    return plain(layer, lambda x: called(layer, x, attention_mask=causal()), use_causal_mask=True)


def t5() -> Pair:
    """T5's first layer: its relative bias is passed as `attention_bias`."""
    config = settled(part("t5", "T5Config")(d_model=D, d_kv=5, num_heads=H))
    layer = ready(
        part("t5", "T5Attention")(config, has_relative_attention_bias=True, is_causal=False)
    )
    with torch.no_grad():
        bias = layer.compute_bias(T, T)  # (1, H, T, T)
    layer, theirs, _ = plain(layer, lambda x: called(layer, x, position_bias=bias), bias=True)
    converted = anymha.convert(layer, to="numpy", weights_only=True)
    return layer, theirs, converted(random_inputs(), attention_bias=bias.numpy())


def bloom() -> Pair:
    """BLOOM: ALiBi is passed as `attention_bias`, and the residual, which it adds, is zero."""
    config = part("bloom", "BloomConfig")(hidden_size=D, n_head=H)
    layer = ready(part("bloom", "BloomAttention")(settled(config), layer_idx=0))
    x, bias = random_inputs(), forward.alibi(H, T)
    alibi = torch.from_numpy(np.broadcast_to(bias, (2, H, 1, T)).reshape(2 * H, 1, T).copy())
    zero = torch.zeros(2, T, D).double()
    theirs = called(layer, torch.from_numpy(x), zero, alibi, causal())
    converted = anymha.convert(layer, to="numpy", weights_only=True)
    return layer, theirs, converted(x, attention_bias=bias, use_causal_mask=True)


def embeddings(width: int, twice: bool = True) -> tuple[torch.Tensor, ...]:
    """The cosines and sines (1, T, width) that the modules take; for GPT-OSS half as wide."""
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.concatenate([angles, angles], 1) if twice else angles
    return tuple(torch.from_numpy(function(angles))[None] for function in (np.cos, np.sin))


def rotary(
    family: str,
    prefix: str,
    norm: bool = False,
    width: int = HEAD,
    head: int = HEAD,
    **options: Any,
) -> Pair:
    """A family with rotary positions in halves, and norms of queries and keys before if it has."""
    sizes = {"num_key_value_heads": K, "head_dim": head} | options.pop("sizes", {})
    config = part(family, f"{prefix}Config")(
        hidden_size=D, num_attention_heads=H, num_hidden_layers=2, **sizes, **options
    )
    name = prefix.removesuffix("Text")
    layer = ready(part(family, f"{name}Attention")(settled(config), layer_idx=0))
    x = random_inputs()
    weights = anymha.get_weights(layer)
    window = min(weights.config.sliding_window or T, T)
    call = {"position_embeddings": embeddings(width, twice=family != "gpt_oss")}
    theirs = called(layer, torch.from_numpy(x), attention_mask=causal(window), **call)
    changes = [forward.rotate(width)]
    if norm:
        changes.insert(0, forward.rms_norm(weights, plus_one=family == "gemma3"))
    bounds: dict[str, Any] = {"window": (window - 1, None)} if window < T else {}
    bounds["softcap"] = getattr(layer, "attn_logit_softcapping", None)
    return layer, theirs, forward.attend(weights, x, tuple(changes), is_causal=True, **bounds)


def pairs(family: str, prefix: str) -> Pair:
    """A family with rotary positions in pairs, over a part of each head."""
    config = part(family, f"{prefix}Config")(n_embd=D, n_head=H, rotary_dim=4)
    layer = ready(part(family, f"{prefix}Attention")(settled(config), layer_idx=0))
    x, positions = random_inputs(), torch.arange(T)[None].repeat(2, 1)
    theirs = called(layer, torch.from_numpy(x), attention_mask=causal(), position_ids=positions)
    weights = anymha.get_weights(layer)
    turn = forward.rotate(4, pairs=True)
    return layer, theirs, forward.attend(weights, x, (turn,), is_causal=True)


def falcon(**options: Any) -> Pair:
    """Falcon, in its three kinds."""
    config = part("falcon", "FalconConfig")(
        hidden_size=D, num_attention_heads=H, num_hidden_layers=2, alibi=False, **options
    )
    layer = ready(part("falcon", "FalconAttention")(settled(config), layer_idx=0))
    x = random_inputs()
    call = {"alibi": None, "position_embeddings": embeddings(HEAD)}
    theirs = called(layer, torch.from_numpy(x), attention_mask=causal(), **call)
    turn = forward.rotate(HEAD)
    return layer, theirs, forward.attend(anymha.get_weights(layer), x, (turn,), is_causal=True)


def encoder(family: str, layer: str, config: str, *arguments: Any, **options: Any) -> Pair:
    """An encoder's attention that takes its configuration alone."""
    names = {"hidden_size": D, "num_attention_heads": H} | options
    settings = settled(part(family, config)(**names))
    module = ready(part(family, layer)(settings, *arguments))
    return plain(module, lambda x: called(module, x))


def albert() -> Pair:
    """ALBERT; its residual and norm, which come after, are left out."""
    config = part("albert", "AlbertConfig")(hidden_size=D, num_attention_heads=H)
    layer = ready(part("albert", "AlbertAttention")(settled(config)))
    context: list[torch.Tensor] = []
    layer.dense.register_forward_hook(lambda module, inputs, output: context.append(output))

    def call(x: torch.Tensor) -> np.ndarray:
        called(layer, x)
        return context[-1].detach().numpy()

    return plain(layer, call)


def mpnet() -> Pair:
    """MPNet: its relative bias, which all layers share, is passed as `attention_bias`."""
    config = part("mpnet", "MPNetConfig")(hidden_size=D, num_attention_heads=H)
    layer = ready(part("mpnet", "MPNetSelfAttention")(settled(config)))
    bias = 0.5 * np.random.default_rng(3).standard_normal((1, H, T, T))
    call = {"position_bias": torch.from_numpy(bias)}
    layer, theirs, _ = plain(layer, lambda x: called(layer, x, **call), bias=True)
    converted = anymha.convert(layer, to="numpy", weights_only=True)
    return layer, theirs, converted(random_inputs(), attention_bias=bias)


def deberta(family: str, prefix: str) -> Pair:
    """DeBERTa without `relative_attention`; its residual and norm are left out."""
    config = part(family, f"{prefix}Config")(hidden_size=D, num_attention_heads=H)
    layer = ready(part(family, f"{prefix}Attention")(settled(config)))
    seen = torch.ones(2, 1, T, T, dtype=torch.bool)
    call = layer.self
    return plain(layer, lambda x: called(lambda y: layer.output.dense(call(y, seen)[0]), x))


def gpt_neo(kind: str = "global") -> Pair:
    """GPT-Neo, whose logits are not scaled; every other layer sees the last positions alone."""
    config = part("gpt_neo", "GPTNeoConfig")(
        hidden_size=D, num_heads=H, num_layers=2, attention_types=[[["global", "local"], 1]],
        window_size=3,
    )  # fmt: skip
    layer = ready(part("gpt_neo", "GPTNeoSelfAttention")(settled(config), kind))
    return plain(layer, lambda x: called(layer, x), use_causal_mask=True)


def mpt() -> Pair:
    """MPT: ALiBi is passed as `attention_bias`."""
    config = settled(part("mpt", "MptConfig")(d_model=D, n_heads=H))
    layer = ready(part("mpt", "MptAttention")(config, layer_idx=0))
    x, bias = random_inputs(), forward.alibi(H, T)
    unseen = torch.ones(T, T).triu(1).bool()[None, None]
    theirs = called(layer, torch.from_numpy(x), torch.from_numpy(bias[0]), attention_mask=unseen)
    converted = anymha.convert(layer, to="numpy", weights_only=True)
    return layer, theirs, converted(x, attention_bias=bias, use_causal_mask=True)


def dbrx() -> Pair:
    """DBRX, whose projections are clipped: here beyond all values."""
    attention = {"kv_n_heads": K, "clip_qkv": 1e3}
    config = settled(part("dbrx", "DbrxConfig")(d_model=D, n_heads=H, attn_config=attention))
    config.attn_config.rope_theta = 10000.0  # which the module reads and no default states
    layer = ready(part("dbrx", "DbrxAttention")(config, layer_idx=0))
    return turned(layer, HEAD)


def turned(layer: Any, width: int, bidirectional: bool = False) -> Pair:
    """A layer with rotary positions in halves."""
    x, weights = random_inputs(), anymha.get_weights(layer)
    window = min(weights.config.sliding_window or T, T)
    mask = causal(window)
    if bidirectional:
        mask = torch.maximum(mask, mask.mT)
    call = {"position_embeddings": embeddings(width), "attention_mask": mask}
    theirs = called(layer, torch.from_numpy(x), **call)
    bounds: dict[str, Any] = {"is_causal": not bidirectional}
    if window < T:
        bounds["window"] = (window - 1, window - 1 if bidirectional else None)
    return layer, theirs, forward.attend(weights, x, (forward.rotate(width),), **bounds)


def rotary_encoder(family: str, prefix: str, *arguments: Any, **options: Any) -> Pair:
    """An encoder with rotary positions, which sees both sides."""
    config = part(family, f"{prefix}Config")(
        hidden_size=D, num_attention_heads=H, num_hidden_layers=2, **options
    )
    layer = ready(part(family, f"{prefix}Attention")(settled(config), *arguments))
    return turned(layer, HEAD, bidirectional=True)


DEFAULT = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

FAMILIES: dict[str, Callable[[], Pair]] = {
    "bert": bert,
    "vit": vit,
    "clip": clip,
    "opt": opt,
    "bart": bart,
    "whisper": whisper,
    "gpt2": gpt2,
    "gpt2, across": gpt2_across,
    "gpt_bigcode, one key head": gpt_bigcode,
    "gpt_bigcode, a key head each": lambda: gpt_bigcode(multi_query=False),
    "t5": t5,
    "bloom": bloom,
    "llama": lambda: rotary("llama", "Llama"),
    "llama, with biases": lambda: rotary("llama", "Llama", attention_bias=True),
    "mistral": lambda: rotary("mistral", "Mistral", sliding_window=3),
    "qwen2": lambda: rotary("qwen2", "Qwen2"),
    "qwen3": lambda: rotary("qwen3", "Qwen3", norm=True),
    "gemma": lambda: rotary("gemma", "Gemma", head=12, width=12),
    "gemma2": lambda: rotary(
        "gemma2",
        "Gemma2",
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        sliding_window=3,
    ),
    "gemma3": lambda: rotary("gemma3", "Gemma3Text", norm=True, query_pre_attn_scalar=20),
    "gpt_oss": lambda: rotary("gpt_oss", "GptOss", sliding_window=T, **DEFAULT),
    "gpt_neox": lambda: rotary("gpt_neox", "GPTNeoX", width=HEAD // 4 * 2, sizes={}),
    "phi3": lambda: rotary("phi3", "Phi3", pad_token_id=0),
    "falcon, a key head each": lambda: falcon(multi_query=False),
    "falcon, one key head": lambda: falcon(multi_query=True),
    "falcon, grouped": lambda: falcon(new_decoder_architecture=True, num_kv_heads=K),
    "codegen": lambda: pairs("codegen", "CodeGen"),
    "gptj": lambda: pairs("gptj", "GPTJ"),
    "albert": albert,
    "distilbert": lambda: encoder(
        "distilbert", "DistilBertSelfAttention", "DistilBertConfig", dim=D, n_heads=H
    ),
    "mpnet": mpnet,
    "deberta": lambda: deberta("deberta", "Deberta"),
    "deberta_v2": lambda: deberta("deberta_v2", "DebertaV2"),
    "wav2vec2_bert": lambda: encoder(
        "wav2vec2_bert",
        "Wav2Vec2BertSelfAttention",
        "Wav2Vec2BertConfig",
        position_embeddings_type=None,
    ),
    "blip": lambda: encoder("blip", "BlipAttention", "BlipVisionConfig"),
    "gpt_neo": gpt_neo,
    "gpt_neo, with a window": lambda: gpt_neo("local"),
    "mpt": mpt,
    "modernbert": lambda: rotary_encoder("modernbert", "ModernBert", 0),
    "modernbert, with a window": lambda: rotary_encoder(
        "modernbert", "ModernBert", 1, local_attention=4
    ),
    "nomic_bert": lambda: rotary_encoder("nomic_bert", "NomicBert"),
    "dbrx": dbrx,
    "phi": lambda: rotary("phi", "Phi", width=HEAD // 2, sizes={"num_key_value_heads": K}),
}
