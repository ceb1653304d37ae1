"""Which documents and tokens made up one step of a run: the data pipeline, asked backwards.

Batch n of a run is a pure function of the token files and the config, so nothing needs to have been
recorded. No torch.
"""

from pathlib import Path
from typing import Any

import msgspec

from toolkit.checkpoint.folder import read_metadata, saved_steps, step_folder
from toolkit.commands.train import open_run_data
from toolkit.data.corpus import Corpus, changed_data
from toolkit.data.instances.base import DocumentPart, target_mask
from toolkit.data.order.batches import BatchOrder, StreamBatches
from toolkit.data.order.plan import Segment
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.data.prepare.tools.show import DecodedPiece, decode_pieces, sides_of
from toolkit.errors import ConfigError, DataError, ToolkitError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.recorded import found_config
from toolkit.runs.files import RUN_FILES


class BatchInstance(msgspec.Struct, frozen=True):
    instance: int
    """Its number in the training split, from 0."""
    num_tokens: int
    num_targets: int
    """Tokens whose prediction the loss counts."""
    documents: list[DocumentPart]
    text: list[DecodedPiece] | None = None
    """Decoded, for the instances asked for."""
    source: str | None = None
    """Of a mixture: where the instance, which is numbered in it, is from."""


class StepBatch(msgspec.Struct, frozen=True, kw_only=True):
    """The global batch of one step."""

    step: int
    """As in train.jsonl, from 1."""
    epoch: int
    """From 0."""
    batch: int
    """Number in its epoch, from 0."""
    batches_per_epoch: int | None
    """None: the data does not say how long an epoch is, or batches have several sizes."""
    fingerprint: str
    """Of the training tokens."""
    is_checked: bool
    """Whether a checkpoint of the run confirms the fingerprint."""
    sequence_length: int
    """Tokens of a row; instances are cut into rows of this length."""
    num_tokens: int
    num_targets: int
    instances: list[BatchInstance]


def step_batch(
    run_dir: Path, step: int, *, show: int = 1, saved_in: str | None = None
) -> StepBatch:
    """The global batch that step `step` of a run trained on, or will train on; its first `show`
    instances are decoded. `saved_in`: URL of the run, whose checkpoints are there."""
    if show < 0:
        raise ConfigError(f"--show {show}: give a number of instances, 0 or more")
    folder = run_dir.resolve()
    config = found_config(folder)
    corpus = open_run_data(config)
    saved = _saved_data(folder if saved_in is None else saved_in)
    order = _order(config, corpus, saved)
    if saved is not None:
        _check_data(saved, corpus, order, folder)
    _check_step(config, corpus, order, step)
    indices = order.indices(step - 1)[0]
    rows, row_split = corpus.train.read(indices), order.segment(step - 1).row_split
    ids = rows["input_ids"]
    # Nothing predicts the first token of each of the rows that an instance is cut into.
    cut = {key: values.reshape(len(ids) * row_split, -1) for key, values in rows.items()}
    targets = target_mask(cut).reshape(ids.shape)
    folder_of_tokenizer = corpus.train.tokenizer_folder if show else None
    tokenizer = load_tokenizer(folder_of_tokenizer) if folder_of_tokenizer else None
    instances = []
    for row, index in enumerate(indices.tolist()):
        parts = corpus.train.documents(index)
        text = None
        if row < show:
            sides = sides_of(corpus.train, rows, parts, row)
            text = decode_pieces(tokenizer, ids[row], targets[row], parts, sides)
        source, number = corpus.locate(index)
        instances.append(
            BatchInstance(number, ids.shape[1], int(targets[row].sum()), parts, text, source)
        )
    epoch, batch = order.epoch_of(step - 1)
    sizes = {segment.batch_instances for segment in order.segments}
    is_known = corpus.has_known_length and len(sizes) == 1
    return StepBatch(
        step=step,
        epoch=epoch,
        batch=batch,
        batches_per_epoch=order.steps_per_epoch if is_known else None,
        fingerprint=corpus.train.fingerprint,
        is_checked=saved is not None,
        sequence_length=ids.shape[1] // row_split,
        num_tokens=int(ids.size),
        num_targets=int(targets.sum()),
        instances=instances,
    )


def _saved_data(run: Path | str) -> dict[str, Any] | None:
    """State of the data in the newest readable checkpoint of the run."""
    root = f"{run}/{RUN_FILES.checkpoints}" if isinstance(run, str) else run / RUN_FILES.checkpoints
    for step in reversed(saved_steps(root)):
        try:
            extra: dict[str, Any] = read_metadata(
                f"{root}/step{step}" if isinstance(root, str) else step_folder(root, step)
            ).extra
        except ToolkitError:
            continue
        if "data" in extra:
            return {**extra["data"], "step": step}
    return None


def _check_data(saved: dict[str, Any], corpus: Corpus, order: BatchOrder, folder: Path) -> None:
    now: dict[str, Any] = {key: saved.get(key) for key in ("seed", "shuffle", "order")}
    now |= {
        "fingerprint": corpus.train.fingerprint,
        "sequence_length": corpus.train.sequence_length,
    }
    if corpus.stream is not None and isinstance(order, StreamBatches):
        now["sources"] = corpus.stream.identity(order.next_position(saved["batch"]))
    changed = changed_data(saved, now)
    if changed:
        raise DataError(
            f"{folder}: the data is not what the run was trained on: {', '.join(changed)} since "
            f"checkpoint step{saved['step']}; restore the data it was trained on"
        )


def _order(config: ExperimentConfig, corpus: Corpus, saved: dict[str, Any] | None) -> BatchOrder:
    if saved is None:
        return corpus.order
    segments = [Segment(*values) for values in saved["segments"]]
    return corpus.order.continued(segments, saved["batch"], config.data.phases)


def _check_step(config: ExperimentConfig, corpus: Corpus, order: BatchOrder, step: int) -> None:
    duration = config.trainer.max_duration
    last = corpus.batches(order).steps_of(duration.value, duration.unit)
    if not 1 <= step <= last:
        raise ConfigError(
            f"--step {step}: the run has steps 1 to {last} (trainer.max_duration is "
            f"{duration.value} {duration.unit})"
        )
