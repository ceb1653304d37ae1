"""Saving under one engine and continuing under another: the jobs that the workers run.

A `Cell` is an engine on a number of ranks; a variant is a model with an optimizer, made of what is
hard for some engine: sizes that no number of ranks divides, ranks that own nothing of a parameter,
frozen parameters, groups, tied embeddings.
"""

import dataclasses
import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.tiny import SEQ, module_config, open_environment, tiny_model, train_steps
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.load import load_checkpoint
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.distributed.config import (
    ContextParallelConfig,
    ExpertParallelConfig,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.models.layer_configs import MoEConfig
from toolkit.optim.base import GroupOverride
from toolkit.optim.config import AdamWConfig, OptimConfig, SGDConfig
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.transformer import TransformerTrainModule

SAVED_AT = 3
"""Steps before the checkpoint."""
CONTINUED = 5
"""Steps after it."""

State = dict[str, torch.Tensor]


class Cell(NamedTuple):
    """An engine on some ranks; `+offload`: its state in host memory; `+tp`, `+cp`, `+pp`, `+ep`:
    groups of two that share parts of the model."""

    engine: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.engine}-{self.ranks}"


CELLS = [
    Cell("single", 1),
    *(Cell("ddp", ranks) for ranks in (2, 4)),
    *(Cell("fsdp", ranks) for ranks in (1, 2, 4)),
    Cell("fsdp+offload", 2),
    *(Cell("hsdp", ranks) for ranks in (2, 4)),
    *(Cell(f"zero{stage}", ranks) for stage in (1, 2, 3) for ranks in (1, 2, 4)),
    Cell("zero2+offload", 2),
    Cell("zero3+offload", 2),
]
LAYOUT_CELLS = [
    Cell("single", 1),
    Cell("fsdp", 4),
    Cell("hsdp+ep", 4),
    Cell("ddp+cp", 2),
    Cell("zero3+cp", 2),
    Cell("fsdp+tp", 2),
    Cell("fsdp+tp", 4),
    Cell("fsdp+tp+ep", 4),
    Cell("fsdp+cp+ep", 4),
    Cell("fsdp+pp", 2),
    Cell("fsdp+pp", 4),
    Cell("fsdp+pp+tp", 4),
    Cell("fsdp+pp+ep", 4),
]
"""With `EXPERTS`, which all of them can cut."""
EXPERTS = "adamw-tied-experts"

AXES: dict[str, Any] = {
    "tp": TensorParallelConfig,
    "cp": ContextParallelConfig,
    "pp": PipelineParallelConfig,
    "ep": ExpertParallelConfig,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model and its optimizer."""

    optim: OptimConfig
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that do not train."""


# Of 4 ranks the last owns no row of the 6 of a key projection, nor of the 5 of an up projection.
_UNEVEN = {
    "vocab_size": 101,
    "vocab_multiple": 1,
    "d_model": 12,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 5,
}
_GROUPS = (
    GroupOverride(params=["*norm.weight"], opts={"weight_decay": 0.0}),
    GroupOverride(params=["embeddings.*"], opts={"lr": 3e-4}),
    GroupOverride(params=["blocks.1.feed_forward.up.weight"], opts={"lr": 0}),
)

VARIANTS = {
    "adamw": Variant(AdamWConfig(lr=1e-3)),
    "adamw-uneven-tied-frozen-groups": Variant(
        AdamWConfig(lr=1e-3, group_overrides=_GROUPS),
        model={**_UNEVEN, "tie_embeddings": True},
        frozen=("blocks.0.attention.*", "head.norm.weight"),
    ),
    "sgd-uneven-frozen-groups": Variant(
        SGDConfig(
            lr=1e-1,
            group_overrides=(
                GroupOverride(params=["blocks.*"], opts={"momentum": 0.9}),
                GroupOverride(params=["head.*"], opts={"weight_decay": 0.1}),
            ),
        ),
        model=_UNEVEN,
        frozen=("embeddings.*", "blocks.1.feed_forward.down.weight"),
    ),
    # Three experts on four ranks: columns, or flattened where four divide nothing.
    "adamw-experts": Variant(
        AdamWConfig(lr=1e-3),
        model={
            "moe": MoEConfig(
                num_experts=3,
                top_k=2,
                intermediate_size=5,
                shared_expert_intermediate_size=7,
                dense_layers=(0,),
                bias_update_rate=0.01,
            ),
            "init_std": 0.1,
        },
    ),
    # A key/value head that two ranks share.
    EXPERTS: Variant(
        AdamWConfig(lr=1e-3),
        model={
            "moe": MoEConfig(
                num_experts=4,
                top_k=2,
                intermediate_size=6,
                dense_layers=(0,),
                score_function="sigmoid",
                bias_update_rate=0.01,
            ),
            "num_key_value_heads": 1,
            "tie_embeddings": True,
            "init_std": 0.1,
        },
    ),
    "adamw-experts-flattened": Variant(
        AdamWConfig(lr=1e-3),
        model={
            "moe": MoEConfig(num_experts=3, top_k=2, intermediate_size=5),
            "d_model": 31,
            "num_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "init_std": 0.1,
        },
    ),
}


def build_module(
    variant: Variant, config: TransformerTrainModuleConfig, env: TrainingEnvironment
) -> TransformerTrainModule:
    model = tiny_model(**variant.model).build(init_device="meta")
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in variant.frozen):
            parameter.requires_grad_(False)
    return config.build(model, environment=env)


