"""The tokenizer of a preparation, and what its ids are."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.data.config import (
    BPETokenizerConfig,
    ByteTokenizerConfig,
    DatasetConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.prepare.build.instructions import with_instructions_template
from toolkit.data.prepare.build.parts import Vocabulary, reading_of, split_of
from toolkit.data.prepare.build.workers import Errand
from toolkit.data.prepare.text.columns import row_texts
from toolkit.data.prepare.text.reading import Counts, read_shard
from toolkit.data.prepare.text.sources import Plan, plan_source
from toolkit.data.prepare.tokenizers.auto import settle
from toolkit.data.prepare.tokenizers.choice import build_tokenizer
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.errors import DataError
from toolkit.storage.atomic import write_atomic

MAX_VOCAB_SIZE = 1 << 32
"""Ids are stored in four bytes at most."""
SAMPLE_SHARDS = 256
_TO_CHECK = "not checked yet"
"""Stands in the mark of a tokenizer until `transformers` was asked; then the release does."""


def stored_tokenizer(
    config: DatasetConfig, plan: Plan, folder: Path, note: Callable[[str], None]
) -> Tokenizer | None:
    """The tokenizer of `config`, stored in `folder`, from where workers load it; a mark
    beside it says that it is whole."""
    choice = config.tokenizer
    if choice is None:
        return None
    mark = _mark_of(folder)
    if mark.exists():
        return load_tokenizer(folder)
    if isinstance(choice, BPETokenizerConfig):
        note(f"training a BPE tokenizer of {choice.vocab_size} ids")
    tokenizer = build_tokenizer(choice, lambda size: sample_texts(config, plan, size))
    if config.instructions is not None:
        tokenizer = with_instructions_template(tokenizer, config.instructions)
    tokenizer = tokenizer.with_bos_policy(config.prepend_bos)
    tokenizer.save(folder)
    # Those two are made here, of parts that `transformers` takes as they are.
    is_ours = isinstance(choice, ByteTokenizerConfig | BPETokenizerConfig)
    write_atomic(mark, b"" if is_ours else _TO_CHECK.encode())
    return load_tokenizer(folder)


def tokenizer_check(config: DatasetConfig, folder: Path) -> Errand | None:
    """Asks whether `transformers` gives the ids of the stored tokenizer; None: it is known, or need
    not be. That takes seconds, most of them for imports, and changes no id: only how
    `transformers` is told to read the folder (`settle`)."""
    if config.tokenizer is None or _mark_of(folder).read_text() != _TO_CHECK:
        return None
    where = f"dataset.tokenizer.path: {getattr(config.tokenizer, 'path', '')}"
    return Errand(
        functools.partial(settle, folder, where=where),
        lambda release: write_atomic(_mark_of(folder), release.encode()),
    )


def checked_release(config: DatasetConfig, folder: Path) -> str | None:
    """The release of `transformers` that gives the ids of the stored tokenizer, where it was
    asked."""
    return None if config.tokenizer is None else _mark_of(folder).read_text() or None


def _mark_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.done")


def plan_of_text(config: DatasetConfig, cache_dir: str | None) -> Plan:
    """The shards of the source of `config`; DataError when there is nothing to read."""
    assert config.source is not None
    is_rows = config.instructions is not None
    return plan_source(config.source, config.validation_fraction, rows=is_rows, cache_dir=cache_dir)


def sample_texts(config: DatasetConfig, plan: Plan, sample_bytes: int) -> Iterator[str]:
    """Training text from shards spread over the whole source, `sample_bytes` of UTF-8 at most; from
    each shard an equal share of what is left, the last document cut."""
    reading = reading_of(config, plan.cache_dir)
    number = min(len(plan.shards), SAMPLE_SHARDS)
    left = sample_bytes
    for turn in range(number):
        quota = left // (number - turn)
        if quota == 0:
            continue
        shard = plan.shards[turn * len(plan.shards) // number]
        for piece in read_shard(shard, reading, Counts()):
            if split_of(piece, config.validation_fraction) == "val":
                continue
            text = piece.text if piece.row is None else "\n".join(row_texts(piece.row))
            data = text[:quota].encode("utf-8", "surrogatepass")
            num_bytes = len(data)
            if num_bytes > quota or len(text) > quota:
                # A character that is cut takes the rest of the room.
                text, num_bytes = data[:quota].decode("utf-8", "ignore"), quota
            yield text
            quota -= num_bytes
            left -= num_bytes
            if quota <= 0:
                break


def vocabulary_of(config: DatasetConfig, tokenizer: Tokenizer | None) -> Vocabulary:
    """The ids that `tokenizer` gives, or that the config tells of token files. DataError: the two
    contradict each other, or lack a token that `config` asks for."""
    source = config.source
    size, eos_id, bos_id, fingerprint = 0, None, None, ""
    if tokenizer is not None:
        size, eos_id, bos_id = tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id
        fingerprint = tokenizer.fingerprint
    if isinstance(source, TokenFilesSourceConfig):
        size = _as_told("vocab_size", source.vocab_size, size or None) or 0
        eos_id = _as_told("eos_id", source.eos_id, eos_id)
        fingerprint = fingerprint or f"unknown-{size}-{eos_id}"
        if eos_id is None:
            raise DataError(
                "dataset.source.eos_id: must be given, dataset.tokenizer names no end-of-document "
                "token"
            )
        if size > MAX_VOCAB_SIZE:
            raise DataError(
                f"dataset.source.vocab_size: must be at most {MAX_VOCAB_SIZE}, not {size}"
            )
        if not 0 <= eos_id < size:
            raise DataError(
                f"dataset.source.eos_id: {eos_id} is outside the vocabulary of {size} ids"
            )
    for needed, token_id, name, kind, setting in (
        (config.append_eos, eos_id, "eos_token", "end", "append_eos"),
        (config.prepend_bos, bos_id, "bos_token", "start", "prepend_bos"),
    ):
        if needed and token_id is None:
            raise DataError(
                f"dataset.tokenizer: it names no {kind}-of-document token; set "
                f"dataset.tokenizer.{name} to one of its tokens, or dataset.{setting}=false"
            )
    return Vocabulary(size, eos_id, bos_id, fingerprint)


def _as_told(name: str, told: int | None, of_tokenizer: int | None) -> int | None:
    """What the config tells of token files, which may not contradict their tokenizer."""
    if told is None or of_tokenizer is None or told == of_tokenizer:
        return of_tokenizer if told is None else told
    raise DataError(
        f"dataset.source.{name}: is {told}, but dataset.tokenizer has {of_tokenizer}; leave it "
        "out, or, where the tokens were made by another tokenizer, set dataset.tokenizer to that "
        "or to null"
    )
