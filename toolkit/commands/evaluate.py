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

from toolkit.commands.models import DTYPES, DType, WeightType, hf_folder_of, pick_device
from toolkit.commands.runs.named import folder_of
from toolkit.commands.train import open_run_data
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
from toolkit.distributed.devices import compute_dtype
from toolkit.errors import CheckpointError, ConfigError, DataError
from toolkit.evaluate.perplexity import (
    causal_lm_loss,
    computing_in,
    evaluate_stream,
    transformer_loss,
)
from toolkit.evaluate.stream import check_vocabulary, read_documents
from toolkit.experiment.checks import rank_microbatch_size
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.recorded import found_config
from toolkit.hf.loading import load_causal_lm
from toolkit.hf.source import ModelSource, averaged, find_source, load_model
from toolkit.runs.status import read_status
from toolkit.train.eval_sums import LossFunction, TokenSums, evaluate_sets, total_sums

MOST_SEQUENCE_TOKENS = 2048
"""Default row of a model without a run; longer contexts are asked for."""
BATCH_TOKENS = 8192

_OPTIONS = {
    ", or set dataset.source.encoding_errors=replace": "",
    "dataset.source.paths": "--files",
    "dataset.source.text_field": "--text-field",
    "dataset.tokenizer.path": "--tokenizer",
}
Notify = Callable[[str], None]


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """One set of tokens."""

    name: str
    loss: float
    """Nats per target token."""
    ppl: float
    bits_per_byte: float | None = None
    """None where the text's bytes are not known."""
    num_targets: int
    num_bytes: int | None
    """UTF-8 bytes of the targets' text."""
    seconds: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What `evaluate` found."""

    source: str
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
    """What was asked for. None: the run's own; else the model's longest sequence, at most
    `MOST_SEQUENCE_TOKENS`, a stride of a whole row, `BATCH_TOKENS` and fp32."""

    sequence_length: int | None = None
    stride: int | None = None
    """Tokens between the beginnings of two rows."""
    batch_tokens: int | None = None
    dtype: DType | None = None
    device: str | None = None
    tokenizer: str | None = None
    """Folder, file or hub name."""
    text_field: str = "text"
    weights: str | None = None
    """The averages that stand in the place of the weights: "ema"."""


def evaluate(
    where: str, *, files: Sequence[str] = (), notify: Notify = lambda line: None, **asked: Any
) -> Evaluation:
    """Loss, perplexity and bits per byte of the model `where`, with `asked` as in `EvalSettings`.

    Each of `files` (files, folders, globs) is a set of its own; without them, the validation
    instances of the run are scored. `notify` is told, in a line, what is not as one might expect.
    """
    model = find_model(str(folder_of(where)), EvalSettings(**asked))
    if not files and model.run is None:
        raise ConfigError(
            f"{model.where}: not a run, so it has no validation data of its own; give --files PATH"
        )
    _check_text(model, has_files=bool(files))
    found, settings = _on_files(model, files, notify) if files else _on_validation(model, notify)
    settings |= model.averages
    scores = [
        Scores(name=name, num_bytes=round(sums.num_bytes) or None, **sums.numbers())
        for name, sums in found.items()
    ]
    step = model.source.metadata.step if model.source and model.source.metadata else None
    return Evaluation(source=model.where, step=step, settings=settings, scores=scores)


class FoundModel(NamedTuple):
    """A model on disk, and what it would be measured with."""

    where: str
    source: ModelSource | None
    """None: of a family that we do not know."""
    hf_folder: Path | None
    reason: str
    """Why `source` is None."""
    run: ExperimentConfig | None
    """Of a checkpoint: the config of its run, with its data found."""
    dtype: WeightType
    batch_tokens: int
    settings: EvalSettings

    @property
    def averages(self) -> dict[str, str]:
        """Which averages stand in the place of its weights, as a setting that is told."""
        chosen = self.source.weights if self.source is not None else None
        return {} if chosen is None else {"weights": chosen}

    def load(self, notify: Notify) -> tuple[LossFunction, int, int | None]:
        """Its loss, vocabulary and longest sequence."""
        loaded = self.open(notify)
        if loaded.is_ours:
            loss_of = transformer_loss(loaded.model, loaded.device, computed_in=loaded.computed_in)
        else:
            loss_of = causal_lm_loss(loaded.model, loaded.device)
        return loss_of, loaded.vocab_size, loaded.longest

    def open(self, notify: Notify) -> "Loaded":
        """The model on its device."""
        place = pick_device(self.settings.device)
        torch.backends.cuda.matmul.allow_tf32 = self.dtype != "fp32"
        if self.source is None:
            assert self.hf_folder is not None, "else there is a source"
            try:
                theirs = load_causal_lm(self.hf_folder, dtype=DTYPES[self.dtype]).to(place)
            except CheckpointError as error:
                raise CheckpointError(f"{self.reason}; {error}") from None
            notify(f"evaluated through transformers: {self.reason}")
            config = theirs.config.get_text_config()
            longest = getattr(config, "max_position_embeddings", None)
            return Loaded(theirs, place, config.vocab_size, longest)
        if few_bits := _few_bits(self.run):
            notify(
                "the weights are exact here; training, and its metrics/eval.jsonl, has "
                f"{few_bits}, so that numbers differ a little"
            )
        # As training does: fp32 weights, computed on in the run's precision. Those of others are
        # rounded once.
        is_ours = self.source.kind != "hf"
        ours = load_model(
            self.source, device=place, dtype=DTYPES["fp32" if is_ours else self.dtype]
        )
        transformer = self.source.config.to_transformer()
        return Loaded(
            ours,
            place,
            transformer.vocab_size,
            transformer.max_sequence_length,
            is_ours=True,
            computed_in=compute_dtype(self.dtype) if is_ours else None,
        )


def _few_bits(run: ExperimentConfig | None) -> str | None:
    """What a run computes with in few bits, and nobody else does."""
    if run is None:
        return None
    lora, float8 = run.train_module.lora, run.train_module.float8_config
    if lora is not None and lora.quantize_base is not None:
        return f"the base in {lora.quantize_base}"
    return None if float8 is None else f"{float8.recipe} float8"


class Loaded(NamedTuple):
    """A model in evaluation mode."""

    model: Any
    device: torch.device
    vocab_size: int
    longest: int | None
    """Most tokens of a row; None: not known."""
    is_ours: bool = False
    """Else one of `transformers`."""
    computed_in: torch.dtype | None = None
    """Over fp32 weights; None: in the type of the weights."""

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(rows, seq)` to logits `(rows, seq, vocab)`."""
        if not self.is_ours:
            return self.model(input_ids=ids, use_cache=False).logits
        with computing_in(self.computed_in, self.device):
            return self.model(ids)


