"""The architectures of `transformers` that we read and write. A new one: a file here and its name
in `FAMILIES`."""

from toolkit.hf.families import glm, gpt, hybrid, layer_normed, llama, llama_kin
from toolkit.hf.family import Family

FAMILIES: tuple[Family, ...] = (
    llama.LLAMA,
    llama.MISTRAL,
    llama.QWEN2,
    llama.QWEN3,
    llama.OLMO2,
    llama.OLMO3,
    llama.GEMMA2,
    llama.GEMMA3_TEXT,
    llama.PHI3,
    llama_kin.SMOLLM3,
    llama_kin.GRANITE,
    llama_kin.SEED_OSS,
    llama_kin.EXAONE4,
    llama_kin.GLM,
    llama_kin.GLM4,
    layer_normed.OLMO,
    layer_normed.STABLELM,
    layer_normed.COHERE,
    layer_normed.COHERE2,
    gpt.GPT2,
    gpt.GPT_NEOX,
    gpt.STARCODER2,
    llama.MIXTRAL,
    llama.QWEN3_MOE,
    llama.OLMOE,
    hybrid.OLMO_HYBRID,
    hybrid.QWEN3_5_TEXT,
    glm.GLM4_MOE,
)
"""Where several can hold a model, the first is chosen."""
