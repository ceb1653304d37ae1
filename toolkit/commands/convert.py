"""`toolkit convert-hf` and `toolkit export-hf`: models of the field in, with a config, and out."""

import fnmatch
import re
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from toolkit.commands.card import card_of
from toolkit.commands.models import DTYPES, WeightType
from toolkit.commands.runs.named import folder_of
from toolkit.config.paths import local_path
from toolkit.data.config import DataLoaderConfig, DatasetConfig, HFTokenizerConfig
from toolkit.data.tokens.prepared import TOKENIZER_FOLDER
from toolkit.errors import CheckpointError, ConfigError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.sources import FINETUNE_FILE
from toolkit.hf.choose import choose_family
from toolkit.hf.convert import Conversion, ConvertOptions, convert_hf
from toolkit.hf.export import Exported, chosen_types, export_source, first_type
from toolkit.hf.licenses import read_license
from toolkit.hf.loading import fetch_model, is_hub_name, name_in_cache
from toolkit.hf.model_card import render_card
from toolkit.hf.push import check_push, push_folder
from toolkit.hf.source import ModelSource, averaged, find_source, is_tokenizer
from toolkit.optim.base import GroupOverride
from toolkit.optim.config import AdamWConfig
from toolkit.optim.schedules import CosineConfig
from toolkit.runs.config import RunConfig
from toolkit.storage.atomic import check_unused, write_atomic
from toolkit.storage.progress import byte_progress
from toolkit.train.config import Duration, TrainerConfig, TransformerTrainModuleConfig

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?\Z", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_LONGEST = 2048
_SEQUENCES = 32
_LARGE = 3_000_000_000
_WITHOUT_DECAY = ("*norm*", "*bias", "embeddings.*")


def convert_model(
    source: str,
    out: str,
    *,
    revision: str | None,
    tokenizer: str | None,
    chat_template: str | None,
    **options: Any,
) -> Conversion:
    """Convert a folder or a model of the hub; options as in `ConvertOptions`."""
    target, folder = local_path(out, "OUT"), Path(source).expanduser()
    if is_hub_name(source):
        folder = fetch_model(source, revision=revision)
    elif revision is not None:
        raise CheckpointError(f"--revision {revision}: {source} is a local folder, not a hub name")
    is_named = not folder.name or is_hub_name(source)
    return convert_hf(
        folder,
        target,
        name=source if is_named else name_in_cache(folder) or folder.resolve().name,
        revision=revision,
        options=ConvertOptions(
            tokenizer=Path(tokenizer).expanduser() if tokenizer else None,
            chat_template=Path(chat_template).expanduser() if chat_template else None,
            **options,
        ),
        add=lambda conversion, unfinished: write_atomic(
            unfinished / FINETUNE_FILE, finetune_config(conversion).to_json()
        ),
    )


def finetune_config(conversion: Conversion) -> ExperimentConfig:
    """A complete config that trains all weights for one epoch; only the text is missing.

    Batches are 32 sequences of the model's length, at most 2048 tokens. Weight decay leaves out
    norms, biases and embeddings.
    """
    model, folder = conversion.config, conversion.folder
    tokenizer = conversion.tokenizer
    length = min(_LONGEST, model.max_sequence_length)
    at_once = 1 if model.num_parameters > _LARGE else 4
    spared = [
        pattern
        for pattern in _WITHOUT_DECAY
        if any(fnmatch.fnmatchcase(name, pattern) for name in conversion.parameter_names)
    ]
    how = "give --dataset.source" if tokenizer else "give --dataset.tokenizer and --dataset.source"
    return ExperimentConfig(
        description=f"Fine-tuning of {folder.name} ({conversion.model_type}); {how}",
        run=RunConfig(experiment=folder.name),
        model=model,
        dataset=DatasetConfig(
            dataset_config=folder.name,
            tokenizer=HFTokenizerConfig(path=str(folder / TOKENIZER_FOLDER)) if tokenizer else None,
            prepend_bos=tokenizer is not None and tokenizer.starts_with_bos,
            sequence_length=length,
        ),
        data_loader=DataLoaderConfig(global_batch_size=_SEQUENCES * length),
        train_module=TransformerTrainModuleConfig(
            rank_microbatch_size=at_once * length,
            optim=AdamWConfig(
                lr=finetuning_lr(model.num_active_parameters),
                weight_decay=0.1,
                group_overrides=(GroupOverride(params=spared, opts={"weight_decay": 0.0}),),
            ),
            scheduler=CosineConfig(units="steps", warmup=20, alpha_f=0.1),
        ),
        trainer=TrainerConfig(
            max_duration=Duration(value=1, unit="epochs"),
            load_path=str(folder),
            load_weights_only=True,
            load_strategy="always",
        ),
    )


def finetuning_lr(num_parameters: int) -> float:
    """A peak learning rate to start from, for a model with so many parameters at work on a token.

    2e-5 at 7B, as in the supervised fine-tuning of Llama 2 (Touvron et al. 2023, section 3.1); for
    other sizes a rule of thumb of ours: as 1 / sqrt(parameters), between 1e-5 and 1e-4.
    """
    lr = 2e-5 * (7e9 / num_parameters) ** 0.5
    return float(f"{min(max(lr, 1e-5), 1e-4):.1e}")


def export_model(
    where: str,
    out: str,
    *,
    dtype: WeightType | Literal["auto"] = "auto",
    max_shard_size: str = "5GB",
    merge_adapter: bool = False,
    tokenizer: str | None = None,
    weights: str | None = None,
    check: bool | None = None,
    license: str | None = None,
    push_to: str | None = None,
) -> tuple[ModelSource, Exported]:
    """Export the model `where` into the folder `out`, with a card, and a bar on a terminal.

    `dtype` auto is that of `chosen_types`. The result is loaded and compared where `check` says so,
    or is None and there is memory for it. `license` (see `read_license`) is what the card names
    instead of the base model's; `push_to` is where on the hub the folder is to go (see `push`),
    which is checked before anything is written.
    """
    folder = local_path(out, "OUT")
    if push_to is not None:
        check_push(push_to)
    terms = None if license is None else read_license(license)
    max_shard_bytes = parse_size(max_shard_size, "--max-shard-size")
    check_unused(folder)
    path = str(folder_of(where))
    source = find_source(path)
    if weights is not None:
        source = averaged(source, weights)
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
        architecture=family.class_of(source.config.to_transformer()),
        dtype=str(kept).removeprefix("torch."),
        merged=merged,
        only_newer=family.only_newer(source.config.to_transformer()),
    )
    if terms is not None:
        card = msgspec.structs.replace(card, **terms)
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


def push(source: ModelSource, exported: Exported, repo: str, *, private: bool = False) -> str:
    """Upload what `export_model` wrote to the repository `repo` of the hub; returns its address.
    Raises CheckpointError, as `push_folder` does."""
    step = f", step {source.metadata.step}" if source.metadata is not None else ""
    what = "adapter" if exported.is_adapter else "model"
    message = f"Upload {what} ({exported.architecture}{step})"
    return push_folder(exported.folder, repo, private=private, message=message)


def parse_size(text: str, option: str) -> int:
    """`5GB`, `200MB`, `1.5 TB` or a number of bytes as bytes; units are powers of 1000."""
    match = _SIZE.match(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"{option} {text}: not a size; write it as 5GB or 200MB")
    return size
