"""A mixture of corpora as one data set (`MixedDataset`) and one order (`MixedStream`).

Position p of the stream: the shares say which source, and that it is that source's k-th instance
(`shares.py`). Of n used instances, epoch k // n has an order of its own, a permutation keyed by the
source's fingerprint and the seed; place k % n of it is the instance. Nothing is stored, so any
position costs the same.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import xxhash

from toolkit.data.config import DatasetConfig
from toolkit.data.instances.base import DocumentPart, InstanceDataset, Rows
from toolkit.data.order.resolve import (
    RatioSegment,
    ResolvedSource,
    resolve_mix,
    resolve_schedule,
    used_instances,
)
from toolkit.data.order.shares import ScheduledShares, runs
from toolkit.data.order.stream import KeyedPermutation
from toolkit.errors import ConfigError, DataError
from toolkit.wording import count


class MixedDataset:
    """The instances of all sources under one numbering: those of the first source by name, then
    those of the second, and so on. An `InstanceDataset`.

    Attributes:
        names: the sources, sorted.
        datasets: their instances.
        first_instances: number of the first instance of each one.
        num_units: units of all sources together; 0 where documents form none.
        units_per_row: the most that a row holds.
    """

    def __init__(self, datasets: Mapping[str, InstanceDataset]) -> None:
        self.names = sorted(datasets)
        self.datasets = [datasets[name] for name in self.names]
        sizes = [dataset.num_instances for dataset in self.datasets]
        ends = np.cumsum([0, *sizes])
        self.first_instances = ends[:-1]
        self.num_instances = int(ends[-1])
        self.sequence_length = max(dataset.sequence_length for dataset in self.datasets)
        self.fingerprint = _hash([(n, datasets[n].fingerprint) for n in self.names])
        firsts = [dataset.read(np.array([0])) for dataset in self.datasets if dataset.num_instances]
        self._like = {key: rows[key].dtype for rows in firsts for key in rows}
        self._is_uniform = all(rows.keys() == self._like.keys() for rows in firsts)
        units = [getattr(dataset, "num_units", 0) for dataset in self.datasets]
        self._first_units = np.cumsum([0, *units])
        self.unit = getattr(self.datasets[0], "unit", None)
        self.num_units = int(self._first_units[-1])
        self.units_per_row = max(
            (getattr(dataset, "units_per_row", 0) for dataset in self.datasets), default=0
        )
        self.tokenizer_folder: Path | None = self.datasets[0].tokenizer_folder
        known = [dataset.bytes_per_token for dataset in self.datasets]
        self.bytes_per_token = 0.0
        if self.num_instances and all(known):
            weighted = (value * size for value, size in zip(known, sizes, strict=True))
            self.bytes_per_token = sum(weighted) / self.num_instances

    def read(self, indices: np.ndarray) -> Rows:
        """What only some sources say of their rows is filled in for the others: every token asked
        for, and one document."""
        owners = np.searchsorted(self.first_instances, indices, side="right") - 1
        numbers = np.unique(owners).tolist()
        if self._is_uniform and len(numbers) == 1:
            return self._read(numbers[0], indices)
        found: list[tuple[np.ndarray, Rows]] = []
        for owner in numbers:
            places = np.flatnonzero(owners == owner)
            found.append((places, self._read(owner, indices[places])))
        # The same keys for any rows: ranks that read from different sources must agree on them.
        mixed: Rows = {}
        for key, dtype in self._like.items():
            width = self.units_per_row if key == "units" else self.sequence_length
            shape = len(indices), width
            if all(key in rows for _, rows in found):
                mixed[key] = np.empty(shape, dtype)
            else:
                mixed[key] = np.full(shape, key == "label_mask", dtype)
            for places, rows in found:
                if key in rows:
                    mixed[key][places] = rows[key]
        return mixed

    def _read(self, owner: int, indices: np.ndarray) -> Rows:
        """Instances of one source. Units are numbered like instances: those of the first source,
        then those of the second, and so on."""
        rows = self.datasets[owner].read(indices - self.first_instances[owner])
        if "units" in rows:
            own = rows["units"]
            units = np.full((len(own), self.units_per_row), -1, dtype=np.int64)
            units[:, : own.shape[1]] = np.where(own < 0, -1, own + self._first_units[owner])
            rows["units"] = units
        return rows

    def documents(self, index: int) -> list[DocumentPart]:
        """Documents are numbered in their source."""
        owner, inside = self.locate(index)
        return self.datasets[self.names.index(owner)].documents(inside)

    def locate(self, index: int) -> tuple[str, int]:
        """(source, number in it) of instance `index`."""
        owner = int(np.searchsorted(self.first_instances, index, side="right")) - 1
        return self.names[owner], int(index - self.first_instances[owner])


class MixPlan:
    """How much of each source a mixture takes, told from numbers of instances alone.

    Attributes:
        names: the sources, sorted.
        available: instances of each one that are used (see `max_tokens`).
        limits: most instances that each one may give (see `max_repetitions`); None: no limit.
        segments: the shares, from each point on where they change.
        epoch_instances: instances that are used, of all sources together.
    """

    def __init__(
        self,
        sources: Sequence[ResolvedSource],
        segments: Sequence[RatioSegment],
        num_instances: Mapping[str, int],
    ) -> None:
        self.sources = {source.name: source for source in sources}
        self.names = sorted(self.sources)
        self.segments = list(segments)
        self.sequence_length = sources[0].dataset.sequence_length
        self.available = {
            name: used_instances(self.sources[name], num_instances[name]) for name in self.names
        }
        self.epoch_instances = sum(self.available.values())
        self.limits: dict[str, int | None] = {}
        for name in self.names:
            most = self.sources[name].max_repetitions
            # As exact as it is written, like ratios.
            limit = None if most is None else int(Fraction(str(most)) * self.available[name])
            self.limits[name] = limit
        self._starts = [segment.at_tokens // self.sequence_length for segment in segments]
        ratios = ([segment.shares[name] for name in self.names] for segment in segments)
        self._shares = ScheduledShares(list(zip(self._starts, ratios, strict=True)))
        self.locate = self._shares.locate

    def counts(self, position: int) -> dict[str, int]:
        """Instances of each source before `position`."""
        return dict(zip(self.names, self._shares.counts(position).tolist(), strict=True))

    def epochs(self, position: int) -> dict[str, float]:
        """How many times each source has been seen before `position`."""
        counts = self.counts(position)
        return {n: counts[n] / size if size else 0.0 for n, size in self.available.items()}

    def position_of(self, name: str, ordinal: int) -> int | None:
        """Where a source gives its instance `ordinal` (from 0); None: it stops before."""
        number, starts = self.names.index(name), self._starts
        for segment, start, end in itertools.zip_longest(self.segments, starts, starts[1:]):
            share, before = segment.shares[name], self.counts(start)[name]
            if not share or (end is not None and self.counts(end)[name] <= ordinal):
                continue
            # The window that `shares.py` keeps it in.
            first = start + int((ordinal - before) / share)
            last = start + int((ordinal - before + 1) / share) + 1
            positions = np.arange(first, last if end is None else min(last, end))
            sources, ordinals = self.locate(positions)
            found = np.flatnonzero((sources == number) & (ordinals == ordinal))
            return int(positions[found[0]])
        return None

    @functools.cached_property
    def ends(self) -> dict[str, int]:
        """Where each source would break its limit; those that never do are left out."""
        return {
            name: place
            for name, limit in self.limits.items()
            if limit is not None and (place := self.position_of(name, limit)) is not None
        }


class MixedStream:
    """The order of a mixture, an `InstanceStream`. One epoch is as many instances as are used,
    though sources pass at their own speeds.

    Attributes:
        plan: the shares.
        fingerprint: identifies the whole order but the seed.
    """

    keeps_epochs_apart = False

    def __init__(
        self,
        config: DatasetConfig,
        datasets: Mapping[str, InstanceDataset],
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        """`datasets` are the training instances of the sources of `config.mix`, by name. DataError:
        one has no instance."""
        for name, dataset in datasets.items():
            if dataset.num_instances == 0:
                raise DataError(
                    f"dataset.mix: {name} has no training instance: its text is shorter than "
                    f"dataset.sequence_length {dataset.sequence_length}; give it more text, or "
                    "take it out"
                )
        num_instances = {name: dataset.num_instances for name, dataset in datasets.items()}
        self.plan = MixPlan(resolve_mix(config), resolve_schedule(config), num_instances)
        self.epoch_instances = self.plan.epoch_instances
        self._fingerprints = {name: datasets[name].fingerprint for name in self.plan.names}
        self._num_instances = num_instances
        self._first = np.cumsum([0, *(num_instances[name] for name in self.plan.names)])[:-1]
        self._seed, self._shuffle = seed, shuffle
        self.fingerprint = _hash(sorted(self.identity().items()))

    @property
    def end(self) -> int | None:
        """Where the first source breaks its `max_repetitions`."""
        return min(self.plan.ends.values(), default=None)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Numbers in the `MixedDataset` of the same sources. DataError: one has been repeated as
        often as its `max_repetitions` allows."""
        sources, ordinals = self.plan.locate(positions)
        found = np.empty(len(positions), dtype=np.int64)
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source)
            name = self.plan.names[source]
            limit = self.plan.limits[name]
            if limit is not None and ordinals[places[-1]] >= limit:
                raise DataError(
                    f"dataset.mix: {name} has been repeated as often as its max_repetitions "
                    f"{self.plan.sources[name].max_repetitions:g} allows ({limit:,} instances); "
                    "raise it, lower its ratio, or stop here"
                )
            found[places] = self._instances(name, ordinals[places]) + self._first[source]
        return found

    def identity(self, position: int | None = None) -> dict[str, str]:
        """What decides the order before `position` (None: all of it), for each source in words
        that can be compared and shown. What comes later is left out."""
        segments, found = self.plan.segments, {}
        if position is not None:
            end = max(1, position * self.plan.sequence_length)
            segments = [segment for segment in segments if segment.at_tokens < end]
        for name in self.plan.names:
            words: list[str] = []
            before: Fraction | None = None
            for segment in segments:
                share = segment.shares[name]
                if share != before:
                    at = f" from token {segment.at_tokens:,}" if segment.at_tokens else ""
                    words.append(f"share {share}{at}")
                before = share
            if words != ["share 0"]:
                used, whole = self.plan.available[name], self._num_instances[name]
                part = [f"{used:,} of {whole:,} instances"] if used < whole else []
                found[name] = ", ".join([f"data {self._fingerprints[name]}", *part, *words])
        return found

    def _instances(self, name: str, ordinals: np.ndarray) -> np.ndarray:
        used, fingerprint = self.plan.available[name], self._fingerprints[name]
        epochs, places = np.divmod(ordinals, used)
        if self._shuffle:
            # The name is part of the key: a corpus that is in the mixture twice has two orders.
            key = f"{name}:{fingerprint}:{self._seed}"
            for epoch, inside in runs(epochs):
                places[inside] = KeyedPermutation(used, f"{key}:{epoch}")(places[inside])
        if used < self._num_instances[name]:
            # Without the seed: every run with this `max_tokens` sees the same part.
            places = KeyedPermutation(self._num_instances[name], f"part:{fingerprint}")(places)
        return places


