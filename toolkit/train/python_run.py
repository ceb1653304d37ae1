"""What `toolkit resume`, `eval` and `batch` read of a run, for one that was put together in Python.

`toolkit train` writes its config itself, and where each value came from. A run without the latter
was made by `start_run` and `Trainer`, which hold all parts of that config.
"""

from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.runs.files import RUN_FILES
from toolkit.train.config import TransformerTrainModuleConfig

if TYPE_CHECKING:
    from toolkit.train.trainer import Trainer


def record_config(trainer: "Trainer") -> None:
    """Write the configs of a run that `toolkit train` did not start, as far as configs made it."""
    run, module, data = trainer.run, trainer.train_module, trainer.train_loader.config
    settings = getattr(module, "config", None)
    is_described = isinstance(settings, TransformerTrainModuleConfig) and data is not None
    if run.path(RUN_FILES.origins).exists() or not is_described:
        return
    assert data is not None, "just looked"
    model, layout = msgspec.to_builtins(module.model_config), trainer.environment.layout
    parts: dict[str, Any] = {
        "train_module": msgspec.to_builtins(settings),
        "trainer": msgspec.to_builtins(trainer.config) | {"start_anew": False},
    }
    data_parts = msgspec.to_builtins(data)
    seed = {"seed": trainer.environment.seed}
    names = {"experiment": run.experiment, "name": run.name, "save_folder": str(run.folder)}
    run.log_metadata(
        {"description": "", "run": names, "model": model, **data_parts, **parts, **seed},
        RUN_FILES.config,
    )
    run.log_metadata(data_parts, RUN_FILES.data_config)
    run.log_metadata(model, RUN_FILES.model_config)
    run.log_metadata(parts, RUN_FILES.trainer_config)
    run.set_status(
        "running",
        engine=layout.name,
        world_size=layout.world_size,
        parameters=module.num_parameters,
        dp_config=msgspec.to_builtins(layout.dp_config),
        precision=layout.precision,
    )
