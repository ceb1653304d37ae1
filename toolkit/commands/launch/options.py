"""The words of `toolkit launch`: which of them are options of the target, and which belong to the
config of the run."""

from typing import Any

import msgspec

from toolkit.commands.launch import TARGETS
from toolkit.commands.launch.target import Target, target_class
from toolkit.config import ConfigLayers, Override, is_override
from toolkit.config.types import nearest
from toolkit.errors import ConfigError, ErrorList
from toolkit.experiment.aliases import ALIASES
from toolkit.experiment.config import ExperimentConfig
from toolkit.wording import shortened

_ALIASES = {
    "num_nodes": "nodes",
    "num_gpus": "gpus",
    "nproc_per_node": "processes",
    "clusters": "cluster",
    "beaker_image": "image",
    "weka_buckets": "weka",
    "env_vars": "env",
    "env_secrets": "secret",
}
"""Names of OLMo-core's launch config, `--launch.NAME`, for ours."""

_NO_VALUE = "needs a value; one with dashes at its start goes behind an equals sign"


def parse_options(words: list[str], target: type[Target]) -> tuple[Target, list[str]]:
    """The target with the options among `words`, and the other words. Raises ConfigError: an option
    that nobody has, or a value that its option does not take."""
    layers, rest, found = ConfigLayers(target), [], ErrorList()
    several: dict[str, list] = {}
    fields = {field.name: field.type for field in msgspec.structs.fields(target)}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        given, sign, text = word[2:].partition("=")
        name, negated = _field(given, fields) if is_override(word) else (None, False)
        if name is None:
            if is_override(word):
                found.ask(_check_known, given, fields)
            rest.append(word)
            continue
        if fields[name] is bool:
            text = text if sign else "true"
            if negated:
                text = {"true": "false", "false": "true"}.get(text, text)
        elif not sign:
            if not queue or is_override(queue[0]):
                found.add(ConfigError(_NO_VALUE, key=f"--{given}"))
                continue
            text = queue.pop(0)
        flag = f"--{name}={text}"
        if getattr(fields[name], "__origin__", None) is tuple:
            several.setdefault(name, []).extend(
                _items(Override(name, text, flag), fields[name], layers, found)
            )
            continue
        with found.collecting():
            layers.set(name, layers.parse(Override(name, text, flag)), flag)
    for name, items in several.items():
        found.ask(layers.set, name, items, f"--{name}")
    checked = layers.check()
    for error in [*found.errors, *checked.errors]:
        if error.key and not error.key.startswith("--"):
            error.key = f"--{error.key.partition('.')[0].replace('_', '-')}"
        found.add(error)
    found.raise_any()
    return checked.config, rest


def _items(given: Override, kind: Any, layers: ConfigLayers, found: ErrorList) -> list:
    """What one use of a repeatable option adds: its text, or the items of a list; numbers are
    written without brackets too."""
    if kind != tuple[int, ...] and not given.text.startswith("["):
        return [given.text]
    text = given.text if given.text.startswith("[") else f"[{given.text}]"
    value = found.ask(layers.parse, given._replace(text=text))
    return value if isinstance(value, list) else []


def _field(given: str, fields: dict) -> tuple[str | None, bool]:
    """The field that an option means, and whether it denies it."""
    name = given.removeprefix("launch.").replace("-", "_")
    name = _ALIASES.get(name, name) if name not in fields else name
    if name in fields:
        return name, False
    for denial in ("no_", "not_"):
        if name.startswith(denial) and fields.get(name.removeprefix(denial)) is bool:
            return name.removeprefix(denial), True
    return None, False


def _check_known(given: str, fields: dict) -> None:
    """Raise ConfigError for an option that neither this target nor a config has."""
    if "." in given and not given.startswith("launch."):
        return
    if given in ExperimentConfig.__struct_fields__ or given in ALIASES:
        return
    name = given.removeprefix("launch.").replace("-", "_")
    if others := [to for to in TARGETS if name in target_class(to).__struct_fields__]:
        raise ConfigError(f"--{given} is an option of --to {' and '.join(others)} alone")
    hint = nearest(name, [*fields, *_ALIASES, *ExperimentConfig.__struct_fields__])
    hint = f"did you mean --{hint.replace('_', '-')}?" if hint else "see `toolkit launch --help`"
    raise ConfigError(f"no such option: --{shortened(given)}; {hint}")
