"""A model's weights as safetensors files under the names of its family.

The family's rules say which tensors of theirs there are and of which of ours they are made. Run on
tensors without storage, they also tell every shape, so files are laid out before the first weight
is seen. Ours then come in one at a time, in any order; each is cut to the real vocabulary,
converted and written to its place at once. Only the parts of a fused tensor (GPT-2's qkv) wait for
one another.

So the format is written here: `safetensors` itself only writes tensors that are all in memory.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.hf.family import Family, Rule
from toolkit.hf.import_weights import VOCABULARY
from toolkit.hf.weights import FLOATS
from toolkit.models.config import TransformerConfig
from toolkit.models.init import canonical_name
from toolkit.models.shapes import MTP_PREFIX, SCORE_BIAS, state_shapes
from toolkit.storage.atomic import write_json_atomic

_LARGEST_HALF = torch.finfo(torch.float16).max
INDEX_FILE = "model.safetensors.index.json"

Dtypes = torch.dtype | Mapping[str, torch.dtype]
"""Of the weights on disk: one for all, or one for each of our names."""


def write_weights(
    config: TransformerConfig,
    family: Family,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    dtypes: Dtypes,
    max_shard_bytes: int,
) -> None:
    """Write `tensors` (our names, whole) into `folder`, but for those of multi-token prediction.
    Raises CheckpointError: a tensor is missing, unknown or of another shape."""
    rules = family.rules(config)
    shapes = state_shapes(config)
    layout: dict[str, Tensor] = {}
    for rule in rules:
        meta = {
            name: torch.empty(shapes[name], dtype=_dtype(dtypes, name), device="meta")
            for name in rule.ours
        }
        ours = [_unpadded(name, tensor, config) for name, tensor in meta.items()]
        layout |= zip(rule.theirs, rule.transform.to_theirs(ours), strict=True)
    shards = _plan_shards(layout, max_shard_bytes)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in layout.values())
        file_of = {target: name for name, targets in shards.items() for target in targets}
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        write_json_atomic(folder / INDEX_FILE, index, sync=False)
    with ExitStack() as stack:
        places: dict[str, tuple[Any, int]] = {}
        for name, targets in shards.items():
            opened = stack.enter_context((folder / name).open("wb"))
            places |= {target: (opened, at) for target, at in _begin_file(opened, targets).items()}
        for target, tensor in _converted(config, rules, shapes, tensors):
            is_narrowed = layout[target].dtype == torch.float16 and tensor.dtype != torch.float16
            if is_narrowed and (largest := tensor.abs().max().item()) > _LARGEST_HALF:
                raise CheckpointError(
                    f"{target}: holds {largest:.3g}, which fp16 cannot; export as bf16 or fp32"
                )
            file, position = places[target]
            raw = tensor.to("cpu", layout[target].dtype).contiguous().view(-1).view(torch.uint8)
            file.seek(position)
            file.write(raw.numpy().data)


def _begin_file(file: BinaryIO, layout: Mapping[str, Tensor]) -> dict[str, int]:
    """Write the header (8 bytes little-endian length; JSON, padded to 8 bytes: name -> dtype,
    shape, byte range) and make room; returns where the bytes of each tensor begin.
    https://huggingface.co/docs/safetensors"""
    names = {dtype: name for name, dtype in FLOATS.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, tensor in layout.items():
        begins[name], end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + begin for name, begin in begins.items()}


def _dtype(dtypes: Dtypes, name: str) -> torch.dtype:
    if isinstance(dtypes, torch.dtype):
        return type_on_disk(name, dtypes)
    # A name that is missing there will be missing among the tensors.
    return dtypes.get(name, torch.float32)


def type_on_disk(name: str, dtype: torch.dtype) -> torch.dtype:
    """That of a tensor of ours where weights are written as `dtype`: biases of routers stay fp32,
    as `transformers` keeps them, for a coarser one chooses other experts."""
    return torch.float32 if name.endswith(SCORE_BIAS) else dtype


def _converted(
    config: TransformerConfig,
    rules: list[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """`(their name, their tensor)`, each as soon as the last of its sources has come in."""
    rule_of = {source: rule for rule in rules for source in rule.ours}
    waiting: dict[str, Tensor] = {}
    missing = set(rule_of)
    for wrapped_name, tensor in tensors:
        name = canonical_name(wrapped_name)
        if name.startswith(MTP_PREFIX):
            continue
        if name not in missing:
            raise CheckpointError(f"{name}: not a parameter of this model, or given twice")
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{name}: shape {tuple(tensor.shape)}, but the model config gives "
                f"{shapes[name]}; export with the config it was trained with"
            )
        missing.remove(name)
        rule = rule_of[name]
        waiting[name] = _unpadded(name, tensor.detach(), config)
        if all(source in waiting for source in rule.ours):
            theirs = rule.transform.to_theirs([waiting.pop(source) for source in rule.ours])
            yield from zip(rule.theirs, theirs, strict=True)
    if missing:
        raise CheckpointError(
            f"{min(missing)}: missing from the weights to export "
            f"({len(missing)} of {len(rule_of)} are); the checkpoint is of another model"
        )


def _unpadded(name: str, tensor: Tensor, config: TransformerConfig) -> Tensor:
    return tensor[: config.vocab_size] if name in VOCABULARY else tensor


def _plan_shards(layout: dict[str, Tensor], max_shard_bytes: int) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, filled in the model's order."""
    groups: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in layout.items():
        if groups[-1] and used + tensor.nbytes > max_shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = tensor
        used += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    total = len(groups)
    return {f"model-{i:05}-of-{total:05}.safetensors": g for i, g in enumerate(groups, start=1)}
