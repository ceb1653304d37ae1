"""The engine's runtime for a materialised model."""

from torch import nn

from toolkit.distributed.engine import BuildOptimizer, Engine
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.process_groups import set_collective_timeouts


def prepare_engine(
    environment: TrainingEnvironment,
    module: nn.Module,
    build_optimizer: BuildOptimizer,
    *,
    max_grad_norm: float | None,
) -> Engine:
    """Hand a materialised `module` and its optimizer to Accelerate.

    `build_optimizer` gets trainable and frozen parameters by canonical name.
    """
    runtime: Engine
    if environment.layout.zero_stage:
        from toolkit.distributed.deepspeed_engine import DeepSpeedEngine

        runtime = DeepSpeedEngine(environment, module, build_optimizer, max_grad_norm=max_grad_norm)
    else:
        from toolkit.distributed.torch_engine import TorchEngine

        runtime = TorchEngine(environment, module, build_optimizer)
    set_collective_timeouts(environment.timeout)
    return runtime
