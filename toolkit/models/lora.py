"""Low-rank adapters on a Transformer's linear layers, through `peft`.

peft puts its own module around each adapted layer. Names stay canonical all the same
(`init.canonical_name`): the weight of `blocks.0.attention.query` keeps its name, the adapter's are
`blocks.0.attention.query.lora_A.weight` and `....lora_B.weight`. Which layers and what else is
trained is told without a model (`parameters.py`).
"""

import fnmatch
import re
from collections.abc import Sequence

from torch import nn

from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import is_adapter


def apply_lora(model: nn.Module, config: LoRAConfig, layers: Sequence[str]) -> None:
    """Give the linear `layers` of `model` adapters, on the meta device; in place."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] # a fraction serves as well
        lora_dropout=0.0,
        target_modules="|".join(re.escape(name) for name in layers),
    )
    inject_adapter_in_model(settings, model, low_cpu_mem_usage=True)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # Inputs come in the compute type, and autocast casts the weights: peft would widen the
            # input to the type of the master weights first, for nothing.
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def is_trained(name: str, config: LoRAConfig) -> bool:
    """Whether the parameter is one that the base's checkpoint does not hold as it is: of an
    adapter, or named by `train_also`."""
    return is_adapter(name) or any(fnmatch.fnmatchcase(name, p) for p in config.train_also)
