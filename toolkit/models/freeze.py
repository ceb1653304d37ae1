"""Which parameters are trained, and what that leaves to compute."""

import fnmatch
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from toolkit.errors import ConfigError
from toolkit.models.config import TransformerConfig
from toolkit.models.counts import attended_keys
from toolkit.models.init import canonical_parameters, is_adapter
from toolkit.models.lora import apply_lora
from toolkit.models.lora_config import LoRAConfig

_WHERE = "train_module.freeze"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


class ParameterInfo(NamedTuple):
    """One parameter before it is sharded."""

    shape: torch.Size
    is_trained: bool


class TrainedParameters(NamedTuple):
    """All parameters of a model by canonical name, its adapters among them."""

    infos: dict[str, ParameterInfo]

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(info.shape.numel() for info in self.infos.values())

    @property
    def num_trained(self) -> int:
        """Of these, the ones that training changes."""
        return sum(info.shape.numel() for info in self.infos.values() if info.is_trained)

    def __str__(self) -> str:
        trained, total = self.num_trained, self.num_parameters
        return f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2g}%)"


def choose_trained(
    model: nn.Module, *, freeze: Sequence[str] = (), lora: LoRAConfig | None = None
) -> TrainedParameters:
    """Add adapters to a model on the meta device, and freeze what is not trained; in place.

    Args:
        freeze: shell-style patterns over parameter names, the adapters' among them.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    if lora is not None:
        apply_lora(model, lora)
    parameters = canonical_parameters(model)
    for pattern in freeze:
        hits = fnmatch.filter(parameters, pattern)
        if not hits:
            examples = ", ".join(list(parameters)[:3])
            raise ConfigError(
                f"{_WHERE}: {pattern!r} matches no parameter (names look like {examples})"
            )
        for name in hits:
            parameters[name].requires_grad_(False)
    chosen = trained_parameters(model)
    if not chosen.num_trained:
        raise ConfigError(f"{_WHERE}: {', '.join(freeze)} leaves no parameter to train")
    return chosen


def trained_parameters(model: nn.Module) -> TrainedParameters:
    """What the parameters of a model that is not sharded say themselves."""
    parameters = canonical_parameters(model)
    return TrainedParameters(
        {name: ParameterInfo(p.shape, p.requires_grad) for name, p in parameters.items()}
    )


def flops_per_token(
    config: TransformerConfig, parameters: TrainedParameters, sequence_length: int
) -> int:
    """Model FLOPs to train one token with a model some of whose parameters may be frozen.

    `counts.flops_per_token` of the config, in which a weight of a matrix takes 6 (forward,
    gradient of the input, gradient of the weight: 2 each), and

    - 2 less for each frozen weight, which needs no gradient of its own;
    - in blocks below the lowest trained parameter, where backward never comes: another 2 less for
      each weight, and of attention the forward third alone;
    - 6 more for each weight of an adapter (4 where it is frozen).

    The block of the lowest trained parameter counts whole; of experts, the share that a token uses.
    """
    total, infos = config.flops_per_token(sequence_length), parameters.infos
    trained = {name for name, info in infos.items() if info.is_trained}
    lowest = min((_first_block(name, config.num_layers) for name in trained), default=0)
    head = "embeddings.tokens.weight" if config.tie_embeddings else "head.weight"
    if head not in trained or trained == {"head.weight"}:
        total -= 2 * config.vocab_size * config.d_model
    for name, info in infos.items():
        block = _BLOCK.match(name)
        if block is None or len(info.shape) < 2:
            continue
        used = info.shape.numel()
        if len(info.shape) == 3 and config.moe is not None:
            used = used * config.moe.top_k // config.moe.num_experts
        if is_adapter(name):
            total += 6 * used
        if not info.is_trained:
            total -= 2 * used
        if int(block[1]) < lowest:
            total -= 2 * used
    width = config.num_heads * config.attention_head_dim
    keys = sum(attended_keys(config, layer, sequence_length) for layer in range(lowest))
    return total - 8 * width * keys // sequence_length


def _first_block(name: str, num_layers: int) -> int:
    """The first block through which backward comes for the sake of this parameter."""
    block = _BLOCK.match(name)
    if block is not None:
        return int(block[1])
    return 0 if name.startswith("embeddings.") else num_layers
