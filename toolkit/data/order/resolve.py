"""From a mix as it is written to its sources: nested mixes opened, shares multiplied out.

Nothing here needs numpy or looks at data.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from toolkit.data.config import DatasetConfig, VariableInstancesConfig
from toolkit.data.order.config import MixConfig, MixSourceConfig, check_nested, read_mix
from toolkit.data.tokens.prepared import dataset_folder
from toolkit.errors import ConfigError

SMALLEST_SHARE = Fraction(1, 1_000_000)
"""Time and memory of finding a place in the mixture grow with the inverse."""
TAKEN_NAME = "val"
"""What the evaluation of all sources together is called in metrics."""


class ResolvedSource(NamedTuple):
    """One corpus of a mixture."""

    name: str
    """Its name in `dataset.mix`; in a nested mix, `outer/inner`."""
    ratio: Fraction
    """Its share of the mixture's instances at the start of training; all add up to 1."""
    dataset: DatasetConfig
    """What it would be as a corpus by itself."""
    max_repetitions: float | None
    max_tokens: int | None


class RatioSegment(NamedTuple):
    """A part of training with the same ratios."""

    at_tokens: int
    """Tokens trained on when it begins."""
    shares: dict[str, Fraction]
    """Share of each source; they add up to 1."""


def resolve_mix(config: DatasetConfig) -> list[ResolvedSource]:
    """The corpora of `config.mix`, sorted by name. Sources whose ratio is always 0 are left out.

    Raises:
        ConfigError: a nested mix is missing, holds itself or has a schedule; two sources would
            share a folder; a share is too small.
    """
    mix = _mix(config)
    leaves = {leaf.name: leaf for leaf in _leaves(mix.sources, config, "", Fraction(1), ())}
    segments = _segments(mix, leaves)
    names = sorted({name for segment in segments for name, s in segment.shares.items() if s})
    sources = [
        ResolvedSource(
            name,
            segments[0].shares[name],
            leaves[name].dataset,
            leaves[name].source.max_repetitions,
            leaves[name].source.max_tokens,
        )
        for name in names
    ]
    _check_folders(sources)
    return sources


def resolve_schedule(config: DatasetConfig) -> list[RatioSegment]:
    """The shares of the sources that `resolve_mix` gives, from each point on where they change;
    the first begins at 0.

    Raises:
        ConfigError: as `resolve_mix`, or all sources stop.
    """
    mix = _mix(config)
    names = [source.name for source in resolve_mix(config)]
    leaves = {leaf.name: leaf for leaf in _leaves(mix.sources, config, "", Fraction(1), ())}
    return [
        RatioSegment(segment.at_tokens, {name: segment.shares[name] for name in names})
        for segment in _segments(mix, leaves)
    ]


