"""Whether the chunks in DCP's `.metadata` make up each tensor exactly once, from bytes that exist.

Reading fills a tensor chunk by chunk. What no chunk covers would keep what the memory held before,
and training, export and generation would use it.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

_MOST_DIMENSIONS = 5
"""Of a tensor in several chunks: two corners for each dimension are compared."""


def check_coverage(metadata: Metadata, sizes: Mapping[str, int]) -> None:
    """Check every tensor in `metadata` against `sizes`, the bytes of each file beside it.

    Raises:
        ValueError: naming the first tensor that is not whole, or a place that belongs to none.
    """
    tensors, places = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(tensors, dict) or not isinstance(places, dict) or not tensors:
        raise ValueError("holds no tensors")
    used: dict[str, list[tuple[int, int]]] = {}
    known = 0
    for name, entry in tensors.items():
        if not isinstance(entry, TensorStorageMetadata) or not _is_described(name, entry):
            raise ValueError(f"{name}: is no tensor")
        if not _is_tiled(entry.size, entry.chunks):
            raise ValueError(f"{name}: its chunks do not make up the tensor exactly once")
        known += len({chunk.offsets for chunk in entry.chunks})
        for chunk in entry.chunks:
            place = places.get(MetadataIndex(name, chunk.offsets))
            numbers = math.prod(chunk.sizes)
            if place is None and numbers == 0:
                known -= 1
                continue
            if not isinstance(place, _StorageInfo) or not _is_inside(place, sizes):
                raise ValueError(f"{name}: a chunk lies outside the files there are")
            if place.length < numbers * entry.properties.dtype.itemsize:
                raise ValueError(f"{name}: a chunk has fewer bytes than numbers")
            if numbers:
                end = place.offset + place.length
                used.setdefault(place.relative_path, []).append((place.offset, end))
    if known != len(places):
        raise ValueError("names chunks that no tensor has")
    for file, spans in used.items():
        spans.sort()
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(spans)):
            raise ValueError(f"uses bytes of {file} twice")


def _is_described(name: Any, entry: TensorStorageMetadata) -> bool:
    return (
        isinstance(name, str)
        and isinstance(entry.properties.dtype, torch.dtype)
        and isinstance(entry.size, torch.Size)
        and isinstance(entry.chunks, list)
        and all(
            isinstance(chunk, ChunkStorageMetadata)
            and isinstance(chunk.offsets, torch.Size)
            and isinstance(chunk.sizes, torch.Size)
            and len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
            and min((*chunk.offsets, *chunk.sizes), default=0) >= 0
            for chunk in entry.chunks
        )
    )


def _is_tiled(size: torch.Size, chunks: list[ChunkStorageMetadata]) -> bool:
    """Whether `chunks` cover a tensor of `size` without gap, overlap or anything outside.

    A sum of boxes is known by the signs at its corners (its difference along every dimension): they
    are those of the whole, all others cancel, if and only if the boxes tile it.
    """
    if min(size, default=0) < 0:
        return False
    parts = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if not math.prod(size):
        return not parts
    if len(parts) == 1:
        return not any(parts[0].offsets) and parts[0].sizes == size
    if len(size) and _is_cut_into_rows(size, parts):
        return True
    if len(size) > _MOST_DIMENSIONS or sum(math.prod(p.sizes) for p in parts) != math.prod(size):
        return False
    signs: dict[tuple[int, ...], int] = {}
    _add_corners(signs, [0] * len(size), size, -1)
    for part in parts:
        _add_corners(signs, part.offsets, part.sizes, 1)
    return not signs


def _is_cut_into_rows(size: torch.Size, parts: list[ChunkStorageMetadata]) -> bool:
    """The usual case, in a tenth of the time."""
    at = 0
    for part in sorted(parts, key=lambda part: part.offsets):
        if part.offsets[0] != at or any(part.offsets[1:]) or part.sizes[1:] != size[1:]:
            return False
        at += part.sizes[0]
    return at == size[0]


def _add_corners(signs: dict[tuple[int, ...], int], begin: Any, sizes: Any, sign: int) -> None:
    edges = [((at, 1), (at + length, -1)) for at, length in zip(begin, sizes, strict=True)]
    for corner in itertools.product(*edges):
        at = tuple(place for place, _ in corner)
        total = signs.pop(at, 0) + sign * math.prod(factor for _, factor in corner)
        if total:
            signs[at] = total


def _is_inside(place: _StorageInfo, sizes: Mapping[str, int]) -> bool:
    numbers = (place.offset, place.length)
    return (
        isinstance(place.relative_path, str)
        and all(type(number) is int and number >= 0 for number in numbers)
        and place.offset + place.length <= sizes.get(place.relative_path, -1)
        and not place.transform_descriptors
    )
