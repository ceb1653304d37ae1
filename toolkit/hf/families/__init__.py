"""The architectures of `transformers` that we read and write. A new one: a file here and its name
in `FAMILIES`."""

from toolkit.hf.families.gemma2 import GEMMA2
from toolkit.hf.families.gemma3_text import GEMMA3_TEXT
from toolkit.hf.families.gpt2 import GPT2
from toolkit.hf.families.gpt_neox import GPT_NEOX
from toolkit.hf.families.llama import LLAMA
from toolkit.hf.families.mistral import MISTRAL
from toolkit.hf.families.mixtral import MIXTRAL
from toolkit.hf.families.olmo2 import OLMO2
from toolkit.hf.families.olmo3 import OLMO3
from toolkit.hf.families.olmoe import OLMOE
from toolkit.hf.families.phi3 import PHI3
from toolkit.hf.families.qwen2 import QWEN2
from toolkit.hf.families.qwen3 import QWEN3
from toolkit.hf.families.qwen3_moe import QWEN3_MOE
from toolkit.hf.family import Family

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    OLMO3,
    GEMMA2,
    GEMMA3_TEXT,
    PHI3,
    GPT2,
    GPT_NEOX,
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
)
"""Where several can hold a model, the first is chosen."""
