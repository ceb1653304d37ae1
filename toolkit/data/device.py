"""Batches on their device before training asks for them."""

from collections.abc import Iterable, Iterator

import torch

Batch = dict[str, torch.Tensor]


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """`batches` on `device`; on CUDA the copy of the next one, from pinned memory on a stream of
    its own, runs while training computes on the current one. Elsewhere they pass as they are."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        ready, ahead = ahead, _start_copy(batch, device, stream)
        if ready is not None:
            yield _wait(ready, device, stream)
    if ahead is not None:
        yield _wait(ahead, device, stream)


def _start_copy(batch: Batch, device: torch.device, stream: "torch.cuda.Stream") -> Batch:
    with torch.cuda.stream(stream):
        return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}


def _wait(batch: Batch, device: torch.device, stream: "torch.cuda.Stream") -> Batch:
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for tensor in batch.values():
        tensor.record_stream(current)  # its memory is not reused before training is done with it
    return batch