def find_model(where: str, settings: EvalSettings) -> FoundModel:
    """The model `where`, and the settings of its run where it has one."""
    folder, source, reason, run = hf_folder_of(where), None, "", None
    dtype: WeightType = "fp32"
    batch_tokens = BATCH_TOKENS
    try:
        source = find_source(where if folder is None else folder)
    except CheckpointError as error:
        if folder is None:
            raise
        reason = str(error)
    if settings.weights is not None:
        if source is None:
            raise CheckpointError(f"--weights {settings.weights}: {reason}")
        source = averaged(source, settings.weights)
    if source is not None and source.run is not None and source.metadata is not None:
        run = found_config(source.run)
        status = read_status(source.run)
        trained_in: Any = status.other.get("precision") if status else None
        dtype = trained_in if trained_in in DTYPES else "fp32"
        batch_tokens = run.data_loader.eval_batch_size or rank_microbatch_size(
            run, source.metadata.world_size
        )
    dtype, batch_tokens = settings.dtype or dtype, settings.batch_tokens or batch_tokens
    return FoundModel(where, source, folder, reason, run, dtype, batch_tokens, settings)


def _check_text(model: FoundModel, *, has_files: bool) -> None:
    """Raise ConfigError where there is no text, or no model of text, to be scored."""
    scored = model.source is not None and model.source.config.to_transformer().num_scores
    objective = None if model.run is None else model.run.train_module.objective
    if scored or (not has_files and objective is not None and objective.unit is not None):
        what = "a reward model, not a language model" if scored else "trained on preferences"
        advice = "" if scored else ", or give --files PATH to score text"
        raise ConfigError(
            f"{model.where}: {what}; its accuracy on pairs is in metrics/eval.jsonl of the run"
            f"{advice}"
        )


Found = tuple[dict[str, TokenSums], dict[str, Any]]
"""Sums by the name of their set, and the settings that they were made with."""


