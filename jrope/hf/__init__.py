"""Hugging Face's folders: config.json, tensor names, safetensors; both ways."""

from jrope.hf.config import config_from_hf as config_from_hf
from jrope.hf.config import config_to_hf as config_to_hf
from jrope.hf.config import token_ids as token_ids
from jrope.hf.rope import rope_from_hf as rope_from_hf
from jrope.hf.rope import rope_to_hf as rope_to_hf
