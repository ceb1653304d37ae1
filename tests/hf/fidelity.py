"""Small random models of `transformers`, and the same models as ours."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from toolkit.hf.import_weights import ImportPlan
from toolkit.hf.loading import quiet_transformers
from toolkit.hf.read_config import HFModel, read_hf_config
from toolkit.hf.weights import HFWeights
from toolkit.models.transformer import Transformer


class Pair(NamedTuple):
    """One model, twice."""

    theirs: PreTrainedModel
    ours: Transformer
    read: HFModel
    folder: Path


def their_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """A config of 9 query and 3 key/value heads, unless `fields` say otherwise."""
    common = {
        "vocab_size": 101,
        "hidden_size": 36,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with quiet_transformers():
        return CONFIG_MAPPING[model_type](**common | fields)


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Weights large enough that every part matters, none at its trivial initial value."""
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def pair(config: PreTrainedConfig, folder: Path) -> Pair:
    """A random model saved in `folder`, and what is read there."""
    theirs = random_model(config)
    theirs.save_pretrained(folder)
    read = read_hf_config(folder)
    training = read.config
    if training.moe is not None:
        # Their loss has no terms for routers unless one asks for them.
        no_terms = {"load_balancing_multiplier": 0.0, "router_z_loss_multiplier": 0.0}
        training = training.replace(moe=training.moe.replace(**no_terms))
    ours = Transformer(training)
    ours.load_state_dict(tensors_of(read, folder))
    return Pair(theirs, ours, read, folder)


def tensors_of(read: HFModel, folder: Path) -> dict[str, Tensor]:
    """Our tensors from the weight files of `folder`."""
    return dict(ImportPlan(read.family, read.config, HFWeights(folder)).tensors())
