"""The architectures of `transformers` that we read and write. A new one: a file here and its name
in `FAMILIES`."""

from toolkit.hf.families.gpt2 import GPT2
from toolkit.hf.families.llama import LLAMA
from toolkit.hf.families.olmo2 import OLMO2
from toolkit.hf.family import Family

FAMILIES: tuple[Family, ...] = (GPT2, LLAMA, OLMO2)
"""Where several can hold a model, the first is chosen."""
