"""The kernels that a model's parts are computed by, in words: printed and kept with the run."""

import torch

from toolkit.models.config import TransformerConfig
from toolkit.models.kernels import grouped_kernel, hardware_of, loss_kernel, sdpa_form
from toolkit.models.liger import is_liger_installed
from toolkit.models.masks import attention_backend


def kernel_record(
    config: TransformerConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_compiled: bool,
    has_z_loss: bool,
    trains_head_alone: bool = False,
) -> dict[str, str]:
    """Part of the model -> its kernel.

    Args:
        dtype: of computation.
        trains_head_alone: the hidden state needs no gradient.
    """
    kernels = {}
    if config.attention_soft_cap is None:
        kernels["attention"] = _sdpa(config, device, dtype, has_bias=False)
    kernels["attention inside documents and windows"] = _masked(config, device, dtype)
    if config.moe is not None:
        widths = (config.moe.intermediate_size, config.d_model)
        hardware = hardware_of(device.type, device.index)
        kernels["experts"] = grouped_kernel(hardware, dtype=dtype, widths=widths)
    loss = loss_kernel(
        device.type,
        dtype=dtype,
        vocab_size=config.vocab_size,
        has_z_loss=has_z_loss,
        has_soft_cap=config.logit_soft_cap is not None,
        is_compiled=is_compiled,
        trains_head_alone=trains_head_alone,
    )
    if loss == "liger" and not is_liger_installed():
        loss = "chunked"
    kernels["loss"] = f"{loss}, compiled" if is_compiled else loss
    return kernels


def _masked(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> str:
    if attention_backend(device, dtype, config.attention_head_dim) == "flex":
        return "flex"
    if config.attention_soft_cap is not None:
        return "scores written out"
    return _sdpa(config, device, dtype, has_bias=True)


def _sdpa(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype, *, has_bias: bool
) -> str:
    form = sdpa_form(
        device.type,
        dtype=dtype,
        head_dim=config.attention_head_dim,
        is_grouped=config.kv_heads != config.num_heads,
        has_bias=has_bias,
    )
    return "sdpa, keys and values repeated" if form.repeats_heads else "sdpa"
