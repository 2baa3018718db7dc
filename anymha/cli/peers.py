"""Attention layers of transformers, for the families whose forward pass is plain attention."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anymha.errors import BackendNotInstalledError, BiasWarning, LayoutError
from anymha.interchange.compared_options import changed_options, show_options
from anymha.interchange.layers import set_weights
from anymha.options.config import AttentionConfig


def _masked(layer: Any, x: Any) -> Any:
    """A decoder's layer, with a mask that lets every position be seen."""
    length = x.shape[1]
    return layer(x, attention_mask=x.new_zeros(1, 1, length, length))


@dataclass(frozen=True)
class Family:
    """A family of transformers."""

    module: str  # Its module there
    config: str  # The class of its configuration
    # The configuration's names of the input width and of the number of heads
    names: tuple[str, str]
    layer: str  # The class of its attention
    sized: bool = False  # Whether the layer takes the width and the heads before its configuration
    indexed: bool = False  # Whether it takes its place in the model
    # Calls the layer on its input, and returns the output
    call: Callable[[Any, Any], Any] = lambda layer, x: layer(x)

    def make_layer(self, width: int, heads: int) -> Any:
        """A new layer."""
        path = f"transformers.models.{self.module}"
        configs: Any = importlib.import_module(f"{path}.configuration_{self.module}")
        models: Any = importlib.import_module(f"{path}.modeling_{self.module}")
        config = getattr(configs, self.config)(**dict(zip(self.names, (width, heads), strict=True)))
        config._attn_implementation = "eager"
        options = {"config": config} | ({"layer_idx": 0} if self.indexed else {})
        return getattr(models, self.layer)(*((width, heads) if self.sized else ()), **options)


_SIZES = ("hidden_size", "num_attention_heads")
_ENCODER = ("d_model", "encoder_attention_heads")
FAMILIES = {
    # BERT's residual and norm, which come after, are left out.
    "transformers.bert": Family("bert", "BertConfig", _SIZES, "BertAttention",
                                call=lambda layer, x: layer.output.dense(layer.self(x)[0])),
    "transformers.vit": Family("vit", "ViTConfig", _SIZES, "ViTAttention"),
    "transformers.clip": Family("clip", "CLIPVisionConfig", _SIZES, "CLIPAttention"),
    "transformers.bart": Family("bart", "BartConfig", _ENCODER, "BartAttention", sized=True),
    "transformers.whisper": Family("whisper", "WhisperConfig", _ENCODER, "WhisperAttention",
                                   sized=True),
    "transformers.opt": Family("opt", "OPTConfig", _SIZES, "OPTAttention", indexed=True,
                               call=_masked),
    "transformers.gpt2": Family("gpt2", "GPT2Config", ("n_embd", "n_head"), "GPT2Attention",
                                indexed=True, call=_masked),
}  # fmt: skip


def run(
    layout: str, config: AttentionConfig, weights: Mapping[str, np.ndarray], query: np.ndarray
) -> np.ndarray:
    """The output of the family's own layer for a query (B, T, D), each position attending to all.

    Raises:
        BackendNotInstalledError: transformers or torch is not installed.
        LayoutError: the family's layer cannot have these sizes.
    """
    heads = config.num_heads
    square = len({query.shape[-1], heads * config.key_dim, *_widths(weights)}) == 1
    changed = changed_options(config)
    if not square or changed or query.dtype.itemsize <= 2:
        received = f" Received: {show_options(config, changed)}." if changed else ""
        raise LayoutError(
            "a layer of that family is as wide as its heads together, and is run here in float32 "
            f"and float64, with all other options at their defaults.{received}"
        )
    try:
        torch: Any = importlib.import_module("torch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, while it is imported
            layer = FAMILIES[layout].make_layer(heads * config.key_dim, heads)
    except ImportError as error:
        raise BackendNotInstalledError(f"it is not installed ({error})") from error
    layer = layer.eval().to(getattr(torch, config.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasWarning)  # zeros change nothing here
        layer = set_weights(layer, dict(weights))
    with torch.no_grad():
        output = FAMILIES[layout].call(layer, torch.from_numpy(query))
    return (output[0] if isinstance(output, tuple) else output).numpy()


def _widths(weights: Mapping[str, np.ndarray]) -> list[int]:
    """The widths of the inputs and of the output."""
    kernels = [weights[f"{name}.kernel"] for name in ("query", "key", "value")]
    return [*(kernel.shape[0] for kernel in kernels), *weights["output.kernel"].shape[2:]]
