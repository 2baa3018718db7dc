"""A small layer of each family of transformers, its output, and ours from its converted weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import anymha
from anymha.attention.features.alibi import alibi_slopes

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


def alibi() -> torch.Tensor:
    """BLOOM's bias (H, 1, T): the slope of the head times the key's position."""
    slopes = torch.tensor(alibi_slopes(H)).double()
    return slopes[:, None, None] * torch.arange(T)


def bloom() -> Pair:
    """BLOOM; the residual, which its module adds, is zero."""
    config = part("bloom", "BloomConfig")(hidden_size=D, n_head=H)
    layer = ready(part("bloom", "BloomAttention")(settled(config), layer_idx=0))
    call = torch.zeros(2, T, D).double(), alibi().repeat(2, 1, 1), causal()
    return plain(layer, lambda x: called(layer, x, *call), use_causal_mask=True)


def rotary(
    family: str, prefix: str, number: int = 0, bidirectional: bool = False, **options: Any
) -> Pair:
    """A family with rotary positions, which are made by its own class for them.

    Args:
        family: Its name.
        prefix: What the names of its classes begin with.
        number: The layer's number, which tells its kind.
        bidirectional: Whether it sees both sides.
        **options: Of its configuration.
    """
    sizes = {"hidden_size": D, "num_attention_heads": H, "num_hidden_layers": 8}
    config = settled(part(family, f"{prefix}Config")(**(sizes | options)))
    name = prefix if family in ("llama4", "hrm_text") else prefix.removesuffix("Text")
    layer = ready(part(family, f"{name}Attention")(config, layer_idx=number))
    window = min(anymha.get_weights(layer).config.sliding_window or T, T)
    mask = causal(window)
    if bidirectional:
        mask = torch.maximum(mask, mask.mT)
    words = prefix if family.startswith(("llama4", "qwen3_5")) else name
    turns = part(family, f"{words}RotaryEmbedding")(config)
    kind = (config.layer_types[number],) if hasattr(turns, "layer_types") else ()
    positions = torch.arange(T)[None]
    call: dict[str, Any] = {"attention_mask": mask}
    if family == "falcon":
        call["alibi"] = None

    def theirs(x: torch.Tensor) -> np.ndarray:
        return called(layer, x, position_embeddings=turns(x, positions, *kind), **call)

    return plain(layer, theirs, use_causal_mask=not bidirectional)


def pairs(family: str, prefix: str) -> Pair:
    """A family with rotary positions in pairs, over a part of each head, made by its module."""
    config = part(family, f"{prefix}Config")(n_embd=D, n_head=H, rotary_dim=4)
    layer = ready(part(family, f"{prefix}Attention")(settled(config), layer_idx=0))
    call = {"attention_mask": causal(), "position_ids": torch.arange(T)[None].repeat(2, 1)}
    return plain(layer, lambda x: called(layer, x, **call), use_causal_mask=True)


def falcon_alibi() -> Pair:
    """Falcon with ALiBi, which it adds before it scales the logits."""
    config = part("falcon", "FalconConfig")(hidden_size=D, num_attention_heads=H, alibi=True)
    layer = ready(part("falcon", "FalconAttention")(settled(config), layer_idx=0))
    call = {"alibi": alibi().repeat(2, 1, 1), "attention_mask": causal()}
    return plain(layer, lambda x: called(layer, x, **call), use_causal_mask=True)


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
    """MPT, with ALiBi."""
    config = settled(part("mpt", "MptConfig")(d_model=D, n_heads=H))
    layer = ready(part("mpt", "MptAttention")(config, layer_idx=0))
    unseen = torch.ones(T, T).triu(1).bool()[None, None]
    call = {"position_bias": alibi(), "attention_mask": unseen}
    return plain(layer, lambda x: called(layer, x, **call), use_causal_mask=True)


def dbrx() -> Pair:
    """DBRX, whose projections are clipped: here beyond all values."""
    attention = {"kv_n_heads": K, "clip_qkv": 1e3}
    config = settled(part("dbrx", "DbrxConfig")(d_model=D, n_heads=H, attn_config=attention))
    config.attn_config.rope_theta = 10000.0  # which the module reads and no default states
    layer = ready(part("dbrx", "DbrxAttention")(config, layer_idx=0))
    turns = part("dbrx", "DbrxRotaryEmbedding")(config)
    converted = anymha.convert(layer, to="numpy", weights_only=True)
    x = random_inputs()
    call = {"position_embeddings": turns(torch.from_numpy(x), torch.arange(T)[None])}
    theirs = called(layer, torch.from_numpy(x), attention_mask=causal(), **call)
    return layer, theirs, converted(x, use_causal_mask=True)


def nomic_bert() -> Pair:
    """Nomic's BERT, whose module takes no number."""
    config = part("nomic_bert", "NomicBertConfig")(hidden_size=D, num_attention_heads=H)
    layer = ready(part("nomic_bert", "NomicBertAttention")(settled(config)))
    turns = part("nomic_bert", "NomicBertRotaryEmbedding")(config)
    positions = torch.arange(T)[None]
    return plain(layer, lambda x: called(layer, x, position_embeddings=turns(x, positions)))


