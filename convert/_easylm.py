"""EasyLM's LLaMA (OpenLLaMA, LWM) as Hugging Face's tensors.

Names are Meta's, kernels are [in, out], and rotation pairs channels 2r and 2r+1 of a
head, as in Meta's weights: the rows of wq and wk are reordered.  LWM stacks its layers
in one array, whose layer axis is the first or the second.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from _common import Lazy, transposed
from _meta_names import LAYER

from jrope.errors import JropeError
from jrope.model.config import EMBEDDING, HEAD, LlamaConfig
from jrope.rope import interleaved_to_half

WTE = "transformer/wte/embedding"
W1 = re.compile(r"transformer/h/(\w+)/feed_forward/w1/kernel")
TOP = {
    WTE: EMBEDDING,
    "transformer/ln_f/kernel": "model.norm.weight",
    "lm_head/kernel": HEAD,
}
STACKED = "scan_decoder"


def is_easylm(tensors: Mapping[str, Lazy]) -> bool:
    """Whether the names are those of EasyLM's LLaMA."""
    return any(name.startswith("transformer/") for name in tensors)


def hf_tensors(
    tensors: Mapping[str, Lazy], config: LlamaConfig, where: Path
) -> dict[str, Lazy]:
    """Hugging Face's names -> the same tensors, [out, in], wq and wk reordered."""
    heads = {
        "attention.wq": config.num_attention_heads,
        "attention.wk": config.num_key_value_heads,
    }
    renamed: dict[str, Lazy] = {}
    for name, lazy in tensors.items():
        match = re.fullmatch(r"transformer/h/(\d+|scan_decoder)/(.+)/kernel", name)
        kind = match[2].replace("/", ".") if match else ""
        if match is None or kind not in LAYER:
            own = transposed(lazy) if name.endswith("/kernel") else lazy
            renamed[TOP.get(name, name)] = own
            continue
        layers = {match[1]: lazy}
        if match[1] == STACKED:
            layers = dict(_layers(lazy, config.num_hidden_layers, f"{where}: {name}"))
        for layer, kernel in layers.items():
            weight = transposed(kernel)
            if kind in heads:
                read = partial(_halves, weight, heads[kind])
                weight = replace(weight, read=read)
            renamed[f"model.layers.{layer}.{LAYER[kind][0]}.weight"] = weight
    return renamed


def _halves(lazy: Lazy, heads: int) -> np.ndarray:
    return interleaved_to_half(lazy.read(), heads)


def _layers(lazy: Lazy, count: int, name: str) -> Iterator[tuple[str, Lazy]]:
    """One array of all layers as one for each."""
    if count not in lazy.shape[:2]:
        raise JropeError(
            f"{name} has shape {lazy.shape}, want {count} layers (num_hidden_layers of "
            "config.json) on its first or second axis"
        )
    axis = lazy.shape.index(count)
    shape = (*lazy.shape[:axis], *lazy.shape[axis + 1 :])
    for layer in range(count):
        yield str(layer), Lazy(shape, lazy.dtype, partial(_layer, lazy, axis, layer))


def _layer(lazy: Lazy, axis: int, layer: int) -> np.ndarray:
    return lazy.read().take(layer, axis)


def sizes(tensors: Mapping[str, Lazy]) -> str:
    """What the shapes say of the configuration, in config.json's words."""
    layers = {match[1]: lazy for n, lazy in tensors.items() if (match := W1.match(n))}
    if WTE not in tensors or len(tensors[WTE].shape) != 2 or not layers:
        return "sizes"
    vocab, hidden = tensors[WTE].shape
    shape = next(iter(layers.values())).shape
    count = len(layers)
    if STACKED in layers:
        count = next((n for n in shape if n != hidden), count)
    return (
        f"vocab_size {vocab}, hidden_size {hidden}, intermediate_size {shape[-1]}, "
        f"num_hidden_layers {count}"
    )
