"""Checks across the sections of an experiment that need no device and read no tokens.

Every error names the keys it is about and the nearest values that work.
"""

import os

from toolkit.data.config import BPETokenizerConfig, ByteTokenizerConfig, TokenizerConfig
from toolkit.data.corpus_info import CorpusInfo
from toolkit.data.tokens.prepared import require_ids
from toolkit.distributed.cpu import asked_threads
from toolkit.errors import ConfigError, DataError
from toolkit.experiment.config import ExperimentConfig
from toolkit.train.config import NO_BASE

BYTE_VOCAB_SIZE = 257
"""256 byte values and the end of a document."""

SEQUENCE = "dataset.sequence_length"
GLOBAL_BATCH = "data_loader.global_batch_size"
MICROBATCH = "train_module.rank_microbatch_size"


def check_experiment(config: ExperimentConfig, world_size: int) -> None:
    """Check that the sections of `config` fit each other on `world_size` ranks.

    Raises:
        ConfigError: batch sizes that do not divide, a sequence longer than the model takes, a
            vocabulary smaller than the tokenizer's, or an adapter on no model; or
            TOOLKIT_NUM_THREADS is no number.
    """
    asked_threads(os.environ)
    _check_sequence(config)
    _check_vocabulary(config)
    _check_batches(config, world_size)
    trainer = config.trainer
    if config.train_module.lora is not None and (
        trainer.load_path is None or trainer.load_strategy == "never"
    ):
        raise ConfigError(NO_BASE)


def check_corpus(config: ExperimentConfig, corpus: CorpusInfo) -> None:
    """Check that `config` can train on this data, as far as manifests tell.

    Raises:
        ConfigError: the model has fewer ids than the data's tokenizer, or the length of the run
            cannot be told.
        DataError: there is less than one global batch.
    """
    trainer = config.trainer
    limits = {"max_duration": trainer.max_duration, "hard_stop": trainer.hard_stop}
    for name, limit in limits.items():
        if (
            limit is not None
            and limit.unit == "epochs"
            and corpus.rows is None
            and not corpus.parts
        ):
            raise ConfigError(
                f"trainer.{name}: {corpus.where} does not say how long an epoch is; use steps or "
                "tokens, or give the class __len__"
            )
    if corpus.vocab_size is not None:
        require_ids(corpus.where, corpus.vocab_size, config.model.vocab_size)
    if corpus.steps_per_epoch(config.data) == 0:
        batch, rows = config.data_loader.global_batch_size, corpus.rows or []
        have = ", ".join(f"{number:,} instances of {length} tokens" for length, number in rows)
        needs = f", and needs {batch // rows[0][0]:,}" if len(rows) == 1 else ""
        raise DataError(
            f"{corpus.where}: not enough data for one batch: {have or 'no instances'} "
            f"({SEQUENCE} {config.dataset.sequence_length}), {GLOBAL_BATCH} is {batch}{needs}; "
            "make one of the two smaller, or give more text"
        )


def rank_microbatch_size(config: ExperimentConfig, world_size: int) -> int:
    """Tokens per forward on one rank: the configured number, or the rank's share of a batch."""
    configured = config.train_module.rank_microbatch_size
    return configured or config.data_loader.global_batch_size // world_size


def gradient_accumulation_steps(config: ExperimentConfig, world_size: int) -> int:
    """Forward and backward passes per optimizer step on one rank."""
    tokens_per_pass = rank_microbatch_size(config, world_size) * world_size
    return config.data_loader.global_batch_size // tokens_per_pass


def known_vocab_size(tokenizer: TokenizerConfig | None) -> int | None:
    """Number of ids of a tokenizer; None where only its files know."""
    if isinstance(tokenizer, ByteTokenizerConfig):
        return BYTE_VOCAB_SIZE
    if isinstance(tokenizer, BPETokenizerConfig):
        return tokenizer.vocab_size
    return None


def _check_sequence(config: ExperimentConfig) -> None:
    length, longest = config.dataset.sequence_length, config.model.max_sequence_length
    if length > longest:
        key = "n_positions" if config.model.to_dict()["type"] == "gpt" else "max_sequence_length"
        raise ConfigError(
            f"{SEQUENCE} {length} is longer than model.{key} {longest}; "
            f"use {longest} or less, or raise model.{key}"
        )


def _check_vocabulary(config: ExperimentConfig) -> None:
    needed = known_vocab_size(config.dataset.tokenizer)
    if needed is not None and needed > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size {config.model.vocab_size} is too small for dataset.tokenizer, "
            f"which has {needed} ids; set model.vocab_size to {needed} or more"
        )


def _check_batches(config: ExperimentConfig, world_size: int) -> None:
    sequence = config.dataset.sequence_length
    batch = config.data_loader.global_batch_size
    microbatch = rank_microbatch_size(config, world_size)
    ranks = f"{world_size} rank" + ("s" if world_size > 1 else "")
    _check_multiple(GLOBAL_BATCH, batch, sequence * world_size, f"{SEQUENCE} {sequence} x {ranks}")
    _check_multiple(MICROBATCH, microbatch, sequence, f"{SEQUENCE} {sequence}")
    evaluation = config.data_loader.eval_batch_size
    if evaluation is not None:
        key = "data_loader.eval_batch_size"
        _check_multiple(key, evaluation, sequence, f"{SEQUENCE} {sequence}")
    unit = microbatch * world_size
    if batch % unit:
        instances = batch // (sequence * world_size)
        works = [n * sequence for n in range(1, instances + 1) if instances % n == 0]
        raise ConfigError(
            f"{GLOBAL_BATCH} {batch} is not divisible by {MICROBATCH} {microbatch} x {ranks} "
            f"= {unit}; nearest that work: {GLOBAL_BATCH} {_nearest_multiples(batch, unit)}, "
            f"or {MICROBATCH} {_around(microbatch, works)}"
        )


def _check_multiple(key: str, value: int, unit: int, meaning: str) -> None:
    if value % unit:
        product = f" = {unit}" if " x " in meaning else ""
        raise ConfigError(
            f"{key} {value} is not divisible by {meaning}{product}; "
            f"nearest that work: {_nearest_multiples(value, unit)}"
        )


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _around(value: int, known: list[int]) -> str:
    below = [v for v in known if v < value][-1:]
    above = [v for v in known if v > value][:1]
    return " or ".join(str(v) for v in below + above)