GROUPED: dict[str, Any] = {"num_key_value_heads": K, "head_dim": HEAD}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 2},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 4, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [2.0, 3.0, 4.0, 5.0],
                 "original_max_position_embeddings": 4},
    "proportional": {"partial_rotary_factor": 0.5},
}  # fmt: skip


def scaled(kind: str) -> Pair:
    """Llama with a scaling of its rotary positions."""
    fields = {"rope_type": kind, "rope_theta": 500.0, **SCALINGS[kind]}
    most = 5 if kind == "dynamic" else 16
    return rotary("llama", "Llama", max_position_embeddings=most, rope_parameters=fields, **GROUPED)


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
    "llama": lambda: rotary("llama", "Llama", **GROUPED),
    "llama, with biases": lambda: rotary("llama", "Llama", attention_bias=True, **GROUPED),
    **{f"llama, {kind}": lambda kind=kind: scaled(kind) for kind in SCALINGS},
    "mistral": lambda: rotary("mistral", "Mistral", sliding_window=3, **GROUPED),
    "qwen2": lambda: rotary("qwen2", "Qwen2", **GROUPED),
    "qwen3": lambda: rotary("qwen3", "Qwen3", **GROUPED),
    "qwen3_next": lambda: rotary("qwen3_next", "Qwen3Next", 3, **GROUPED),
    "qwen3_next, with biases": lambda: rotary(
        "qwen3_next", "Qwen3Next", 3, attention_bias=True, **GROUPED
    ),
    "qwen3_next, Qwen3.5": lambda: rotary("qwen3_5", "Qwen3_5Text", 3, **GROUPED),
    "qwen3_next, Qwen3.5 MoE": lambda: rotary("qwen3_5_moe", "Qwen3_5MoeText", 3, **GROUPED),
    "afmoe": lambda: rotary("afmoe", "Afmoe", sliding_window=3, **GROUPED),
    "afmoe, without positions": lambda: rotary("afmoe", "Afmoe", 3, sliding_window=3, **GROUPED),
    "hrm_text": lambda: rotary("hrm_text", "HrmText", head_dim=HEAD),
    "hrm_text, with biases": lambda: rotary(
        "hrm_text", "HrmText", head_dim=HEAD, attention_bias=True
    ),
    "gemma": lambda: rotary("gemma", "Gemma", num_key_value_heads=K, head_dim=12),
    "gemma2": lambda: rotary(
        "gemma2",
        "Gemma2",
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        sliding_window=3,
        **GROUPED,
    ),
    **{
        f"gemma3, {kind}": lambda number=number: rotary(
            "gemma3", "Gemma3Text", number, query_pre_attn_scalar=20, sliding_window=3, **GROUPED
        )
        for kind, number in (("local", 0), ("global", 5))
    },
    "gpt_oss": lambda: rotary("gpt_oss", "GptOss", sliding_window=3, **GROUPED),
    "gpt_neox": lambda: rotary("gpt_neox", "GPTNeoX", rotary_pct=0.5),
    "phi3": lambda: rotary("phi3", "Phi3", num_key_value_heads=K, pad_token_id=0),
    "falcon, a key head each": lambda: rotary("falcon", "Falcon", multi_query=False),
    "falcon, one key head": lambda: rotary("falcon", "Falcon", multi_query=True),
    "falcon, grouped": lambda: rotary(
        "falcon", "Falcon", new_decoder_architecture=True, num_kv_heads=K
    ),
    "falcon, with ALiBi": falcon_alibi,
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
    "modernbert": lambda: rotary("modernbert", "ModernBert", 0, True),
    "modernbert, with a window": lambda: rotary(
        "modernbert", "ModernBert", 1, True, local_attention=4
    ),
    "nomic_bert": nomic_bert,
    "dbrx": dbrx,
    "phi": lambda: rotary("phi", "Phi", num_key_value_heads=K, qk_layernorm=True),
    "olmo2": lambda: rotary("olmo2", "Olmo2", **GROUPED),
    "cohere": lambda: rotary("cohere", "Cohere", use_qk_norm=True, num_key_value_heads=K),
    "cohere2": lambda: rotary("cohere2", "Cohere2", sliding_window=3, num_key_value_heads=K),
    "cohere2, without positions": lambda: rotary("cohere2", "Cohere2", 3, num_key_value_heads=K),
    "glm": lambda: rotary("glm", "Glm", attention_bias=True, **GROUPED),
    "llama4": lambda: rotary("llama4", "Llama4Text", **GROUPED),
    "smollm3": lambda: rotary("smollm3", "SmolLM3", num_key_value_heads=K),
    "smollm3, without positions": lambda: rotary("smollm3", "SmolLM3", 3, num_key_value_heads=K),
    "granite": lambda: rotary("granite", "Granite", attention_multiplier=0.3, **GROUPED),
    "starcoder2": lambda: rotary("starcoder2", "Starcoder2", sliding_window=3, **GROUPED),
    "exaone4": lambda: rotary("exaone4", "Exaone4", sliding_window=3, **GROUPED),
    "exaone4, without positions": lambda: rotary("exaone4", "Exaone4", 3, **GROUPED),
    "glm4_moe": lambda: rotary("glm4_moe", "Glm4Moe", use_qk_norm=True, **GROUPED),
    "hunyuan_v1_dense": lambda: rotary("hunyuan_v1_dense", "HunYuanDenseV1", **GROUPED),
}
