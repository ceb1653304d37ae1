"""Configs of mixtures: how much of each source training sees."""

from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from toolkit.config import Config, convert, nearest, parse_json_mapping, read_json_mapping
from toolkit.config.base import check_positive
from toolkit.config.paths import NewName, local_path
from toolkit.data.source_config import FiltersConfig, InstructionsConfig, SourceConfig
from toolkit.errors import ConfigError


class MixSourceConfig(Config, kw_only=True):
    """One source of a mixture: a corpus of its own, or a mixture again.

    What is not said here is taken from `dataset`: root, tokenizer, validation split, instances.
    """

    ratio: float
    """Share of the mixture's tokens, relative to the other sources' ratios."""
    dataset_name: NewName | None = None
    """First folder level of its token files; default: the source's name in the mixture."""
    dataset_config: NewName | None = None
    """Second folder level; default: `dataset.dataset_config`."""
    source: SourceConfig | None = None
    """Where its text comes from; null: its token files exist already."""
    filters: FiltersConfig | None = None
    """Which documents are left out; default: `dataset.filters`."""
    deduplicate: bool | None = None
    """Leave out documents that were there before; default: `dataset.deduplicate`."""
    instructions: InstructionsConfig | None = None
    """For rows that are conversations; default: `dataset.instructions`."""
    max_repetitions: float | None = None
    """Most times each token may be seen over the whole run; null: no limit."""
    max_tokens: int | None = None
    """Use a random but fixed part of the source, of about this many tokens."""
    mix: "str | dict[str, MixSourceConfig] | None" = None
    """A mixture in place of a corpus: the name of a packaged mix, a JSON file, or sources."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < float("inf"):
            raise ValueError(f"ratio must be a number, 0 or more: {self.ratio}")
        check_positive(self, "max_repetitions", "max_tokens")
        if self.mix is not None and (self.source is not None or self.dataset_name is not None):
            raise ValueError("a source has either a mix or a corpus of its own, not both")


class RatioChangeConfig(Config, kw_only=True):
    """New ratios from a point of training on."""

    at_tokens: int
    """Tokens trained on (all sources together) when the ratios change."""
    ratios: dict[str, float]
    """Ratio of every source that is named; the others keep theirs. 0 stops a source."""

    def __post_init__(self) -> None:
        check_positive(self, "at_tokens")
        if any(not 0.0 <= ratio < float("inf") for ratio in self.ratios.values()):
            raise ValueError(f"ratios must be numbers, 0 or more: {self.ratios}")


class MixConfig(Config, kw_only=True):
    """Named sources in given shares; what `toolkit/recipes/mixes/*.json` hold."""

    description: str = ""
    """What the mixture is for, in a line."""
    sources: dict[str, MixSourceConfig]
    """The sources by name. Sources of a nested mixture are called `outer/inner`."""
    schedule: tuple[RatioChangeConfig, ...] = ()
    """Changes of the ratios, in the order of `at_tokens`."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("a mix needs at least one source")
        for name in self.sources:
            if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(
                    f"name of a source must be letters, digits, '.', '-', '_': {name!r}"
                )
        if sum(source.ratio for source in self.sources.values()) <= 0:
            raise ValueError("at least one ratio must be more than 0")
        places = [change.at_tokens for change in self.schedule]
        if places != sorted(set(places)):
            raise ValueError(f"schedule: at_tokens must ascend: {places}")
        for change in self.schedule:
            unknown = sorted(change.ratios.keys() - self.sources.keys())
            if unknown:
                raise ValueError(f"schedule: no such source: {', '.join(unknown)}")


def mix_names() -> list[str]:
    """Names of the mixes that come with the package, sorted."""
    names = (entry.name for entry in _folder().iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def read_mix(name: str, outside: tuple[str, ...] | None = None) -> MixConfig:
    """The mix in the JSON file `name`, or the packaged one of that name, inside the named mixes
    `outside` (None: it is `dataset.mix` itself). ConfigError: there is none, it is no mix, or a
    nested one holds itself or has a schedule."""
    try:
        return convert(_read_data(name, outside), MixConfig)
    except ConfigError as error:
        raise ConfigError(f"mix {name}: {str(error).removeprefix(f'mix {name}: ')}") from None


def inline_mixes(mix: Any) -> Any:
    """`dataset.mix` as it stands in a config file, with names of mixes replaced by what they
    hold: a config that is stored with a run then means the same for ever. What is no mix at all is
    left for the check of the whole config to name. ConfigError: as of `read_mix`."""
    if isinstance(mix, str):
        mix = _read_data(mix, None)
    elif not (isinstance(mix, dict) and "sources" in mix):
        return mix
    return {**mix, "sources": _inline(mix.get("sources"), ())}


def _read_data(name: str, outside: tuple[str, ...] | None) -> dict[str, Any]:
    """`read_mix` as plain JSON types that nobody has checked."""
    path = local_path(name, "mix")
    if path.is_file():
        data = read_json_mapping(path)
    elif name in mix_names():
        text = (_folder() / f"{name}.json").read_text(encoding="utf-8")
        data = parse_json_mapping(text, f"mix {name}")
    else:
        near = nearest(name, mix_names())
        hint = f"did you mean {near!r}?" if near else "mixes: " + ", ".join(mix_names())
        kind = "file" if name.endswith(".json") or "/" in name else "mix or file"
        raise ConfigError(f"mix {name}: no such {kind}; {hint}")
    if outside is not None and _identity(name) in map(_identity, outside):
        raise ConfigError(
            f"mix {name}: holds itself ({' -> '.join([*outside, name])}); take it out of one"
        )
    if outside is not None and data.get("schedule"):
        raise ConfigError(
            f"mix {name}: has a schedule, which only dataset.mix itself can have; take it out, or "
            "write the changes into dataset.mix.schedule"
        )
    return data


def _identity(name: str) -> str:
    """The same for two names of one file."""
    path = local_path(name, "mix")
    return str(path.resolve()) if path.is_file() else name


def _inline(sources: Any, outside: tuple[str, ...]) -> Any:
    if not isinstance(sources, dict):
        return sources
    found = {}
    for key, source in sources.items():
        nested, chain = source.get("mix") if isinstance(source, dict) else None, outside
        if isinstance(nested, str):
            chain = (*outside, nested)
            nested = _read_data(nested, outside).get("sources")
        found[key] = source if nested is None else {**source, "mix": _inline(nested, chain)}
    return found


def _folder() -> Traversable:
    return resources.files("toolkit") / "recipes" / "mixes"
