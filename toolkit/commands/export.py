"""`toolkit export-hf`: from a run, a checkpoint or a folder to one that `transformers` loads."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from toolkit.commands.model_facts import card_of
from toolkit.commands.models import WeightType, torch_dtype
from toolkit.errors import ConfigError
from toolkit.hf.choose import choose_family
from toolkit.hf.export import Exported, chosen_types, export_source, first_type
from toolkit.hf.model_card import render_card
from toolkit.hf.source import ModelSource, find_source, is_tokenizer
from toolkit.storage.atomic import check_unused
from toolkit.storage.progress import byte_progress

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?\Z", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class ExportOptions(NamedTuple):
    """What was asked for."""

    dtype: WeightType | Literal["auto"] = "auto"
    """auto: see `chosen_types`."""
    max_shard_size: str = "5GB"
    merge_adapter: bool = False
    tokenizer: str | None = None
    """A folder in the place of the model's own tokenizer."""
    check: bool | None = None
    """Load the result and compare; None: where there is memory for it."""


def export_model(path: str, folder: Path, options: ExportOptions) -> tuple[ModelSource, Exported]:
    """Export the model in `path` into `folder`, with a card, and a bar on a terminal.

    Raises:
        ConfigError: an option makes no sense.
        CheckpointError, DataError: see `find_source` and `export_source`.
    """
    max_shard_bytes = parse_size(options.max_shard_size, "--max-shard-size")
    check_unused(folder)
    source = find_source(path)
    if options.merge_adapter and source.lora is None:
        raise ConfigError(f"--merge-adapter: {path} holds no adapter; leave the option out")
    if options.tokenizer is not None:
        tokenizer = Path(options.tokenizer).expanduser()
        if not is_tokenizer(tokenizer):
            raise ConfigError(f"--tokenizer {tokenizer}: no tokenizer.json there")
        source = source._replace(tokenizer_folder=tokenizer)
    dtype = None if options.dtype == "auto" else torch_dtype(options.dtype)
    merged = source.lora is None or options.merge_adapter
    kept = first_type(dtype or (chosen_types(source) if merged else torch.float32))
    family = choose_family(source.config, source.origin.get("model_type"))
    card = card_of(
        source,
        architecture=family.architecture,
        dtype=str(kept).removeprefix("torch."),
        merged=merged,
        only_newer=family.only_newer(source.config.to_transformer()),
    )
    with byte_progress("exporting", 4 * source.config.num_parameters) as advance:
        exported = export_source(
            source,
            folder,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            merge_adapter=options.merge_adapter,
            card=render_card(card),
            check=options.check,
            on_tensor=lambda tensor: advance(4 * tensor.numel()),
        )
    return source, exported


def parse_size(text: str, option: str) -> int:
    """`5GB`, `200MB`, `1.5 TB` or a number of bytes as bytes; units are powers of 1000.

    Raises:
        ConfigError: it is none of these, or less than a byte.
    """
    match = _SIZE.match(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"{option} {text}: not a size; write it as 5GB or 200MB")
    return size
