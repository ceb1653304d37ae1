"""Everything that training data can be, behind two values.

A `DataConfig` names one corpus of token files, a mixture of several, or a data set written in
Python. `prepare/corpus.py` makes what is missing, `corpus_info.py` tells what there is, and
`open_corpus` opens it: instances, and the order of batches. Nothing here needs torch.
"""

import logging
from collections.abc import Mapping
from typing import Any

from toolkit.data.config import (
    DataConfig,
    DatasetConfig,
    VariableInstancesConfig,
)
from toolkit.data.corpus_info import VAL, CorpusInfo, check_same_tokens, data_places, read_corpus
from toolkit.data.instances.base import InstanceDataset
from toolkit.data.instances.custom import (
    UNKNOWN_LENGTH,
    IterableInstances,
    SequentialStream,
    open_custom,
)
from toolkit.data.instances.open import ensure_plans, open_instances
from toolkit.data.instances.variable import VariableDataset, VariableOrder
from toolkit.data.order.batches import BatchOrder, StreamBatches, first_segment
from toolkit.data.order.mixture import MixedDataset, MixedStream
from toolkit.data.order.resolve import resolve_mix
from toolkit.data.order.stream import InstanceStream, ShuffledStream
from toolkit.data.tokens.prepared import PreparedDataset, localize, nothing_held_out
from toolkit.errors import DataError

logger = logging.getLogger(__name__)


class Corpus:
    """Opened training data: instances by number, and which of them make up batch n.

    Attributes:
        train: the training instances.
        evaluation: the validation instances by name; empty where there are none.
        order: of the global batches.
        vocab_size: every id is below this; 0 where a custom data set does not say.
        seed: of the data order.
        seed_key: the value of the config that gave it, for messages.
        stream: of a mixture.
    """

    def __init__(
        self,
        train: InstanceDataset,
        evaluation: dict[str, InstanceDataset],
        order: BatchOrder,
        *,
        vocab_size: int,
        seed: int,
        stream: MixedStream | None = None,
    ) -> None:
        self.train = train
        self.evaluation = evaluation
        self.order = order
        self.vocab_size = vocab_size
        self.seed = seed
        self.seed_key = "data_loader.seed"
        self.stream = stream

    @property
    def has_known_length(self) -> bool:
        """Whether the number of training instances is known."""

        return self.train.num_instances < UNKNOWN_LENGTH

    def sources(self, position: int) -> dict[str, str]:
        """What decides the order of a mixture before a position of its stream, by source; empty
        for a single corpus."""
        return self.stream.identity(position) if self.stream is not None else {}

    def counts(self, position: int) -> dict[str, int]:
        """Instances of each source of a mixture before a position of its stream."""
        return self.stream.counts(position) if self.stream is not None else {}

    def locate(self, index: int) -> tuple[str | None, int]:
        """(source of a mixture, number in it) of a training instance; (None, index) of a single
        corpus."""

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
    info = info or read_corpus(cfg, in_use=True)
    if info is None:
        places = ", ".join(str(place) for place in data_places(cfg))
        raise DataError(f"{places}: no prepared data there; make it with: toolkit prepare")
    for config, prepared in info.parts.values():
        ensure_plans(prepared, config)
    if cfg.dataset.mix is not None:
        check_same_tokens({name: prepared for name, (_, prepared) in info.parts.items()})
    seed = cfg.seed if cfg.data_loader.seed is None else cfg.data_loader.seed
    if cfg.dataset.custom is not None:
        corpus = _open_custom(cfg, seed)
    elif cfg.dataset.mix is not None:
        corpus = _open_mixture(cfg, info, seed)
    else:
        corpus = _open_single(cfg, info, seed)
    if cfg.data_loader.seed is None:
        corpus.seed_key = "seed, which data_loader.seed follows"
    return corpus


def _open_single(cfg: DataConfig, info: CorpusInfo, seed: int) -> Corpus:

    ((config, prepared),) = info.parts.values()
    train = open_instances(prepared, "train", config)
    loader = cfg.data_loader
    order: BatchOrder
    if isinstance(train, VariableDataset):
        assert isinstance(config.instances, VariableInstancesConfig)
        order = VariableOrder(
            train.buckets,
            global_batch_size=loader.global_batch_size,
            fingerprint=train.fingerprint,
            seed=seed,
            curriculum=config.instances.curriculum,
            num_cycles=config.instances.num_cycles,
            shuffle=loader.shuffle,
            batch_instances=_batch_instances(cfg),
        )
    else:
        stream = ShuffledStream(
            train.num_instances, fingerprint=train.fingerprint, seed=seed, shuffle=loader.shuffle
        )
        order = StreamBatches(stream, [first_segment(_batch_instances(cfg))])
    evaluation = _evaluation({VAL: (config, prepared)})
    return Corpus(train, evaluation, order, vocab_size=prepared.vocab_size, seed=seed)


def _open_mixture(cfg: DataConfig, info: CorpusInfo, seed: int) -> Corpus:
    dataset = localize(cfg.dataset, cfg.store)
    opened = {
        name: open_instances(prepared, "train", config)
        for name, (config, prepared) in info.parts.items()
    }
    train = MixedDataset(opened)
    stream = MixedStream(
        resolve_mix(dataset), opened, dataset, seed=seed, shuffle=cfg.data_loader.shuffle
    )
    order = StreamBatches(stream, [first_segment(_batch_instances(cfg))])
    train.fingerprint = stream.fingerprint
    return Corpus(
        train,
        _evaluation(info.parts),
        order,
        vocab_size=info.vocab_size or 0,
        seed=seed,
        stream=stream,
    )


def _open_custom(cfg: DataConfig, seed: int) -> Corpus:

    custom, loader = cfg.dataset.custom, cfg.data_loader
    assert custom is not None
    workers: Any = {"num_workers": loader.num_workers, "worker_type": loader.worker_type}
    length = cfg.dataset.sequence_length
    train = open_custom(custom, "train", length, **workers)
    assert train is not None
    stream: InstanceStream
    if isinstance(train, IterableInstances):
        stream = SequentialStream(train.num_instances)
    else:
        stream = ShuffledStream(
            train.num_instances, fingerprint=train.fingerprint, seed=seed, shuffle=loader.shuffle
        )
    order = StreamBatches(stream, [first_segment(_batch_instances(cfg))])
    val = open_custom(custom, "val", length)
    evaluation: dict[str, InstanceDataset] = {VAL: val} if val is not None else {}
    return Corpus(train, evaluation, order, vocab_size=train.vocab_size or 0, seed=seed)


def _evaluation(
    parts: dict[str, tuple[DatasetConfig, PreparedDataset]],
) -> dict[str, InstanceDataset]:
    """The validation instances of every part that has enough of them."""

    found = {}
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


def _batch_instances(cfg: DataConfig) -> int:
    return max(1, cfg.data_loader.global_batch_size // cfg.dataset.sequence_length)


def changed_data(
    before: Mapping[str, Any], now: Mapping[str, Any], *, seed_key: str = "data_loader.seed"
) -> list[str]:
    """What of the data differs between two states of a loader, in words.

    Of mixtures, what decided the batches so far is compared: ratios may change later.
    """
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
