"""Write a model as a folder that `AutoModelForCausalLM.from_pretrained` reads.

1. The table of the model's family says which `transformers` tensors there are and of which of ours
   they are made. Run on tensors without storage, it also tells every shape, so files can be laid
   out before the first weight is seen.
2. Our tensors come in one at a time, in any order; each is cut to the real vocabulary, converted
   and written to its place at once. Only the parts of a fused tensor (GPT-2's qkv) wait for one
   another.
3. Everything happens in a temporary folder beside the target, which gets its name last.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import CheckpointError, DataError
from toolkit.hf.families import FAMILIES
from toolkit.hf.family import Family, Rule, why_not
from toolkit.hf.safetensors_file import SafetensorsFile
from toolkit.models.config import ModelConfig, TransformerConfig
from toolkit.models.init import canonical_name
from toolkit.storage.atomic import (
    PathLike,
    fsync_folder,
    fsync_tree,
    remove_tree,
    temporary_path,
    write_json_atomic,
)

_PADDED = ("embeddings.tokens.weight", "head.weight")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def hf_architecture(config: ModelConfig) -> str | None:
    """The `transformers` class that computes what this model computes; None where there is none."""
    family = _family(config.to_transformer())
    return family.architecture if family else None


def export_hf(
    config: ModelConfig,
    named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: PathLike,
    *,
    tokenizer_folder: PathLike | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, generation_config.json, safetensors weights and the tokenizer's files.

    Args:
        config: of the model.
        named_tensors: all parameters by name (wrappers' prefixes are fine), whole, on any device;
            an iterable is consumed one tensor at a time.
        folder: where to; must not exist, or be empty.
        tokenizer_folder: its tokenizer files are copied, and the tokens that end documents (and
            start them, where the data had such) are recorded.
        dtype: of the weights on disk; default: float32, the type of master weights.
        max_shard_bytes: largest size of one weight file.

    Raises:
        CheckpointError: when no class fits, the folder is in use, or tensors are missing, unknown
            or of another shape.
        DataError: when `tokenizer_folder` holds no tokenizer.
    """
    folder, transformer = Path(folder), config.to_transformer()
    family = _family(transformer)
    if family is None:
        raise CheckpointError(
            "model: no transformers class has this combination of parts, so it cannot be exported; "
            f"known: {', '.join(f.architecture for f in FAMILIES)}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: already exists; remove it or choose another folder")
    bos_id, eos_id = _special_ids(tokenizer_folder)
    dtype = dtype or torch.float32
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_path(folder)
    unfinished.mkdir()
    try:
        items = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
        _write_weights(transformer, family, iter(items), unfinished, dtype, max_shard_bytes)
        special_tokens = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": None}
        settings: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **family.write_config(transformer),
            **special_tokens,
            "dtype": str(dtype).removeprefix("torch."),
        }
        write_json_atomic(unfinished / "config.json", settings, sync=False)
        generation = {"_from_model_config": True, **special_tokens}
        write_json_atomic(unfinished / "generation_config.json", generation, sync=False)
        if tokenizer_folder is not None:
            for name in _TOKENIZER_FILES:
                if (Path(tokenizer_folder) / name).is_file():
                    shutil.copyfile(Path(tokenizer_folder) / name, unfinished / name)
        fsync_tree(unfinished)
        # Takes the place of an empty folder too.
        unfinished.replace(folder)
        fsync_folder(folder.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(unfinished)
        raise


def _family(config: TransformerConfig) -> Family | None:
    return next((family for family in FAMILIES if why_not(family, config) is None), None)


def _special_ids(tokenizer_folder: PathLike | None) -> tuple[int | None, int | None]:
    """Tokens that start and end documents, where the data had them."""
    if tokenizer_folder is None:
        return None, None
    from toolkit.data.tokenizers.tokenizer import TOKENIZER_FILE, load_tokenizer

    if not (Path(tokenizer_folder) / TOKENIZER_FILE).is_file():
        raise DataError(
            f"{tokenizer_folder}: no {TOKENIZER_FILE} here; give the folder of the tokenizer, "
            "or none to export weights alone"
        )
    tokenizer = load_tokenizer(tokenizer_folder)
    return tokenizer.bos_id if tokenizer.prepends_bos else None, tokenizer.eos_id


def _write_weights(
    config: TransformerConfig,
    family: Family,
    items: Iterator[tuple[str, Tensor]],
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    rules = family.rules(config)
    expected = {name: p.detach() for name, p in config.build(init_device="meta").named_parameters()}
    shapes: dict[str, torch.Size] = {}
    for rule in rules:
        theirs = rule.layout.to_theirs([_unpadded(s, expected[s], config) for s in rule.ours])
        shapes |= {name: t.shape for name, t in zip(rule.theirs, theirs, strict=True)}
    shards = _plan_shards(shapes, dtype, max_shard_bytes)
    file_of = {target: name for name, targets in shards.items() for target in targets}
    if len(shards) > 1:
        size = sum(shape.numel() * dtype.itemsize for shape in shapes.values())
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        write_json_atomic(folder / "model.safetensors.index.json", index, sync=False)
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(SafetensorsFile(folder / name, targets, dtype))
            for name, targets in shards.items()
        }
        for target, tensor in _converted(config, rules, expected, items):
            files[file_of[target]].write(target, tensor)


def _converted(
    config: TransformerConfig,
    rules: list[Rule],
    expected: dict[str, Tensor],
    items: Iterator[tuple[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """`(their name, their tensor)`, each as soon as the last of its sources has come in."""
    rule_of = {source: rule for rule in rules for source in rule.ours}
    waiting: dict[str, Tensor] = {}
    missing = set(rule_of)
    for wrapped_name, tensor in items:
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
            theirs = rule.layout.to_theirs([waiting.pop(source) for source in rule.ours])
            yield from zip(rule.theirs, theirs, strict=True)
    if missing:
        raise CheckpointError(
            f"{sorted(missing)[0]}: missing from the weights to export "
            f"({len(missing)} of {len(rule_of)} are); the checkpoint is of another model"
        )


def _unpadded(name: str, tensor: Tensor, config: TransformerConfig) -> Tensor:
    return tensor[: config.vocab_size] if name in _PADDED else tensor


def _plan_shards(
    shapes: dict[str, torch.Size], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, dict[str, torch.Size]]:
    """File name -> its tensors, filled in the model's order."""
    groups: list[dict[str, torch.Size]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        if groups[-1] and used + size > max_shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = shape
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    total = len(groups)
    return {f"model-{i:05}-of-{total:05}.safetensors": g for i, g in enumerate(groups, start=1)}
