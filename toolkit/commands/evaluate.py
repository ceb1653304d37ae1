"""`toolkit eval`: which model on which data, with which settings.

1. The model: a run's newest checkpoint, a step folder, or a folder of `transformers`, which goes
   through our own model where a family fits and through `transformers` where none does.
2. The data: the validation instances that the run was evaluated on, read and added up as during
   training; or files, as one stream of tokens each.
3. The settings: what was asked for, else the run's own.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from toolkit.commands.models import DTYPES, DType, hf_folder_of, pick_device
from toolkit.commands.prepared import open_run_data
from toolkit.commands.runs import folder_of
from toolkit.data.config import (
    DatasetConfig,
    FilesSourceConfig,
    FixedInstancesConfig,
    HFTokenizerConfig,
)
from toolkit.data.evaluation import EvalLoader
from toolkit.data.instances.open import instances_config
from toolkit.data.prepare.text.sources import plan_source
from toolkit.data.prepare.tokenizers.choice import load_hf_tokenizer
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.data.tokens.prepared import read_prepared
from toolkit.errors import CheckpointError, ConfigError, DataError
from toolkit.evaluate.perplexity import causal_lm_loss, evaluate_stream, transformer_loss
from toolkit.evaluate.stream import check_vocabulary, read_documents
from toolkit.experiment.checks import rank_microbatch_size
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.found_data import find_data
from toolkit.experiment.load import load_run_config
from toolkit.hf.loading import load_causal_lm
from toolkit.hf.source import ModelSource, find_source, load_model
from toolkit.runs.status import read_status
from toolkit.train.eval_sums import LossFunction, TokenSums, evaluate_sets, total_sums

MOST_SEQUENCE_TOKENS = 2048
"""Default row of a model without a run; longer contexts are asked for."""
BATCH_TOKENS = 8192
TOTAL = "total"

Notify = Callable[[str], None]


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """One set of tokens."""

    name: str
    loss: float
    """Nats per target token."""
    ppl: float
    bits_per_byte: float | None
    """None where the text's bytes are not known."""
    num_targets: int
    num_bytes: int | None
    """UTF-8 bytes of the targets' text."""
    seconds: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What `evaluate` found."""

    source: str
    """The model as it was given."""
    step: int | None
    """Of the checkpoint; None for a folder of `transformers`."""
    settings: dict[str, Any]
    scores: list[Scores]
    """Of each set; where there are several, of all together, last."""

    def lines(self) -> Iterator[str]:
        """One JSON object for each set."""
        shared = {"source": self.source, "step": self.step, "settings": self.settings}
        for scores in self.scores:
            numbers = {
                key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in msgspec.structs.asdict(scores).items()
            }
            yield msgspec.json.encode(numbers | shared).decode()


class EvalSettings(NamedTuple):
    """What was asked for. None: the run's own, else the default named."""

    sequence_length: int | None = None
    """The model's longest, at most `MOST_SEQUENCE_TOKENS`."""
    stride: int | None = None
    """Tokens between the beginnings of two rows. As long as a row."""
    batch_tokens: int | None = None
    """`BATCH_TOKENS`."""
    dtype: DType | None = None
    """fp32."""
    device: str | None = None
    """The first GPU, else the CPU."""
    tokenizer: str | None = None
    """Folder, file or hub name. The model's own."""
    text_field: str = "text"


def evaluate(
    where: str,
    *,
    files: Sequence[str] = (),
    notify: Notify = lambda line: None,
    **asked: Any,
) -> Evaluation:
    """Loss, perplexity and bits per byte of the model `where`.

    Args:
        files: files, folders and globs, each a set of its own; none: the validation instances of
            the run.
        notify: told, in a line, what is not as one might expect.
        asked: fields of `EvalSettings`.

    Raises:
        CheckpointError: `where` is no model, or is damaged.
        ConfigError: a setting does not fit, or there is nothing to evaluate on.
        DataError: files or the run's data cannot be used.
    """
    settings = EvalSettings(**asked)
    where = str(folder_of(where))
    model = _find(where)
    run = _run_config(model.source)
    if files:
        return _on_files(model, run, files, settings, notify)
    if run is None:
        raise ConfigError(
            f"{where}: not a run, so it has no validation data of its own; give --files PATH"
        )
    return _on_validation(model, run, settings, notify)


class _Model(NamedTuple):
    where: str
    source: ModelSource | None
    """None: of a family that we do not know."""
    hf_folder: Path | None
    reason: str = ""
    """Why `source` is None."""

    @property
    def step(self) -> int | None:
        metadata = self.source.metadata if self.source is not None else None
        return metadata.step if metadata is not None else None


