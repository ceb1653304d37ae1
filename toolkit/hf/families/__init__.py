"""The architectures of `transformers` that we read and write. A new one: a file here and its name
in `FAMILIES`."""

from toolkit.hf.families import glm, gpt, llama
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
    gpt.GPT2,
    gpt.GPT_NEOX,
    llama.MIXTRAL,
    llama.QWEN3_MOE,
    llama.OLMOE,
    glm.GLM4_MOE,
)
"""Where several can hold a model, the first is chosen."""
