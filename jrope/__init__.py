"""LLaMA in JAX and Flax, with every RoPE extension as PyTorch computes it.

Pure functions of (params, tokens, positions, cache); parameters under Hugging Face's
names.  One letter key for dimensions, here, in einsums and in docstrings:

    B batch              T new tokens        S cache slots       L layers
    D hidden_size        N query heads       K key/value heads   G = N / K
    H head_dim           R rotary pairs      F intermediate_size V vocab_size
"""

from jrope import hf as hf
from jrope import parity as parity
from jrope import rope as rope
from jrope.batch.files import run_batch as run_batch
from jrope.batch.rows import BatchSettings as BatchSettings
from jrope.errors import JropeError as JropeError
from jrope.generation.ahead import compile_ahead as compile_ahead
from jrope.generation.guesser import Draft as Draft
from jrope.generation.guesser import PromptLookup as PromptLookup
from jrope.generation.run import Generation as Generation
from jrope.generation.run import generate as generate
from jrope.generation.run import stream as stream
from jrope.generation.sample import Sampler as Sampler
from jrope.hf.checkpoint import load as load
from jrope.hf.checkpoint import load_shapes as load_shapes
from jrope.hf.checkpoint import save as save
from jrope.model.cache import KVCache as KVCache
from jrope.model.config import LlamaConfig as LlamaConfig
from jrope.model.llama import Llama as Llama
from jrope.model.llama import forward as forward
from jrope.model.llama import hidden_states as hidden_states
from jrope.model.llama import init_params as init_params
from jrope.model.placed import shard as shard
from jrope.model.scores import score as score
from jrope.model.with_rope import with_rope as with_rope
from jrope.rope import Rope as Rope
from jrope.sharding.axes import Axes as Axes
from jrope.sharding.group import Processes as Processes
from jrope.sharding.meshes import mesh as mesh
from jrope.sharding.processes import processes as processes
from jrope.weights.int8 import dequantize as dequantize
from jrope.weights.int8 import quantize as quantize

__version__ = "0.1.0"