class _Run(NamedTuple):
    config: ExperimentConfig
    dtype: DType
    batch_tokens: int


class _Loaded(NamedTuple):
    loss_of: LossFunction
    vocab_size: int
    longest: int | None


def _find(where: str) -> _Model:
    folder = hf_folder_of(where)
    if folder is None:
        return _Model(where, find_source(where), None)
    try:
        return _Model(where, find_source(folder), folder)
    except CheckpointError as error:
        return _Model(where, None, folder, str(error))


def _run_config(source: ModelSource | None) -> _Run | None:
    """What the run of a checkpoint was evaluated with; None where there is no run."""
    if source is None or source.run is None or source.metadata is None:
        return None
    config = find_data(load_run_config(source.run).config, source.run.resolve())
    status = read_status(source.run)
    precision = status.other.get("precision") if status is not None else None
    batch_tokens = config.data_loader.eval_batch_size or rank_microbatch_size(
        config, source.metadata.world_size
    )
    return _Run(config, "bf16" if precision == "bf16" else "fp32", batch_tokens)


def _load(model: _Model, dtype: DType, device: str | None, notify: Notify) -> _Loaded:
    place = pick_device(device)
    torch.backends.cuda.matmul.allow_tf32 = dtype != "fp32"
    if model.source is None:
        assert model.hf_folder is not None, "else there is a source"
        try:
            theirs = load_causal_lm(model.hf_folder, dtype=DTYPES[dtype]).to(place)
        except CheckpointError as error:
            raise CheckpointError(f"{model.reason}; {error}") from None
        notify(f"evaluated through transformers: {model.reason}")
        config = theirs.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        return _Loaded(causal_lm_loss(theirs, place), config.vocab_size, longest)
    # As training does: fp32 weights, computed on in bf16. Weights of others are rounded once.
    is_ours = model.source.kind != "hf"
    weights = DTYPES["fp32" if is_ours else dtype]
    ours = load_model(model.source, device=place, dtype=weights)
    loss_of = transformer_loss(ours, place, autocast=is_ours and dtype == "bf16")
    config = model.source.config.to_transformer()
    return _Loaded(loss_of, config.vocab_size, config.max_sequence_length)


def _on_validation(model: _Model, run: _Run, settings: EvalSettings, notify: Notify) -> Evaluation:
    for name in ("sequence_length", "stride", "tokenizer"):
        if getattr(settings, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} goes with --files; the run's own validation data is scored as it was "
                "during training"
            )
    dtype = settings.dtype or run.dtype
    batch_tokens = settings.batch_tokens or run.batch_tokens
    corpus = open_run_data(run.config)
    try:
        if not corpus.evaluation:
            raise ConfigError(f"{model.where}: the run has no validation data; give --files PATH")
        _notice_other_data(model, corpus.train.fingerprint, notify)
        loaded = _load(model, dtype, settings.device, notify)
        loaders = {
            name: EvalLoader(
                instances,
                eval_tokens=run.config.data_loader.eval_tokens,
                batch_tokens=batch_tokens,
                rank=0,
                world_size=1,
                vocab_size=corpus.vocab_size or loaded.vocab_size,
            )
            for name, instances in corpus.evaluation.items()
        }
        found = evaluate_sets(loaders, loaded.loss_of)
        assert found is not None, "nothing asked to stop"
    finally:
        corpus.close()
    return Evaluation(
        source=model.where,
        step=model.step,
        settings={
            "data": "validation",
            "sequence_length": run.config.dataset.sequence_length,
            "eval_tokens": run.config.data_loader.eval_tokens,
            "batch_tokens": batch_tokens,
            "dtype": dtype,
        },
        scores=[_scores(name, sums) for name, sums in found.items()],
    )


