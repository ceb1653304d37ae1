"""What a run says of itself before its first step."""

from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.experiment.config import ExperimentConfig
from toolkit.models.counts import shown_parameters
from toolkit.wording import count

if TYPE_CHECKING:
    from toolkit.distributed.environment import TrainingEnvironment


def opening_lines(
    config: ExperimentConfig, environment: "TrainingEnvironment", folder: Path
) -> list[str]:
    """What is not used and why, what trains where, and what resuming will promise."""
    from toolkit.distributed.devices import device_name

    layout = environment.layout
    processes = count(layout.world_size, "process")
    device = device_name(environment.device)
    if environment.device.type == "cpu":
        device = f"the CPU ({device})"
    lines = [
        *layout.notices,
        f"training {shown_parameters(config.model)} parameters on {processes}, "
        f"{layout.name} in {layout.precision} on {device}: {folder}",
    ]
    promise = resume_promise(environment.device.type, deterministic=config.trainer.deterministic)
    return lines if promise is None else [*lines, promise]


def resume_promise(device_type: str, *, deterministic: bool) -> str | None:
    """How equal a resumed run will be on a GPU; None on CPUs, where it is bit-equal anyway."""
    if device_type == "cpu":
        return None
    if deterministic:
        return "a resumed run will be bit-equal on as many GPUs of the same kind"
    return (
        "a resumed run will be equal to rounding: GPU kernels add up in any order; "
        "--trainer.deterministic=true makes it bit-equal, and slower"
    )
