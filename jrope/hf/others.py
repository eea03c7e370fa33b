"""Why a model_type that is no family of ours is refused: its name, one line each."""

from jrope.errors import did_you_mean
from jrope.hf.families import FAMILIES

_EXPERTS = "a mixture of experts"
_WRAPPED = "text beside images or sound"

_WHY: dict[str, str] = {
    "mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe phimoe olmoe granitemoe "
    "granitemoeshared granitemoehybrid deepseek_v2 deepseek_v3 dbrx gpt_oss glm4_moe "
    "ernie4_5_moe hunyuan_v1_moe exaone_moe flex_olmo minimax minimax_m2 jetmoe "
    "llama4_text afmoe dots1": _EXPERTS,
    "llama4": f"{_EXPERTS}, {_WRAPPED}",
    "gemma3 gemma3n mistral3 mllama llava paligemma qwen2_vl qwen2_5_vl qwen3_vl "
    "phi4_multimodal cohere2_vision glm4v idefics3 smolvlm": f"{_WRAPPED}: save its "
    "language model by itself",
    "cohere cohere2": "LayerNorm without biases and blocks side by side",
    "stablelm": "LayerNorm with biases and, in part, blocks side by side",
    "glm glm4": "pairs of neighbouring channels, partly rotated",
    "helium ernie4_5": "pairs of neighbouring channels",
    "hunyuan_v1_dense": "a norm of queries and keys after the rotation",
    "exaone4": "rotated windowed layers beside full ones that are not",
    "ministral3": "queries scaled by their position",
    "arcee nemotron apertus nanochat": "an MLP without a gate",
    "olmo": "LayerNorm without weights",
    "bitnet": "weights of three values",
    "gpt2 gpt_neo gpt_neox gptj bloom mpt opt phi falcon starcoder2": "LayerNorm, and "
    "an MLP without a gate",
    "falcon_mamba mamba mamba2 rwkv jamba bamba zamba zamba2 recurrent_gemma falcon_h1 "
    "lfm2 olmo_hybrid": "layers without attention",
    "minicpm3": "keys and values through a narrow projection",
    "internlm2 baichuan chatglm qwen": "remote code only",
}
_REASONS = {name: why for names, why in _WHY.items() for name in names.split()}


def refusal(model_type: object) -> str:
    """What to say of a model_type that is not in `FAMILIES`."""
    known = ", ".join(FAMILIES)
    why = _REASONS.get(str(model_type))
    if why is not None:
        return f"model_type is {model_type!r} ({why}), which is not supported: {known}"
    hint = did_you_mean(str(model_type), FAMILIES)
    return f"model_type is {model_type!r}{hint}, want one of {known}"
