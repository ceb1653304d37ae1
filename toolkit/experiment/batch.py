"""Which documents and tokens made up one step of a run: the data pipeline, asked backwards.

Batch n of a run is a pure function of the token files and the config, so nothing needs to have been
recorded. No torch.
"""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.checkpoint.layout import read_metadata, saved_steps, step_folder
from toolkit.data.tokens.prepared import PreparedDataset, dataset_folder, read_prepared
from toolkit.errors import ConfigError, DataError, ToolkitError
from toolkit.experiment.checks import steps_per_epoch
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import find_data, load_run_config
from toolkit.runs.files import RUN_FILES

if TYPE_CHECKING:
    import numpy as np

    from toolkit.data.tokens.tokenizer import Tokenizer


class DocumentPart(msgspec.Struct, frozen=True):
    """The tokens of one document inside an instance."""

    document: int
    """Its number in the training split, from 0."""
    start: int
    """First token, counted from the document's own first."""
    end: int
    """One past the last."""
    num_tokens: int
    """Tokens of the whole document."""


class Piece(msgspec.Struct, frozen=True):
    """Consecutive tokens of one document that are all targets, or none of them."""

    document: int
    is_target: bool
    """Whether the loss counts the prediction of these tokens."""
    num_tokens: int
    text: str


class BatchInstance(msgspec.Struct, frozen=True):
    """One row of the batch."""

    instance: int
    """Its number in the training split, from 0."""
    num_tokens: int
    num_targets: int
    """Tokens whose prediction the loss counts."""
    documents: list[DocumentPart]
    text: list[Piece] | None = None
    """Decoded, for the instances asked for."""


class StepBatch(msgspec.Struct, frozen=True, kw_only=True):
    """The global batch of one step."""

    step: int
    """As in train.jsonl, from 1."""
    epoch: int
    """From 0."""
    batch: int
    """Number in its epoch, from 0."""
    batches_per_epoch: int
    fingerprint: str
    """Of the training tokens."""
    is_checked: bool
    """Whether a checkpoint of the run confirms the fingerprint."""
    num_tokens: int
    num_targets: int
    instances: list[BatchInstance]


def step_batch(run_dir: Path, step: int, *, show: int = 1) -> StepBatch:
    """The global batch that step `step` of a run trained on, or will train on.

    Args:
        show: how many instances, from the first, are decoded.

    Raises:
        RunError: `run_dir` is not a run folder.
        ConfigError: no such step.
        DataError: the run's data is not here, or is not what the run was trained on.
    """
    from toolkit.data.instances.fixed import BatchOrder, TokenDataset

    folder = run_dir.resolve()
    config = find_data(load_run_config(run_dir).config, folder)
    prepared = read_prepared(config.dataset)
    if prepared is None or not prepared.has_split("train"):
        raise DataError(
            f"{dataset_folder(config.dataset)}: the run's prepared data is not there; restore it, "
            "or make it again with `toolkit prepare`"
        )
    _check_step(config, prepared, step)
    if show < 0:
        raise ConfigError(f"--show {show}: give a number of instances, 0 or more")
    dataset = TokenDataset(prepared, "train", config.dataset.sequence_length)
    is_checked = _check_fingerprint(folder, prepared)
    loader = config.data_loader
    order = BatchOrder(
        num_instances=dataset.num_instances,
        batch_instances=loader.global_batch_size // dataset.sequence_length,
        fingerprint=dataset.fingerprint,
        seed=config.seed if loader.seed is None else loader.seed,
        shuffle=loader.shuffle,
    )
    indices = order.indices(step - 1)[0]
    rows = dataset.read(indices)
    targets = target_mask(rows)
    starts = prepared.document_starts("train")
    tokenizer = _tokenizer(prepared) if show else None
    instances = []
    for row, index in enumerate(indices.tolist()):
        parts = document_parts(starts, prepared.num_tokens("train"), index, rows.shape[1])
        text = None
        if tokenizer is not None and row < show:
            text = decode_pieces(tokenizer, rows[row], targets[row], parts)
        instances.append(BatchInstance(index, rows.shape[1], int(targets[row].sum()), parts, text))
    epoch, batch = divmod(step - 1, order.steps_per_epoch)
    return StepBatch(
        step=step,
        epoch=epoch,
        batch=batch,
        batches_per_epoch=order.steps_per_epoch,
        fingerprint=dataset.fingerprint,
        is_checked=is_checked,
        num_tokens=int(rows.size),
        num_targets=int(targets.sum()),
        instances=instances,
    )


