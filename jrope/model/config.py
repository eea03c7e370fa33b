"""What a LLaMA is: the configuration, and the name and shape of every weight.

The fields have Hugging Face's names.  Those of every LLaMA have no default: a
checkpoint decides them (`hf.config_from_hf` reads them), or whoever trains one.  Those
by which other families differ have LLaMA's values, and cost a LLaMA nothing.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

from jrope.errors import JropeError, is_integer, is_number, is_positive
from jrope.model.activations import ACTIVATIONS
from jrope.rope import Rope

_FACTORS = (
    "attention_scale",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_divisor",
    "score_cap",
    "logit_cap",
)
_OPTIONAL = ("attention_scale", "score_cap", "logit_cap")
NormKind: TypeAlias = Literal["llama", "wide", "gemma"]
NORMS = {  # where norms stand -> their names
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
_ALIKE = ("rotary_dim", "layout", "precision")
_WORDS = {
    "qk_norm": (None, "head", "whole"),
    "norm": ("llama", "wide", "gemma"),
    "norm_at": tuple(NORMS),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@final
@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A LLaMA's shape and constants: hashable, hence a static argument of jit.

    Args:
      vocab_size: V, rows of the embedding.
      hidden_size: D.
      intermediate_size: F, width of the gated MLP.
      num_hidden_layers: L.
      num_attention_heads: N, query heads.
      num_key_value_heads: K, a divisor of N.
      head_dim: H, even; N * H need not be D.
      max_position_embeddings: length the checkpoint declares; `with_rope` takes it for
        the trained length where a method needs one.
      rms_norm_eps: added to the mean square inside the root.
      hidden_act: a name in `activations.ACTIVATIONS`.
      attention_bias: q, k and v have a bias, and o unless `o_bias` says otherwise.
      mlp_bias: gate, up and down have a bias.
      tie_word_embeddings: logits are taken with the embedding matrix.
      initializer_range: standard deviation of fresh weights.
      rope: the rotary embedding.
      bos_token_id: first token of an otherwise empty prompt, if any.
      eos_token_id: ids that end a sequence; may be empty.
      pad_token_id: id that fills rows after their end, if any (else 0).
      model_type: the family, whose words `hf.config_to_hf` writes.
      o_bias: o has a bias; None: as `attention_bias` says.
      windows: of each layer, how many keys up to its own a query sees, None: all of
        them; None for all layers: none has a window.
      rotary: of each layer, whether queries and keys are rotated; None: in all.
      attention_scale: what scores are multiplied by; None: 1 / sqrt(H).
      embedding_multiplier: rows of the embedding are multiplied by it.
      residual_multiplier: what a block adds to its input is multiplied by it.
      logits_divisor: logits are divided by it.
      score_cap: scores become cap * tanh(score / cap) before the mask; None: they stay.
      logit_cap: likewise logits.
      qk_norm: an RMSNorm of queries and keys before they are rotated: "head" of every
        head by itself, "whole" of all heads together; None: there is none.
      norm: RMSNorm's arithmetic: "llama" rounds before it multiplies with the weight,
        "wide" after, "gemma" too, and its weights count from 1 (and the factor of the
        embedding is rounded to its dtype).
      norm_at: "pre": before each block; "post": after it, before the sum; "sandwich":
        both.
      wide_rotation: queries and keys are rotated in float32 and rounded once.
      local_rope: the rotary embedding of the layers with a window; None: `rope`.

    Raises:
      JropeError: a field is out of range or contradicts another.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    initializer_range: float
    rope: Rope
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    model_type: str = "llama"
    o_bias: bool | None = None
    windows: tuple[int | None, ...] | None = None
    rotary: tuple[bool, ...] | None = None
    attention_scale: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None
    qk_norm: Literal["head", "whole"] | None = None
    norm: NormKind = "llama"
    norm_at: Literal["pre", "post", "sandwich"] = "pre"
    wide_rotation: bool = False
    local_rope: Rope | None = None

    def __post_init__(self) -> None:
        wrong = list(self._problems())
        if wrong:
            raise JropeError("configuration: " + "; ".join(wrong))

    def _problems(self) -> Iterator[str]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not is_integer(value, at_least=1):
                yield f"{field.name} is {value!r}, want a positive integer"
            if field.type is bool and not isinstance(value, bool):
                yield f"{field.name} is {value!r}, want true or false"
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                yield f"{name} is {value!r}, want a number >= 0 and < 1e30"
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            yield f"hidden_act is {self.hidden_act!r}, want one of {known}"
        yield from self._token_problems()
        yield from self._head_problems()
        yield from self._family_problems()

    def _head_problems(self) -> Iterator[str]:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        good = is_integer(heads, at_least=1) and is_integer(kv_heads, at_least=1)
        if good and heads % kv_heads:
            yield (
                f"num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        if not isinstance(self.rope, Rope):
            yield f"rope is {self.rope!r}, want a Rope"
        elif is_integer(self.head_dim, at_least=1):
            got = self.rope.rotary_dim
            if got > self.head_dim:
                yield f"rope.rotary_dim {got} exceeds head_dim {self.head_dim}"

    def _family_problems(self) -> Iterator[str]:
        if not isinstance(self.model_type, str):
            yield f"model_type is {self.model_type!r}, want a name"
        if self.o_bias is not None and not isinstance(self.o_bias, bool):
            yield f"o_bias is {self.o_bias!r}, want null, true or false"
        for name, known in _WORDS.items():
            if (value := getattr(self, name)) not in known:
                yield f"{name} is {value!r}, want one of {', '.join(map(str, known))}"

        for name in _FACTORS:
            value = getattr(self, name)
            if not is_positive(value) and (value is not None or name not in _OPTIONAL):
                null = "null or " * (name in _OPTIONAL)
                yield f"{name} is {value!r}, want {null}a number > 0 and < 1e30"
        yield from self._layer_problems()
        yield from self._local_problems()

    def _layer_problems(self) -> Iterator[str]:
        layers, rotary = self.num_hidden_layers, self.rotary
        if rotary is not None:
            good = isinstance(rotary, tuple) and len(rotary) == layers
            if not good or not all(isinstance(r, bool) for r in rotary):
                yield f"rotary is {rotary!r}, want {layers} of true or false; or null"
        if self.windows is None:
            return
        windows = self.windows
        good = isinstance(windows, tuple) and len(windows) == layers
        given = [w for w in windows if w is not None] if good else []
        if not given or not all(is_integer(w, at_least=1) for w in given):
            wanted = f"{layers} of null or an integer >= 1, not all null; or null"
            yield f"windows is {windows!r}, want {wanted}"
        if isinstance(self.rope, Rope) and self.rope.lengths == "growing":
            yield (
                "rope.lengths is 'growing', want 'planned' or 'hf': a layer with a "
                "window keeps keys as they were rotated"
            )

    def _local_problems(self) -> Iterator[str]:
        local, rope = self.local_rope, self.rope
        if local is None or not isinstance(rope, Rope):
            return
        if not isinstance(local, Rope) or local.needs_length:
            yield f"local_rope is {local!r}, want a Rope that needs no length, or null"
        elif self.windows is None:
            yield "local_rope is given, want windows, too: it is for their layers"
        elif any(getattr(local, name) != getattr(rope, name) for name in _ALIKE):
            told = [getattr(x, name) for name in _ALIKE for x in (local, rope)]
            yield f"local_rope and rope differ in {' and '.join(_ALIKE)}: {told}"

    def _token_problems(self) -> Iterator[str]:
        single = {"bos_token_id": self.bos_token_id, "pad_token_id": self.pad_token_id}
        for name, value in single.items():
            if value is not None and not is_integer(value, at_least=0):
                yield f"{name} is {value!r}, want null or an integer >= 0"
        good = isinstance(self.eos_token_id, tuple)
        if not good or not all(is_integer(i, at_least=0) for i in self.eos_token_id):
            got = self.eos_token_id
            yield f"eos_token_id is {got!r}, want a tuple of integers >= 0"


def parameter_shapes(
    config: LlamaConfig, layers: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The one list of weights: Hugging Face's tensor name -> shape, [out, in] matrices.

    Everything else (initial values, loading, saving, sharding) derives from it, and the
    parameter tree is these names split at the dots.  `layers` asks for the first ones
    alone: all layers have the same.
    """
    layers = config.num_hidden_layers if layers is None else layers
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    n = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (n, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, n)}
    mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (v, d)}
    biased = biased_projections(config)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for block, matrices in {"self_attn": attention, "mlp": mlp}.items():
            for name, shape in matrices.items():
                shapes[f"{prefix}.{block}.{name}.weight"] = shape
                if name in biased:
                    shapes[f"{prefix}.{block}.{name}.bias"] = shape[:1]
        if config.qk_norm is not None:
            head = config.head_dim
            sizes = (head, head) if config.qk_norm == "head" else (n, k)
            shapes[f"{prefix}.self_attn.q_norm.weight"] = sizes[:1]
            shapes[f"{prefix}.self_attn.k_norm.weight"] = sizes[1:]
        for name in NORMS[config.norm_at]:
            shapes[f"{prefix}.{name}.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (v, d)
    return shapes


def biased_projections(config: LlamaConfig) -> set[str]:
    """The projections that have a bias, in every layer."""
    names = {"q_proj", "k_proj", "v_proj"} if config.attention_bias else set[str]()
    o_bias = config.attention_bias if config.o_bias is None else config.o_bias
    names |= {"o_proj"} if o_bias else set()
    return names | ({"gate_proj", "up_proj", "down_proj"} if config.mlp_bias else set())
