"""Where weights come from: a run, a checkpoint, or a folder of `transformers`.

Whatever it is, its weights come out under our names, one whole CPU tensor at a time.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from toolkit.checkpoint.find import find_checkpoint
from toolkit.checkpoint.folder import (
    CALLBACK_PREFIX,
    HF_CONFIG_FILE,
    HF_FOLDER,
    METADATA_FILE,
    MODEL_PREFIX,
    TENSORS_FOLDER,
    CheckpointMetadata,
    kind_of,
    read_metadata,
)
from toolkit.checkpoint.tensors import iterate_tensors, stored_shapes, stored_types
from toolkit.config.interpolation import fill
from toolkit.data.config import DataConfig
from toolkit.data.corpus_info import data_places
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from toolkit.data.tokens.prepared import TOKENIZER_FOLDER
from toolkit.errors import CheckpointError, ToolkitError
from toolkit.hf.adapter import merged
from toolkit.hf.import_weights import ImportPlan
from toolkit.hf.read_config import read_hf_config
from toolkit.hf.weights import HFWeights
from toolkit.models.config import ModelConfig
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.router import Router
from toolkit.models.transformer import Transformer
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import run_of_checkpoint
from toolkit.storage.atomic import PathLike
from toolkit.storage.foreign import guard, read_json

log = logging.getLogger(__name__)


class ModelSource(NamedTuple):
    """One model on disk; see `find_source`."""

    where: str
    """For messages: as it was given."""
    kind: Literal["run", "checkpoint", "hf"]
    config: ModelConfig
    checkpoint: Path | None = None
    """The step folder; None for `hf`."""
    hf_folder: Path | None = None
    """The folder of `transformers`; None for the others."""
    tokenizer_folder: Path | None = None
    """What `load_tokenizer` reads; None where no tokenizer is known, or it is gone."""
    metadata: CheckpointMetadata | None = None
    """Of `checkpoint`."""
    run: Path | None = None
    """The run folder that the checkpoint lies in."""
    extra: Mapping[str, Any] = MappingProxyType({})
    """Of `metadata`."""
    weights: str | None = None
    """The averages that stand in the place of trained weights; see `averaged`."""

    @property
    def origin(self) -> dict[str, Any]:
        """What `toolkit convert-hf` recorded of the model that the weights once came from (`name`,
        `model_type`, `dtype`); empty where there was none."""
        return self.extra.get("source") or self.base.get("source") or {}

    @property
    def base(self) -> dict[str, Any]:
        """What is recorded of the checkpoint that an adapter was trained on."""
        return self.extra.get("base") or {}

    @property
    def hub_name(self) -> str | None:
        """Name on the hub of the model in `origin`; None where it came from a folder, which is
        recorded without its parents."""
        name = str(self.origin.get("name") or "")
        return name if "/" in name else None

    @property
    def base_name(self) -> str | None:
        """What an adapter calls its base: of a model that was not trained since it was converted,
        its name on the hub, else the name of its folder; of another one, where it lies in its run.
        No place on this machine: an adapter is made to be given away."""
        if self.base.get("source") and self.base.get("step") == 0:
            return self.hub_name or self.origin.get("name")
        path = Path(str(self.base.get("path") or ""))
        parts = [*path.parts[-3:], HF_FOLDER] if (path / HF_FOLDER).is_dir() else path.parts[-3:]
        return "/".join(parts) or None

    @property
    def lora(self) -> LoRAConfig | None:
        """Of the adapter that the checkpoint holds; None: it holds whole weights."""
        adapter = self.extra.get("adapter")
        with guard(f"{self.where}: its adapter", CheckpointError):
            return msgspec.convert(adapter, LoRAConfig) if adapter is not None else None

    @property
    def tensors_folder(self) -> Path:
        assert self.checkpoint is not None, "the other kinds have one"
        return self.checkpoint / TENSORS_FOLDER


def find_source(path: PathLike) -> ModelSource:
    """The model in `path`: a run folder or what `toolkit convert-hf` wrote (its newest whole
    checkpoint counts; sizes are compared, contents are not), a step{N} folder, or a folder with the
    config.json and weights of `transformers`. Raises CheckpointError for anything else."""
    where = str(path)
    folder, what_it_is = Path(path).expanduser(), kind_of(where)
    if what_it_is == "url":
        raise CheckpointError(f"{where}: copy the checkpoint to a local folder and give that")
    if what_it_is in ("file", "missing"):
        what = "is a file" if what_it_is == "file" else "no such folder"
        raise CheckpointError(
            f"{where}: {what}; give a run folder, a step{{N}} folder, or a folder with a "
            f"{HF_CONFIG_FILE} of transformers"
        )
    if what_it_is == "checkpoint":
        # Raises where it is not whole.
        find_checkpoint(folder, quick=True)
        return _of_checkpoint(where, "checkpoint", folder)
    if what_it_is == "hf":
        tokenizer = folder if (folder / TOKENIZER_FILE).is_file() else None
        config = read_hf_config(folder).config
        return ModelSource(where, "hf", config, hf_folder=folder, tokenizer_folder=tokenizer)
    if what_it_is == "folder":
        raise CheckpointError(
            f"{where}: neither a run, a checkpoint, nor a folder with a {HF_CONFIG_FILE} of "
            "transformers; `toolkit runs` lists runs"
        )
    found, rejected = find_checkpoint(folder, quick=True)
    for damaged in rejected:
        log.warning("%s: damaged, so an older checkpoint is used", damaged)
    if found is None:
        raise CheckpointError(
            f"{where}: holds no whole checkpoint; `toolkit verify {where}` lists what is there"
        )
    return _of_checkpoint(where, "run" if what_it_is == "run" else "checkpoint", found)


def source_tensors(source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """`(our name, whole CPU tensor)` of every parameter, one at a time, in the type they are kept
    in; an adapter is merged into its base. Raises CheckpointError for a file that is damaged, or
    an adapter's base that is not what it was."""
    if source.hf_folder is not None:
        return _import_plan(source.hf_folder).tensors()
    if source.lora is None:
        return kept_tensors(source)
    return merged(source_tensors(adapter_base(source)), dict(kept_tensors(source)), source.lora)


