"""`toolkit convert-hf`: a model of the field as a checkpoint, and a config that trains it."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from toolkit.config.paths import local_path
from toolkit.data.config import DataLoaderConfig, DatasetConfig, HFTokenizerConfig
from toolkit.data.tokens.prepared import TOKENIZER_FOLDER
from toolkit.errors import CheckpointError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.sources import FINETUNE_FILE
from toolkit.hf.convert import Conversion, ConvertOptions, convert_hf
from toolkit.hf.loading import fetch_model, is_hub_name, name_in_cache
from toolkit.optim.config import AdamWConfig, GroupOverride
from toolkit.optim.schedules import CosineConfig
from toolkit.runs.config import RunConfig
from toolkit.storage.atomic import write_atomic
from toolkit.train.config import Duration, TrainerConfig, TransformerTrainModuleConfig

_LONGEST = 2048
_SEQUENCES = 32
_LARGE = 3_000_000_000
_WITHOUT_DECAY = ("*norm*", "*bias", "embeddings.*")


def convert_model(
    source: str,
    out: str,
    *,
    revision: str | None = None,
    validate: bool | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    add_tokens: Sequence[str] = (),
    chat_template: str | None = None,
) -> Conversion:
    """Convert a folder or a model of the hub; options as in `ConvertOptions`.

    Args:
        revision: branch, tag or commit on the hub.

    Raises:
        ToolkitError: see `convert_hf`; nothing is left at `out`.
    """
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
            validate=validate,
            tokenizer=Path(tokenizer).expanduser() if tokenizer else None,
            vocab_size=vocab_size,
            add_tokens=add_tokens,
            chat_template=Path(chat_template).expanduser() if chat_template else None,
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
