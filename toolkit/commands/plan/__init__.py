"""`toolkit plan`: what a layout needs and how long a step takes, before there is a machine.

1. `job.py`: a step of the config on a layout, as one rank sees it.
2. `pieces.py`: the weights that the rank holds; `activations.py` what a forward keeps; `memory.py`
   puts both together at the largest moment of a step.
3. `communication.py`: every collective; `devices.py` knows the links; `step_time.py` adds it up.
4. `plans.py` makes a plan of it; `search.py` makes one for every layout that nothing refuses.
5. `report.py` shows them, and what makes one fit that does not (`advice.py`). `simulate.py` counts
   the same in the real modules and engines.

No torch but in `simulate.py`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from toolkit.commands.plan.devices import find_device
from toolkit.commands.plan.job import Job
from toolkit.commands.plan.plans import (
    Plan,
    Target,
    as_json,
    at_largest_batch,
    job_of,
    plan_of,
)
from toolkit.commands.plan.report import describe, describe_search, flags
from toolkit.commands.plan.search import KEPT, Found, Limits, search
from toolkit.config.named import named
from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.launcher import world_size_of
from toolkit.distributed.layout import Layout, fewest_ranks, layout_of
from toolkit.errors import ConfigError
from toolkit.experiment.checks import besides_layout, check_experiment, layout_for
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import LoadedExperiment
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.wording import count

__all__ = ["Answer", "Plan", "launched", "plan_experiment"]

MOST_RANKS = 16_384
_FURTHER = 6
"""Doublings of the number of ranks in which one that works is looked for."""


class Answer(NamedTuple):
    """What `toolkit plan` says."""

    text: str
    data: Mapping[str, Any]
    """The same as plain data: bytes, seconds, FLOPs."""


def launched(
    environ: Mapping[str, str], world_size: int | None, *, searches: bool = False
) -> Mapping[str, str] | None:
    """The launcher's variables on `world_size` ranks, by which the config's layout is judged; None
    where that is not known yet, or with `searches` of no meaning. Raises ConfigError: no such
    number of ranks."""
    _check_number("--world-size", world_size)
    if searches or (world_size is None and world_size_of(environ) == 1):
        return None
    return environ if world_size is None else {**environ, "WORLD_SIZE": f"{world_size}"}


def _check_number(option: str, value: int | None) -> None:
    if value is not None and not 1 <= value <= MOST_RANKS:
        raise ConfigError(f"{option} {value}: give a number from 1 to {MOST_RANKS:,}")


def plan_experiment(
    loaded: LoadedExperiment,
    environ: Mapping[str, str],
    *,
    world_size: int | None = None,
    machine: int = 8,
    device: str = "h100",
    searches: bool = False,
    simulates: bool = False,
    price: float | None = None,
) -> Answer:
    """Plan the layout that the config asks for on `world_size` ranks, or with `searches` the
    fastest. Default number of ranks: the launcher's, else the fewest on which it fits.

    `machine`: devices of one machine. `price`: of one device for an hour. Raises ConfigError: an
    unknown device, or no layout of so many ranks fits; it names the nearest number that works.
    """
    _check_number("--gpus-per-node", machine)
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price-per-gpu-hour {price}: give a number, not a negative one")
    target = Target(find_device(device, machine), machine, price)
    if launched(environ, world_size) is not None and world_size is None:
        world_size = world_size_of(environ)
    if searches:
        return _search(loaded, target, world_size, simulates=simulates)
    plan = _given(loaded.config, target, world_size, environ)
    text = describe(loaded.config, loaded.source, plan, target)
    data: dict[str, Any] = dict(as_json(loaded.config, plan, target))
    if simulates:
        text, data = _simulated(plan, loaded.config.train_module, text, data)
    return Answer(text, data)


def _simulated(
    plan: Plan, module: TransformerTrainModuleConfig, text: str, data: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    engine = plan.job.layout.name
    if engine == "ddp" or engine.startswith("zero"):
        raise ConfigError(
            f"--simulate: {engine} does not run on tensors without storage; plan for "
            "--train_module.dp_config.name=fsdp, or leave --simulate out"
        )
    counted = named("toolkit.commands.plan.simulate:simulate")(plan, module)
    return f"{text}\n\n{counted}", data | {"simulated": counted.to_dict()}


def _given(
    config: ExperimentConfig, target: Target, world_size: int | None, environ: Mapping[str, str]
) -> Plan:
    """The plan of the config's own layout."""
    if world_size is not None:
        layout = _layout(config, world_size, environ)
        check_experiment(config, layout.batch_ranks, layout=layout)
        return plan_of(job_of(config, layout, target))
    refused: ConfigError | None = None
    plan = None
    for ranks in _sizes(config):
        try:
            layout = _layout(config, ranks, environ)
            check_experiment(config, layout.batch_ranks, layout=layout)
        except ConfigError as error:
            refused = refused or error
            continue
        plan = plan_of(job_of(config, layout, target))
        if plan.fits:
            break
    if plan is None:
        assert refused is not None
        raise refused
    return plan


