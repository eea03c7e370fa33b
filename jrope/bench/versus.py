"""transformers beside jrope: the same weights, in the same memory, on the same device.

The arrays are lent to PyTorch through DLPack, so that no second copy of the model is
needed.  Decoding is timed inside transformers' own `generate`, from its first new token
to its last.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jrope.errors import JropeError, check
from jrope.generation.sample import Sampler
from jrope.hf import config_to_hf
from jrope.model.config import LlamaConfig
from jrope.tree import Params, flatten

EAGER, COMPILED = "transformers", "transformers, compiled"


def import_peers() -> tuple[Any, Any]:
    """The torch and transformers modules.

    Raises:
      JropeError: one is not installed.
    """
    found: list[Any] = []
    for name in ("torch", "transformers"):
        try:
            found.append(importlib.import_module(name))
        except ImportError as error:
            hint = "pip install torch transformers"
            raise JropeError(
                f"--versus transformers needs {name} ({error}): {hint}"
            ) from None
    return found[0], found[1]


def torch_device(torch: Any) -> str:
    """Where torch runs beside jrope: "cuda" or "cpu".

    Raises:
      JropeError: torch does not see the GPU that JAX has.
    """
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        raise JropeError("--versus: JAX runs on a GPU that torch does not see")
    return "cuda" if gpu else "cpu"


class Peer:
    """A LlamaForCausalLM over jrope's own arrays, with sdpa attention.

    Args:
      params: the plain parameter tree; must stay as it is while the peer lives.
      config: the model.
    """

    def __init__(self, params: Params, config: LlamaConfig) -> None:
        kind, wanted = config.model_type, "'llama', whose class runs over these arrays"
        check(kind == "llama", "--versus: model_type", kind, wanted)
        self.torch, self.transformers = import_peers()
        self.config = config
        self.criteria = self.transformers.StoppingCriteriaList
        self.device = torch_device(self.torch)
        self.modes = (EAGER, COMPILED) if self.device == "cuda" else (EAGER,)
        self.model = self._build(flatten(params))

    def prefill(self, batch: int, context: int) -> Callable[[], float]:
        """A function that runs one prompt and returns its seconds."""
        ids = self._prompt(batch, context)

        def run() -> float:
            with self.torch.inference_mode():
                begin = self._now()
                out = self.model(ids, use_cache=True, logits_to_keep=1)
                end = self._now()
            del out
            return end - begin

        return run

    def decode(
        self, batch: int, context: int, new: int, sampler: Sampler, mode: str
    ) -> Callable[[], float]:
        """A function that generates, and returns the seconds per token after the first.

        Args:
          batch, context: of the prompt; rows have equal lengths.
          new: tokens after the first.
          sampler: greedy, or temperature and top-p.
          mode: one of `modes`.
        """
        ids, options = self._prompt(batch, context), _options(sampler)
        if mode == COMPILED:
            options["cache_implementation"] = "static"
        settings = self.transformers.GenerationConfig(
            max_new_tokens=new + 1, pad_token_id=0, eos_token_id=None, **options
        )
        mask = self.torch.ones_like(ids)

        def run() -> float:
            clock = _Clock(self, batch, new + 1)
            self.model.generate(
                ids,
                attention_mask=mask,
                generation_config=settings,
                stopping_criteria=self.criteria([clock]),
            )
            return (clock.end - clock.begin) / new

        return run

    def free(self) -> None:
        """Forget static caches and compiled code, and give the pools' memory back."""
        for name in ("_cache", "_previous_max_cache_length"):
            vars(self.model).pop(name, None)  # later caches would be as long
        if self.device == "cuda":
            self.torch.compiler.reset()
            self.torch.cuda.empty_cache()

    def _build(self, flat: Mapping[str, jax.Array]) -> Any:
        dtype = str(flat["model.embed_tokens.weight"].dtype)
        words = {**config_to_hf(self.config, dtype=dtype), "eos_token_id": None}
        torch = self.torch
        settings: Any = self.transformers.LlamaConfig(**words)
        settings._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = self.transformers.LlamaForCausalLM(settings)
        state = {name: torch.from_dlpack(array) for name, array in flat.items()}
        if self.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, assign=True)
        rotary = type(model.model.rotary_emb)
        with torch.device(self.device):
            model.model.rotary_emb = rotary(settings)
        return model.eval().requires_grad_(False)

    def _prompt(self, batch: int, context: int) -> Any:
        random = np.random.default_rng(1)
        ids = random.integers(0, self.config.vocab_size, (batch, context))
        return self.torch.tensor(ids, device=self.device)

    def _now(self) -> float:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()


class _Clock:
    """A stopping criterion that never stops: it looks at the first and last token."""

    def __init__(self, peer: Peer, batch: int, last: int) -> None:
        self.peer, self.last, self.count = peer, last, 0
        self.begin = self.end = 0.0
        self.never = peer.torch.zeros(batch, dtype=peer.torch.bool, device=peer.device)

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.count += 1
        if self.count == 1:
            self.begin = self.peer._now()  # pyright: ignore[reportPrivateUsage]
        if self.count == self.last:
            self.end = self.peer._now()  # pyright: ignore[reportPrivateUsage]
        return self.never


def _options(sampler: Sampler) -> dict[str, Any]:
    if not sampler.temperature:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": float(np.asarray(sampler.temperature)),
        "top_p": float(np.asarray(sampler.top_p)),
        "top_k": 0,
    }