def watched(
    tensors: Iterable[tuple[str, Tensor]], on_tensor: Callable[[Tensor], None]
) -> Iterator[tuple[str, Tensor]]:
    """`tensors`; each is shown to `on_tensor` as it is read."""
    for name, tensor in tensors:
        on_tensor(tensor)
        yield name, tensor


def averaged(source: ModelSource, weights: str) -> ModelSource:
    """`source` with the averages that the callback `weights` keeps ("ema", or where it keeps
    several "ema/0.999") in the place of the weights that it averages. Raises CheckpointError: the
    checkpoint has none."""
    if source.checkpoint is None:
        raise CheckpointError(f"{source.where}: no checkpoint, so it has no averages {weights!r}")
    name, _, wanted = weights.partition("/")
    known = averages_of(source.tensors_folder)
    fitting = [w for w in known if w == weights or (not wanted and w.partition("/")[0] == name)]
    if len(fitting) != 1:
        there = f"there are {', '.join(known)}" if known else "it was trained without any"
        raise CheckpointError(f"{source.where}: averages {weights!r}: {there}")
    return source._replace(weights=fitting[0])


def averages_of(folder: Path) -> list[str]:
    """The averages of weights that a checkpoint has beside them: "ema/0.999"."""
    shapes = stored_shapes(folder)
    weights = {key.removeprefix(MODEL_PREFIX) for key in shapes if key.startswith(MODEL_PREFIX)}
    found = set()
    for key in shapes:
        if key.startswith(CALLBACK_PREFIX):
            parts = key.removeprefix(CALLBACK_PREFIX).split(".")
            cuts = (i for i in range(1, len(parts)) if ".".join(parts[i:]) in weights)
            if (cut := next(cuts, None)) is not None:
                found.add("/".join(filter(None, (parts[0], ".".join(parts[1:cut])))))
    return sorted(found)


