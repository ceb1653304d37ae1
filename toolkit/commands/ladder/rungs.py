"""The runs of a ladder: a config for each size and duration.

Batch and rate follow N (`sizes.py`) from the config's own, which are right for the config's model:

    tokens of a batch   proportional to N^(2/3), rounded to a power of two of rows
    learning rate       proportional to N^(-1/3); with `optim.mup` as it is, since muP scales it

Both exponents are those that OLMo's ladders use (Bhagia et al. 2024, arXiv:2412.04403), after the
fits of Porian et al. 2024 (arXiv:2406.19146). Lengths of schedules keep their share of the run.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from toolkit.commands.ladder.sizes import multiplied_weights, scaled_model
from toolkit.config.check import convert
from toolkit.errors import ConfigError
from toolkit.experiment.checks import batches_of, check_experiment
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import LoadedExperiment
from toolkit.experiment.schedules import (
    Scheduled,
    check_schedule_lengths,
    length_in,
    scheduled_settings,
)
from toolkit.models.config import ModuleConfig
from toolkit.optim.schedule import Amount

BATCH_EXPONENT, RATE_EXPONENT = 2 / 3, -1 / 3
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMBGT]?)")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_LENGTHS = ("until", "duration", "period_lengths", "decay_from")
"""Of schedules: points and lengths that no fraction can stand for."""


class Rung(NamedTuple):
    """One run of a ladder."""

    name: str
    size: int
    """N of its model."""
    tokens: int
    """Tokens that it trains on, whole steps."""
    steps: int
    flops: float
    """Model FLOPs of the whole run."""
    config: ExperimentConfig
    """As it is written: `${NAME}` is not filled in."""


class Ladder(NamedTuple):
    experiment: str
    rungs: list[Rung]
    """The smallest first."""


def parse_number(text: str, option: str) -> int:
    """`300k`, `4M`, `1.5B` or `20` as a number. Raises ConfigError: it is none, or 0."""
    match = _NUMBER.fullmatch(text.strip())
    number = 0
    if match is not None:
        number = round(float(match[1]) * _UNITS["k" if match[2] == "K" else match[2]])
    if number < 1:
        raise ConfigError(f"{option} {text}: expected a number such as 300k, 4M or 1.5B")
    return number


def parse_numbers(text: str, option: str) -> list[int]:
    """Several, with commas. Raises ConfigError: one is none, or there twice."""
    numbers = [parse_number(word, option) for word in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"{option} {text}: a number is there twice; give each once")
    return sorted(numbers)


def plan_ladder(
    loaded: LoadedExperiment, sizes: Sequence[int], ratios: Sequence[int], *, ranks: int = 1
) -> Ladder:
    """The runs of every size in `sizes` (N) on each number of `ratios` tokens for each of its
    weights.

    Args:
        loaded: the config whose shape, rate and batch the others have.
        ranks: processes of each run.

    Raises:
        ConfigError: something of the config does not scale, or a run would not start.
    """
    config = loaded.stored
    if isinstance(config.model, ModuleConfig):
        raise ConfigError(
            "a model of your own has no shape that the ladder knows; give a config with a "
            "transformer or gpt",
            key="model",
        )
    _check_scales(config)
    rungs = [
        _rung(config, size, ratio, ranks, loaded.origins) for size in sizes for ratio in ratios
    ]
    made: set[object] = set()
    for rung in rungs:
        keys: set[object] = {rung.name, (rung.size, rung.tokens)}
        if not made.isdisjoint(keys):
            raise ConfigError(
                f"{rung.name}: there is such a run already; take --sizes or --tokens-per-parameter "
                "further apart"
            )
        made |= keys
    return Ladder(f"{config.run.experiment}_ladder", rungs)


def _check_scales(config: ExperimentConfig) -> None:
    for key, given in (
        ("data_loader.batch_size_schedule", config.data_loader.batch_size_schedule),
        ("data_loader.sequence_length_schedule", config.data_loader.sequence_length_schedule),
        ("dataset.mix.schedule", config.dataset.mix.schedule if config.dataset.mix else ()),
        ("train_module.lora", config.train_module.lora),
        ("train_module.freeze", config.train_module.freeze),
        ("trainer.load_path", config.trainer.load_path),
    ):
        if given:
            raise ConfigError("does not scale with the runs of a ladder; leave it out", key=key)


def _rung(
    base: ExperimentConfig, size: int, ratio: int, ranks: int, origins: dict[str, str]
) -> Rung:
    own = base.model.to_transformer()
    model = scaled_model(own, size)
    found, before = multiplied_weights(model), multiplied_weights(own)
    name = f"{_shown(size)}-{ratio}"
    growth, length = found / before, base.dataset.sequence_length
    rows = base.data_loader.global_batch_size / length * growth**BATCH_EXPONENT
    rows = max(_power_of_two(rows), ranks * -(-_power_of_two(rows) // ranks))
    batch = rows * length
    steps = max(1, round(found * ratio / batch))
    data: dict[str, Any] = base.to_dict()
    data["description"] = f"{_shown(found)} weights, {ratio} tokens each: {base.description}"
    data["run"] |= {"experiment": f"{base.run.experiment}_ladder", "name": name}
    data["run"] |= {"save_folder": None}
    data["model"] = model.to_dict()
    data["data_loader"]["global_batch_size"] = batch
    module, trainer = data["train_module"], data["trainer"]
    module["rank_microbatch_size"] = _microbatch(base, rows // ranks) * length
    if base.train_module.optim.mup is None:
        _scale_rates(module["optim"], growth**RATE_EXPONENT)
    for setting in scheduled_settings(base):
        _, *path = setting.key.split(".")
        place = module[path[0]] if len(path) == 1 else module[path[0]][".".join(path[1:])]
        _stretch(place, setting, base)
    trainer |= {"max_duration": {"value": steps, "unit": "steps"}, "hard_stop": None}
    trainer["callbacks"]["lm_evaluator"] |= {"enabled": True, "at_end": True}
    trainer |= {"no_evals": False}
    try:
        config = convert(data, ExperimentConfig)
        check_experiment(config, ranks)
        check_schedule_lengths(config, batches_of(config, None), origins)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.problem}", key=error.key) from None
    tokens = steps * batch
    flops = float(model.flops_per_token(length)) * tokens
    return Rung(name, found, tokens, steps, flops, config)


def _microbatch(base: ExperimentConfig, rows: int) -> int:
    """Rows of a microbatch: a divisor of a rank's `rows`, at most the config's."""
    size = base.train_module.rank_microbatch_size
    most = rows if size is None else max(1, size // base.dataset.sequence_length)
    return max(number for number in range(1, min(rows, most) + 1) if rows % number == 0)


def _scale_rates(optim: dict[str, Any], factor: float) -> None:
    for name in ("lr", "adamw_lr"):
        if optim.get(name) is not None:
            optim[name] = float(f"{optim[name] * factor:.4g}")
    for override in optim["group_overrides"]:
        if "lr" in override["opts"]:
            override["opts"]["lr"] = float(f"{override['opts']['lr'] * factor:.4g}")


def _stretch(schedule: dict[str, Any], setting: Scheduled, base: ExperimentConfig) -> None:
    """Tell lengths of a schedule as shares of the run, as those of `base` are."""
    own, key = setting.schedule, setting.key
    if own.units == "epochs":
        raise ConfigError("a ladder's runs have steps; use units: steps or tokens", key=key)
    stages = schedule.get("stages") or ()
    for place in (schedule, *stages):
        for name in _LENGTHS:
            if place.get(name):
                problem = "does not scale with the runs of a ladder; use its fraction"
                raise ConfigError(problem, key=f"{key}.{name}")
    total = own.t_max or _total(setting, base)
    share = own.length_of_warmup(total) / total
    schedule |= {"warmup": None, "warmup_fraction": share or None, "t_max": None}
    if (decay := own.decay_span(total)) is not None:
        schedule |= {"decay": None, "decay_fraction": decay[1] / total}


def _total(setting: Scheduled, base: ExperimentConfig) -> Amount:
    batches, duration = batches_of(base, None), base.trainer.max_duration
    try:
        steps = batches.steps_of(duration.value, duration.unit)
        return length_in(setting.schedule, steps, batches)
    except ValueError:
        if setting.schedule.length_of_warmup(1) or setting.schedule.decay_span(1):
            raise ConfigError(
                "the ladder keeps the shares that a schedule's lengths have of the run, and of "
                "epochs they are not known; give steps or tokens",
                key="trainer.max_duration",
            ) from None
        return 1


def _power_of_two(number: float) -> int:
    return int(2 ** max(0, round(math.log2(number))))


def _shown(number: int) -> str:
    """`4M`, `1.5B`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
