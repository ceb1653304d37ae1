"""`toolkit export-hf`: from a run, a checkpoint or a folder to one that `transformers` loads."""

import re
from pathlib import Path
from typing import Literal

import torch

from toolkit.commands.model_facts import card_of
from toolkit.commands.models import DTYPES, WeightType
from toolkit.commands.runs import folder_of
from toolkit.config.paths import local_path
from toolkit.errors import ConfigError
from toolkit.hf.choose import choose_family
from toolkit.hf.export import Exported, chosen_types, export_source, first_type
from toolkit.hf.model_card import render_card
from toolkit.hf.source import ModelSource, find_source, is_tokenizer
from toolkit.storage.atomic import check_unused
from toolkit.storage.progress import byte_progress

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?\Z", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export_model(
    where: str,
    out: str,
    *,
    dtype: WeightType | Literal["auto"] = "auto",
    max_shard_size: str = "5GB",
    merge_adapter: bool = False,
    tokenizer: str | None = None,
    check: bool | None = None,
) -> tuple[ModelSource, Exported]:
    """Export the model `where` into the folder `out`, with a card, and a bar on a terminal.

    Args:
        dtype: auto: see `chosen_types`.
        tokenizer: a folder in the place of the model's own tokenizer.
        check: load the result and compare; None: where there is memory for it.

    Raises:
        ConfigError: an option makes no sense.
        CheckpointError, DataError: see `find_source` and `export_source`.
    """
    folder = local_path(out, "OUT")
    max_shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    check_unused(folder)
    path = str(folder_of(where))
    source = find_source(path)
    if merge_adapter and source.lora is None:
        raise ConfigError(f"--merge-adapter: {path} holds no adapter; leave the option out")
    if tokenizer is not None:
        other = Path(tokenizer).expanduser()
        if not is_tokenizer(other):
            raise ConfigError(f"--tokenizer {other}: no tokenizer.json there")
        source = source._replace(tokenizer_folder=other)
    kind = None if dtype == "auto" else DTYPES[dtype]
    merged = source.lora is None or merge_adapter
    kept = first_type(kind or (chosen_types(source) if merged else torch.float32))
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
            dtype=kind,
            max_shard_bytes=max_shard_bytes,
            merge_adapter=merge_adapter,
            card=render_card(card),
            check=check,
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
