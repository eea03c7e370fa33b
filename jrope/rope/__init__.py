"""Rotary position embeddings: positions to cos and sin, and the rotation.

`Rope` is the whole description of a rotary embedding, `table` turns positions into cos
and sin, `rotate` applies them.  Every method of stretching the context is a small class
in `methods`.  Nothing here knows a model.

Two knobs, never mixed: `condense` divides positions (LongChat, SuperHOT, FastChat),
`scaling` changes frequencies (everything else).

Two precisions, because they exclude each other at long positions (9e-3 apart at 128k):

- "parity": what transformers computes, within 1 ulp: float32 frequencies, a float32
  product with the position, cos and sin cast to the activations' dtype before rotating.
- "accurate": float64 frequencies as 48-bit fractions of a turn; the phase is integer
  arithmetic modulo one turn, exact at any position; the rotation is float32, cast once.

Three rules for the length that dynamic NTK, dynamic YaRN and longrope depend on:

- "planned": the sequence's planned total, fixed for a run: one table, rotated keys are
  cached, decoding equals a full pass.
- "growing": the query at position t sees every key rotated for length t + 1, whether
  decoded or in a full pass; keys are cached as they are and rotated in each step.
- "hf": transformers' own: the largest position of the whole batch + 1, with a memory,
  and cached keys keep the rotation of the step that wrote them.  History counts there.

Source: RoPE, Su et al. 2021 (arXiv:2104.09864), eq. 34.
"""

from jrope.rope.embedding import Layout as Layout
from jrope.rope.embedding import Lengths as Lengths
from jrope.rope.embedding import Precision as Precision
from jrope.rope.embedding import Rope as Rope
from jrope.rope.embedding import table as table
from jrope.rope.frequencies import base_frequencies as base_frequencies
from jrope.rope.frequencies import ntk_theta as ntk_theta
from jrope.rope.methods import ROPE_TYPES as ROPE_TYPES
from jrope.rope.methods import DynamicNTK as DynamicNTK
from jrope.rope.methods import DynamicYarn as DynamicYarn
from jrope.rope.methods import Linear as Linear
from jrope.rope.methods import Llama3 as Llama3
from jrope.rope.methods import LongRope as LongRope
from jrope.rope.methods import Method as Method
from jrope.rope.methods import NTKAware as NTKAware
from jrope.rope.methods import Proportional as Proportional
from jrope.rope.methods import Yarn as Yarn
from jrope.rope.names import ALIASES as ALIASES
from jrope.rope.names import build as build
from jrope.rope.names import describe as describe
from jrope.rope.rotation import half_to_interleaved as half_to_interleaved
from jrope.rope.rotation import interleaved_to_half as interleaved_to_half
from jrope.rope.rotation import rotate as rotate
