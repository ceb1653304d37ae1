"""The checkpoint that a run of adapters stands on: found, compared, recorded.

Checkpoints of such a run hold the adapter alone, and of its base where it was, its step and the
hash of its `.metadata.json`, in which every file of it is hashed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from toolkit.checkpoint.folder import CheckpointMetadata, read_metadata
from toolkit.config.secrets import mask_secrets
from toolkit.errors import CheckpointError, ConfigError
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import is_trained
from toolkit.models.shapes import SCORE
from toolkit.storage.foreign import guard
from toolkit.storage.remote import is_url

MERGE = "merge it first: toolkit export-hf --merge-adapter, then toolkit convert-hf"


class BaseCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What `extra["base"]` of an adapter's checkpoint says."""

    path: str
    """Its step folder, absolute, or URL."""
    step: int
    fingerprint: str
    """Hash of its `.metadata.json`."""
    source: dict[str, Any] | None = None
    """Its own `extra["source"]`: the model of `transformers` that it once came from."""


def describe_base(checkpoint: Path | str) -> BaseCheckpoint:
    """The record of a base that was loaded; raises CheckpointError."""
    metadata = read_metadata(checkpoint)
    is_local = isinstance(checkpoint, Path)
    return BaseCheckpoint(
        path=str(Path(checkpoint).absolute()) if is_local else mask_secrets(checkpoint),
        step=metadata.step,
        fingerprint=metadata.xxh3,
        source=metadata.extra.get("source"),
    )


def find_base(
    adapter: Path | str, load_path: str | None, look: Callable[[str], Path | str | None]
) -> Path | str:
    """The base of the checkpoint `adapter`: in `trainer.load_path`, which may have moved since, or
    where it was; `look` finds the newest checkpoint of a path or URL. Raises CheckpointError where
    `adapter` holds none, or its base is not found."""
    record = read_metadata(adapter).extra.get("base")
    if record is None:
        raise CheckpointError(
            f"{adapter}: holds a whole model, no adapter: set train_module.lora back to null, or "
            f"start a new run with --trainer.load_path={adapter}"
        )
    with guard(f"{adapter}: its base", CheckpointError):
        wanted = msgspec.convert(record, BaseCheckpoint)

    given = look(load_path) if load_path is not None else None
    if given is not None and read_metadata(given).xxh3 == wanted.fingerprint:
        return given
    # The base's own run may have gone on since, or the path is relative to another folder.
    if given is None or (load_path is not None and _is_in(wanted.path, load_path)):
        recorded = look(wanted.path)
        if recorded is not None and read_metadata(recorded).xxh3 == wanted.fingerprint:
            return recorded
    there = "holds no checkpoint" if given is None else f"holds another checkpoint ({given})"
    raise CheckpointError(
        f"{adapter}: its adapter belongs to step {wanted.step} of {wanted.path}, and "
        f"{load_path or wanted.path} {there}; say where that base is: --trainer.load_path=..."
    )


def check_adapter(
    checkpoint: Path | str,
    saved: CheckpointMetadata,
    lora: LoRAConfig | None,
    *,
    weights_only: bool,
) -> None:
    """Check that a run with this `train_module.lora` can start from `checkpoint`, as its own or
    (`weights_only`) as a base or the weights of a new one. Raises CheckpointError where it holds an
    adapter and a whole model is wanted, or another adapter."""
    before, adapter = saved.extra.get("adapter"), msgspec.to_builtins(lora)
    if before is None:
        return
    with guard(f"{checkpoint}: its adapter", CheckpointError):
        # Of an older release it lacks what had no choice then.
        before = msgspec.to_builtins(msgspec.convert(before, LoRAConfig))
    if weights_only:
        raise CheckpointError(f"{checkpoint}: holds an adapter, not a whole model; {MERGE}")
    if lora is None:
        raise CheckpointError(
            f"{checkpoint}: holds an adapter, not a whole model; set train_module.lora as it was "
            f"to go on with its run, or {MERGE}"
        )
    changed = [
        f"train_module.lora.{name} (was {_show(before.get(name))}, is {_show(value)})"
        for name, value in adapter.items()
        if name != "dropout"  # it may change, as a rate may
        and _show(before.get(name)) != _show(value)
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint}: holds another adapter: {', '.join(changed)}; set it back, or start a "
            "new run"
        )


def check_new_score(lora: LoRAConfig | None) -> None:
    """Raise ConfigError where a reward model begins from a language model, and its new head would
    stay as it begins."""
    if lora is not None and not is_trained(SCORE, lora):
        problem = f"the score is new, and an adapter alone does not train it; add {SCORE}"
        raise ConfigError(problem, key="train_module.lora.train_also")


def _is_in(path: str, folder: str) -> bool:
    if is_url(path) or is_url(folder):
        return path.startswith(f"{folder.rstrip('/')}/")
    return Path(path).is_relative_to(Path(folder).absolute())


def _show(value: Any) -> str:
    return msgspec.json.encode(value).decode()  # lists and tuples alike
