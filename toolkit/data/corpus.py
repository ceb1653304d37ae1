"""Everything that training data can be, behind two values.

A `DataConfig` names one corpus of token files, a mixture of several, or a data set written in
Python. `prepare/corpus.py` makes what is missing, `corpus_info.py` tells what there is, and
`open_corpus` opens it: instances, and the order of batches. Nothing here needs torch.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from toolkit.data.config import DataConfig, DatasetConfig, VariableInstancesConfig
from toolkit.data.corpus_info import (
    NO_EPOCHS,
    VAL,
    CorpusInfo,
    check_batch_schedules,
    check_eval_sets,
    check_same_tokens,
    data_places,
    read_corpus,
)
from toolkit.data.instances.base import InstanceDataset
from toolkit.data.instances.custom import UNKNOWN_LENGTH, SequentialStream, open_custom
from toolkit.data.instances.open import ensure_plans, open_instances
from toolkit.data.instances.variable import VariableDataset, VariableOrder
from toolkit.data.order.batches import BatchOrder, StreamBatches
from toolkit.data.order.mixture import MixedDataset, MixedStream
from toolkit.data.order.plan import Batches, Segment
from toolkit.data.order.stream import InstanceStream, ShuffledStream
from toolkit.data.tokens.prepared import PreparedDataset, localize, nothing_held_out
from toolkit.errors import DataError
from toolkit.wording import count

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class Corpus:
    """Opened training data: instances by number, and which of them make up batch n."""

    train: InstanceDataset
    evaluation: dict[str, InstanceDataset]
    """The validation instances by name; empty where there are none."""
    eval_sets: frozenset[str] = frozenset()
    """Which of them were not held out of the training data."""
    order: BatchOrder
    """Of the global batches."""
    vocab_size: int
    """Every id is below this; 0 where a custom data set does not say."""
    seed: int
    """Of the data order."""
    seed_key: str
    """The value of the config that gave it, for messages."""
    stream: MixedStream | None = None
    """Of a mixture."""

    def batches(self, order: BatchOrder | None = None) -> Batches:
        """Sizes, tokens and epochs of the batches of `order` (default: the corpus' own)."""
        unknown = None if self.has_known_length else NO_EPOCHS
        return Batches(order or self.order, self.train.sequence_length, no_epochs=unknown)

    @property
    def has_known_length(self) -> bool:
        """Whether the number of training instances is known."""
        return self.train.num_instances < UNKNOWN_LENGTH

    def locate(self, index: int) -> tuple[str | None, int]:
        """(source of a mixture, or None; number in it) of a training instance."""
        return self.train.locate(index) if isinstance(self.train, MixedDataset) else (None, index)

    def close(self) -> None:
        """End workers."""
        close = getattr(self.train, "close", None)
        if close is not None:
            close()


def open_corpus(cfg: DataConfig, info: CorpusInfo | None = None) -> Corpus:
    """The training data of `cfg`, which is there; plans of rows are made where they are missing.

    Args:
        info: what `prepare_corpus` or `read_corpus` has told of it; default: read now.

    Raises:
        ConfigError, DataError: token files are missing or damaged, or do not suit the config.
    """
    check_batch_schedules(cfg)
    info = info or read_corpus(cfg, in_use=True)
    if info is None:
        places = ", ".join(str(place) for place in data_places(cfg))
        raise DataError(f"{places}: no prepared data there; make it with: toolkit prepare")
    if not info.is_ready:
        if info.parts:
            check_same_tokens({name: prepared for name, (_, prepared) in info.parts.items()})
        check_eval_sets(info)
        for config, prepared in (*info.parts.values(), *info.eval_parts.values()):
            ensure_plans(prepared, config)
    loader, length = cfg.data_loader, cfg.dataset.sequence_length
    seed, seed_key = loader.seed, "data_loader.seed"
    if seed is None:
        seed, seed_key = cfg.seed, "seed, which data_loader.seed follows"
    train: InstanceDataset
    order: BatchOrder
    stream: InstanceStream | None = None
    vocab_size = info.vocab_size or 0
    if cfg.dataset.custom is not None:
        workers: Any = {"num_workers": loader.num_workers, "worker_type": loader.worker_type}
        custom = open_custom(cfg.dataset.custom, "train", length, **workers)
        val = open_custom(cfg.dataset.custom, "val", length)
        assert custom is not None
        train, vocab_size = custom, custom.vocab_size or 0
        evaluation: dict[str, InstanceDataset] = {} if val is None else {VAL: val}
        if custom.is_sequential:
            stream = SequentialStream(train.num_instances)
    else:
        opened = {
            name: open_instances(prepared, "train", config)
            for name, (config, prepared) in info.parts.items()
        }
        if cfg.dataset.mix is not None:
            dataset = localize(cfg.dataset, cfg.store)
            train = MixedDataset(opened)
            stream = MixedStream(dataset, opened, seed=seed, shuffle=loader.shuffle)
            train.fingerprint = stream.fingerprint
        else:
            (train,) = opened.values()
        evaluation = {
            **_eval_sets(info),
            **_evaluation({name or VAL: part for name, part in info.parts.items()}),
        }
    phases = cfg.phases
    batch_instances = phases[0].batch_instances
    if isinstance(train, VariableDataset):
        kind = cfg.dataset.instances
        assert isinstance(kind, VariableInstancesConfig)
        order = VariableOrder(
            train.buckets,
            global_batch_size=loader.first_batch_size,
            fingerprint=train.fingerprint,
            seed=seed,
            curriculum=kind.curriculum,
            num_cycles=kind.num_cycles,
            shuffle=loader.shuffle,
            batch_instances=batch_instances,
        )
    else:
        stream = stream or ShuffledStream(
            train.num_instances, fingerprint=train.fingerprint, seed=seed, shuffle=loader.shuffle
        )
        order = StreamBatches(stream, [Segment(0, 0, batch_instances)]).continued((), 0, phases)
    return Corpus(
        train=train,
        evaluation=evaluation,
        eval_sets=frozenset(info.eval_parts),
        order=order,
        vocab_size=vocab_size,
        seed=seed,
        seed_key=seed_key,
        stream=stream if isinstance(stream, MixedStream) else None,
    )


def _eval_sets(info: CorpusInfo) -> dict[str, InstanceDataset]:
    found: dict[str, InstanceDataset] = {}
    for name, (config, prepared) in info.eval_parts.items():
        found[name] = open_instances(prepared, "train", config)
        if not found[name].num_instances:
            raise DataError(
                f"dataset.eval_sets.{name}: {prepared.folder} has "
                f"{count(prepared.num_tokens('train'), 'token')}, less than one instance of "
                f"dataset.sequence_length {config.sequence_length}; give it more text, or padded "
                "instances (dataset.eval_instances)"
            )
    return found


def _evaluation(
    parts: dict[str, tuple[DatasetConfig, PreparedDataset]],
) -> dict[str, InstanceDataset]:
    """The validation instances of every part that has enough of them."""
    found: dict[str, InstanceDataset] = {}
    for name, (config, prepared) in parts.items():
        if not prepared.has_split("val"):
            line = nothing_held_out(prepared)
            if line is not None:
                logger.warning("no evaluation: %s", line)
            continue
        instances = open_instances(prepared, "val", config, evaluation=True)
        if instances.num_instances:
            found[name] = instances
            continue
        logger.warning(
            "no evaluation: the validation split of %s has %d tokens, less than one instance of "
            "dataset.sequence_length %d",
            prepared.folder,
            prepared.num_tokens("val"),
            config.sequence_length,
        )
    return found


def changed_data(
    before: Mapping[str, Any], now: Mapping[str, Any], *, seed_key: str = "data_loader.seed"
) -> list[str]:
    """What of the data differs between two states of a loader, in words. Of mixtures, what decided
    the batches so far is compared: ratios may change later."""
    keys = {
        "seed": seed_key,
        "shuffle": "data_loader.shuffle",
        "sequence_length": "dataset.sequence_length",
        "order": "dataset.instances",
    }
    if "sources" not in before or "sources" not in now:
        keys["fingerprint"] = "the training data"
    changed = [
        f"{words} (was {before.get(key)}, is {now.get(key)})"
        for key, words in keys.items()
        if before.get(key) != now.get(key)
    ]
    was, has = before.get("sources", {}), now.get("sources", {})
    return changed + [
        f"source {name} (was {was.get(name, 'absent')}, is {has.get(name, 'absent')})"
        for name in sorted(was.keys() | has.keys())
        if "fingerprint" not in keys and was.get(name) != has.get(name)
    ]
