"""What a model's configuration states about one of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

SLIDING, FULL = "sliding_attention", "full_attention"
_PERIODS = {"gemma2": 2, "gpt_oss": 2, "gemma3": 6, "cohere2": 4, "olmo3": 4, "exaone4": 4,
            "exaone_moe": 4, "afmoe": 4}  # fmt: skip
"""Families where each n-th layer alone has no window, unless the configuration says otherwise."""
_BASES = {
    "llama4": 500000.0, "smollm3": 2000000.0, "cohere": 500000.0, "gpt_oss": 150000.0,
    "mixtral": 1000000.0, "flex_olmo": 500000.0, "nomic_bert": 1000.0,
    "csm": 500000.0,
}  # fmt: skip
_BASES_BY_KIND = {
    "gemma3": {FULL: 1000000.0},
    "modernbert": {FULL: 160000.0},
    "olmo3": {FULL: 500000.0, SLIDING: 500000.0},
}
"""The bases of rotary positions of configurations that state none, where they are not 10000."""
_KEYS_BY_KIND = {
    SLIDING: ("rope_local_base_freq", "local_rope_theta"),
    FULL: ("global_rope_theta",),
}
"""The names of the bases where they are one for each kind of layer."""
_ALIKE = {
    name: layout
    for layout, names in {
        "bert": "roberta xlm_roberta camembert electra layoutlm data2vec_text",
        "vit": "deit dinov2 vit_mae yolos",
        "clip": "clip_text_model clip_vision_model siglip_text_model siglip_vision_model",
        "bart": "mbart pegasus marian m2m_100 blenderbot wav2vec2 hubert",
        "opt": "xglm biogpt",
        "gemma3": "gemma3_text",
        "llama4": "llama4_text",
        "llama": "arcee csm jais2 eurobert",
        "granite": "granitemoe granitemoeshared hyperclovax",
        "mistral": "mixtral",
        "qwen2": "qwen2_moe",
        "qwen3": "qwen3_moe",
        "qwen3_next": "qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
        "olmo2": "flex_olmo olmo3",
        "hunyuan_v1_dense": "hunyuan_v1_moe",
        "exaone4": "exaone_moe",
        "glm": "glm4",
    }.items()
    for name in names.split()
}
"""Families whose attention is that of another family."""
_ATTENTION = "attn_config"
"""Where MPT and DBRX have what is about their attention."""


@dataclass(frozen=True)
class LayerConfig(Mapping[str, Any]):
    """A model's configuration as one of its layers has it, by transformers' names.

    Args:
        stated: The content of `config.json`, or what a live model's configuration states.
        number: The layer's number, from 0; None where it is not known.
    """

    stated: Mapping[str, Any]
    number: int | None = None

    def __getitem__(self, key: str) -> Any:
        inner = self.stated.get(_ATTENTION)
        if key not in self.stated and isinstance(inner, Mapping):
            return inner[key]
        return self.stated[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stated)

    def __len__(self) -> int:
        return len(self.stated)

    @property
    def family(self) -> str:
        """The model's family; empty where it is not stated."""
        name = self.stated.get("model_type")
        return name.replace("-", "_").removesuffix("_text") if isinstance(name, str) else ""

    @property
    def head_dim(self) -> int | None:
        """The width of a head."""
        width = self.stated.get("head_dim")
        if isinstance(width, int) and width > 0:
            return width
        widths = [self.stated.get(name) for name in ("hidden_size", "n_embd", "d_model")]
        heads = [self.stated.get(name) for name in ("num_attention_heads", "n_head", "n_heads")]
        width, count = (next((x for x in found if _is_size(x)), 0) for found in (widths, heads))
        return width // count if width and count and not width % count else None

    @property
    def kind(self) -> str | None:
        """The layer's kind, as "sliding_attention"; None where it is not known.

        Families without kinds have "full_attention".
        """
        kinds = self.stated.get("layer_types")
        if isinstance(kinds, list) and kinds:
            if self.number is not None and self.number < len(kinds):
                return str(kinds[self.number])
            return str(kinds[0]) if len(set(map(str, kinds))) == 1 else None
        family, number = self.family, self.number
        if family.startswith("qwen"):
            first = self.stated.get("max_window_layers")
            if self.stated.get("use_sliding_window") is not True:
                return FULL
            if first == 0:
                return SLIDING
            if number is None or not _is_size(first):
                return None
            return SLIDING if number >= first else FULL
        if family == "modernbert":
            every = self.stated.get("global_attn_every_n_layers", 3)
            return self._periodic(every, 0)
        if family in _PERIODS:
            key = "global_attn_every_n_layers" if family == "afmoe" else "sliding_window_pattern"
            every = self.stated.get(key, _PERIODS[family])
            return self._periodic(every, every - 1 if _is_size(every) else 0)
        return FULL

    def _periodic(self, every: Any, place: int) -> str | None:
        """The kind where one of `every` layers, that at `place`, has no window."""
        if self.number is None or not _is_size(every):
            return None
        return FULL if self.number % every == place else SLIDING

    @property
    def has_kinds(self) -> bool:
        """Whether the family's layers are of several kinds."""
        return self.family in _PERIODS or self.family.startswith(("qwen", "modernbert"))

    @property
    def rotates(self) -> bool | None:
        """Whether the layer rotates queries and keys; None where that is not known."""
        if self.family in ("smollm3", "llama4"):
            if self.number is None:
                return None
            layers = self.stated.get("no_rope_layers")
            if isinstance(layers, list) and layers:  # 1 stands for a layer that rotates
                return bool(layers[self.number]) if self.number < len(layers) else None
            every = self.stated.get("no_rope_layer_interval", 4)
            return (self.number + 1) % every != 0 if _is_size(every) else None
        if self.family in ("cohere2", "afmoe", "exaone4", "exaone_moe"):
            if self.family.startswith("exaone") and not self.stated.get("sliding_window"):
                return True
            return None if self.kind is None else self.kind == SLIDING
        return not (self.family == "falcon" and self.stated.get("alibi"))

    def rope(self) -> dict[str, Any] | None:
        """The rotary positions' fields with their base, `rope_theta`.

        Returns:
            None where the layer has none; "unknown" as a field where that cannot be told.
        """
        kind = self.kind
        rope = self.stated.get("rope_parameters") or self.stated.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            return {"unknown": rope}
        by_kind = {k: v for k, v in rope.items() if str(k).endswith("_attention")}
        if by_kind:
            if kind not in by_kind:
                return {"unknown": kind}
            own: Any = by_kind[kind]
            return None if own is None else self._with_base(own)
        two = self.family in _BASES_BY_KIND
        if two and kind is None:
            return {"unknown": kind}
        return self._with_base({} if two and kind == SLIDING else rope)

    def _with_base(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        by_kind = _BASES_BY_KIND.get(self.family)
        keys: tuple[str, ...] = ("rope_theta", "rotary_emb_base")
        default = _BASES.get(self.family, 10000.0)
        if by_kind is not None and self.kind is not None:
            keys = (*_KEYS_BY_KIND.get(self.kind, ()), *(keys if self.kind == FULL else ()))
            default = by_kind.get(self.kind, 10000.0)
        base = next((self[key] for key in keys if key in self), default if self.family else None)
        if base is None and "rope_theta" not in fields:
            return {"unknown": base}
        return {"rope_theta": base, **{n: v for n, v in fields.items() if v is not None}}


def alike(family: str) -> str | None:
    """The family that has the same attention; None where there is none."""
    return _ALIKE.get(family)


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
