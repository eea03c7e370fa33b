"""The oracle: every rotary method and a whole LLaMA, from the papers, in NumPy.

It imports neither jrope nor transformers and is written for reading.  Frequencies and
angles are `np.longdouble` (80 bits on x86), so that cos and sin are right to 1e-12 at
position 2**24; the model is float64.

f_i = theta ** (-2i/d) for the pairs i < d/2 is a pair's turn per token in radians; each
method is a new f and an attention scaling A: tables A cos(p f) and A sin(p f).

Letters: B batch, T tokens, N query heads, K key/value heads, H head size, R pairs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import erf  # pyright: ignore

Array = np.ndarray[Any, Any]
Frequencies = tuple[Array, float]
Long = np.longdouble
Number = float | np.longdouble
Growing = Callable[[int], Frequencies]
PI = 4 * np.arctan(Long(1))


def default(dim: int, theta: Number) -> Frequencies:
    """Plain rotary embedding (Su et al. 2021): theta ** (-2i/d)."""
    return Long(theta) ** (-2 * np.arange(dim // 2, dtype=Long) / dim), 1.0


def linear(dim: int, theta: float, factor: float) -> Frequencies:
    """Position interpolation (Chen et al. 2023), the same as condensing: f / s."""
    return default(dim, theta)[0] / Long(factor), 1.0


def ntk(dim: int, theta: Number, factor: Number) -> Frequencies:
    """NTK-aware (bloc97 2023): the base grows until the slowest pair is f / s."""
    return default(dim, Long(theta) * Long(factor) ** (Long(dim) / (dim - 2)))


def dynamic(d: int, theta: float, factor: float, trained: int, n: int) -> Frequencies:
    """NTK-aware with an s that grows with the length n >= M: s n/M - (s - 1)."""
    return ntk(d, theta, Long(factor) * max(n, trained) / trained - Long(factor) + 1)


def yarn(
    dim: int,
    theta: float,
    factor: float,
    original: int,
    *,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    truncate: bool = True,
) -> Frequencies:
    """YaRN (Peng et al. 2023): a ramp over the pairs, from f to f / s.

    Pair i makes O f_i / 2 pi turns over the original context O.  Solved for i, that
    gives the ramp's ends: beta_fast turns (kept) and beta_slow turns (interpolated).
    """

    def pair_with(turns: float) -> float:
        return dim / 2 * math.log(original / (2 * math.pi * turns)) / math.log(theta)

    fast, slow = pair_with(beta_fast or 32), pair_with(beta_slow or 1)
    if truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, dim - 1)
    width = Long((slow - fast) or 0.001)
    slowness = np.clip((np.arange(dim // 2, dtype=Long) - fast) / width, 0, 1)

    def sharpening(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = sharpening(mscale) / sharpening(mscale_all_dim)
    elif attention_factor is None:
        attention_factor = sharpening(1)
    f = default(dim, theta)[0]
    return f * (1 - slowness) + f / Long(factor) * slowness, attention_factor


def dynamic_yarn(
    dim: int, theta: float, original: int, n: int, *, tuned: Number = 1, **turns: Any
) -> Frequencies:
    """YaRN with s = n/O, and at least the s that the model was tuned with."""
    return yarn(dim, theta, max(tuned, Long(n) / original), original, **turns)  # type: ignore


def llama3(
    dim: int, theta: float, factor: float, original: int, low: float, high: float
) -> Frequencies:
    """Llama 3.1: f / s below `low` turns over O, f above `high`, a ramp between."""
    f = default(dim, theta)[0]
    kept = (original * f / (2 * PI) - Long(low)) / (Long(high) - Long(low))
    kept = np.clip(kept, 0, 1)
    return f * (kept + (1 - kept) / Long(factor)), 1.0


def longrope(
    dim: int,
    theta: float,
    short: Sequence[float],
    long: Sequence[float],
    original: int,
    n: int,
    *,
    factor: float | None = None,
    attention_factor: float | None = None,
) -> Frequencies:
    """LongRoPE (Ding et al. 2024): a searched divisor per pair, by the length n."""
    divisors = np.array(long if n > original else short, Long)
    if attention_factor is None:
        stretch = math.log(max(factor or 1, 1))
        attention_factor = math.sqrt(1 + stretch / math.log(original))
    return default(dim, theta)[0] / divisors, attention_factor


def proportional(
    dim: int, theta: float, share: float = 1.0, factor: float = 1.0
) -> Frequencies:
    """Gemma 4: the first int(share d/2) pairs turn, at f / s; the others stand."""
    turning = np.arange(dim // 2) < int(share * dim // 2)
    return np.where(turning, default(dim, theta)[0] / Long(factor), 0), 1.0


def from_hf(
    parameters: Mapping[str, Any], max_positions: int, dim: int, length: int
) -> Frequencies:
    """What a config.json means: its `rope_parameters`, M, head size; n is `length`."""
    p = dict(parameters)
    kind, theta = p.pop("rope_type", "default"), p.pop("rope_theta")
    share = p.pop("partial_rotary_factor", 1.0)
    if kind == "proportional":
        return proportional(dim, theta, share, **p)
    dim = int(dim * share)  # only the first channels rotate
    original = p.pop("original_max_position_embeddings", max_positions)
    if kind in ("yarn", "longrope") and p.get("factor") is None:
        p["factor"] = max_positions / original
    if kind == "dynamic-yarn":
        tuned = Long(max_positions) / original if p.pop("finetuned", False) else 1
        return dynamic_yarn(dim, theta, original, length, tuned=tuned, **p)
    if kind == "yarn":
        return yarn(dim, theta, p.pop("factor"), original, **p)
    if kind == "longrope":
        lists = p.pop("short_factor"), p.pop("long_factor")
        return longrope(dim, theta, *lists, original, length, **p)
    if kind == "llama3":
        turns = p["low_freq_factor"], p["high_freq_factor"]
        return llama3(dim, theta, p["factor"], original, *turns)
    if kind == "dynamic":
        return dynamic(dim, theta, p["factor"], max_positions, length)
    return {"default": default, "linear": linear, "ntk": ntk}[kind](dim, theta, **p)


def table(f: Array, scaling: float, positions: Any) -> tuple[Array, Array]:
    """A cos(p f), A sin(p f): float64 [..., R].

    The angle is rounded once, to 64 bits, and libm reduces it exactly: the error at
    position 2**24 is 2**24 * 2**-64 = 1e-12.
    """
    angles = np.asarray(positions).astype(Long)[..., None] * f
    cos, sin = Long(scaling) * np.cos(angles), Long(scaling) * np.sin(angles)
    return cos.astype(np.float64), sin.astype(np.float64)


def rotate(x: Array, cos: Array, sin: Array, layout: str = "half") -> Array:
    """Turn x[..., T, heads, H] by tables [..., T, R]: (x1 + x2 j) (cos + sin j).

    Pair i is channels (i, i + R) in "half", (2i, 2i + 1) in "interleaved"; the channels
    past 2R stay.
    """
    pairs = cos.shape[-1]
    first = np.arange(pairs) if layout == "half" else 2 * np.arange(pairs)
    second = first + (pairs if layout == "half" else 1)
    turned = (x[..., first] + 1j * x[..., second]) * (cos + 1j * sin)[..., None, :]
    out = np.array(x, np.float64)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def fastchat_table(
    dim: int,
    ratio: float,
    max_position_embeddings: int = 2048,
    base: float = 10000,
    dtype: Any = np.float32,
) -> tuple[Array, Array]:
    """FastChat's CondenseRotaryEmbedding: cos and sin [1, 1, M * ratio, dim].

    Powers, frequencies, condensed positions and angles are rounded to `dtype` one after
    the other; cos and sin of that angle are correctly rounded.
    """
    exponents = np.arange(0, dim, 2).astype(dtype) / np.asarray(dim, dtype)
    powers = (float(base) ** exponents.astype(np.float64)).astype(dtype)
    positions = np.arange(int(max_position_embeddings * ratio)).astype(dtype)
    angles = (positions / np.asarray(ratio, dtype))[:, None] * (1 / powers)
    both = np.concatenate([angles, angles], -1).astype(Long)[None, None]
    return np.cos(both).astype(dtype), np.sin(both).astype(dtype)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def _gelu_tanh(x: Array) -> Array:
    return x * _sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **dict.fromkeys(["gelu", "gelu_python"], _gelu),
    **dict.fromkeys(["gelu_accurate", "gelu_fast", "gelu_new"], _gelu_tanh),
    **dict.fromkeys(["gelu_python_tanh", "gelu_pytorch_tanh"], _gelu_tanh),
    **dict.fromkeys(["silu", "swish"], lambda x: x * _sigmoid(x)),
    "gelu_10": lambda x: np.clip(_gelu(x), -10, 10),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "laplace": lambda x: 0.5 * (1 + erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": _sigmoid,
    "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
    "tanh": np.tanh,
}


def changed_logits(
    logits: Array,
    prompt: Sequence[int],
    drawn: Sequence[int],
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    bias: Mapping[int, float] | None = None,
    stop_ids: Sequence[int] = (),
    least: int = 0,
) -> Array:
    """What a token is drawn from behind prompt and drawn tokens, [V], in vLLM's order.

    Stop ids are kept back from the first `least` tokens, and biases added; Keskar et
    al. 2019 divide positive logits of tokens that are there and multiply the others;
    OpenAI's API takes c frequency + (c > 0) presence from a token drawn c times.
    """
    x = logits.astype(np.float64)
    if len(drawn) < least:
        x[[*stop_ids]] = -np.inf
    for token, value in (bias or {}).items():
        x[token] += value
    for token in {*prompt, *drawn}:
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in {*drawn}:
        x[token] -= [*drawn].count(token) * frequency + presence
    return x


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich 2019)."""
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def attend(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """Causal softmax attention, q [B,T,N,H], k and v [B,T,K,H]; N/K queries share one.

    A token sees itself and earlier ones, and of those only the first lengths[b].
    """
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    t = np.arange(q.shape[1])
    seen = (t <= t[:, None]) & (t < lengths[:, None, None])
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def attend_growing(
    q: Array, k: Array, v: Array, growing: Growing, layout: str = "half"
) -> Array:
    """`attend` for q and k that are not turned: query t has its own frequencies.

    It and the keys that it sees are turned for a sequence of t + 1 tokens.
    """
    out = np.empty(q.shape)
    for n in range(1, q.shape[1] + 1):
        tables = table(*growing(n), np.arange(n))
        turned = (rotate(x[:, :n], *tables, layout) for x in (q, k))
        out[:, n - 1] = attend(*turned, v[:, :n], np.array([n]))[:, -1]
    return out


class Output(NamedTuple):
    """Logits [B,T,V]; hidden: the embeddings, each layer's output, the final norm's."""

    logits: Array
    hidden: list[Array]


def forward(
    weights: Mapping[str, Array],
    tokens: Array,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    frequencies: Array | Growing,
    scaling: float = 1.0,
    eps: float = 1e-5,
    activation: str = "silu",
    layout: str = "half",
    positions: Array | None = None,
    lengths: Array | None = None,
) -> Output:
    """LLaMA (Touvron et al. 2023) on flat tensors [out, in] with Hugging Face's names.

    A bias is added where there is one; without `lm_head.weight` the embedding is the
    head.  tokens and positions (0, 1, ... if None) are [B,T]; frequencies [R], or [B,R]
    for rows that differ, or a function of each query's length, see `attend_growing`;
    lengths [B]: logits at and past them mean nothing.
    """
    w = {name: np.asarray(tensor, np.float64) for name, tensor in weights.items()}
    batch, time = tokens.shape
    lengths = np.full(batch, time) if lengths is None else np.asarray(lengths)
    steps = np.tile(np.arange(time), (batch, 1)) if positions is None else positions

    def mix(q: Array, k: Array, v: Array) -> Array:
        if callable(frequencies):
            return attend_growing(q, k, v, frequencies, layout)
        rows = np.broadcast_to(frequencies, (batch, np.shape(frequencies)[-1]))
        tables = table(rows[:, None], scaling, steps)
        return attend(*(rotate(x, *tables, layout) for x in (q, k)), v, lengths)

    def dense(name: str, x: Array) -> Array:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    x = w["model.embed_tokens.weight"][tokens]
    hidden = [x]
    while (at := f"model.layers.{len(hidden) - 1}.") + "input_layernorm.weight" in w:
        h = rms_norm(x, w[at + "input_layernorm.weight"], eps)
        q, k, v = (
            dense(f"{at}self_attn.{name}_proj", h).reshape(batch, time, n, head_dim)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        mixed = mix(q, k, v).reshape(batch, time, heads * head_dim)
        x = x + dense(at + "self_attn.o_proj", mixed)
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"], eps)
        gate = ACTIVATIONS[activation](dense(at + "mlp.gate_proj", h))
        x = x + dense(at + "mlp.down_proj", gate * dense(at + "mlp.up_proj", h))
        hidden.append(x)
    x = rms_norm(x, w["model.norm.weight"], eps)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return Output(x @ head.T, [*hidden, x])
