"""From a mix as it is written to its sources: nested mixes opened, shares multiplied out.

Nothing here needs numpy or looks at data.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

from toolkit.data.config import DatasetConfig, VariableInstancesConfig
from toolkit.data.order.config import MixConfig, MixSourceConfig, read_mix
from toolkit.data.tokens.prepared import dataset_folder
from toolkit.data.tokens.units import name_of
from toolkit.errors import ConfigError

SMALLEST_SHARE = Fraction(1, 1_000_000)
"""Time and memory of finding a place in the mixture grow with the inverse."""
TAKEN_NAME = "val"
"""What the evaluation of all sources together is called in metrics."""
_INHERITED = ("dataset_config", "filters", "deduplicate", "instructions")


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
    ConfigError: a nested mix cannot be used, two sources would share a folder, a share is too
    small, or all sources stop."""
    return _resolve(config)[0]


def resolve_schedule(config: DatasetConfig) -> list[RatioSegment]:
    """The shares of the sources that `resolve_mix` gives, from each point on where they change;
    the first begins at 0. Errors as there."""
    return _resolve(config)[1]


def used_instances(source: ResolvedSource, num_instances: int) -> int:
    """How many of a source's instances are used: about `max_tokens` of them."""
    if source.max_tokens is None:
        return num_instances
    return min(num_instances, -(-source.max_tokens // source.dataset.sequence_length))


def limited_instances(config: DatasetConfig, num_instances: Mapping[str, int]) -> int:
    """Instances of one pass over the mixture, given how many each source has."""
    return sum(used_instances(source, num_instances[source.name]) for source in resolve_mix(config))


def _resolve(config: DatasetConfig) -> tuple[list[ResolvedSource], list[RatioSegment]]:
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
    leaves = sorted(_leaves(config.mix.sources, config), key=lambda leaf: leaf.name)
    segments = _segments(config.mix, {leaf.name: leaf.ratio for leaf in leaves}, config)
    sources = [
        leaf._replace(ratio=segments[0].shares[leaf.name])
        for leaf in leaves
        if any(segment.shares[leaf.name] for segment in segments)
    ]
    _check_folders(sources)
    _check_units(sources)
    names = [source.name for source in sources]
    return sources, [
        RatioSegment(segment.at_tokens, {name: segment.shares[name] for name in names})
        for segment in segments
    ]


def _check_units(sources: list[ResolvedSource]) -> None:
    """All sources, as far as the config tells it, hold rows of one kind."""
    known = [source for source in sources if source.dataset.source is not None]
    for source in known[1:]:
        first, second = known[0].dataset.unit, source.dataset.unit
        if first != second:
            raise ConfigError(
                f"dataset.mix: {known[0].name} holds {name_of(first)}, {source.name} "
                f"{name_of(second)}; give all of them rows of one kind (instructions.kind)"
            )


def _leaves(
    sources: Mapping[str, MixSourceConfig],
    parent: DatasetConfig,
    prefix: str = "",
    part: Fraction = Fraction(1),
    outside: tuple[str, ...] = (),
    max_repetitions: float | None = None,
) -> Iterator[ResolvedSource]:
    """All corpora below `sources`; their `ratio` is their share of the source of `dataset.mix` that
    they belong to. What an outer source says holds where an inner one says nothing else."""
    total = sum(_exact(source.ratio) for source in sources.values())
    for key, source in sources.items():
        name, is_mix = f"{prefix}{key}", source.mix is not None
        changes = {
            field: value for field in _INHERITED if (value := getattr(source, field)) is not None
        }
        if not is_mix:
            folder = source.dataset_name or key
            changes |= {"source": source.source, "dataset_name": folder, "mix": None}
        try:
            dataset = parent.replace(**changes)
        except ValueError as error:
            kind = "mix" if is_mix else "source"
            raise ConfigError(f"dataset.mix: {kind} {name}: {error}") from None
        own = part * _exact(source.ratio) / total if prefix else part
        limit = max_repetitions if source.max_repetitions is None else source.max_repetitions
        if source.mix is None:
            yield ResolvedSource(name, own, dataset, limit, source.max_tokens)
            continue
        if source.max_tokens is not None:
            raise ConfigError(
                f"dataset.mix: {name}.max_tokens: {name} is a mix itself; give max_tokens to its "
                "sources"
            )
        inside, chain = source.mix, outside
        if isinstance(inside, str):
            chain = (*outside, inside)
            inside = read_mix(inside, outside).sources
        else:
            try:
                MixConfig(sources=inside)
            except ValueError as error:
                raise ConfigError(f"dataset.mix: {name}.mix: {error}") from None
        yield from _leaves(inside, dataset, f"{name}/", own, chain, limit)


def _segments(
    mix: MixConfig, parts: Mapping[str, Fraction], config: DatasetConfig
) -> list[RatioSegment]:
    ratios = {name: _exact(source.ratio) for name, source in mix.sources.items()}
    segments = [RatioSegment(0, _shares(ratios, parts, "dataset.mix.sources"))]
    for number, change in enumerate(mix.schedule):
        ratios |= {name: _exact(ratio) for name, ratio in change.ratios.items()}
        shares = _shares(ratios, parts, f"dataset.mix.schedule.{number}")
        # A change takes effect between two instances.
        at_tokens = -(-change.at_tokens // config.sequence_length) * config.sequence_length
        if segments[-1].at_tokens == at_tokens:
            segments.pop()
        # Each segment counts anew, so one that changes nothing would change the order all the same.
        if segments[-1].shares != shares:
            segments.append(RatioSegment(at_tokens, shares))
    return segments


def _shares(
    ratios: Mapping[str, Fraction], parts: Mapping[str, Fraction], where: str
) -> dict[str, Fraction]:
    total = sum(ratios.values())
    if not total:
        raise ConfigError(f"{where}: all ratios are 0; give at least one source more")
    shares = {name: ratios[name.split("/")[0]] / total * part for name, part in parts.items()}
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
