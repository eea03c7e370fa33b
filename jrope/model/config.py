"""What a LLaMA is: the configuration, and the name and shape of every weight.

The fields have Hugging Face's names.  None has a default: everything here is decided by
a checkpoint (`hf.config_from_hf` reads them) or by whoever trains one.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from jrope.errors import JropeError, is_integer, is_number
from jrope.model.activations import ACTIVATIONS
from jrope.rope import Rope

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
      attention_bias: q, k, v and o have a bias.
      mlp_bias: gate, up and down have a bias.
      tie_word_embeddings: logits are taken with the embedding matrix.
      initializer_range: standard deviation of fresh weights.
      rope: the rotary embedding.
      bos_token_id: first token of an otherwise empty prompt, if any.
      eos_token_id: ids that end a sequence; may be empty.
      pad_token_id: id that fills rows after their end, if any (else 0).

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

    def _token_problems(self) -> Iterator[str]:
        single = {"bos_token_id": self.bos_token_id, "pad_token_id": self.pad_token_id}
        for name, value in single.items():
            if value is not None and not is_integer(value, at_least=0):
                yield f"{name} is {value!r}, want null or an integer >= 0"
        good = isinstance(self.eos_token_id, tuple)
        if not good or not all(is_integer(i, at_least=0) for i in self.eos_token_id):
            got = self.eos_token_id
            yield f"eos_token_id is {got!r}, want a tuple of integers >= 0"


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The one list of weights: Hugging Face's tensor name -> shape, [out, in] matrices.

    Everything else (initial values, loading, saving, sharding) derives from it, and the
    parameter tree is these names split at the dots.
    """
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    n = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (n, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, n)}
    mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (v, d)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        blocks = [
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlp, config.mlp_bias),
        ]
        for block, matrices, bias in blocks:
            for name, shape in matrices.items():
                shapes[f"{prefix}.{block}.{name}.weight"] = shape
                if bias:
                    shapes[f"{prefix}.{block}.{name}.bias"] = shape[:1]
        shapes[f"{prefix}.input_layernorm.weight"] = (d,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (v, d)
    return shapes
