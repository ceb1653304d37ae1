"""Write a model as a folder that `AutoModelForCausalLM.from_pretrained` reads, or of reward models
`AutoModelForSequenceClassification`.

Everything happens in a temporary folder beside the target, which gets its name last: after the
files have been loaded by `transformers` and gave our logits, where that is asked for.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from toolkit.checkpoint.folder import HF_FOLDER, check_free_space
from toolkit.data.prepare.build.stops import SPECIAL_IDS
from toolkit.data.prepare.tokenizers.companions import read_json
from toolkit.errors import CheckpointError, ToolkitError
from toolkit.hf import compare
from toolkit.hf.adapter import NotForPeftError, export_adapter, merged
from toolkit.hf.choose import choose_family, hf_architecture
from toolkit.hf.family import SCORED
from toolkit.hf.source import (
    ModelSource,
    adapter_base,
    kept_tensors,
    source_tensors,
    source_types,
    watched,
)
from toolkit.hf.tokenizer_files import GENERATION_FILE, add_tokenizer
from toolkit.hf.write_weights import Dtypes, type_on_disk, write_weights
from toolkit.models.config import ModelConfig, TransformerConfig
from toolkit.models.lora_config import LoRAConfig
from toolkit.storage.atomic import PathLike, check_unused, new_output, write_json_atomic
from toolkit.wording import count

log = logging.getLogger(__name__)

CARD_FILE = "README.md"
MAX_SHARD_BYTES = 5_000_000_000


class Exported(NamedTuple):
    folder: Path
    architecture: str
    """Class name of `transformers`; of an adapter, of its base."""
    dtype: torch.dtype
    """Of the weights; where they differ, of the first."""
    weight_files: list[str]
    weight_bytes: int
    has_tokenizer: bool
    is_adapter: bool = False
    not_checked: str | None = None
    """Why it was not loaded and compared; None: it was."""
    only_newer: str | None = None
    """What of the model `transformers` before 5 computes otherwise; None: nothing."""
    left_out: str | None = None
    """What of the model, without which its logits are the same, the class has no place for."""

    @property
    def gives_scores(self) -> bool:
        """Whether it is a reward model."""
        return self.architecture.endswith(SCORED)


def export_hf(
    config: ModelConfig,
    named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: PathLike,
    *,
    tokenizer_folder: PathLike | None = None,
    dtype: Dtypes | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    model_type: str | None = None,
    generation: Mapping[str, Any] | None = None,
    card: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> Exported:
    """Write config.json, generation_config.json, safetensors weights and the tokenizer's files.

    Args:
        named_tensors: all parameters by name (wrappers' prefixes are fine), whole, on any device;
            an iterable is consumed one tensor at a time.
        folder: must not exist, or be empty.
        tokenizer_folder: its tokenizer files are copied, and the tokens that end texts (and start
            them, where the data had such) are recorded; see `special_ids`.
        dtype: of the weights on disk, of all or of each by our name; default: float32, the type of
            master weights.
        max_shard_bytes: largest size of one weight file.
        model_type: of the model that the weights came from; preferred where several fit.
        generation: generation_config.json of that model, kept but for the tokens of the tokenizer.
        card: content of README.md; None: none is written.
        check: called with the finished folder before it gets its name; what it raises leaves
            nothing behind.

    Raises CheckpointError where no class fits, the folder is in use, or tensors are missing,
    unknown or of another shape, and DataError where `tokenizer_folder` holds no tokenizer.
    """
    transformer = config.to_transformer()
    family = choose_family(transformer, model_type)
    check_unused(folder)
    left_out = None
    if transformer.num_mtp_layers:
        left_out = f"{count(transformer.num_mtp_layers, 'module')} for multi-token prediction"
        log.info("%s left out: %s computes logits without", left_out, family.architecture)
    dtypes = torch.float32 if dtype is None else dtype
    first = first_type(dtypes)
    type_name = str(first).removeprefix("torch.")
    items = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    with new_output(folder) as unfinished:
        below = _scored_below(transformer)
        ends = add_tokenizer(unfinished, tokenizer_folder, generation, scored_below=below)
        write_weights(transformer, family, items, unfinished, dtypes, max_shard_bytes)
        settings: dict[str, Any] = {
            "architectures": [family.class_of(transformer)],
            "model_type": family.model_type,
            **family.write_config(transformer),
            **{name: ends.get(name) for name in SPECIAL_IDS},
            # A row of the embedding would not be trained by those who fine-tune the folder. Without
            # it classes that give scores take no batches.
            "pad_token_id": None if below is None else ends.get("pad_token_id"),
            "dtype": type_name,
            # What it was called before transformers 4.56.
            "torch_dtype": type_name,
            **_labels(transformer.num_scores),
        }
        write_json_atomic(unfinished / "config.json", settings, sync=False)
        _write_card(unfinished, card)
        if check is not None:
            check(unfinished)
        return Exported(
            Path(folder),
            family.class_of(transformer),
            first,
            *_weight_files(unfinished),
            has_tokenizer=tokenizer_folder is not None,
            only_newer=family.only_newer(transformer),
            left_out=left_out,
        )


def export_source(
    source: ModelSource,
    folder: PathLike,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    merge_adapter: bool = False,
    card: str | None = None,
    check: bool | None = None,
    on_tensor: Callable[[Tensor], None] = lambda _: None,
) -> Exported:
    """`export_hf` of a run, checkpoint or folder; memory stays at a tensor or two.

    Args:
        dtype: of the weights on disk; default: see `chosen_types`.
        merge_adapter: of an adapter, write the whole model that it makes of its base; else what
            `peft` loads onto that.
        check: load the result with `transformers`, an adapter onto its base, and compare logits and
            token ids with ours; default: when there is memory for it, and the base.
        on_tensor: called with each tensor as it is read.

    Raises what `export_hf` does, and CheckpointError where the comparison finds a difference.
    """
    not_checked = None
    if check is False:
        not_checked = "not asked for"
    elif check is None and not compare.has_memory_to_compare(source.config):
        needed = compare.bytes_to_compare(source.config) / 1e9
        not_checked = f"it takes about {needed:.1f} GB of memory, which are not free"
    if source.lora is not None and not merge_adapter:
        return _export_adapter(source, folder, dtype, card, check, not_checked)
    dtypes = dtype or chosen_types(source)

    def compare_all(written: Path) -> None:
        with _named(written, folder):
            tensors = _rounded(source_tensors(source), dtypes)
            compare.compare_with_transformers(written, source.config, tensors)
            if source.tokenizer_folder is not None:
                compare.check_tokenizer(written)

    exported = export_hf(
        source.config,
        watched(source_tensors(source), on_tensor),
        folder,
        tokenizer_folder=source.tokenizer_folder,
        dtype=dtypes,
        max_shard_bytes=max_shard_bytes,
        model_type=source.origin.get("model_type"),
        generation=generation_of(source),
        card=card,
        check=compare_all if not_checked is None else None,
    )
    return exported._replace(not_checked=not_checked)


def export_checkpoint(
    checkpoint: Path,
    extra: Mapping[str, Any],
    *,
    tokenizer_folder: Path | None,
    weights: str | None = None,
) -> None:
    """Write `hf/` into a checkpoint whose tensors are there: the whole model, or what PEFT loads
    onto an adapter's base. Where `transformers` has no class for the model, that is logged.

    `extra`: see `CheckpointMetadata`; `weights`: the averages to write, see `averaged`.
    """
    config = msgspec.convert(extra["model"], ModelConfig)
    source = ModelSource(str(checkpoint), "checkpoint", config, checkpoint, extra=extra)
    source = source._replace(tokenizer_folder=tokenizer_folder, weights=weights)
    if hf_architecture(config, source.origin.get("model_type")) is None:
        log.info("no transformers class has these parts; %s/ is not written", HF_FOLDER)
    else:
        try:
            export_source(source, checkpoint / HF_FOLDER, check=False)
        except NotForPeftError as error:
            log.info("%s/ is not written: %s", HF_FOLDER, error)


def chosen_types(source: ModelSource) -> Dtypes:
    """The type of exported weights where none is asked for: that which the model had when it was
    imported, else fp32. Weights that are not kept as fp32 were never trained here: each stays what
    it is."""
    types = source_types(source)
    if source.lora is None and any(kept != torch.float32 for kept in types.values()):
        return types
    original = getattr(torch, str(source.origin.get("dtype")), None)
    return original if isinstance(original, torch.dtype) else torch.float32


def first_type(dtypes: Dtypes) -> torch.dtype:
    """The type of the first weight, which config.json names."""
    return dtypes if isinstance(dtypes, torch.dtype) else next(iter(dtypes.values()))


def generation_of(source: ModelSource) -> dict[str, Any] | None:
    """generation_config.json of the model that the weights once came from, where it had one."""
    if source.hf_folder is not None:
        return read_json(source.hf_folder / GENERATION_FILE) or None
    return source.origin.get("generation_config") or None


def _scored_below(transformer: TransformerConfig) -> int | None:
    """The size of the vocabulary of a reward model; None: it is none."""
    return None if transformer.num_scores is None else transformer.vocab_size


def _labels(number: int | None) -> dict[str, Any]:
    """How config.json says that the head gives so many scores."""
    if number is None:
        return {}
    names = {str(n): f"LABEL_{n}" for n in range(number)}
    return {"id2label": names, "label2id": {name: int(n) for n, name in names.items()}}


def _write_card(folder: Path, card: str | None) -> None:
    if card is not None:
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _weight_files(folder: Path) -> tuple[list[str], int]:
    """Their names, and their bytes together."""
    files = sorted(folder.glob("*.safetensors"))
    return [file.name for file in files], sum(file.stat().st_size for file in files)


def _rounded(tensors: Iterable[tuple[str, Tensor]], dtypes: Dtypes) -> Iterator[tuple[str, Tensor]]:
    """The weights as they are read back. A type of its own for each loses nothing."""
    for name, tensor in tensors:
        if isinstance(dtypes, torch.dtype):
            tensor = tensor.to(type_on_disk(name, dtypes))
        yield name, tensor


@contextlib.contextmanager
def _named(written: Path, folder: PathLike) -> Iterator[None]:
    """Errors name the folder as it was asked for."""
    try:
        yield
    except CheckpointError as error:
        text = str(error).replace(str(written), str(folder))
        raise CheckpointError(f"{text}; nothing was exported") from None


def _export_adapter(
    source: ModelSource,
    folder: PathLike,
    dtype: torch.dtype | None,
    card: str | None,
    check: bool | None,
    not_checked: str | None,
) -> Exported:
    assert source.lora is not None
    family = choose_family(source.config, source.origin.get("model_type"))
    with new_output(folder) as unfinished:
        tensors = kept_tensors(source)
        export_adapter(
            source.config, family, source.lora, tensors, unfinished, source.base_name, dtype
        )
        if source.tokenizer_folder is not None:
            below = _scored_below(source.config.to_transformer())
            generation = generation_of(source)
            add_tokenizer(unfinished, source.tokenizer_folder, generation, scored_below=below)
        _write_card(unfinished, card)
        if not_checked is None:
            not_checked = _compare_adapter(source, source.lora, unfinished, folder, dtype, check)
        return Exported(
            Path(folder),
            family.class_of(source.config.to_transformer()),
            dtype or torch.float32,
            *_weight_files(unfinished),
            has_tokenizer=source.tokenizer_folder is not None,
            is_adapter=True,
            not_checked=not_checked,
        )


def _compare_adapter(
    source: ModelSource,
    lora: LoRAConfig,
    written: Path,
    folder: PathLike,
    dtype: torch.dtype | None,
    check: bool | None,
) -> str | None:
    """Compare what `peft` makes of the base and the adapter in `written` with what both are here;
    returns why not, where the base is not at hand and nobody insists."""
    try:
        base = adapter_base(source)
        types = source_types(base)
        check_free_space(written.parent, 4 * base.config.num_parameters)
    except ToolkitError as error:
        if check:
            raise
        return str(error)
    model_type = source.origin.get("model_type")
    with _named(written, folder), tempfile.TemporaryDirectory(dir=written) as place:
        export_hf(base.config, source_tensors(base), place, dtype=types, model_type=model_type)
        adapter = dict(_rounded(kept_tensors(source), dtype or torch.float32))
        tensors = merged(source_tensors(base), adapter, lora)
        compare.compare_with_transformers(Path(place), source.config, tensors, adapter=written)
        if source.tokenizer_folder is not None:
            compare.check_tokenizer(written)
    return None