def target_mask(rows: "np.ndarray") -> "np.ndarray":
    """Which tokens the loss asks for, bool of the shape `(batch, seq)` of `rows`.

    Labels are shifted inside an instance (`toolkit.train.transformer.shift_labels`), so nothing
    predicts its first token.
    """
    import numpy as np

    mask = np.ones(rows.shape, dtype=bool)
    mask[:, 0] = False
    return mask


def document_parts(
    starts: "np.ndarray", num_tokens: int, instance: int, sequence_length: int
) -> list[DocumentPart]:
    """The documents that instance `instance` has tokens of, in order.

    Args:
        starts: position of each document's first token, ascending.
        num_tokens: of the whole split.
    """
    import numpy as np

    first = instance * sequence_length
    last = first + sequence_length
    number = max(0, int(np.searchsorted(starts, first, side="right")) - 1)
    parts = []
    while number < len(starts) and int(starts[number]) < last:
        begin = int(starts[number])
        end = int(starts[number + 1]) if number + 1 < len(starts) else num_tokens
        if end > max(first, begin):  # documents may be empty
            parts.append(
                DocumentPart(number, max(first, begin) - begin, min(last, end) - begin, end - begin)
            )
        number += 1
    return parts


def decode_pieces(
    tokenizer: "Tokenizer", ids: "np.ndarray", is_target: "np.ndarray", parts: list[DocumentPart]
) -> list[Piece]:
    """The text of one instance, cut where the document or the loss mask changes.

    A character whose bytes lie on both sides of a cut shows as U+FFFD.
    """
    import numpy as np

    pieces, position = [], 0
    for part in parts:
        stop = position + part.end - part.start
        mask = is_target[position:stop]
        changes = np.flatnonzero(np.diff(mask)) + 1
        bounds = [position, *(position + changes).tolist(), stop]
        for begin, end in itertools.pairwise(bounds):
            text = tokenizer.decode(ids[begin:end])
            pieces.append(Piece(part.document, bool(is_target[begin]), end - begin, text))
        position = stop
    return pieces


def _check_step(config: ExperimentConfig, prepared: PreparedDataset, step: int) -> None:
    per_epoch = steps_per_epoch(config, prepared)
    if per_epoch == 0:
        raise DataError(f"{prepared.folder}: holds less than one batch of this run; restore it")
    duration = config.trainer.max_duration
    last = duration.in_steps(config.data_loader.global_batch_size, per_epoch)
    if not 1 <= step <= last:
        raise ConfigError(
            f"--step {step}: the run has steps 1 to {last} (trainer.max_duration is "
            f"{duration.value} {duration.unit})"
        )


def _check_fingerprint(folder: Path, prepared: PreparedDataset) -> bool:
    """Whether the newest readable checkpoint of the run names these tokens; False: there is none.

    Raises:
        DataError: it names others.
    """
    found = prepared.fingerprint("train")
    root = folder / RUN_FILES.checkpoints
    for step in reversed(saved_steps(root)):
        try:
            extra: dict[str, Any] = read_metadata(step_folder(root, step)).extra
        except ToolkitError:
            continue
        trained = extra.get("data_fingerprint")
        if trained is not None and trained != found:
            raise DataError(
                f"{prepared.folder}: is not what the run was trained on: the fingerprint of its "
                f"training tokens is {found}, checkpoint step{step} says {trained}; restore the "
                "data it was trained on"
            )
        if trained is not None:
            return True
    return False


def _tokenizer(prepared: PreparedDataset) -> "Tokenizer":
    from toolkit.data.tokens.tokenizer import load_tokenizer

    return load_tokenizer(prepared.tokenizer_folder)
