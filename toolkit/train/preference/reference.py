"""Log-probabilities under the reference model: computed once, kept beside the data.

1. Before the first step every rank computes those of its share of the rows of each set, all ranks
   get them from one another, and rank 0 writes them into `reference/KEY.npy` in the folder of the
   token files. KEY stands for the rows, the weights of the reference, and the compute type.
2. A later start finds the file, and a resume needs no more. Where it is gone, they are computed
   again from the same checkpoint: its hash is part of the run's own checkpoints.
3. Under an adapter on weights that are not trained, the reference is the model itself without it.
   Otherwise it is a second model, which is there until they are computed.

A table lies on each rank's device: 8 bytes for each unit.
"""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from toolkit.checkpoint.folder import read_metadata
from toolkit.errors import CheckpointError, DataError
from toolkit.models.log_probs import TokenLogProbs
from toolkit.storage.atomic import write_atomic
from toolkit.train.adapter_base import BaseCheckpoint, describe_base
from toolkit.train.preference.frozen import FrozenModel, load_frozen, newest_checkpoint
from toolkit.train.preference.vocabulary import check_same_vocabulary
from toolkit.wording import count

log = logging.getLogger(__name__)

FOLDER = "reference"
"""Of tables, beside the token files."""
KEY = "train_module.objective.reference"


