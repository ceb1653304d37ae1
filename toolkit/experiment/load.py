"""From `toolkit train SOURCE --flags` to an `ExperimentConfig` that knows where each value is from.

1. SOURCE is a JSON file, a Python file that makes a config (python_config.py), or the name of a
   recipe; each holds a complete config.
2. `{"preset": NAME, ...}` in the model section becomes that preset, under the section's other
   values. The name of a mix in `dataset.mix` becomes what the mix holds.
3. `--base FOLDER` gives model, tokenizer and weights to start from (sources.py); recipes for
   fine-tuning have none of their own.
4. Flags follow: the short ones (`--sequence-length`), then overrides (`--a.b.c=VALUE`) in the order
   given. `--model.preset=NAME` replaces the model section before the other flags apply. A source
   that they give gets a name of its own (sources.py).
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from toolkit.config import (
    DEFAULT_ORIGIN,
    ConfigLayers,
    Override,
    parse_json_mapping,
    parse_override_args,
    read_json_mapping,
)
from toolkit.config.check import check
from toolkit.config.files import YAML_SUFFIXES
from toolkit.config.interpolation import fill
from toolkit.config.paths import local_path
from toolkit.config.secrets import check_no_secrets
from toolkit.config.types import nearest, shown, type_of
from toolkit.data.order.config import inline_mixes
from toolkit.distributed.launcher import world_size_of
from toolkit.distributed.layout import layout_of
from toolkit.errors import ConfigError, ErrorList
from toolkit.experiment.aliases import ALIASES, implied, our_path, our_value, without
from toolkit.experiment.checks import LOADING, check_experiment, layout_for
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load_checks import check_load_path
from toolkit.experiment.objectives import give_scores
from toolkit.experiment.other_trainers import THEIR_NAMES, check_not_theirs, with_our_name
from toolkit.experiment.python_config import call_build_config, is_python_config
from toolkit.experiment.recorded import RUN_ORIGIN, stored_config
from toolkit.experiment.sources import (
    OFFICIAL,
    longest_sequence,
    name_own_data,
    read_base,
    recipe_hint,
    recipe_names,
    recipe_text,
    without_model,
)
from toolkit.models.presets import PRESETS, preset
from toolkit.runs.listing import find_named
from toolkit.runs.registry import check_run_folder, resolve_run_folder

SHORTHANDS: dict[str, str] = {
    "name": "run.name",
    "sequence_length": "dataset.sequence_length",
    "data_root": "dataset.root",
    "save_folder": "run.save_folder",
    "work_dir": "run.work_dir",
}
"""Options of the command line that stand for one config value each."""


ORIGINS_KEY = "$origins"
"""In a file that was made of a loaded experiment (`with_origins`): path -> origin, as if its values
were loaded from there now."""


class LoadedExperiment(NamedTuple):
    """A resolved config with the origin of each leaf value."""

    config: ExperimentConfig
    """With the variables that `${NAME}` names filled in."""
    origins: dict[str, str]
    """`path -> origin`: "default", a recipe, a file, a preset, a flag as typed, or "run"."""
    source: str
    """The recipe, file or run folder it was loaded from."""
    stored: ExperimentConfig
    """The config as it is written, which the run folder keeps: no secrets, `${NAME}` as it is."""
    given: tuple[Override, ...] = ()
    """What the command line said besides `source`, by our paths, in the order that it counts;
    `base` has no path."""


def load_experiment(
    source: str,
    overrides: Sequence[str] = (),
    shorthands: Mapping[str, Any] | None = None,
    *,
    base: str | None = None,
    starts: bool = False,
    environ: Mapping[str, str] | None = os.environ,
    check_data: Callable[[ExperimentConfig], None] | None = None,
    fills: bool = True,
) -> LoadedExperiment:
    """Load a recipe or JSON file and apply the command line to it; see the top of this file.

    Where the config is refused, the error tells too what else is wrong: with the data, as
    `check_data` says, with the layout under a launcher's `environ` (None: not known), and where
    `starts`, with the run that would be started. Without `fills`, `config` too has `${NAME}` as it
    is written.
    """
    loading = _Loading()
    with loading.found.collecting():
        data, origin = _read_source(source)
        check_not_theirs(data, origin)
    if loading.found.errors:
        loading.parse(overrides)  # nothing else can be told without the file
        loading.found.raise_any()
    written = data.pop(ORIGINS_KEY, None)
    loading.add(data, origin)
    if written is not None:
        loading.layers.rename_origins(_checked_origins(written, source))
    if base is not None:
        loading.found.ask(loading.add_base, base)
    before = copy.deepcopy(loading.layers.data.get("dataset") or {})
    loading.apply_flags(overrides, shorthands or {})
    loading.found.ask(name_own_data, loading.layers, before, overrides)
    has_model = "model" in loading.layers.data
    if has_model:
        give_scores(loading.layers)
    if not has_model:
        if not (base is not None and loading.found.errors) and not loading.refuses("model"):
            loading.found.add(ConfigError(without_model(source, data)))
        loading.layers.data["model"] = preset("quickstart")  # for what can be told of the rest
    across = has_model or loading.refuses("model")
    return loading.loaded(
        source,
        across=across,
        starts=starts,
        environ=environ,
        check_data=check_data,
        fills=fills,
    )


def with_origins(stored: ExperimentConfig, origins: Mapping[str, str]) -> dict[str, Any]:
    """The content of a file that loads as `stored`, each value with its origin."""
    kept = {path: origin for path, origin in origins.items() if origin != DEFAULT_ORIGIN}
    return {ORIGINS_KEY: kept, **stored.to_dict()}


def without_defaults(config: ExperimentConfig, origins: Mapping[str, str]) -> dict[str, Any]:
    """The content of a file that loads as `config`: without what `origins` calls a default, where
    it does."""

    def kept(data: dict[str, Any], path: str) -> dict[str, Any]:
        found = {}
        for name, value in data.items():
            place = f"{path}{name}"
            if isinstance(value, dict) and value and place not in origins:
                if part := kept(value, f"{place}."):
                    found[name] = part
            elif origins.get(place) != DEFAULT_ORIGIN:
                found[name] = value
        return found

    short = kept(config.to_dict(), "")
    checked = check(short, ExperimentConfig)
    return short if not checked.errors and checked.config == config else config.to_dict()


def _checked_origins(written: Any, source: str) -> dict[str, str]:
    try:
        return msgspec.convert(written, dict[str, str])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {ORIGINS_KEY}: {error}") from None


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> LoadedExperiment:
    """Load the config a run was started with and apply the command line of a resume."""
    loading = _Loading()
    loading.add(stored_config(run_dir), RUN_ORIGIN)
    loading.found.raise_any()
    loading.apply_flags(overrides, {})
    return loading.loaded(str(run_dir))


def _read_source(source: str) -> tuple[dict[str, Any], str]:
    if is_python_config(source):
        made = call_build_config(source)
        return _read_source(made) if isinstance(made, str) else (made, source)
    path = local_path(source, "CONFIG")
    if path.is_file():
        return read_json_mapping(path), source
    if source in recipe_names():
        return parse_json_mapping(recipe_text(source), f"recipe {source}"), f"recipe {source}"
    if path.is_dir():
        raise ConfigError(
            f"{source}: a folder; give a JSON or YAML file or a recipe ({recipe_hint('')})"
        )
    is_path = source.endswith((".json", *YAML_SUFFIXES)) or "/" in source.removeprefix(OFFICIAL)
    kind = "file" if is_path else "recipe or file"
    near = source.removesuffix(".json") if source.startswith(OFFICIAL) else path.stem
    raise ConfigError(f"{source}: no such {kind}; {recipe_hint(near)}")


class _Loading:
    """A config on its way: its layers so far, and what is wrong with them."""

    def __init__(self) -> None:
        self.layers, self.found = ConfigLayers(ExperimentConfig), ErrorList()
        self.given: list[Override] = []

    def refuses(self, path: str) -> bool:
        return any(path in error.about for error in self.found.errors)

    def add(self, data: dict[str, Any], origin: str) -> None:
        """Add what can be added of a file, recipe or base."""
        while True:
            try:
                data = our_value("", data)
                break
            except ConfigError as error:  # about a name that is given twice
                self.found.add(error)
                data = without(data, error.about[0])
        model, dataset = data.get("model"), data.get("dataset")
        if isinstance(model, str) or (isinstance(model, dict) and "preset" in model):
            data = {key: value for key, value in data.items() if key != "model"}
            with self.found.collecting():
                if isinstance(model, str):
                    raise _no_model(model, '{{"preset": "{}"}}')
                self.layers.add({"model": _preset(model["preset"])}, f"preset {model['preset']}")
                if rest := {key: value for key, value in model.items() if key != "preset"}:
                    data["model"] = rest
        if isinstance(dataset, dict) and "mix" in dataset:
            rest = {key: value for key, value in dataset.items() if key != "mix"}
            data = {**data, "dataset": rest}
            with self.found.collecting():
                data["dataset"] = {**dataset, "mix": inline_mixes(dataset["mix"])}
        self.layers.add(data, origin)

    def add_base(self, name: str) -> None:
        """Take what `--base` says in the place of the model and tokenizer there are."""
        self.given.append(Override("", name, f"--base={name}"))
        folder = local_path(find_named(name), "--base")
        base = read_base(folder)
        self.layers.data.pop("model", None)
        dataset = self.layers.data.setdefault("dataset", {})
        if "tokenizer" in base.get("dataset", {}):
            dataset.pop("tokenizer", None)
        longest, wanted = longest_sequence(base["model"]), dataset.get("sequence_length")
        if longest is not None and wanted is not None and wanted > longest:
            base.setdefault("dataset", {})["sequence_length"] = longest
        self.add(base, f"--base={folder}")

    def parse(self, args: Sequence[str]) -> list[Override]:
        short = [name.replace("_", "-") for name in SHORTHANDS]
        return parse_override_args(
            args,
            sections=[*ExperimentConfig.__struct_fields__, *(a for a in ALIASES if "." not in a)],
            options=[*short, "base", "dry-run", "json", "debug"],
            theirs=THEIR_NAMES,
            root=type_of(ExperimentConfig),
            found=self.found,
        )

    def apply_flags(self, args: Sequence[str], shorthands: Mapping[str, Any]) -> None:
        by_path: dict[str, Override] = {}
        for name, value in shorthands.items():
            if value is not None:
                path, flag = SHORTHANDS[name], f"--{name.replace('_', '-')}={value}"
                by_path[path] = Override(name, str(value), flag)
                self.given.append(Override(path, str(value), flag))
                self.layers.set(path, value, flag)
        overrides, has_model = self.parse(args), True
        self.given += [own._replace(path=our_path(own.path)) for own in overrides]
        for override in overrides:
            if override.path == "model.preset":
                has_model = False
                with self.found.collecting():
                    self.layers.set("model", _preset(override.text), override.flag)
                    has_model = True
        for override in overrides:
            is_lost = override.path.startswith("model.") and not has_model
            if override.path != "model.preset" and not is_lost:
                ours = override._replace(path=our_path(override.path))
                self.found.ask(self._apply, override, ours, by_path.setdefault(ours.path, override))

    def _apply(self, override: Override, ours: Override, first: Override) -> None:
        if first.path != override.path and first.text != override.text:
            raise ConfigError(f"{first.flag} and {override.flag}: two names of one value; give one")
        module = self.layers.data.get("train_module")
        checkpointing = module.get("ac_config") if isinstance(module, dict) else None
        mode = checkpointing.get("mode") if isinstance(checkpointing, dict) else None
        try:
            value = self.layers.parse(ours)
        except ConfigError as error:
            raise with_our_name(error, {}, ours.path) from None
        if ours.path == "model" and isinstance(value, dict) and "preset" in value:
            value = {**_preset(value.pop("preset")), **value}
        elif ours.path == "model" and isinstance(value, str):
            raise _no_model(value, "--model.preset={}")
        elif ours.path == "dataset.mix":
            value = inline_mixes(value)
        self.layers.set(ours.path, our_value(ours.path, value), ours.flag)
        if (also := implied(override.path, mode)) is not None:
            self.layers.set(*also, ours.flag)

    def loaded(self, source: str, *, fills: bool = True, **known: Any) -> LoadedExperiment:
        """The experiment, or what is wrong with it: `known` is for `_add_other_errors`."""
        checked = self.layers.check()
        for error in checked.errors:
            self.found.add(with_our_name(error, self.layers.data))
        if self.found.errors:
            config, has_model = checked.config, not self.refuses("model")
            if config is None:  # the model alone has no default
                self.layers.data["model"], has_model = preset("quickstart"), False
                config = self.layers.check().config
            if config is not None:
                _add_other_errors(self.found, config, has_model=has_model, **known)
            self.found.raise_any()
        stored = checked.config
        check_no_secrets(stored.to_dict())
        origins = self.layers.origins(stored)
        config = fill(stored) if fills else stored
        return LoadedExperiment(config, origins, source, stored, tuple(self.given))


def _add_other_errors(
    found: ErrorList,
    config: ExperimentConfig,
    *,
    has_model: bool = True,
    across: bool = True,
    starts: bool = False,
    environ: Mapping[str, str] | None = os.environ,
    check_data: Callable[[ExperimentConfig], None] | None = None,
) -> None:
    """Add to `found`, the reasons to refuse a config, what is wrong with the rest of it: all that
    can be told without the values which are refused, so that a user mends everything at once.

    `config` has defaults in the place of what is refused; `across`: its sections belong together.
    """
    refused = [path for error in found.errors for path in error.about]
    names_known = not any(a.startswith(("model", "train_module.lora")) for a in refused)

    def is_known(*paths: str) -> bool:
        return not any(error.is_about(*paths) for error in found.errors)

    others = ErrorList()
    if across:
        layout, ranks = None, 1
        if environ is not None:
            own = (layout_for, config) if has_model else (layout_of, config.train_module)
            layout = others.ask(*own, environ)
            ranks = world_size_of(environ)
        options = {"layout": layout, "has_model": has_model, "has_names": names_known}
        others.ask(check_experiment, config, ranks, **options)
    with others.collecting():
        filled = fill(config)
        if check_data is not None and is_known("dataset.source", "dataset.mix"):
            others.ask(check_data, filled)
        if starts and is_known("run"):
            others.ask(check_run_folder, filled.run, "<time>")
        if starts and across and is_known("run", *LOADING):
            folder = resolve_run_folder(filled.run, "<time>")
            others.ask(check_load_path, filled, folder, has_model=names_known)
    for other in others.errors:
        if not other.is_about(*refused):  # else it is about a default that stands there
            found.add(other)


def _preset(name: Any) -> dict[str, Any]:
    if not isinstance(name, str):
        problem = f"expected the name of a preset, not {name!r}"
        raise ConfigError(problem, key="model.preset", about="model")
    return preset(name)


def _no_model(name: str, form: str) -> ConfigError:
    write = form.format(nearest(name, PRESETS) or "NAME")
    problem = f"expected a mapping, not {shown(name)}; for a preset give {write}"
    return ConfigError(problem, key="model")
