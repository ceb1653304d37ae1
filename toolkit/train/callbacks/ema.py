"""Exponential moving averages of the weights."""

import logging
from collections.abc import Collection

import torch

from toolkit.errors import ConfigError
from toolkit.train.callbacks.averages import Average
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import TWO_AVERAGES, EMAConfig

log = logging.getLogger(__name__)


class EMA(Callback):
    """average = decay * average + (1 - decay) * weights, after each `interval` steps, one average
    per decay. (Polyak & Juditsky 1992; as used for language models by Karras et al. 2023, section
    3, and others.) A step that was skipped for a non-finite gradient counts like any other."""

    def __init__(self, config: EMAConfig) -> None:
        self._config = config
        self._averages: dict[str, Average] = {}
        self._found: dict[str, set[str]] = {}
        """Decay -> names that the checkpoint has filled."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        if not self._averages:
            module = self.state.train_module
            self._averages = {str(decay): Average(module) for decay in self._config.decays}
        return {
            f"{decay}.{name}": tensor
            for decay, average in self._averages.items()
            for name, tensor in average.tensors.items()
        }

    def state_filled(self, names: Collection[str]) -> None:
        for decay in self._averages:
            prefix = f"{decay}."
            own = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
            self._found[decay] = set(own)

    def pre_train(self) -> None:
        state, config = self.state, self._config
        if state.train_module.averages:
            raise ConfigError(TWO_AVERAGES, key="trainer.callbacks.ema.enabled")
        self.state_tensors()
        for decay, average in self._averages.items():
            found = self._found.get(decay, set()) if self._has_begun else set()
            average.copy(without=frozenset(found))
            if state.is_main and state.step and not found and self._has_begun:
                log.info("ema: the average of decay %s begins at step %d", decay, state.step)
        if config.evaluate == "instead":
            state.train_module.averages.append(next(iter(self._averages.values())).held)
            state.exported_weights = f"ema/{config.decays[0]}"
        elif config.evaluate == "also":
            held = (average.held for average in self._averages.values())
            state.also_evaluated |= zip(config.suffixes, held, strict=True)

    def post_step(self) -> None:
        step, config = self.state.step, self._config
        if step > config.start_step and step % config.interval:
            return
        for decay, average in zip(config.decays, self._averages.values(), strict=True):
            average.update(1.0 - decay if step > config.start_step else 1.0)

    @property
    def _has_begun(self) -> bool:
        return self.state.step >= self._config.start_step