def _layout(config: ExperimentConfig, world_size: int, environ: Mapping[str, str]) -> Layout:
    return layout_for(config, {**environ, "WORLD_SIZE": f"{world_size}"})


def _sizes(config: ExperimentConfig) -> list[int]:
    """Numbers of ranks to try: one, or what the axes of the config multiply to, and doublings."""
    unit = fewest_ranks(config.train_module)
    return [size for n in range(15) if (size := unit * 2**n) <= MOST_RANKS]


def _search(
    loaded: LoadedExperiment, target: Target, world_size: int | None, *, simulates: bool
) -> Answer:
    config = loaded.config
    job = _any_job(config, target)
    length = config.dataset.sequence_length
    batch = at_largest_batch(config).data_loader.global_batch_size
    given = config.train_module.dp_config
    settings = {} if given is None else {name: getattr(given, name) for name in KEPT}
    limits = Limits(besides_layout(config), max(1, batch // length), settings)
    sizes = [world_size] if world_size is not None else [2**n for n in range(11)]
    found, size = Found([], 0), sizes[0]
    for size in sizes:
        found = search(job, size, limits)
        if found.plans:
            break
    if not found.plans:
        raise _nothing_fits(job, limits, target, size, found)
    best = found.plans[0]
    text = describe_search(loaded, found, target, size)
    data: dict[str, Any] = {
        **as_json(config, best, target),
        "flags": flags(loaded, best),
        "num_layouts": found.num_layouts,
        "layouts": [
            {
                "flags": flags(loaded, plan),
                "seconds": plan.time.total,
                "mfu": plan.time.mfu,
                "memory": plan.memory.total,
            }
            for plan in found.plans
        ],
    }
    if simulates:
        module = config.train_module.replace(ac_config=best.job.ac_config)
        text, data = _simulated(best, module, text, data)
    return Answer(text, data)


def _any_job(config: ExperimentConfig, target: Target) -> Job:
    """A job of the config on one rank, from which those of other layouts are made."""
    given, single = config.train_module.dp_config, DataParallelConfig(name="single")
    if given is not None:
        single = single.replace(param_dtype=given.param_dtype)
    alone = config.train_module.replace(
        rank_microbatch_size=config.dataset.sequence_length,
        dp_config=single, tp_config=None, cp_config=None, pp_config=None, ep_config=None,
    )  # fmt: skip
    config = config.replace(train_module=alone)
    check_experiment(config, 1)
    return job_of(config, layout_of(alone, {}), target)


def _nothing_fits(
    job: Job, limits: Limits, target: Target, world_size: int, found: Found
) -> ConfigError:
    name, ranks = target.device.name, count(world_size, "rank")
    if not found.num_layouts:
        problem = (
            f"--world-size {world_size}: no layout divides {ranks} (global batch of "
            f"{limits.batch_rows:,} rows, {job.model.num_heads} heads, {job.model.num_layers} "
            "layers)"
        )
    else:
        problem = f"--world-size {world_size}: no layout of {ranks} fits {name}"
    for n in range(1, _FURTHER + 1):
        for size in {world_size * 2**n, 1 << (world_size.bit_length() + n - 1)}:
            if size <= MOST_RANKS and search(job, size, limits).plans:
                return ConfigError(f"{problem}; the nearest number that works is {size}")
    if not found.num_layouts:
        larger = f"--data_loader.global_batch_size={world_size * job.sequence_length}"
        return ConfigError(
            f"{problem}; each rank of data parallelism needs a row: plan for "
            f"{count(limits.batch_rows, 'rank')} or fewer, or with {larger}"
        )
    return ConfigError(
        f"{problem}, nor one of {world_size * 2**_FURTHER}; make rows or model smaller, or plan "
        "for a device with more memory"
    )
