"""What of a config the device of this process cannot do: asked once torch is there, and before the
run folder is."""

import torch

from toolkit.distributed.devices import compute_dtype, usable_gpus
from toolkit.distributed.environment import settle_precision
from toolkit.distributed.float8 import check_float8_on
from toolkit.distributed.layout import Layout
from toolkit.errors import ErrorList
from toolkit.experiment.config import ExperimentConfig
from toolkit.models.config import ModuleConfig
from toolkit.models.kernels import hardware_of
from toolkit.models.sdpa import attention_order, masked_backend
from toolkit.train.callbacks.config_monitors import check_profiler_device


def check_device(config: ExperimentConfig, layout: Layout) -> None:
    """Raises ConfigError: 8-bit products, an attention kernel or a memory snapshot on a device
    without them, or a precision that does not go with them."""
    device, found = torch.device("cuda" if usable_gpus() else "cpu"), ErrorList()
    precision = settle_precision(layout, device).precision
    if (float8 := config.train_module.float8_config) is not None:
        found.ask(check_float8_on, float8, device=device, precision=precision)
    if not isinstance(config.model, ModuleConfig):
        asked, model = config.train_module.attention_backend, config.model.to_transformer()
        dtype = compute_dtype(precision) or torch.float32
        found.ask(masked_backend, asked, model, device, dtype)
        found.ask(
            attention_order,
            asked,
            hardware_of(device.type),
            dtype=dtype,
            head_dim=model.attention_head_dim,
            cudnn=torch.backends.cudnn.version() if device.type == "cuda" else None,
            is_deterministic=config.trainer.deterministic,
        )
    found.ask(check_profiler_device, config.trainer.callbacks.profiler, device.type)
    found.raise_any()
