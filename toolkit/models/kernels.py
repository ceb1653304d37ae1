"""Which kernel computes what: pure functions of the hardware and of what is asked for.

Each rule exists because a kernel fails, is wrong or is slow somewhere; its docstring says where.
`kernel_record` puts the answers for a model into words, printed and kept with the run.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch

from toolkit.models.blockwise import prefers_blocks
from toolkit.models.config import TransformerConfig

SMALLEST_FLEX_HEAD = 16
"""Flex attention's CUDA kernels take no narrower heads."""

LARGEST_SHARED_HEAD = 192
"""Wider heads have no fused kernel that shares keys and values among queries on every GPU: flash
attention's backward refuses some of them on sm_86, sm_89 and sm_120, and all above 256."""

ALIGNED_HEAD = 8
"""SDPA's memory-efficient kernel takes heads whose width is a multiple of this, in any type."""

_ALIGNMENT = 16
"""Bytes that the rows of CUDA's grouped operands must be a multiple of."""

_SHARED_MEMORY = {
    (7, 0): 98_304, (7, 5): 65_536, (8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448,
    (10, 0): 232_448, (10, 3): 232_448, (11, 0): 232_448,
}  # fmt: skip
"""Bytes a block of threads can have, by compute capability (CUDA C Programming Guide, "Technical
Specifications per Compute Capability"); the others have `_CONSUMER`."""
_CONSUMER = 101_376


class Hardware(NamedTuple):
    """What of a device decides between kernels; None where it is not known, or not CUDA's."""

    type: str
    """As in `torch.device.type`."""
    capability: tuple[int, int] | None = None
    shared_memory: int | None = None
    """Bytes of one block of threads."""
    is_rocm: bool = False
    has_triton: bool = False


class SdpaForm(NamedTuple):
    """How queries, keys and values are given to SDPA."""

    repeats_heads: bool = False
    """Keys and values are repeated, so that there are as many as queries."""
    padding: int = 0
    """Zeros added to each head."""


def widest_float(device: torch.device) -> torch.dtype:
    """The type of sums that must not round: float64, but float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def fused_steps_are_told(device: torch.device) -> bool:
    """Whether torch's fused optimizers divide by `grad_scale` and heed `found_inf`. Their kernels
    for Apple's GPUs take both and read neither (torch 2.13, FusedAdamWKernelImpl.mm)."""
    return device.type != "mps"


@torch.compiler.assume_constant_result
def hardware_of(type: str, index: int | None = None, *, has_triton: bool = False) -> Hardware:
    """The hardware of a device, as far as its driver tells."""
    unknown = Hardware(type, has_triton=has_triton)
    if type != "cuda":
        return unknown
    try:
        capability = torch.cuda.get_device_capability(index)
        properties: Any = torch.cuda.get_device_properties(index)
    except (AssertionError, RuntimeError):  # no such device here
        return unknown
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    if not isinstance(shared, int):
        shared = _SHARED_MEMORY.get(capability, _CONSUMER)
    return Hardware(type, capability, shared, torch.version.hip is not None, has_triton)


MaskedBackend = Literal["flex", "sdpa"]


def attention_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> Literal["flex", "sdpa"]:
    """How masked or soft-capped attention is computed on `device`; see `attention_kernel`."""
    has_triton = find_spec("triton") is not None
    hardware = hardware_of(device.type, device.index, has_triton=has_triton)
    return attention_kernel(hardware, dtype=dtype, head_dim=head_dim)


def attention_kernel(
    hardware: Hardware, *, dtype: torch.dtype, head_dim: int
) -> Literal["flex", "sdpa"]:
    """How masked or soft-capped attention is computed.

    "flex": skips the blocks between documents and outside windows. Trains on CUDA only, needs
    Triton, which supports sm_80 and newer, and shared memory that holds its tiles. Chosen over
    kernels for sequences of varying length (`varlen_attn`), which know no fp32 and whose number of
    documents the host would have to wait for. "sdpa": any device and type, all scores computed.
    """
    fits = (
        hardware.type == "cuda"
        and hardware.has_triton
        and (hardware.capability is None or hardware.capability >= (8, 0))
        and dtype.itemsize <= 4
        and head_dim >= SMALLEST_FLEX_HEAD
        and _flex_tiles_fit(hardware, dtype, head_dim)
    )
    return "flex" if fits else "sdpa"


def _flex_tiles_fit(hardware: Hardware, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the tiles that inductor chooses for flex attention, backward among them, fit.

    Heads are rounded up to a power of two. With 99 KB (A10, L40S, RTX cards) a row of 256 bytes is
    the widest: beyond, backward asks for 112 KB and does not compile. Data center GPUs have 163 KB
    (A100) or 227 KB; inductor has smaller tiles for heads of exactly 256.
    """
    if hardware.shared_memory is None or hardware.is_rocm:  # inductor has other tiles for AMD
        return True
    row = dtype.itemsize << (head_dim - 1).bit_length()
    if hardware.shared_memory < 160_000:
        return row <= 256
    if row <= 512 or head_dim == 256:
        return True
    return row <= 1024 and dtype.itemsize == 2 and hardware.shared_memory > 200_000


def sdpa_form(
    device_type: str, *, dtype: torch.dtype, head_dim: int, is_grouped: bool, has_bias: bool
) -> SdpaForm:
    """The form in which one of SDPA's fused kernels takes the heads on CUDA.

    In any other form torch computes all `heads * seq * seq` scores and keeps them for backward.
    Flash attention shares keys and values among queries, but knows neither fp32 nor a bias; the
    memory-efficient kernel knows both, but no sharing and no odd widths; float64 has none.
    """
    has_flash = dtype.itemsize == 2 and not has_bias and head_dim <= LARGEST_SHARED_HEAD
    if device_type != "cuda" or dtype.itemsize > 4 or has_flash:
        return SdpaForm()
    return SdpaForm(repeats_heads=is_grouped, padding=-head_dim % ALIGNED_HEAD)


def grouped_kernel(
    hardware: Hardware, *, dtype: torch.dtype, widths: tuple[int, ...]
) -> Literal["grouped_mm", "loop"]:
    """How the matrix products of experts are computed.

    "grouped_mm": torch's grouped kernel, which the host does not wait for: bf16, widths that are a
    multiple of 8, NVIDIA's sm_90 and sm_100. Elsewhere torch loops over the groups itself, and
    waits for their sizes in each product. "loop": one product for each group that has rows, any
    device and type. On a CPU torch's own grouped product is such a loop too, and as fast.
    """
    aligned = all(width * dtype.itemsize % _ALIGNMENT == 0 for width in widths)
    is_fast = hardware.capability is not None and hardware.capability[0] in (9, 10)
    is_fast = is_fast and not hardware.is_rocm
    return "grouped_mm" if is_fast and dtype == torch.bfloat16 and aligned else "loop"


def leaves_empty_groups_undefined(hardware: Hardware) -> bool:
    """Whether torch's grouped kernel writes no weight gradient for a group without rows.

    On sm_100 and sm_103 memory's old content remains there (pytorch issues 172439, 193633); on
    sm_90 it is zero. What is newer is not trusted either.
    """
    return hardware.capability is None or hardware.capability[0] != 9


def loss_kernel(
    device_type: str,
    *,
    dtype: torch.dtype,
    vocab_size: int,
    has_z_loss: bool,
    has_soft_cap: bool,
    is_compiled: bool,
    trains_head_alone: bool,
    is_cut: bool = False,
) -> Literal["liger", "chunked"]:
    """How the head's cross entropy is computed.

    "liger": Liger's fused kernel, if it is installed. "chunked": our own. A compiled kernel of ours
    does the same as Liger's, without its wait for the device. Liger returns the sum of a z-loss in
    the compute type; knows no padding ids, and the product over the exact vocabulary is slow where
    its rows are not aligned; and gives no gradient for the weight where the hidden state needs none
    (0.8.5), so a head that is trained alone would stay as it is. `is_cut`: several ranks have rows
    of the vocabulary, of which Liger knows nothing.
    """
    fits = device_type == "cuda" and dtype.itemsize <= 4 and vocab_size % 8 == 0
    differs = has_z_loss or has_soft_cap or is_compiled or trains_head_alone or is_cut
    return "liger" if fits and not differs else "chunked"


def matrix_products(dtype: torch.dtype) -> str:
    """How CUDA multiplies matrices of `dtype`, as torch is set."""
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float32:
        return f"{name}, sums in float32"
    return "float32 rounded to TF32" if torch.backends.cuda.matmul.allow_tf32 else "float32, exact"


@cache
def liger_function() -> Any:
    """Liger's fused linear cross entropy (Hsu et al. 2024); None where it is not installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy


def delta_rule_kernel(device_type: str, *, dtype: torch.dtype) -> Literal["fla", "chunks"]:
    """How the gated delta rule is computed.

    "fla": the Triton kernels of flash-linear-attention, where they are installed; they know no
    fp32. "chunks": `toolkit.models.delta_rule`, any device and type.
    """
    fits = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "fla" if fits and fla_function() is not None else "chunks"


@cache
def fla_function() -> Any:
    """The gated delta rule of flash-linear-attention (Yang & Zhang 2024); None where it is not
    installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    return chunk_gated_delta_rule


def kernel_record(
    config: TransformerConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_compiled: bool,
    has_z_loss: bool,
    trains_head_alone: bool = False,
    vocabulary_is_cut: bool = False,
    attention_order: Sequence[str] = (),
    masked_backend: MaskedBackend | None = None,
) -> dict[str, str]:
    """Part of the model -> its kernel, for computation in `dtype`. `config` has the sizes that one
    rank computes with. `trains_head_alone`: the hidden state needs no gradient. `attention_order`:
    SDPA's kernels, those that are tried first. `masked_backend`: the one that was asked for."""
    head_dim, record = config.attention_head_dim, {}
    if device.type == "cuda":
        record["matrix products"] = matrix_products(dtype)

    def sdpa(*, has_bias: bool) -> str:
        is_grouped = config.kv_heads != config.num_heads
        form = sdpa_form(
            device.type, dtype=dtype, head_dim=head_dim, is_grouped=is_grouped, has_bias=has_bias
        )
        return "sdpa, keys and values repeated" if form.repeats_heads else "sdpa"

    masked = "scores written out"
    if (masked_backend or attention_backend(device, dtype, head_dim)) == "flex":
        masked = "flex"
    elif config.is_plain_softmax:
        masked = sdpa(has_bias=True)
    if masked_backend == "flex":
        record["attention"] = "flex"
    elif config.is_plain_softmax:
        record["attention"] = sdpa(has_bias=False)
        if device.type == "cuda" and attention_order:
            record["attention"] += f" ({', else '.join(attention_order[:2])})"
        if is_compiled and masked_backend is None and prefers_blocks(device.type, dtype):
            record["attention"] = masked = "blocks of queries"
    record["attention inside documents and windows"] = masked
    if config.delta_net is not None:
        kernel = delta_rule_kernel(device.type, dtype=dtype)
        record["linear attention"] = {
            "fla": "flash-linear-attention",
            "chunks": "chunks of matrix products",
        }[kernel]
        if device.type == "cuda" and fla_function() is None:
            advice = "pip install 'toolkit[fla]' for a fused kernel"
            record["linear attention"] += f" ({advice})"
    if config.moe is not None:
        widths = (config.moe.intermediate_size, config.d_model)
        hardware = hardware_of(device.type, device.index)
        record["experts"] = grouped_kernel(hardware, dtype=dtype, widths=widths)
    loss = loss_kernel(
        device.type,
        dtype=dtype,
        vocab_size=config.vocab_size,
        has_z_loss=has_z_loss,
        has_soft_cap=config.logit_soft_cap is not None,
        is_compiled=is_compiled,
        trains_head_alone=trains_head_alone,
        is_cut=vocabulary_is_cut,
    )
    if loss == "liger" and liger_function() is None:
        loss = "chunked"
    record["loss"] = f"{loss}, compiled" if is_compiled else loss
    return record