def config_of(engine: str, variant: Variant) -> TransformerTrainModuleConfig:
    name, *options = engine.split("+")
    axes = {f"{axis}_config": AXES[axis](degree=2) for axis in options if axis in AXES}
    if "pp" in options:  # as many microbatches as stages
        axes["rank_microbatch_size"] = 2 * SEQ
    dp = {"cpu_offload": "offload" in options}
    return module_config(name, dp=dp, optim=variant.optim, **axes)


def save(module: TransformerTrainModule, root: Path, step: int = SAVED_AT) -> None:
    env = module.environment
    save_checkpoint(
        root, step=step, tokens=0, tensors=module.state_tensors(), rank_state={"rank": env.rank},
        engine=env.layout.name, rank=env.rank, group=env.cpu_group,
    )  # fmt: skip


def save_and_go_on(engine: str, name: str, root: str) -> list[dict[str, float]]:
    """Save after `SAVED_AT` steps; the metrics of those that follow without a break."""
    variant = VARIANTS[name]
    config = config_of(engine, variant)
    env = open_environment(config)
    try:
        module = build_module(variant, config, env)
        train_steps(module, 0, SAVED_AT)
        save(module, Path(root))
        return train_steps(module, SAVED_AT, SAVED_AT + CONTINUED)
    finally:
        env.close()


def continue_each(
    engine: str, name: str, checkpoints: list[str], again: str
) -> list[list[dict[str, float]]]:
    """Continue from each checkpoint with a new module; the metrics after each.

    What the engine holds after loading number i is saved again into `again`/i.
    """
    variant = VARIANTS[name]
    config = config_of(engine, variant)
    env = open_environment(config, seed=99)  # other initial values: loading must replace them all
    try:
        histories = []
        for index, checkpoint in enumerate(checkpoints):
            module = build_module(variant, config, env)
            load_checkpoint(
                Path(checkpoint), tensors=module.state_tensors(), rank=env.rank, group=env.cpu_group
            )
            module.state_filled()
            save(module, Path(again) / str(index))
            histories.append(train_steps(module, SAVED_AT, SAVED_AT + CONTINUED))
        return histories
    finally:
        env.close()


def stored(checkpoint: Path) -> State:
    """Every tensor of a checkpoint, whole."""
    return dict(iterate_tensors(checkpoint / "model_and_optim", ""))


def differences(found: State, expected: State) -> list[str]:
    """Names that one side lacks or whose bits differ."""
    names = sorted(found.keys() ^ expected.keys())
    shared = found.keys() & expected.keys()
    return names + sorted(name for name in shared if not torch.equal(found[name], expected[name]))
