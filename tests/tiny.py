"""A tiny model and deterministic batches for training tests."""

from types import SimpleNamespace
from typing import Any

import torch

from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.environment import TrainingEnvironment, prepare_training_environment
from toolkit.models.config import TransformerConfig
from toolkit.models.init import canonical_parameters
from toolkit.optim.config import AdamWConfig
from toolkit.optim.schedules import ConstantConfig
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Progress
from toolkit.train.transformer import TransformerTrainModule

SEQ = 16
ROWS = 8
VOCAB = 100


def tiny_model(**changes: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 50,
        "max_sequence_length": SEQ,
    }
    return TransformerConfig(**(settings | changes))


def empty_weights(config: Any) -> dict[str, torch.Tensor]:
    """Zeros under the names that a checkpoint of this model has."""
    parameters = canonical_parameters(config.build(init_device="meta"))
    return {f"model.{name}": torch.zeros(p.shape) for name, p in parameters.items()}


def module_config(engine: str | None = None, **changes: Any) -> TransformerTrainModuleConfig:
    dp = changes.pop("dp", {})
    settings: dict[str, Any] = {
        "rank_microbatch_size": ROWS * SEQ,
        "precision": "fp32",
        "optim": AdamWConfig(lr=1e-3),
        "scheduler": ConstantConfig(),
        "dp_config": DataParallelConfig(name=engine, **dp) if engine else None,
    }
    return TransformerTrainModuleConfig(**(settings | changes))


def open_environment(config: TransformerTrainModuleConfig, seed: int = 3) -> TrainingEnvironment:
    trainer = SimpleNamespace(deterministic=False, collective_timeout=1800.0, log_ranks="rank0")
    settings = SimpleNamespace(seed=seed, train_module=config, trainer=trainer)
    return prepare_training_environment(settings)


def build(
    config: TransformerTrainModuleConfig, environment: TrainingEnvironment, **model: Any
) -> TransformerTrainModule:
    return config.build(tiny_model(**model).build(init_device="meta"), environment=environment)


def global_batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator)


def train_steps(
    module: TransformerTrainModule, first: int, last: int, batches: Any = global_batch
) -> list[dict[str, float]]:
    """Train on global batches first..last-1; metrics reduced over ranks."""
    env, layout = module.environment, module.environment.layout
    rows, share = ROWS // layout.batch_ranks, layout.batch_rank(env.rank)
    history = []
    for step in range(first, last):
        batch = batches(step)
        batch = batch if isinstance(batch, dict) else {"input_ids": batch}
        own = {k: v[share * rows : (share + 1) * rows] for k, v in batch.items()}
        metrics = module.train_batch(own)
        size = ROWS * SEQ
        metrics |= module.optim_step(Progress(step, step * size, 100, 100 * size, size))
        loss = metrics["loss"].value.clone() * env.owns_loss
        if env.world_size > 1:
            torch.distributed.all_reduce(loss)
        history.append(
            {
                "loss": loss.item(),
                "grad_norm": float(metrics["grad_norm"].value),
                "skipped": float(metrics["skipped"].value),
            }
        )
    return history
