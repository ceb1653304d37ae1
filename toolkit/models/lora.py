"""Adapters and frozen parameters: what `parameters.py` says of a config, done to its model.

`peft` puts a module of its own around each adapted layer. Names stay canonical all the same
(`init.canonical_name`): the weight of `blocks.0.attention.query` keeps its name, the adapter's are
`blocks.0.attention.query.lora_A.weight` and `....lora_B.weight`.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from toolkit.models.config import LoRAConfig
from toolkit.models.init import canonical_parameters
from toolkit.models.parameters import TrainedParameters, adapted_layers, trained_parameters
from toolkit.models.transformer import Transformer


def choose_trained(
    model: Transformer | nn.Module, *, freeze: Sequence[str] = (), lora: LoRAConfig | None = None
) -> TrainedParameters:
    """Add adapters to a model on the meta device, and freeze what is not trained, in place; see
    `trained_parameters`."""
    assert isinstance(model, Transformer), "names are told from a Transformer's config"
    chosen = trained_parameters(model.config, freeze=freeze, lora=lora)
    frozen = {n for n, p in canonical_parameters(model).items() if not p.requires_grad}
    if lora is not None:
        _add_adapters(model, lora, adapted_layers(model.config, lora))
    parameters = canonical_parameters(model)
    told = {name: info.shape for name, info in chosen.infos.items()}
    assert {name: tuple(p.shape) for name, p in parameters.items()} == told, "parameters mismatch"
    for name in frozen:  # by the caller, who may know a model of his own better
        chosen.infos[name] = chosen.infos[name]._replace(is_trained=False)
    for name, parameter in parameters.items():
        parameter.requires_grad_(chosen.infos[name].is_trained)
    return chosen


def _add_adapters(model: nn.Module, config: LoRAConfig, layers: Sequence[str]) -> None:
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


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it does without its adapters; what is trained, and whether a
    parameter needs a gradient, stays."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
