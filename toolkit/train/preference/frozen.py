"""A model that is not trained, beside the one that is: a reference, or a teacher.

It is read from a checkpoint and cut like the model in training: over tensor- and context-parallel
ranks, and by FSDP2. Without FSDP2 each rank holds it whole, in the compute type.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from toolkit.checkpoint.find import find_checkpoint, find_remote_checkpoint
from toolkit.checkpoint.folder import MODEL_PREFIX, read_metadata
from toolkit.checkpoint.load import load_weights
from toolkit.distributed.devices import compute_dtype
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.materialize import materialize_frozen
from toolkit.distributed.shards import stored_tensor
from toolkit.errors import CheckpointError
from toolkit.models.config import ModelConfig
from toolkit.models.init import canonical_parameters
from toolkit.storage.foreign import guard
from toolkit.storage.remote import is_url
from toolkit.train.progress import no_checkpoint


def newest_checkpoint(path: str, environment: TrainingEnvironment, *, key: str) -> Path | str:
    """The newest whole checkpoint of a run, folder or URL, which `key` of the config names; every
    rank calls it. Raises CheckpointError: there is none."""
    place: Any = {"rank": environment.rank, "group": environment.cpu_group}
    found: Path | str | None
    if is_url(path):
        found = find_remote_checkpoint(path, **place).checkpoint
    else:
        found = find_checkpoint(Path(path).expanduser(), **place).checkpoint
    if found is None:
        raise CheckpointError(no_checkpoint(path, key))
    return found


def load_frozen(
    checkpoint: Path | str,
    environment: TrainingEnvironment,
    *,
    prepare: Callable[[Any], None] = lambda model: None,
) -> "FrozenModel":
    """The model of `checkpoint`; every rank calls it. `prepare` is given the model before it is cut
    and has storage."""
    with guard(str(checkpoint), CheckpointError):
        config = msgspec.convert(read_metadata(checkpoint).extra["model"], ModelConfig)
    model = config.build(init_device="meta")
    model.requires_grad_(False)
    prepare(model)
    shards = materialize_frozen(model, environment)
    tensors = {
        f"{MODEL_PREFIX}{name}": stored_tensor(parameter.detach(), shards[name])
        for name, parameter in canonical_parameters(model).items()
    }
    load_weights(checkpoint, tensors, environment.cpu_group)
    dtype = compute_dtype(environment.layout.precision)
    if dtype is not None and not environment.layout.is_fsdp:
        model.to(dtype)  # FSDP2 gathers in this type
    return FrozenModel(model.eval())


class FrozenModel:
    """Call it like a model; without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @torch.no_grad()
    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.model(*inputs, **options)

    def free(self) -> None:
        """Give back what FSDP2 has gathered for the last forward, which no backward will free."""
        if hasattr(self.model, "reshard"):
            for module in self.model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
