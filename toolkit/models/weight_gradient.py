"""The gradient of a weight that adds up in a wide type over pieces of the rows."""

import torch
from torch import Tensor


def widens_products(device: torch.device) -> bool:
    """Whether a matrix product of bf16 on `device` can be written in fp32 as it was summed.

    cuBLAS does. torch has no such product for CPUs (2.13), and ROCm's is not tried.
    """
    return device.type in ("cuda", "meta") and torch.version.hip is None


def add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total + left @ right`, in `dtype`; in place where there is a total.

    `left` is `(rows, inner)` and `right` `(inner, columns)`, both of one type. Where products
    cannot be widened each is rounded to that type before it is added.
    """
    if left.dtype == dtype:
        return left @ right if total is None else total.addmm_(left, right)
    if widens_products(left.device):
        return widened_product(total, left, right, dtype)
    product = left @ right
    return product.to(dtype) if total is None else total.add_(product)


def widened_product(
    total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same in one kernel that reads and writes `total` once and rounds nothing else."""
    if total is None:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.addmm(total, left, right, out_dtype=dtype, out=total)