class References:
    """The tables of one run, by the name of the set of rows ("train", "val")."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._config = module.objective
        self._record: dict[str, Any] | None = None
        """The checkpoint they are from, as in checkpoints; see `describe_base`."""
        self._tables: dict[str, Tensor] = {}
        self._model: FrozenModel | None = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._record is None else {"reference": self._record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._record = state.get("reference")

    def of(self, split: str, units: Tensor) -> Tensor | None:
        """Of units `(rows, K)` by their numbers, `(rows, K, 2)`; None: the loss computes them."""
        if self._config.reference_log_probs == "base":
            return None
        if split not in self._tables:
            raise DataError(
                f"{split}: the log-probabilities of its rows under the reference model are not "
                "there; a batch of your own holds them as reference_log_probs (rows, units, 2)"
            )
        return self._tables[split][units.clamp(min=0)]

    def prepare(self, state: Any) -> None:
        """Read or compute the tables of all sets; every rank calls it. Raises CheckpointError: the
        reference model is not there, or does not fit."""
        if self._config.reference_log_probs == "base":
            return
        loader = state.train_loader
        sets = {"train": (loader.dataset, loader.dataset.num_instances)}
        for name, own in state.eval_loaders.items():
            sets[name] = (own.dataset, own.num_instances)
        if self._record is None or self._is_own_base:
            self._checkpoint(state)
        folder = loader.tokenizer_folder
        places = (folder.parent if folder is not None else state.run.folder) / FOLDER
        for name, (dataset, rows) in sets.items():
            path = places / f"{self._key(dataset, rows)}.npy"
            table = self._read(path, dataset, state)
            if table is None:
                table = self._computed(name, dataset, rows, state)
                if table is None:
                    return  # asked to stop; so does the loop
                if state.is_main:
                    _write(path, table)
            self._tables[name] = torch.from_numpy(table).to(state.environment.device)
        self._model = None

    @property
    def _is_own_base(self) -> bool:
        lora = self._module.config.lora
        return self._config.reference is None and lora is not None and not lora.train_also

    def _checkpoint(self, state: Any) -> Path | str | None:
        """Where the reference is from, which `_record` tells from now on; None: it is the model
        itself without adapters."""
        before, module = self._record, self._module
        if self._is_own_base:
            assert module.base is not None, "an adapter is trained on a checkpoint"
            self._record = _plain(module.base)
            return None
        given, key = self._config.reference or state.config.load_path, KEY
        if self._config.reference is None:
            key = "trainer.load_path"
        checkpoint = None
        if given is not None:
            checkpoint = newest_checkpoint(given, state.environment, key=key)
            if before is not None and read_metadata(checkpoint).xxh3 != before["fingerprint"]:
                checkpoint = None  # its run has gone on
        if checkpoint is None and before is not None:
            checkpoint = newest_checkpoint(before["path"], state.environment, key=KEY)
            if read_metadata(checkpoint).xxh3 != before["fingerprint"]:
                raise CheckpointError(
                    f"{KEY}: this run began with step {before['step']} of {before['path']}, which "
                    f"is another model now; put it back, or start a new run"
                )
        if checkpoint is None:
            raise CheckpointError(f"{KEY}: name the reference model, or trainer.load_path")
        extra, vocab_size = read_metadata(checkpoint).extra, module.model_config.vocab_size
        check_same_vocabulary(checkpoint, extra, vocab_size, key=KEY)
        self._record = _plain(describe_base(checkpoint))
        return checkpoint

    def _key(self, dataset: Any, rows: int) -> str:
        """What numbers depend on, but for rounding by other engines."""
        assert self._record is not None
        lora = self._module.config.lora
        parts = {
            "format": 1,
            "rows": [dataset.fingerprint, rows],
            "sequence_length": dataset.sequence_length,
            "unit": self._config.unit,
            "weights": self._record["fingerprint"],
            "base_in": lora.quantize_base if lora is not None and self._is_own_base else None,
            "precision": self._module.environment.layout.precision,
        }
        return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True).encode())

    def _read(self, path: Path, dataset: Any, state: Any) -> np.ndarray | None:
        """The table in `path` on every rank; None: there is none that is whole."""
        table: np.ndarray | None = None
        if state.is_main and path.is_file():
            try:
                table = np.load(path, allow_pickle=False)
                if table.ndim != 2 or table.shape[1] != 2 or not np.isfinite(table).all():
                    raise ValueError("it holds no log-probabilities of pairs")
                if len(table) != getattr(dataset, "num_units", len(table)):
                    raise ValueError(f"it is of {len(table):,} rows, not {dataset.num_units:,}")
                log.info("log-probabilities under the reference model: %s", path)
            except (OSError, ValueError, EOFError) as error:
                table = None
                log.warning("%s: not usable, computed again: %s", path, error)
        return state.environment.broadcast(table)

    def _computed(self, name: str, dataset: Any, rows: int, state: Any) -> np.ndarray | None:
        module, environment = self._module, state.environment
        if self._model is None and (checkpoint := self._checkpoint(state)) is not None:
            log.info("reference model: %s", checkpoint)
            self._model = load_frozen(checkpoint, environment, prepare=_give_log_probs)
        log.info("log-probabilities of %s of %s", count(rows, "row"), name)
        layout, rank = environment.layout, environment.rank
        at_once = max(1, (module.config.rank_microbatch_size or 1) // dataset.sequence_length)
        share = layout.batch_rank(rank), layout.batch_ranks
        numbers: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for indices, is_own in _shares(rows, at_once, *share):
            if state.should_stop():
                return None
            batch = {k: torch.from_numpy(v) for k, v in dataset.read(indices).items()}
            part = module.unit_batch_of(batch)
            sums = module.answer_log_probs(part, self._model)
            if is_own and layout.owns_rows(rank):
                has = part.is_unit.cpu().numpy()
                numbers.append(part.units.cpu().numpy()[has])
                values.append(sums.float().cpu().numpy()[has])
        if self._model is not None:
            self._model.free()
        found = [
            pair
            for ranks in environment.gather((numbers, values))
            for pair in zip(*ranks, strict=True)
        ]
        last = max((int(own.max()) for own, _ in found if own.size), default=-1)
        table = np.zeros((getattr(dataset, "num_units", last + 1), 2), dtype=np.float32)
        for own, sums_of_own in found:
            table[own] = sums_of_own
        if broken := int((~np.isfinite(table)).any(axis=1).sum()):
            assert self._record is not None
            raise CheckpointError(
                f"{KEY}: the model in {self._record['path']} gives {broken:,} of "
                f"{count(len(table), 'unit')} of {name} log-probabilities that are not finite; "
                "name another one, or set train_module.precision to bf16 or fp32"
            )
        return table


def _shares(rows: int, at_once: int, share: int, shares: int) -> Iterator[tuple[np.ndarray, bool]]:
    """The rows of each forward of a rank: as many forwards of as many rows on every rank. The last
    are read again where there are too few; False: all of them are."""
    for first in range(0, rows, at_once * shares):
        wanted = np.arange(at_once) + first + share * at_once
        yield np.minimum(wanted, rows - 1), bool(wanted[0] < rows)


def _give_log_probs(model: Any) -> None:
    model.head.loss = TokenLogProbs(model.head.loss)


def _plain(record: BaseCheckpoint) -> dict[str, Any]:
    return {"path": record.path, "step": record.step, "fingerprint": record.fingerprint}


def _write(path: Path, table: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = io.BytesIO()
        np.save(raw, table, allow_pickle=False)
        write_atomic(path, raw.getvalue())
    except OSError as error:
        log.warning("%s: not written, so the next start computes it again: %s", path, error)
