"""Which engine runs: one pure function from the launcher's environment and the config to `Engine`.

`accelerate launch` speaks through its FSDP and DeepSpeed variables; `train_module.dp_config` speaks
under plain `torchrun`. If both speak and disagree it is an error that names both. Silence means DDP
on several processes and `single` on one. No torch here: `--dry-run` asks too.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from toolkit.distributed.config import DataParallelConfig, WrappingStrategy
from toolkit.distributed.launcher import (
    EngineChoice,
    EngineName,
    check_deepspeed,
    deepspeed_notices,
    launcher_choice,
    launcher_notices,
    launcher_precision,
    offloads_to_cpu,
    with_offload,
    world_size_of,
)
from toolkit.errors import ConfigError
from toolkit.parents import is_accelerated

Precision = Literal["auto", "fp32", "bf16"]

DP_CONFIG = "train_module.dp_config"


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """The resolved answer to "which engine": the only thing the rest of `distributed` looks at."""

    name: EngineName
    origin: str
    """Who decided: the launcher, the config, or nobody (default)."""
    precision: Precision
    """`auto` only before the hardware is known (`--dry-run`)."""
    world_size: int
    num_replicas: int
    """Groups that hold a full copy of the weights each."""
    shard_degree: int
    """Ranks that share one copy."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: bool = True
    wrapping_strategy: WrappingStrategy = "blocks"
    prefetch_factor: int = 0
    cpu_offload: bool = False
    """`fsdp`, `hsdp`: shards and optimizer state live in host memory."""
    deepspeed_config: dict[str, Any] = {}
    """DeepSpeed's JSON, offload included; what we must own is overridden later."""
    notices: tuple[str, ...] = ()
    """Lines to show once at the start."""

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage, 0 for the other engines."""
        return int(self.name[4:]) if self.name.startswith("zero") else 0

    @property
    def is_fsdp(self) -> bool:
        """Whether parameters are FSDP2's DTensors."""
        return self.name in ("fsdp", "hsdp")

    def as_config(self) -> DataParallelConfig:
        """The config that asks for this engine, whatever the launcher."""
        is_hsdp = self.name == "hsdp"
        return DataParallelConfig(
            name=self.name,
            num_replicas=self.num_replicas if is_hsdp else None,
            shard_degree=self.shard_degree if is_hsdp else None,
            reduce_dtype=self.reduce_dtype,
            reshard_after_forward=self.reshard_after_forward,
            wrapping_strategy=self.wrapping_strategy,
            prefetch_factor=self.prefetch_factor,
            cpu_offload=self.cpu_offload,
            deepspeed_config=self.deepspeed_config,
        )


def resolve_engine(
    precision: Precision,
    dp_config: DataParallelConfig | None,
    environ: Mapping[str, str],
) -> Engine:
    """The engine for `train_module.precision` and `train_module.dp_config` under this launcher.

    Raises:
        ConfigError: launcher and config disagree, the world size does not fit, or the launcher
            asks for something we do not run (FSDP1, fp16, tensor parallelism).
    """
    world_size = world_size_of(environ)
    launched = launcher_choice(environ)
    configured = _config_choice(dp_config)
    default = EngineChoice(name="ddp" if world_size > 1 else "single", origin="default")
    if launched and configured:
        choice = _merge(launched, configured)
    else:
        choice = launched or configured or default
    if choice.name == "ddp" and world_size == 1:
        choice = EngineChoice(name="single", origin=choice.origin)
    if choice.name == "single" and world_size > 1:
        raise ConfigError(
            f"{choice.origin} asks for the engine single, but the launcher started {world_size} "
            "processes; use ddp, or one process"
        )
    replicas, shards = _mesh(choice, world_size)
    answer, notices = _precision(precision, dp_config, choice, environ)
    return Engine(
        name=choice.name,
        origin=choice.origin,
        precision=answer,
        world_size=world_size,
        num_replicas=replicas,
        shard_degree=shards,
        reduce_dtype=choice.reduce_dtype,
        reshard_after_forward=choice.reshard_after_forward,
        wrapping_strategy=choice.wrapping_strategy,
        prefetch_factor=choice.prefetch_factor,
        cpu_offload=choice.cpu_offload,
        deepspeed_config=choice.deepspeed_config,
        notices=(*notices, *choice.notices, *launcher_notices(environ)),
    )


def offloads(config: DataParallelConfig) -> bool:
    """Whether the engine this asks for keeps state in host memory."""
    return config.cpu_offload or offloads_to_cpu(config.deepspeed_config)


