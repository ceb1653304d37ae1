"""What a step asks a GPU to do, counted on tensors without values: operators, bytes, casts, FLOPs.

Fake tensors are on a CPU, so autocast and autograd work as they do with real ones. Attention is one
operator forward and one backward, for whoever computes it, and moves what it reads and writes.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
    "lift_fresh", "is_same_size", "resize_", "set_", "record_stream", "scalar_tensor",
    "_unsafe_view",
}  # fmt: skip
"""Operators that start no kernel, besides views."""
_SPARSE = {"embedding", "gather", "index", "index_select", "scatter_", "scatter"}
"""Operators that read or write as much of their largest tensor as they give or are given."""
_COLLECTIVES = {
    "allgather": "all-gather", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce", "all_reduce": "all-reduce", "broadcast": "broadcast",
}  # fmt: skip


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class OpCounter(TorchDispatchMode):
    """Counts while it is entered. What starts a kernel on a GPU counts as one operator, whatever it
    starts there; a foreach or fused operator over many tensors too."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()
        self.bytes = self.casts = self.cast_bytes = self.flops = 0
        self.collectives: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()

    @property
    def ops(self) -> int:
        return sum(self.kinds.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note_collective(name.lstrip("_"), given)
        elif not (name in _NOTHING or _is_view(func) or not made):
            self._note(name, args, given, made, func)
        return out

    def _note(self, name: str, args: Any, given: list, made: list, func: Any) -> None:
        self.kinds[name] += 1
        moved = sum(map(nbytes, given)) + sum(map(nbytes, made))
        if name in _SPARSE or name == "embedding_dense_backward":
            # Of the table only the rows that are asked for.
            moved = 2 * min(nbytes(t) for t in (*given[:1], *made)) + sum(map(nbytes, given[1:]))
        self.bytes += moved
        is_cast = name in ("_to_copy", "copy_", "_foreach_copy_") and any(
            a.dtype != b.dtype and a.is_floating_point()
            for a, b in zip(given[-1:], made, strict=False)
        )
        if name == "copy_":
            is_cast = given[0].dtype != given[1].dtype
        if is_cast:
            self.casts += 1
            self.cast_bytes += moved
        self.flops += _product_flops(name, args)

    def fused(self, name: str, flops: int, tensors: tuple[torch.Tensor, ...]) -> None:
        self.kinds[name] += 1
        self.flops += flops
        self.bytes += sum(map(nbytes, tensors))

    def _note_collective(self, name: str, given: list) -> None:
        kind = next((k for start, k in _COLLECTIVES.items() if name.startswith(start)), None)
        if kind is not None and given:
            self.collectives[kind] += 1
            self.collective_bytes[kind] += max(map(nbytes, given))


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and any(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _product_flops(name: str, args: Any) -> int:
    if name in ("mm", "bmm"):
        left, right = args[:2]
    elif name in ("addmm", "baddbmm", "addmm_"):
        left, right = args[1:3]
    else:
        return 0
    return 2 * math.prod(left.shape) * right.shape[-1]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, counter: OpCounter) -> Any:
        ctx.save_for_backward(query, key, value)
        ctx.counter = counter
        # Causal: half of the scores, two products each.
        ctx.flops = 2 * math.prod(query.shape) * key.shape[-2]
        out = torch.empty_like(query)
        counter.fused("attention", ctx.flops, (query, key, value, out))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value = ctx.saved_tensors
        grads = tuple(map(torch.empty_like, (query, key, value)))
        tensors = (query, key, value, query, grad, *grads)
        ctx.counter.fused("attention backward", 5 * ctx.flops // 2, tensors)
        return *grads, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, counter: OpCounter) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.counter, out = counter, torch.empty_like(x)
        counter.fused("rms_norm", 0, (x, out))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        grads = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
        ctx.counter.fused("rms_norm backward", 0, (x, grad, grads[0]))
        return *grads, None


@contextlib.contextmanager
def counted_kernels(counter: OpCounter) -> Iterator[None]:
    """SDPA and RMSNorm, by whoever calls torch's, are one operator each, as on a GPU; attention
    writes no scores."""

    def rms_norm(x: Any, _: Any, weight: Any = None, eps: Any = None) -> Any:
        return _RMSNorm.apply(x, weight, counter)

    def attend(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
        query, key, value = (t.to(kind) for t in (query, key, value))
        return _Attention.apply(query, key, value, counter)

    with (
        mock.patch.object(functional, "scaled_dot_product_attention", attend),
        mock.patch.object(functional, "rms_norm", rms_norm),
    ):
        yield


def compiled_kernels(block: Any, inputs: tuple) -> tuple[int, int]:
    """Kernels that inductor writes for `block`, forward and backward, besides matrix products and
    attention. Real tensors: `inputs[0]` is the residual stream."""
    from torch._inductor import metrics

    torch._dynamo.reset()
    metrics.reset()
    torch._inductor.config.fx_graph_cache = False  # what is found there is not counted
    out = torch.compile(block, dynamic=False)(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    forward = metrics.generated_kernel_count
    out.sum().backward()
    return forward, metrics.generated_kernel_count - forward