def _hash(identity: object) -> str:
    return xxhash.xxh3_64_hexdigest(repr(identity).encode())


def check_limits(plan: MixPlan, total_instances: int, *, batch_instances: int = 1) -> None:
    """Raise ConfigError when the first `total_instances` instances, in batches of
    `batch_instances`, repeat a source more than it may be; says what would work."""
    broken = sorted((end, name) for name, end in plan.ends.items() if end < total_instances)
    if not broken:
        return
    end, name = broken[0]
    others = sorted(other for _, other in broken[1:])
    also = f" (so do {', '.join(others)})" if others else ""
    length, available, limit = plan.sequence_length, plan.available[name], plan.limits[name]
    taken = plan.counts(total_instances)[name]
    longest = end // batch_instances * batch_instances * length
    ways = [
        f"train on at most {count(longest, 'token')} (trainer.max_duration)",
        "raise its max_repetitions",
    ]
    # One number tells the largest share that stays within the limit.
    if len(plan.segments) == 1 and len(plan.names) > 1 and limit is not None:
        now, most = plan.segments[0].shares[name], Fraction(limit, total_instances)
        way = f"lower its share from {_floor(100 * now)}% to {_floor(100 * most)}% of the mixture"
        if "/" not in name:
            way += f" (its ratio times {_floor(most * (1 - now) / ((1 - most) * now))})"
        ways.insert(0, way)
    raise ConfigError(
        f"dataset.mix: {name} breaks its limit of {plan.sources[name].max_repetitions:g} "
        f"repetitions{also}: the run takes {count(taken * length, 'token')} of it, "
        f"{_floor(Fraction(taken, max(1, available)))} times the {available * length:,} "
        f"there are; {', or '.join(ways)}"
    )


def _floor(value: Fraction) -> str:
    """Four digits, never rounded up."""
    digits = 4
    while value and value * 10 ** (digits - 1) < 100 and digits < 12:
        digits += 1
    return f"{int(value * 10**digits) / 10**digits:.{digits}f}".rstrip("0").rstrip(".")
