"""Largest gradients and weights of layers, and sizes of activations."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from toolkit.metrics.norms import layer_of
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config_monitors import StatisticsMonitorConfig


class StatisticsMonitor(Callback):
    """`gradient_max/<layer>`, `weight_max/<layer>`: largest absolute values; with `activations`
    `activation_rms/<block>` and `activation_max/<block>` of what blocks put out, over all tokens of
    the global batch. Gradients are those before clipping."""

    def __init__(self, config: StatisticsMonitorConfig) -> None:
        self._config = config
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._undo: list[Callable[[], None]] = []

    def pre_step(self) -> None:
        if not self._is_due() or not self._config.activations:
            return
        self._sums = {name: [] for name in self.state.train_module.blocks}
        for name, block in self.state.train_module.blocks.items():
            if block is not None:
                self._undo.append(_watch(block, self._sums[name].append))

    def pre_optim_step(self) -> None:
        while self._undo:
            self._undo.pop()()
        if not self._is_due():
            return
        module = self.state.train_module
        gradients, weights = module.shards()
        layers = list(dict.fromkeys(map(layer_of, module.parameter_names)))
        values = _largest("gradient_max", layers, gradients)
        values |= _largest("weight_max", layers, weights)
        reductions = dict.fromkeys(values, "max")
        if self._sums:
            found, largest = self._activations()
            values |= found | largest
            reductions |= dict.fromkeys(largest, "max")
        self.state.record("network", values, reductions)

    def _is_due(self) -> bool:
        return self.state.step % self._config.interval == 0 or self.state.step == 1

    def _activations(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Root mean squares, the same on every rank, and largest values of this one."""
        device = self.state.environment.device
        rows = [
            torch.stack(parts) if parts else torch.zeros(1, 3, device=device)
            for parts in self._sums.values()
        ]
        sums = torch.stack([row[:, :2].sum(0) for row in rows])
        if self.state.environment.world_size > 1:
            dist.all_reduce(sums)
        rms = (sums[:, 0] / sums[:, 1]).sqrt()
        largest = torch.stack([row[:, 2].max() for row in rows])
        return (
            {f"activation_rms/{n}": v for n, v in zip(self._sums, rms.unbind(), strict=True)},
            {f"activation_max/{n}": v for n, v in zip(self._sums, largest.unbind(), strict=True)},
        )


def _largest(
    kind: str, layers: list[str], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The largest absolute value in each layer of what this rank has; 0 where that is nothing."""
    found: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    named = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    norms = torch._foreach_norm(list(named.values()), float("inf")) if named else []
    for name, norm in zip(named, norms, strict=True):
        found[layer_of(name)].append(norm.float())
    return {
        f"{kind}/{layer}": torch.stack(parts).max() if parts else torch.zeros(())
        for layer, parts in found.items()
    }


def _watch(block: nn.Module, add: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
    """Have `add` called with (sum of squares, number, largest) of each output of `block`; what ends
    it."""

    def measure(output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach().float()
        number = torch.full_like(hidden[..., :1].sum(), hidden.numel())
        add(torch.stack((hidden.square().sum(), number, hidden.abs().max())))

    compiled: Any = block._compiled_call_impl
    if compiled is None:
        return block.register_forward_hook(lambda _, inputs, output: measure(output)).remove

    # Compiled code does not look for hooks that come later.
    def watched(*args: Any, **kwargs: Any) -> Any:
        output = compiled(*args, **kwargs)
        measure(output)
        return output

    block._compiled_call_impl = watched

    def undo() -> None:
        block._compiled_call_impl = compiled

    return undo
