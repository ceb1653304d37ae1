"""Do all ranks train the same thing?

Machines may hold data of their own (`dataset.root` on a local disk), be given other config files,
or run another Python whose standard library is another text. Nothing else would notice: every rank
reads its rows of a batch that the others think is another one.
"""

import hashlib
import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from toolkit.data.evaluation import EvalLoader
from toolkit.data.loader import TrainLoader
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.errors import ConfigError, DataError
from toolkit.experiment.common import common_content
from toolkit.experiment.config import ExperimentConfig


class RankView(msgspec.Struct, frozen=True):
    """What one rank is about to train, as hashes: of config and engine, and of the tokens."""

    host: str
    config: str
    train: str
    val: str | None


def check_agreement(
    config: ExperimentConfig,
    environment: TrainingEnvironment,
    train_loader: TrainLoader,
    eval_loaders: dict[str, EvalLoader],
) -> None:
    """Compare config and data of all ranks with those of rank 0; all ranks call it."""
    if environment.cpu_group is None:
        return
    view = RankView(
        host=socket.gethostname(),
        config=_hash(config, environment.layout),
        train=train_loader.fingerprint,
        val=" ".join(loader.dataset.fingerprint for loader in eval_loaders.values()) or None,
    )
    compare(environment.gather(view))


def compare(views: Sequence[RankView]) -> None:
    first = views[0]
    odd = _differing(views, "config")
    if odd:
        raise ConfigError(
            f"the config differs between machines: {odd} against rank 0 on {first.host}; start all "
            "of them with the same config file, flags and launcher settings"
        )
    for split, key in (("training", "train"), ("validation", "val")):
        odd = _differing(views, key)
        if odd:
            raise DataError(
                f"dataset: the {split} tokens differ between machines: {odd} against rank 0 on "
                f"{first.host}; copy the prepared folder to all of them, or give a shared "
                "dataset.root (--data-root)"
            )


def _differing(views: Sequence[RankView], key: str) -> str:
    """The first rank of each host that is not like rank 0, in words."""
    hosts: dict[str, int] = {}
    for rank, view in enumerate(views):
        if getattr(view, key) != getattr(views[0], key):
            hosts.setdefault(view.host, rank)
    return ", ".join(f"rank {rank} on {host}" for host, rank in hosts.items())


def _hash(config: ExperimentConfig, engine: Any) -> str:
    shared = {**common_content(config), "engine": engine}
    return hashlib.sha256(msgspec.json.encode(shared, order="sorted")).hexdigest()
