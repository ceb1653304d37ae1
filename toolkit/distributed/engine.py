"""Which engine runs: one pure function from the launcher's environment and the config to `Engine`.

`accelerate launch` speaks through its FSDP and DeepSpeed variables; `train_module.dp_config` speaks
under plain `torchrun`. If both speak and disagree it is an error that names both. Silence means DDP
on several processes and `single` on one. No torch here: `--dry-run` asks too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from toolkit.distributed.config import DataParallelConfig
from toolkit.errors import ConfigError

EngineName = Literal["single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]
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
    cpu_offload: bool = False
    deepspeed_config: dict[str, Any] = {}
    """User's DeepSpeed JSON; what we must own is overridden later."""
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


class _Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What one side (launcher or config) asked for."""

    name: EngineName
    origin: str
    num_replicas: int | None = None
    shard_degree: int | None = None
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    deepspeed_config: dict[str, Any] = {}


def world_size_of(environ: Mapping[str, str]) -> int:
    """Number of processes the launcher started; 1 without a launcher."""
    return int(environ.get("WORLD_SIZE", "1"))


def rank_of(environ: Mapping[str, str]) -> int:
    """This process's rank; 0 without a launcher."""
    return int(environ.get("RANK", "0"))


def has_launcher(environ: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return "WORLD_SIZE" in environ or "ACCELERATE_MIXED_PRECISION" in environ


def launcher_names_engine(environ: Mapping[str, str]) -> bool:
    """Whether the launcher itself asks for an engine (FSDP or DeepSpeed variables)."""
    return _flag(environ, "ACCELERATE_USE_DEEPSPEED") or _flag(environ, "ACCELERATE_USE_FSDP")


def launcher_names_precision(environ: Mapping[str, str]) -> bool:
    """Whether the launcher itself asks for a precision; "no" is its silence."""
    return environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() != "no"


def resolve_engine(
    precision: Precision,
    dp_config: DataParallelConfig | None,
    environ: Mapping[str, str],
) -> Engine:
    """The engine for `train_module.precision` and `train_module.dp_config` under this launcher.

    Raises:
        ConfigError: launcher and config disagree, the world size does not fit, or the launcher
            asks for something we do not run (FSDP1, fp16).
    """
    world_size = world_size_of(environ)
    launched = _launcher_choice(environ)
    configured = _config_choice(dp_config)
    if launched and configured and launched.name != configured.name:
        raise ConfigError(
            f"two engines asked for: {launched.origin} says {launched.name}, {configured.origin} "
            f"says {configured.name}; remove {DP_CONFIG} or launch with "
            f"accelerate_configs/{configured.name}.yaml"
        )
    default = _Choice(name="ddp" if world_size > 1 else "single", origin="default")
    choice = launched or configured or default
    if choice.name == "ddp" and world_size == 1:
        choice = _Choice(name="single", origin=choice.origin)
    if choice.name == "single" and world_size > 1:
        raise ConfigError(
            f"{choice.origin} asks for the engine single, but the launcher started {world_size} "
            "processes; use ddp, or one process"
        )
    replicas, shards = _mesh(choice, world_size)
    answer, notices = _precision(precision, dp_config, environ)
    return Engine(
        name=choice.name,
        origin=choice.origin,
        precision=answer,
        world_size=world_size,
        num_replicas=replicas,
        shard_degree=shards,
        reduce_dtype=choice.reduce_dtype,
        reshard_after_forward=choice.reshard_after_forward,
        cpu_offload=choice.cpu_offload,
        deepspeed_config=choice.deepspeed_config,
        notices=notices,
    )


def _config_choice(config: DataParallelConfig | None) -> _Choice | None:
    if config is None:
        return None
    _check_deepspeed(config.deepspeed_config, f"{DP_CONFIG}.deepspeed_config")
    return _Choice(
        name=config.name,
        origin=DP_CONFIG,
        num_replicas=config.num_replicas,
        shard_degree=config.shard_degree,
        reduce_dtype=config.reduce_dtype,
        reshard_after_forward=config.reshard_after_forward,
        cpu_offload=config.cpu_offload or _offloads(config.deepspeed_config),
        deepspeed_config=config.deepspeed_config,
    )


def _launcher_choice(environ: Mapping[str, str]) -> _Choice | None:
    if _flag(environ, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed_choice(environ)
    if not _flag(environ, "ACCELERATE_USE_FSDP"):
        return None
    origin = "accelerate launch (FSDP)"
    if environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(f"{origin}: only FSDP2 is supported; set fsdp_version: 2 in the YAML")
    common: dict[str, Any] = {
        "origin": origin,
        "reshard_after_forward": _flag(environ, "FSDP_RESHARD_AFTER_FORWARD", default=True),
        "cpu_offload": _flag(environ, "FSDP_OFFLOAD_PARAMS"),
    }
    replicas = int(environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    if _flag(environ, "ACCELERATE_USE_PARALLELISM_CONFIG") and replicas > 1:
        shards = int(environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1"))
        return _Choice(name="hsdp", num_replicas=replicas, shard_degree=shards, **common)
    return _Choice(name="fsdp", **common)


def _deepspeed_choice(environ: Mapping[str, str]) -> _Choice:
    origin = "accelerate launch (DeepSpeed)"
    config: dict[str, Any] = {}
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() not in ("", "none"):
        try:
            config = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{origin}: cannot read the DeepSpeed config {file}: {error}"
            ) from None
        _check_deepspeed(config, file)
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    if str(stage) not in ("1", "2", "3"):
        raise ConfigError(f"{origin}: zero stage {stage!r} is not supported; use 1, 2 or 3")
    offload = _offloads(config) or any(
        environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE") == "cpu"
        for part in ("optimizer", "param")
    )
    name: Any = f"zero{stage}"
    return _Choice(name=name, origin=origin, cpu_offload=offload, deepspeed_config=config)


def _offloads(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed JSON keeps something in host memory."""
    zero = config.get("zero_optimization", {})
    parts = ("offload_optimizer", "offload_param")
    return any(zero.get(part, {}).get("device") == "cpu" for part in parts)


def _check_deepspeed(config: Mapping[str, Any], where: str) -> None:
    for owned, ours in (("optimizer", "optim"), ("scheduler", "scheduler")):
        if owned in config:
            raise ConfigError(
                f"{where}: remove {owned!r} there; it is train_module.{ours} of the JSON config"
            )


def _mesh(choice: _Choice, world_size: int) -> tuple[int, int]:
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
    asked: Precision, dp_config: DataParallelConfig | None, environ: Mapping[str, str]
) -> tuple[Precision, tuple[str, ...]]:
    launched = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", "bf16"):
        raise ConfigError(
            f"accelerate launch: mixed_precision {launched} is not supported; use no or bf16"
        )
    alias: dict[str | None, Precision] = {None: "auto", "float32": "fp32", "bfloat16": "bf16"}
    from_dp = alias[dp_config.param_dtype if dp_config else None]
    if "auto" not in (asked, from_dp) and asked != from_dp:
        raise ConfigError(
            f"two precisions asked for: train_module.precision is {asked}, "
            f"{DP_CONFIG}.param_dtype is {dp_config.param_dtype if dp_config else None}; keep one"
        )
    explicit = asked if asked != "auto" else from_dp
    if explicit == "auto":
        return ("bf16" if launched == "bf16" else "auto"), ()
    if launched == "bf16" and explicit == "fp32":
        return explicit, ("precision fp32 from the config overrides the launcher's bf16",)
    return explicit, ()


def _flag(environ: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    value = environ.get(name)
    return default if value is None else value.lower() in ("true", "1", "yes")