def _on_files(
    model: _Model,
    run: _Run | None,
    files: Sequence[str],
    settings: EvalSettings,
    notify: Notify,
) -> Evaluation:
    sources = {path: FilesSourceConfig(paths=[path], text_field=settings.text_field)
               for path in files}  # fmt: skip
    with _option_names():
        for source in sources.values():
            for line in plan_source(source, 0.0).notes():
                notify(line)
        tokenizer = _tokenizer(model, settings.tokenizer)
    dataset = run.config.dataset if run is not None else None
    append_eos = True if dataset is None else _appends_eos(dataset)
    mask_documents = dataset is not None and _masks_documents(dataset)
    dtype: DType = settings.dtype or (run.dtype if run is not None else "fp32")
    loaded = _load(model, dtype, settings.device, notify)
    length, stride = _lengths(settings, dataset, loaded.longest)
    batch_tokens = settings.batch_tokens or (run.batch_tokens if run is not None else BATCH_TOKENS)
    found = {}
    for path, source in sources.items():
        with _option_names():
            chunks = read_documents(
                source, tokenizer, prepend_bos=tokenizer.adds_bos, append_eos=append_eos
            )
            try:
                found[path] = evaluate_stream(
                    check_vocabulary(chunks, loaded.vocab_size, path),
                    loaded.loss_of,
                    bytes_of=tokenizer.token_bytes,
                    sequence_length=length,
                    stride=stride,
                    batch_tokens=batch_tokens,
                    mask_documents=mask_documents,
                )
            except DataError as error:
                where = "" if path in str(error) else f"{path}: "
                raise DataError(f"{where}{error}") from None
    if len(found) > 1:
        found[TOTAL] = total_sums(found.values())
    return Evaluation(
        source=model.where,
        step=model.step,
        settings={
            "data": "files",
            "sequence_length": length,
            "stride": stride,
            "batch_tokens": batch_tokens,
            "dtype": dtype,
            "mask_documents": mask_documents,
            "prepend_bos": tokenizer.adds_bos,
            "append_eos": append_eos and tokenizer.eos_id is not None,
        },
        scores=[_scores(name, sums) for name, sums in found.items()],
    )


def _lengths(
    settings: EvalSettings, dataset: DatasetConfig | None, longest: int | None
) -> tuple[int, int]:
    """Tokens of a row, and between the beginnings of two."""
    length = settings.sequence_length
    if length is None:
        default = dataset.sequence_length if dataset is not None else MOST_SEQUENCE_TOKENS
        length = min(default, longest or default)
    if length < 2:
        raise ConfigError(f"--sequence-length {length}: a row needs 2 tokens or more")
    if longest is not None and length > longest:
        raise ConfigError(
            f"--sequence-length {length}: the model takes at most {longest} tokens; give that or "
            "less"
        )
    stride = length if settings.stride is None else settings.stride
    if not 1 <= stride <= length:
        raise ConfigError(
            f"--stride {stride}: rows of {length} tokens can begin 1 to {length} tokens apart"
        )
    return length, stride


def _tokenizer(model: _Model, asked: str | None) -> Tokenizer:
    if asked is not None:
        return load_hf_tokenizer(HFTokenizerConfig(path=asked))
    source = model.source
    if source is not None and source.tokenizer_folder is not None:
        return load_tokenizer(source.tokenizer_folder)
    if model.hf_folder is not None:
        with contextlib.suppress(DataError):
            return load_hf_tokenizer(HFTokenizerConfig(path=str(model.hf_folder)))
    raise DataError(f"{model.where}: no tokenizer here; give one with --tokenizer PATH")


def _appends_eos(dataset: DatasetConfig) -> bool:
    prepared = read_prepared(dataset) if dataset.mix is None and dataset.custom is None else None
    return prepared.manifest.append_eos if prepared is not None else dataset.append_eos


def _masks_documents(dataset: DatasetConfig) -> bool:
    kind = instances_config(dataset, evaluation=True)
    return not isinstance(kind, FixedInstancesConfig) or kind.intra_document_masking


def _notice_other_data(model: _Model, fingerprint: str, notify: Notify) -> None:
    metadata = model.source.metadata if model.source is not None else None
    saved = (metadata.extra.get("data") or {}) if metadata is not None else {}
    if saved.get("fingerprint") not in (None, fingerprint):
        notify("the run's data is not what it was when the checkpoint was saved")


def _scores(name: str, sums: TokenSums) -> Scores:
    numbers = sums.numbers()
    return Scores(
        name=name,
        loss=numbers["loss"],
        ppl=numbers["ppl"],
        bits_per_byte=numbers.get("bits_per_byte"),
        num_targets=numbers["num_targets"],
        num_bytes=round(sums.num_bytes) or None,
        seconds=numbers["seconds"],
    )


@contextlib.contextmanager
def _option_names() -> Iterator[None]:
    """Errors of the data layer name config keys; here, options stand for them."""
    try:
        yield
    except DataError as error:
        text = str(error).replace(", or set dataset.source.encoding_errors=replace", "")
        for key, option in (
            ("dataset.source.paths", "--files"),
            ("dataset.source.text_field", "--text-field"),
            ("dataset.tokenizer.path", "--tokenizer"),
        ):
            text = text.replace(key, option)
        raise DataError(text) from None
