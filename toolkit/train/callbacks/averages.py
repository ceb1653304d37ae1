"""Running means of the trained weights, on the shards that each rank holds.

The tensors are twins of the weights (`twin_tensor`), whatever engine holds them: torch's tensors,
FSDP2's shards, DeepSpeed's flat fp32 partitions. Updates are a few kernels over all of them.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch

from toolkit.checkpoint.folder import MODEL_PREFIX
from toolkit.distributed.shards import memory_of, twin_tensor
from toolkit.train.module import TrainModule


def trained_weights(module: TrainModule) -> dict[str, torch.Tensor]:
    """This rank's part of each trained weight by canonical name, as checkpoints know it."""
    names = module.trained_names
    tensors = (
        (key.removeprefix(MODEL_PREFIX), tensor)
        for key, tensor in module.state_tensors().items()
        if key.startswith(MODEL_PREFIX) and tensor.is_floating_point()
    )
    return {name: tensor for name, tensor in tensors if names is None or name in names}


class Average:
    """One mean of the trained weights of `module`."""

    def __init__(self, module: TrainModule) -> None:
        self._module = module
        self.tensors: Mapping[str, torch.Tensor] = {
            name: twin_tensor(weight) for name, weight in trained_weights(module).items()
        }
        """By canonical name; not filled yet."""
        self._memory = [memory_of(tensor) for tensor in self.tensors.values()]
        self._live: list[torch.Tensor] | None = None

    @torch.no_grad()
    def copy(self, *, without: frozenset[str] = frozenset()) -> None:
        """Take the values of the weights, of all but those named."""
        weights = trained_weights(self._module)
        for name, tensor in self.tensors.items():
            if name not in without:
                memory_of(tensor).copy_(memory_of(weights[name]))

    @torch.no_grad()
    def update(self, share: float) -> None:
        """Move towards the weights: average += share * (weights - average). After a step: FSDP2 may
        move its shards in the first forward."""
        if self._live is None:
            self._live = self._live_memory()
        if self._memory:
            torch._foreach_lerp_(self._memory, self._live, share)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the model has the average as its weights. The two change places, tensor by
        tensor, so that no third copy is needed."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(self._memory, self._live_memory(), strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)
        self._module.state_filled()

    def _live_memory(self) -> list[torch.Tensor]:
        weights = trained_weights(self._module)
        return [memory_of(weights[name]) for name in self.tensors]
