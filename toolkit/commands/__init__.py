"""What verbs do: `commands.batch.step_batch(...)`. Modules are imported when first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "batch", "convert", "data", "doctor", "doctor_ranks", "dry_run", "evaluate",
    "evaluate_tasks", "explain", "generate", "init", "ladder", "launch", "launching", "load",
    "merge", "mix", "plan", "presets", "recipes", "replay", "report", "runs", "schedule",
    "schema", "sweep", "train", "tune", "tune_report", "verify",
]  # fmt: skip

if TYPE_CHECKING:
    from toolkit.commands import (
        batch,
        convert,
        data,
        doctor,
        doctor_ranks,
        dry_run,
        evaluate,
        evaluate_tasks,
        explain,
        generate,
        init,
        ladder,
        launch,
        launching,
        load,
        merge,
        mix,
        plan,
        presets,
        recipes,
        replay,
        report,
        runs,
        schedule,
        schema,
        sweep,
        train,
        tune,
        tune_report,
        verify,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f"{__name__}.{name}")
