"""Counting what a step really does: live bytes and collectives, of a real rank or a fake one."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    "allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce",
    "alltoall": "all-to-all", "send": "p2p", "broadcast": "broadcast",
}  # fmt: skip
"""Beginning of an operator's name -> what `toolkit plan` calls it. A receive is its send's twin."""


class Exchange(NamedTuple):
    """Calls of one kind over one group."""

    kind: str
    group: str
    """Name of the process group."""
    calls: int
    bytes: int
    """Of all calls: of the largest tensor of each on this rank."""


class Counter(TorchDispatchMode):
    """Counts while it is entered: bytes of live tensors, their peak, and collectives.

    Bytes are those of storages, whoever holds them, also autograd; of FSDP's, what they are resized
    to. What was made before is counted from `see` on. Fake tensors count as real ones do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._exchanges: dict[tuple[str, str], list[int]] = {}

    def see(self, *tensors: Any) -> None:
        """Count tensors, or what of them is on this rank."""
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue  # a fake tensor has another device
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = 0
                weakref.finalize(storage, self._forget, key)
                self._resize(key, storage.nbytes())

    def restart(self) -> None:
        """Forget exchanges and the peak so far."""
        self._exchanges.clear()
        self.peak = self.live

    @property
    def exchanges(self) -> list[Exchange]:
        return [Exchange(*key, *numbers) for key, numbers in sorted(self._exchanges.items())]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func, (args, kwargs))
        self.see(*(t for t in tree_leaves(out) if not isinstance(t, DTensor)))
        return out

    def __enter__(self) -> Any:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._watching_resizes())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextlib.contextmanager
    def _watching_resizes(self) -> Iterator[None]:
        """FSDP frees gathered weights by resizing their storage, which is no operator."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._sizes:
                self._resize(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def _resize(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def _note(self, func: Any, arguments: Any) -> None:
        name = func.overloadpacket.__name__.lstrip("_")
        kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
        if kind is None:
            return
        leaves = tree_leaves(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        group = next((_group_name(x) for x in leaves if isinstance(x, torch.ScriptObject)), "")
        found = self._exchanges.setdefault((kind, group), [0, 0])
        found[0] += 1
        found[1] += max((t.numel() * t.element_size() for t in tensors), default=0)


def _group_name(boxed: Any) -> str:
    try:
        return str(dist.ProcessGroup.unbox(boxed).group_name)
    except (RuntimeError, TypeError, AttributeError):  # another object: the operation to reduce by
        return ""