def used_instances(source: ResolvedSource, num_instances: int) -> int:
    """How many of a source's instances are used: about `max_tokens` of them."""
    if source.max_tokens is None:
        return num_instances
    wanted = -(-source.max_tokens // source.dataset.sequence_length)
    return min(num_instances, wanted)


def limited_instances(config: DatasetConfig, num_instances: Mapping[str, int]) -> int:
    """Instances of one pass over the mixture, given how many each source has."""
    return sum(used_instances(source, num_instances[source.name]) for source in resolve_mix(config))


class _Leaf(NamedTuple):
    name: str
    top: str
    """The source of `dataset.mix` that it belongs to..."""
    part: Fraction
    """...and its share of that."""
    source: MixSourceConfig
    dataset: DatasetConfig


def _mix(config: DatasetConfig) -> MixConfig:
    if config.mix is None:
        raise ConfigError("dataset.mix is null: there is no mixture; give its sources")
    if isinstance(config.instances, VariableInstancesConfig):
        raise ConfigError(
            "dataset.instances: rows of variable length do not mix; use fixed or packed instances"
        )
    # Not in `MixConfig`: sources of nested mixes, which are called `outer/val`, may have this name.
    if TAKEN_NAME in config.mix.sources:
        raise ConfigError(
            f"dataset.mix.sources.{TAKEN_NAME}: this name is taken by the evaluation of all "
            "sources together; give the source another name, and keep its folder with "
            f"dataset_name={TAKEN_NAME}"
        )
    return config.mix


def _leaves(
    sources: Mapping[str, MixSourceConfig],
    parent: DatasetConfig,
    prefix: str,
    part: Fraction,
    outside: tuple[str, ...],
) -> list[_Leaf]:
    total = sum(_exact(source.ratio) for source in sources.values())
    found = []
    for key, source in sources.items():
        name = f"{prefix}{key}"
        own = part * _exact(source.ratio) / total if prefix else part
        if source.mix is None:
            dataset = _dataset(name, parent, _corpus(key, source))
            found.append(_Leaf(name, name.split("/")[0], own, source, dataset))
            continue
        if source.max_tokens is not None:
            raise ConfigError(
                f"dataset.mix: {name}.max_tokens: {name} is a mix itself; give max_tokens to its "
                "sources"
            )
        inside, chain = source.mix, outside
        if isinstance(inside, str):
            nested = read_mix(inside)
            check_nested(inside, nested.schedule, outside)
            chain, inside = (*outside, inside), nested.sources
        else:
            try:
                MixConfig(sources=inside)
            except ValueError as error:
                raise ConfigError(f"dataset.mix: {name}.mix: {error}") from None
        # What the outer source says holds inside, where its sources say nothing else.
        inside = {
            inner: below.replace(
                max_repetitions=source.max_repetitions
                if below.max_repetitions is None
                else below.max_repetitions
            )
            for inner, below in inside.items()
        }
        dataset = _dataset(name, parent, _settings(source), is_mix=True)
        found += _leaves(inside, dataset, f"{name}/", own, chain)
    return found


def _settings(source: MixSourceConfig) -> dict[str, Any]:
    fields = ("dataset_config", "filters", "deduplicate", "instructions")
    given = {field: getattr(source, field) for field in fields}
    return {field: value for field, value in given.items() if value is not None}


def _corpus(key: str, source: MixSourceConfig) -> dict[str, Any]:
    return {
        **_settings(source),
        "source": source.source,
        "dataset_name": source.dataset_name or key,
        "mix": None,
    }


def _dataset(
    name: str, parent: DatasetConfig, changes: dict[str, Any], *, is_mix: bool = False
) -> DatasetConfig:
    try:
        return parent.replace(**changes)
    except ValueError as error:
        kind = "mix" if is_mix else "source"
        raise ConfigError(f"dataset.mix: {kind} {name}: {error}") from None


def _segments(mix: MixConfig, leaves: Mapping[str, _Leaf]) -> list[RatioSegment]:
    ratios = {name: _exact(source.ratio) for name, source in mix.sources.items()}
    length = next(iter(leaves.values())).dataset.sequence_length
    segments = [RatioSegment(0, _shares(ratios, leaves, "dataset.mix.sources"))]
    for number, change in enumerate(mix.schedule):
        ratios |= {name: _exact(ratio) for name, ratio in change.ratios.items()}
        shares = _shares(ratios, leaves, f"dataset.mix.schedule.{number}")
        # A change takes effect between two instances.
        at_tokens = -(-change.at_tokens // length) * length
        if segments[-1].at_tokens == at_tokens:
            segments.pop()
        # Each segment counts anew, so one that changes nothing would change the order all the same.
        if segments[-1].shares != shares:
            segments.append(RatioSegment(at_tokens, shares))
    return segments


def _shares(
    ratios: Mapping[str, Fraction], leaves: Mapping[str, _Leaf], where: str
) -> dict[str, Fraction]:
    total = sum(ratios.values())
    if not total:
        raise ConfigError(f"{where}: all ratios are 0; give at least one source more")
    shares = {name: ratios[leaf.top] / total * leaf.part for name, leaf in leaves.items()}
    for name, share in shares.items():
        if 0 < share < SMALLEST_SHARE:
            raise ConfigError(
                f"{where}: {name} has a share of {float(share):.1e}, less than "
                f"{float(SMALLEST_SHARE):.0e} of the mixture; raise its ratio, or set it to 0"
            )
    return shares


def _check_folders(sources: list[ResolvedSource]) -> None:
    known: dict[str, ResolvedSource] = {}
    for source in sources:
        folder = str(dataset_folder(source.dataset))
        other = known.setdefault(folder, source)
        if other.dataset != source.dataset:
            raise ConfigError(
                f"dataset.mix: {other.name} and {source.name} would both be kept in {folder}, but "
                "have different settings; give one of them another dataset_name"
            )


def _exact(ratio: float) -> Fraction:
    """The number as it is written: 0.1 is a tenth."""
    return Fraction(str(ratio))
