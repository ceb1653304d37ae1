"""Which parameters are trained: what `parameters.py` says of a config, done to its model."""

from collections.abc import Sequence

from torch import nn

from toolkit.models.init import canonical_parameters
from toolkit.models.lora import apply_lora
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import TrainedParameters, adapted_layers, trained_parameters
from toolkit.models.transformer import Transformer


def choose_trained(
    model: Transformer | nn.Module, *, freeze: Sequence[str] = (), lora: LoRAConfig | None = None
) -> TrainedParameters:
    """Add adapters to a model on the meta device, and freeze what is not trained; in place.

    Args:
        freeze: shell-style patterns over parameter names, the adapters' among them.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    assert isinstance(model, Transformer), "names are told from a Transformer's config"
    chosen = trained_parameters(model.config, freeze=freeze, lora=lora)
    frozen = {n for n, p in canonical_parameters(model).items() if not p.requires_grad}
    if lora is not None:
        apply_lora(model, lora, adapted_layers(model.config, lora))
    parameters = canonical_parameters(model)
    told = {name: info.shape for name, info in chosen.infos.items()}
    assert {name: tuple(p.shape) for name, p in parameters.items()} == told, "parameters mismatch"
    for name in frozen:  # by the caller, who may know a model of his own better
        chosen.infos[name] = chosen.infos[name]._replace(is_trained=False)
    for name, parameter in parameters.items():
        parameter.requires_grad_(chosen.infos[name].is_trained)
    return chosen
