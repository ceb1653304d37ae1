"""Mix files: mixtures by name (`toolkit/recipes/mixes/*.json`) or as a JSON file of one's own."""

from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from toolkit.config import convert, nearest, parse_json_mapping, read_json_mapping
from toolkit.config.paths import local_path
from toolkit.data.order.config import MixConfig
from toolkit.errors import ConfigError


def mix_names() -> list[str]:
    """Names of the mixes that come with the package, sorted."""
    names = (entry.name for entry in _folder().iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def read_mix(name: str) -> MixConfig:
    """The mix in the JSON file `name`, or the packaged one of that name.

    Raises:
        ConfigError: there is none, or it is no mix.
    """
    try:
        return convert(read_mix_data(name), MixConfig)
    except ConfigError as error:
        raise ConfigError(f"mix {name}: {str(error).removeprefix(f'mix {name}: ')}") from None


def read_mix_data(name: str) -> dict[str, Any]:
    """Like `read_mix`, as plain JSON types that nobody has checked."""
    path = local_path(name, "mix")
    if path.is_file():
        return read_json_mapping(path)
    if name in mix_names():
        text = (_folder() / f"{name}.json").read_text(encoding="utf-8")
        return parse_json_mapping(text, f"mix {name}")
    near = nearest(name, mix_names())
    hint = f"did you mean {near!r}?" if near else "mixes: " + ", ".join(mix_names())
    kind = "file" if name.endswith(".json") or "/" in name else "mix or file"
    raise ConfigError(f"mix {name}: no such {kind}; {hint}")


def inline_mixes(mix: Any) -> Any:
    """`dataset.mix` as it stands in a config file, with names of mixes replaced by what they
    hold: a config that is stored with a run then means the same for ever.

    What is no mix at all is left as it is, for the check of the whole config to name.

    Raises:
        ConfigError: there is no such mix, or it holds itself.
    """
    if isinstance(mix, str):
        mix = read_mix_data(mix)
        return {**mix, "sources": _inline(mix.get("sources"), ())}
    if isinstance(mix, dict) and "sources" in mix:
        return {**mix, "sources": _inline(mix["sources"], ())}
    return mix


def check_nested(name: str, mix: Any, outside: tuple[str, ...]) -> None:
    """Check that the mix `name` can stand inside the mixes `outside`.

    Raises:
        ConfigError: it is one of them, or has a schedule.
    """
    if file_identity(name) in map(file_identity, outside):
        raise ConfigError(
            f"mix {name}: holds itself ({' -> '.join([*outside, name])}); take it out of one"
        )
    if mix:
        raise ConfigError(
            f"mix {name}: has a schedule, which only dataset.mix itself can have; take it out, or "
            "write the changes into dataset.mix.schedule"
        )


def file_identity(name: str) -> str:
    """The same for two names of one file."""
    path = local_path(name, "mix")
    return str(path.resolve()) if path.is_file() else name


def _inline(sources: Any, outside: tuple[str, ...]) -> Any:
    if not isinstance(sources, dict):
        return sources
    found = {}
    for key, source in sources.items():
        nested = source.get("mix") if isinstance(source, dict) else None
        if isinstance(nested, str):
            data = read_mix_data(nested)
            check_nested(nested, data.get("schedule"), outside)
            inside = _inline(data.get("sources"), (*outside, nested))
            found[key] = {**source, "mix": inside}
        elif isinstance(nested, dict):
            found[key] = {**source, "mix": _inline(nested, outside)}
        else:
            found[key] = source
    return found


def _folder() -> Traversable:
    return resources.files("toolkit") / "recipes" / "mixes"
