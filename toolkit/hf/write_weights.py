"""A model's weights as safetensors files under the names of its family.

The family's table says which tensors of theirs there are and of which of ours they are made. Run on
tensors without storage, it also tells every shape, so files are laid out before the first weight is
seen. Ours then come in one at a time, in any order; each is cut to the real vocabulary, converted
and written to its place at once. Only the parts of a fused tensor (GPT-2's qkv) wait for one
another. The library's own `save_file` wants all tensors of a file in memory at once.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.hf.family import Family, Rule
from toolkit.hf.import_weights import VOCABULARY
from toolkit.hf.weights import DTYPES
from toolkit.models.config import TransformerConfig
from toolkit.models.init import canonical_name
from toolkit.storage.atomic import write_json_atomic

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
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
) -> list[Path]:
    """Write `tensors` (our names, whole) into `folder`; returns the files of weights.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    rules = family.rules(config)
    expected = {name: p.detach() for name, p in config.build(init_device="meta").named_parameters()}
    layout: dict[str, Tensor] = {}
    for rule in rules:
        ours = [_unpadded(s, expected[s], config).to(_dtype(dtypes, s)) for s in rule.ours]
        layout |= zip(rule.theirs, rule.transform.to_theirs(ours), strict=True)
    shards = _plan_shards(layout, max_shard_bytes)
    file_of = {target: name for name, targets in shards.items() for target in targets}
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in layout.values())
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        write_json_atomic(folder / INDEX_FILE, index, sync=False)
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(SafetensorsFile(folder / name, targets))
            for name, targets in shards.items()
        }
        for target, tensor in _converted(config, rules, expected, tensors):
            if layout[target].dtype == torch.float16:
                _check_range(target, tensor)
            files[file_of[target]].write(target, tensor)
    return [folder / name for name in shards]


def _check_range(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float16 and tensor.abs().max() > _LARGEST_HALF:
        raise CheckpointError(
            f"{name}: holds {tensor.abs().max().item():.3g}, which fp16 cannot; export as bf16 or "
            "fp32"
        )


def _dtype(dtypes: Dtypes, name: str) -> torch.dtype:
    if isinstance(dtypes, torch.dtype):
        return dtypes
    # A name that is missing there will be missing among the tensors.
    return dtypes.get(name, torch.float32)


def _converted(
    config: TransformerConfig,
    rules: list[Rule],
    expected: dict[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """`(their name, their tensor)`, each as soon as the last of its sources has come in."""
    rule_of = {source: rule for rule in rules for source in rule.ours}
    waiting: dict[str, Tensor] = {}
    missing = set(rule_of)
    for wrapped_name, tensor in tensors:
        name = canonical_name(wrapped_name)
        if name not in missing:
            raise CheckpointError(f"{name}: not a parameter of this model, or given twice")
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{name}: shape {tuple(tensor.shape)}, but the model config gives "
                f"{tuple(expected[name].shape)}; export with the config it was trained with"
            )
        missing.remove(name)
        rule = rule_of[name]
        waiting[name] = _unpadded(name, tensor.detach(), config)
        if all(source in waiting for source in rule.ours):
            theirs = rule.transform.to_theirs([waiting.pop(source) for source in rule.ours])
            yield from zip(rule.theirs, theirs, strict=True)
    if missing:
        raise CheckpointError(
            f"{sorted(missing)[0]}: missing from the weights to export "
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


class SafetensorsFile:
    """Context manager; every tensor announced in `layout` is to be given to `write` once.

    Args:
        layout: name -> a tensor of that shape and type (on the meta device, say).
    """

    def __init__(self, path: Path, layout: Mapping[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        self._places: dict[str, tuple[int, torch.dtype]] = {}
        for name, tensor in layout.items():
            end = position + tensor.nbytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            self._places[name] = (position, tensor.dtype)
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data_start + position)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` (any device, converted to the announced type) in its place."""
        offset, dtype = self._places[name]
        flat = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
        self._file.seek(self._data_start + offset)
        self._file.write(flat.numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
