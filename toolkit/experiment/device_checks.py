"""What of a config the device of this process cannot do: asked once torch is there, and before the
run folder is."""

import torch

from toolkit.distributed.devices import usable_gpus
from toolkit.distributed.environment import settle_precision
from toolkit.distributed.float8 import check_float8_on
from toolkit.distributed.layout import Layout
from toolkit.errors import ErrorList
from toolkit.experiment.config import ExperimentConfig
from toolkit.train.callbacks.config_monitors import check_profiler_device


def check_device(config: ExperimentConfig, layout: Layout) -> None:
    """Raises ConfigError: 8-bit products or a memory snapshot on a device without them, or a
    precision that does not go with them."""
    device, found = torch.device("cuda" if usable_gpus() else "cpu"), ErrorList()
    if (float8 := config.train_module.float8_config) is not None:
        precision = settle_precision(layout, device).precision
        found.ask(check_float8_on, float8, device=device, precision=precision)
    found.ask(check_profiler_device, config.trainer.callbacks.profiler, device.type)
    found.raise_any()