def kept_tensors(source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """`source_tensors` of a checkpoint as it is: of an adapter, the adapter's own."""
    folder = source.tensors_folder
    if source.weights is None:
        yield from iterate_tensors(folder, MODEL_PREFIX)
        return
    prefix = f"{CALLBACK_PREFIX}{source.weights.replace('/', '.')}."
    own = stored_types(folder, prefix)
    yield from iterate_tensors(folder, prefix)
    rest = [name for name in stored_types(folder, MODEL_PREFIX) if name not in own]
    yield from iterate_tensors(folder, MODEL_PREFIX, rest)


def source_types(source: ModelSource) -> dict[str, torch.dtype]:
    """The type that each tensor of `source_tensors` has, by our name; of an adapter, that it has in
    the checkpoint."""
    if source.hf_folder is not None:
        plan = _import_plan(source.hf_folder)
        return {name: tensor.dtype for name, tensor in plan.meta_tensors.items()}
    return stored_types(source.tensors_folder, MODEL_PREFIX)


def adapter_base(source: ModelSource) -> ModelSource:
    """The checkpoint that the adapter of `source` was trained on. Raises CheckpointError: it is
    gone, or is another one now."""
    path = Path(str(source.base.get("path")))
    if not (path / METADATA_FILE).is_file():
        raise CheckpointError(
            f"{source.where}: an adapter, whose base {path} is not there any more; put it back, "
            "or a link to where it is now"
        )
    if read_metadata(path).xxh3 != source.base.get("fingerprint"):
        raise CheckpointError(
            f"{source.where}: an adapter, whose base {path} is another checkpoint now; put the one "
            "back that it was trained on"
        )
    return find_source(path)


def load_model(
    source: ModelSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The model in evaluation mode, with its weights as `dtype` on `device`."""
    return filled_model(source.config, source_tensors(source), device=device, dtype=dtype)


@torch.no_grad()
def filled_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """A model with `tensors` (our names, each once) as its weights, in evaluation mode; biases of
    routers are in fp32, whatever `dtype`. Raises
    CheckpointError for one that is missing, unknown or of another shape."""
    model = config.build(init_device="meta").to(dtype)
    for module in model.modules():  # which experts are chosen does not depend on the type
        if isinstance(module, Router) and module.score_bias is not None:
            module.score_bias = module.score_bias.float()
    model = model.to_empty(device=device).eval()
    missing = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors:
        parameter = missing.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            reason = "not a parameter of this model"
            if parameter is not None:
                reason = f"shape {tuple(tensor.shape)}, the model wants {tuple(parameter.shape)}"
            raise CheckpointError(f"{name}: {reason}; the weights are of another model")
        parameter.copy_(tensor)
    if missing:
        raise CheckpointError(f"{min(missing)}: missing from the weights")
    return model


def _import_plan(folder: Path) -> ImportPlan:
    model = read_hf_config(folder)
    return ImportPlan(model.family, model.config, HFWeights(folder))


def _of_checkpoint(where: str, kind: Literal["run", "checkpoint"], folder: Path) -> ModelSource:
    metadata = read_metadata(folder)
    extra = metadata.extra
    stored = extra.get("model")
    if stored is None:
        raise CheckpointError(f"{folder}: does not say which model it is of")
    try:
        config = msgspec.convert(stored, ModelConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{folder}: its model is not known here: {error}") from None
    # Also a step folder that was given as "."
    root, run = Path(os.path.abspath(folder)).parent, run_of_checkpoint(folder)
    # Beside the checkpoints (a converted model), in the run folder, or in the data of the run.
    places = [root] if run is None else [root, run, *_data_of(run)]
    tokenizer = next(filter(is_tokenizer, (place / TOKENIZER_FOLDER for place in places)), None)
    return ModelSource(where, kind, config, folder, None, tokenizer, metadata, run, extra)


def is_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` may find something in `folder`."""
    return (folder / TOKENIZER_FILE).is_file() or (folder / TOKENIZER_CONFIG_FILE).is_file()


def _data_of(run: Path) -> list[Path]:
    """Where the token files of a run are, which may be relative to where it was started."""
    with contextlib.suppress(OSError, ToolkitError, KeyError, TypeError, ValueError):
        data = fill(read_json(run / RUN_FILES.data_config, CheckpointError, DataConfig))
        started_in = read_json(run / RUN_FILES.command, CheckpointError)["cwd"]
        return [other for p in data_places(data) for other in (p, Path(started_in) / p)]
    return []
