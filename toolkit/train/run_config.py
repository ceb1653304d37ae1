"""The config in a run folder, which `toolkit resume`, `eval` and `batch` read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.autotune.choices import Choices
from toolkit.distributed.layout import Layout
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.train.config import TransformerTrainModuleConfig

if TYPE_CHECKING:
    from toolkit.train.state import TrainState  # which imports torch


def log_config(
    run: RunManager,
    config: Mapping[str, Any],
    layout: Layout,
    parameters: int,
    choices: Choices | None = None,
) -> None:
    """Write a config (plain JSON types), whole and in parts, and what a resume launches again:
    engine and precision, and what `auto` became (`choices`; None: not known yet)."""
    # Asked for once: the next start must not do it again.
    trainer = {**config["trainer"], "start_anew": False}
    config = {**config, "trainer": trainer}
    data = {name: config[name] for name in ("dataset", "data_loader", "store", "seed")}
    run.log_metadata(config, RUN_FILES.config)
    run.log_metadata(data, RUN_FILES.data_config)
    run.log_metadata(config["model"], RUN_FILES.model_config)
    run.log_metadata(
        {"train_module": config["train_module"], "trainer": trainer}, RUN_FILES.trainer_config
    )
    run.set_status(
        "running",
        engine=layout.description,
        world_size=layout.world_size,
        parameters=parameters,
        **layout.parallel_configs,
        precision=layout.precision,
        **({} if choices is None else {"chosen": msgspec.to_builtins(choices)}),
    )


def log_python_config(state: "TrainState") -> None:
    """The same for a run that was put together in Python, as far as configs made its parts.
    `toolkit train` writes its own, and where each value came from."""
    run, module, data = state.run, state.train_module, state.train_loader.config
    settings = getattr(module, "config", None)
    if (
        run.path(RUN_FILES.origins).exists()
        or not isinstance(settings, TransformerTrainModuleConfig)
        or data is None
    ):
        return
    names = {"experiment": run.experiment, "name": run.name, "save_folder": str(run.folder)}
    parts = {"model": module.model_config, "train_module": settings, "trainer": state.config}
    config = {
        "description": "",
        "run": names,
        **msgspec.to_builtins(data),
        **{name: msgspec.to_builtins(part) for name, part in parts.items()},
        "seed": state.environment.seed,
    }
    environment = state.environment
    log_config(run, config, environment.layout, module.num_parameters, environment.choices)
