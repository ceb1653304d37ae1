"""The engine's runtime for a materialised model."""

from torch import nn

from toolkit.distributed.environment import TrainingEnvironment, set_collective_timeouts
from toolkit.distributed.runtime import BuildOptimizer, EngineRuntime


def prepare_runtime(
    environment: TrainingEnvironment,
    module: nn.Module,
    build_optimizer: BuildOptimizer,
    *,
    max_grad_norm: float | None,
) -> EngineRuntime:
    """Hand a materialised `module` and its optimizer to Accelerate.

    `build_optimizer` gets trainable and frozen parameters by canonical name.
    """
    runtime: EngineRuntime
    if environment.engine.zero_stage:
        from toolkit.distributed.zero import ZeroRuntime

        runtime = ZeroRuntime(environment, module, build_optimizer, max_grad_norm=max_grad_norm)
    else:
        from toolkit.distributed.plain import PlainRuntime

        runtime = PlainRuntime(environment, module, build_optimizer)
    set_collective_timeouts()
    return runtime