def _on_validation(model: FoundModel, notify: Notify) -> Found:
    for name in ("sequence_length", "stride", "tokenizer"):
        if getattr(model.settings, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} goes with --files; the run's own validation data is scored as it was "
                "during training"
            )
    assert model.run is not None, "else there are files"
    assert model.source is not None, "a run has one"
    assert model.source.metadata is not None, "a checkpoint has it"
    eval_tokens = model.run.data_loader.eval_tokens
    corpus = open_run_data(model.run)
    try:
        if not corpus.evaluation:
            raise ConfigError(f"{model.where}: the run has no validation data; give --files PATH")
        saved = model.source.metadata.extra.get("data") or {}
        if saved.get("fingerprint") not in (None, corpus.train.fingerprint):
            notify("the run's data is not what it was when the checkpoint was saved")
        loss_of, vocab_size, _ = model.load(notify)
        loaders = {
            name: EvalLoader(
                instances,
                eval_tokens=eval_tokens,
                batch_tokens=model.batch_tokens,
                rank=0,
                world_size=1,
                vocab_size=corpus.vocab_size or vocab_size,
                is_held_out=name not in corpus.eval_sets,
            )
            for name, instances in corpus.evaluation.items()
        }
        found = evaluate_sets(loaders, loss_of)
        assert found is not None, "nothing asked to stop"
    finally:
        corpus.close()
    return found, {
        "data": "validation",
        "sequence_length": model.run.dataset.sequence_length,
        "eval_tokens": eval_tokens,
        "batch_tokens": model.batch_tokens,
        "dtype": model.dtype,
    }


def _on_files(model: FoundModel, files: Sequence[str], notify: Notify) -> Found:
    settings, dataset = model.settings, model.run.dataset if model.run is not None else None
    sources = {
        path: FilesSourceConfig(paths=[path], text_field=settings.text_field) for path in files
    }
    with _option_names():
        for source in sources.values():
            for line in plan_source(source, 0.0).listing.notes():
                notify(line)
        tokenizer = tokenizer_of(model)
    append_eos, mask_documents = True, False
    if dataset is not None:
        is_one = dataset.mix is None and dataset.custom is None
        prepared = read_prepared(dataset) if is_one else None
        append_eos = prepared.manifest.append_eos if prepared is not None else dataset.append_eos
        kind = instances_config(dataset, evaluation=True)
        mask_documents = not isinstance(kind, FixedInstancesConfig) or kind.intra_document_masking
    loss_of, vocab_size, longest = model.load(notify)
    length, stride = row_lengths(settings, dataset, longest)
    found: dict[str, TokenSums] = {}
    for path, source in sources.items():
        with _option_names():
            chunks = read_documents(
                source, tokenizer, prepend_bos=tokenizer.adds_bos, append_eos=append_eos
            )
            try:
                found[path] = evaluate_stream(
                    check_vocabulary(chunks, vocab_size, path),
                    loss_of,
                    bytes_of=tokenizer.token_bytes,
                    sequence_length=length,
                    stride=stride,
                    batch_tokens=model.batch_tokens,
                    mask_documents=mask_documents,
                )
            except DataError as error:
                where = "" if path in str(error) else f"{path}: "
                raise DataError(f"{where}{error}") from None
    if len(found) > 1:
        found["total"] = total_sums(found.values())
    return found, {
        "data": "files",
        "sequence_length": length,
        "stride": stride,
        "batch_tokens": model.batch_tokens,
        "dtype": model.dtype,
        "mask_documents": mask_documents,
        "prepend_bos": tokenizer.adds_bos,
        "append_eos": append_eos and tokenizer.eos_id is not None,
    }


def row_lengths(
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


def tokenizer_of(model: FoundModel) -> Tokenizer:
    """The one asked for, else the model's; DataError: there is none."""
    if (asked := model.settings.tokenizer) is not None:
        return load_hf_tokenizer(HFTokenizerConfig(path=asked))
    source = model.source
    if source is not None and source.tokenizer_folder is not None:
        return load_tokenizer(source.tokenizer_folder)
    if model.hf_folder is not None:
        with contextlib.suppress(DataError):
            return load_hf_tokenizer(HFTokenizerConfig(path=str(model.hf_folder)))
    raise DataError(f"{model.where}: no tokenizer here; give one with --tokenizer PATH")


@contextlib.contextmanager
def _option_names() -> Iterator[None]:
    """Errors of the data layer name config keys; here, options stand for them."""
    try:
        yield
    except DataError as error:
        text = str(error)
        for key, option in _OPTIONS.items():
            text = text.replace(key, option)
        raise DataError(text) from None
