"""What a checkpoint can hold besides the model's tensors: plain values, which are read back."""

from collections.abc import Mapping
from typing import Any

import torch

_DTYPES = frozenset(
    {
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)


def plain_state(state: Any, where: str = "") -> Any:
    """A copy of `state` in plain values: numbers, text, bytes, None, tensors, and lists, tuples and
    mappings of them. Scalars of numpy become numbers.

    Raises:
        TypeError: naming what no checkpoint can hold, which could be written but never read.
    """
    if state is None or type(state) in (bool, int, float, str, bytes):
        return state
    if isinstance(state, Mapping):
        return {
            plain_state(key, f"a key of {where or 'it'}"): plain_state(value, f"{where}[{key!r}]")
            for key, value in state.items()
        }
    if isinstance(state, list | tuple):
        items = (plain_state(item, f"{where}[{number}]") for number, item in enumerate(state))
        return tuple(items) if isinstance(state, tuple) else list(items)
    if isinstance(state, torch.Tensor) and state.dtype in _DTYPES and not state.is_sparse:
        return state.detach().clone()
    for kind in (bool, int, float, str):  # enumerations, and float64 of numpy
        if isinstance(state, kind):
            return kind(state)
    if hasattr(state, "dtype") and getattr(state, "shape", None) == ():
        number = state.item()
        if type(number) in (bool, int, float):
            return number
    said = f"{state.dtype} tensor" if isinstance(state, torch.Tensor) else type(state).__name__
    raise TypeError(
        f"{where or 'it'} is a {said}, which no checkpoint can hold; give numbers, text, None, "
        "tensors, and lists and mappings of them"
    )