def _config_choice(config: DataParallelConfig | None) -> EngineChoice | None:
    if config is None:
        return None
    is_zero = config.name.startswith("zero")
    deepspeed = config.deepspeed_config
    where = f"{DP_CONFIG}.deepspeed_config"
    check_deepspeed(deepspeed, where)
    stage = deepspeed.get("zero_optimization", {}).get("stage", "auto")  # an object: checked
    if is_zero and str(stage) not in ("auto", config.name.removeprefix("zero")):
        raise ConfigError(
            f"{where} says stage {stage}, {DP_CONFIG}.name says {config.name}; keep one of them"
        )
    if is_zero and config.cpu_offload:
        parts = ("optimizer", "param") if config.name == "zero3" else ("optimizer",)
        deepspeed = with_offload(deepspeed, *parts)
    return EngineChoice(
        name=config.name,
        origin=DP_CONFIG,
        num_replicas=config.num_replicas,
        shard_degree=config.shard_degree,
        reduce_dtype=config.reduce_dtype,
        reshard_after_forward=config.reshard_after_forward,
        wrapping_strategy=config.wrapping_strategy,
        prefetch_factor=config.prefetch_factor,
        cpu_offload=config.cpu_offload and not is_zero,
        deepspeed_config=deepspeed,
        notices=deepspeed_notices(deepspeed, where),
    )


def _merge(launched: EngineChoice, configured: EngineChoice) -> EngineChoice:
    """Both name the same engine: each setting comes from the side that departs from its default
    (launchers always state theirs); two departures that differ are an error."""
    if launched.name != configured.name:
        variable = f"ACCELERATE_USE_{'DEEPSPEED' if launched.name.startswith('zero') else 'FSDP'}"
        left = f"; or `unset {variable}`, which no `accelerate launch` of this process set"
        raise ConfigError(
            f"two engines asked for: {launched.origin} says {launched.name}, {configured.origin} "
            f"says {configured.name}; remove {DP_CONFIG} or launch with "
            f"accelerate_configs/{configured.name}.yaml{'' if is_accelerated() else left}"
        )
    default = EngineChoice(name=launched.name, origin="default")
    merged = {}
    for field in EngineChoice.__struct_fields__:
        if field in ("name", "origin", "notices"):
            continue
        theirs, ours, unset = (getattr(c, field) for c in (launched, configured, default))
        if ours not in (unset, theirs) and theirs != unset:
            raise ConfigError(
                f"{launched.origin} says {field} {theirs}, {DP_CONFIG}.{field} says {ours}; "
                "keep one of them"
            )
        merged[field] = theirs if ours == unset else ours
    notices = tuple(dict.fromkeys((*launched.notices, *configured.notices)))
    return msgspec.structs.replace(launched, notices=notices, **merged)


def _mesh(choice: EngineChoice, world_size: int) -> tuple[int, int]:
    """(num_replicas, shard_degree) for the choice; their product is the world size."""
    if choice.name in ("single", "ddp"):
        return world_size, 1
    if choice.name != "hsdp":
        return 1, world_size
    replicas = choice.num_replicas
    if replicas is None:
        replicas = world_size // choice.shard_degree if choice.shard_degree else 2
    shards = choice.shard_degree or world_size // replicas
    if replicas < 1 or shards < 1 or replicas * shards != world_size:
        raise ConfigError(
            f"{choice.origin}: hsdp mesh num_replicas {replicas} x shard_degree {shards} does not "
            f"fit {world_size} processes; their product must be the number of processes"
        )
    return replicas, shards


def _precision(
    asked: Precision,
    dp_config: DataParallelConfig | None,
    choice: EngineChoice,
    environ: Mapping[str, str],
) -> tuple[Precision, tuple[str, ...]]:
    alias: dict[str | None, Precision] = {None: "auto", "float32": "fp32", "bfloat16": "bf16"}
    from_dp = alias[dp_config.param_dtype if dp_config else None]
    if "auto" not in (asked, from_dp) and asked != from_dp:
        raise ConfigError(
            f"two precisions asked for: train_module.precision is {asked}, "
            f"{DP_CONFIG}.param_dtype is {dp_config.param_dtype if dp_config else None}; keep one"
        )
    explicit = asked if asked != "auto" else from_dp
    launched = launcher_precision(environ)
    bf16 = choice.deepspeed_config.get("bf16")
    if isinstance(bf16, dict) and bf16.get("enabled") is True:
        launched = "bf16"
    if explicit == "auto":
        return launched or "auto", ()
    if launched and explicit == "fp32":
        return explicit, ("precision fp32 from the config overrides the launcher's bf16",)
    return explicit, ()
