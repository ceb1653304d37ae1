"""What computes attention, by name: SDPA or flex attention, and which of SDPA's kernels is tried
first on CUDA: a choice of the process, as torch keeps it."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend

from toolkit.errors import ConfigError
from toolkit.models.architecture import Architecture, AttentionBackend
from toolkit.models.kernels import (
    ALIGNED_HEAD,
    Hardware,
    MaskedBackend,
    attention_backend,
    hardware_of,
)

KEY = "train_module.attention_backend"
FLASH3_MODULE = "flash_attn_interface"
"""What the package of FlashAttention 3 is imported as."""

_CUDNN, _FLASH3 = 91_002, "FA3"
"""The first cuDNN whose attention is tried unasked (torch's own floor for GPUs of sm_100); torch's
name of FlashAttention 3."""
_BACKENDS: dict[str, Any] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_LEAVE_KERNELS_OPEN = ("auto", "sdpa", "flex")
_TORCHS = ("flash", "efficient", "math", "cudnn")
"""torch's own order (2.13)."""


def takes_measured(
    asked: AttentionBackend,
    hardware: Hardware,
    *,
    dtype: torch.dtype,
    head_dim: int,
    cudnn: int | None,
    is_deterministic: bool,
) -> bool:
    """Whether `attention_order` puts the kernel that was measured to be fastest first: unasked, on
    sm_90 and sm_100, for heads that flash attention and cuDNN's both compute."""
    is_new = hardware.capability is not None and hardware.capability[0] in (9, 10)
    is_new &= not hardware.is_rocm and cudnn is not None and cudnn >= _CUDNN
    fits = _is_aligned_half(dtype, head_dim) and head_dim <= 128
    return asked in _LEAVE_KERNELS_OPEN and is_new and fits and not is_deterministic


def _is_aligned_half(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype.itemsize == 2 and head_dim % ALIGNED_HEAD == 0


def attention_order(
    asked: AttentionBackend,
    hardware: Hardware,
    *,
    dtype: torch.dtype,
    head_dim: int,
    cudnn: int | None,
    is_deterministic: bool,
    measured: Literal["flash", "cudnn"] | None = None,
) -> tuple[str, ...]:
    """SDPA's kernels in the order in which they are tried, the first that takes a call computes it.

    Unasked the one that was `measured` to be fastest comes first, and where nothing was, cuDNN's on
    sm_90 and sm_100, where torch's own flash attention is the one written for sm_80; but for
    deterministic runs, which its backward is not. `cudnn` is its version, None where there is none.
    Raises ConfigError: the kernel that is asked for computes no such heads here.
    """
    if asked in _LEAVE_KERNELS_OPEN:
        is_open = takes_measured(
            asked,
            hardware,
            dtype=dtype,
            head_dim=head_dim,
            cudnn=cudnn,
            is_deterministic=is_deterministic,
        )
        return _first(measured or "cudnn") if is_open else _TORCHS
    problem = None
    if hardware.type != "cuda":
        problem = f"chooses between CUDA's kernels, and this is a run on {hardware.type}"
    elif asked not in ("math", "efficient") and not _is_aligned_half(dtype, head_dim):
        problem = (
            f"{asked} computes bf16 and fp16, heads of a multiple of {ALIGNED_HEAD}; not "
            f"{str(dtype).removeprefix('torch.')}, heads of {head_dim}"
        )
    elif asked == "cudnn" and (is_deterministic or cudnn is None):
        problem = "cudnn is not deterministic" if is_deterministic else "there is no cuDNN here"
    elif asked == "flash3" and (hardware.capability or (0, 0))[0] != 9:
        problem = "flash3 runs on sm_90 (H100, H200)"
    elif asked == "flash3" and find_spec(FLASH3_MODULE) is None:
        problem = f"flash3 needs FlashAttention 3 (the module {FLASH3_MODULE}), not installed here"
    if problem is not None:
        raise ConfigError(f"{problem}; use auto", key=KEY)
    return ("flash3", *_TORCHS) if asked == "flash3" else _first(asked)


def masked_backend(
    asked: AttentionBackend, model: Architecture, device: torch.device, dtype: torch.dtype
) -> MaskedBackend | None:
    """What computes attention with masks, soft caps or sinks, where `asked` names it, else None;
    flex attention computes all other attention too. Raises ConfigError: it cannot compute that of
    `model` on `device`."""
    part = "attention_sinks" if model.attention_sinks else "attention_soft_cap"
    if asked not in ("auto", "flex") and not model.is_plain_softmax:
        raise ConfigError(f"{asked} does not know model.{part}; use auto", key=KEY)
    if asked != "flex":
        return "sdpa" if asked == "sdpa" else None
    if attention_backend(device, dtype, head_dim := model.attention_head_dim) != "flex":
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"flex attention trains on CUDA GPUs of sm_80 or newer, with Triton and shared memory "
            f"for its tiles; not on this {device.type}, {name}, heads of {head_dim}; use auto",
            key=KEY,
        )
    return "flex"


def _first(name: str) -> tuple[str, ...]:
    return (name, *(other for other in _TORCHS if other != name))


def choose_attention(
    asked: AttentionBackend,
    device: torch.device,
    *,
    dtype: torch.dtype,
    head_dim: int,
    measured: Literal["flash", "cudnn"] | None = None,
) -> tuple[str, ...]:
    """Set the order of this process for `device`, and return it. Raises ConfigError: see
    `attention_order`."""
    facts = _facts(device)
    order = attention_order(asked, dtype=dtype, head_dim=head_dim, measured=measured, **facts)
    set_order(order)
    return order


def takes_measured_here(
    asked: AttentionBackend, device: torch.device, *, dtype: torch.dtype, head_dim: int
) -> bool:
    """`takes_measured` on `device`."""
    return takes_measured(asked, dtype=dtype, head_dim=head_dim, **_facts(device))


def _facts(device: torch.device) -> dict[str, Any]:
    """What else decides, of this process and its `device`."""
    return {
        "hardware": hardware_of(device.type, device.index),
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "is_deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def set_order(order: Sequence[str]) -> None:
    """Try SDPA's kernels in this order from now on; FlashAttention 3 takes the place of torch's."""
    implementations: Any = torch.nn.attention  # that can be chosen since torch 2.13 at the latest
    active = getattr(implementations, "current_flash_attention_impl", lambda: None)()
    if order[0] == "flash3" and active != _FLASH3:
        implementations.activate_flash_attention_impl(_FLASH3)
    elif order[0] != "flash3" and active == _FLASH3:
        implementations.restore_flash_attention_impl()
    chosen = [int(_BACKENDS[name]) for name in order if name in _BACKENDS]
    known: Any = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order([*chosen, *(n for n in known if n not in chosen)])
