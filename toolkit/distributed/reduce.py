"""Metrics of all ranks as one."""

import torch
import torch.distributed as dist

from toolkit.distributed.environment import TrainingEnvironment
from toolkit.metrics.recorder import Column


def reduce_columns(
    environment: TrainingEnvironment, columns: list[Column], values: torch.Tensor
) -> torch.Tensor:
    """One collective per operation over all ranks, in the metrics thread on a group of its own.

    Args:
        columns: name and reduction of each value.
        values: float64 on the CPU, `(len(columns),)`; the answer too.
    """
    for operation in ("sum", "mean", "max"):
        index = [i for i, (_, wanted) in enumerate(columns) if wanted == operation]
        if not index:
            continue
        part = values[index]
        how = dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM
        dist.all_reduce(part, op=how, group=environment.metrics_group)
        values[index] = part / environment.world_size if operation == "mean" else part
    return values
