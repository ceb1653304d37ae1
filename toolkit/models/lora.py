"""Low-rank adapters on a Transformer's linear layers, through `peft`.

peft puts its own module around each adapted layer. Names stay canonical all the same
(`init.canonical_name`): the weight of `blocks.0.attention.query` keeps its name, the adapter's are
`blocks.0.attention.query.lora_A.weight` and `....lora_B.weight`.
"""

import fnmatch
import re

from torch import nn

from toolkit.errors import ConfigError
from toolkit.models.init import canonical_parameters, is_adapter
from toolkit.models.lora_config import LoRAConfig

_WHERE = "train_module.lora"


def apply_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Give the layers of `model` that `config` names their adapters, on the meta device; in place.

    Nothing else is trained afterwards, but for what `train_also` names.

    Raises:
        ConfigError: a pattern matches no linear layer (no parameter, for `train_also`), or stacked
            weights of experts, which take no adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = "|".join(re.escape(name) for name in _target_names(model, config))
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] # a fraction serves as well
        lora_dropout=0.0,
        target_modules=names,
    )
    inject_adapter_in_model(settings, model, low_cpu_mem_usage=True)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # Inputs come in the compute type, and autocast casts the weights: peft would widen the
            # input to the type of the master weights first, for nothing.
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    parameters = canonical_parameters(model)
    for pattern in config.train_also:
        hits = [n for n in parameters if fnmatch.fnmatchcase(n, pattern) and not is_adapter(n)]
        if not hits:
            raise ConfigError(f"{_WHERE}.train_also: {pattern!r} matches no parameter")
        for name in hits:
            parameters[name].requires_grad_(True)


def is_trained(name: str, config: LoRAConfig) -> bool:
    """Whether the parameter is one that the base's checkpoint does not hold as it is: of an
    adapter, or named by `train_also`."""
    return is_adapter(name) or any(fnmatch.fnmatchcase(name, p) for p in config.train_also)


def _target_names(model: nn.Module, config: LoRAConfig) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    stacked = [name for name, p in model.named_parameters() if p.dim() > 2]
    chosen: set[str] = set()
    for pattern in config.target_modules:
        where = f"{_WHERE}.target_modules: {pattern!r}"
        for name in stacked:
            if fnmatch.fnmatchcase(name, pattern):
                raise ConfigError(
                    f"{where} matches {name}, stacked weights of experts, which take no adapter; "
                    "name linear layers only, such as *.attention.*"
                )
        hits = fnmatch.filter(linear, pattern)
        if not hits:
            raise ConfigError(f"{where} matches no linear layer{_examples(model, pattern, linear)}")
        chosen.update(hits)
    return [name for name in linear if name in chosen]


def _examples(model: nn.Module, pattern: str, linear: list[str]) -> str:
    others = {name.rpartition(".")[0]: name for name, _ in model.named_parameters()}
    for module, parameter in others.items():
        if fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(parameter, pattern):
            return f" ({parameter} is none; train_module.lora.train_also trains it whole)"
    return f" (names look like {', '.join(linear[:2])})"
