"""What the launcher says through its environment variables.

`accelerate launch` turns its YAML into FSDP_*, PARALLELISM_CONFIG_* and ACCELERATE_* variables;
`torchrun` gives the number of processes only. What is asked for there and not done is an error or
a notice, never silence. No torch here: `--dry-run` asks too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from toolkit.config import Config
from toolkit.distributed.config import (
    ContextParallelConfig,
    ContextStyle,
    DataParallelConfig,
    TensorParallelConfig,
)
from toolkit.distributed.engines import EngineName
from toolkit.distributed.ranks import ENGINE
from toolkit.errors import ConfigError
from toolkit.parents import is_accelerated
from toolkit.storage.foreign import read_json

_OURS_IN_DEEPSPEED = {
    "gradient_clipping": "train_module.max_grad_norm",
    "gradient_accumulation_steps": "train_module.rank_microbatch_size",
    "train_batch_size": "data_loader.global_batch_size",
    "train_micro_batch_size_per_gpu": "train_module.rank_microbatch_size",
    "torch_autocast": "train_module.precision",
    "activation_checkpointing": "train_module.ac_config",
}
"""Keys of DeepSpeed's JSON that the config of the run decides."""

_CONTEXT_STYLES: dict[str, ContextStyle] = {"allgather": "allgather", "alltoall": "ring"}
"""Accelerate's names; its `alltoall` is torch's ring: parts of the keys go round."""

DEEPSPEED_FIXED: dict[str, tuple[Any, str]] = {
    "prescale_gradients": (False, "gradients are added up in fp32 and divided afterwards"),
    "gradient_predivide_factor": (1.0, "gradients are added up in fp32 and divided afterwards"),
    "gradient_allreduce_op": ("mean", "the loss is a mean over all ranks"),
    "managed_gradient_accumulation": (True, "train_module.rank_microbatch_size decides"),
    "disable_allgather": (False, "every rank needs the updated weights"),
    "data_types": ({"grad_accum_dtype": "fp32"}, "gradients are accumulated in fp32"),
}
"""Key of DeepSpeed's JSON -> the one value that it may have here, and why."""


ENGINE_FILES = Path(__file__).parents[1] / "recipes" / "engines"
"""YAMLs of `accelerate launch`, and the DeepSpeed JSONs that they name."""
DEEPSPEED_FOLDER = "ds_configs"


class Choice(NamedTuple):
    """What one side, launcher or config, asks for."""

    config: DataParallelConfig
    origin: str
    notices: tuple[str, ...] = ()


def world_size_of(environ: Mapping[str, str]) -> int:
    """Number of processes the launcher started; 1 without a launcher."""
    return int(environ.get("WORLD_SIZE", "1"))


def rank_of(environ: Mapping[str, str]) -> int:
    """This process's rank; 0 without a launcher."""
    return int(environ.get("RANK", "0"))


def has_launcher(environ: Mapping[str, str]) -> bool:
    """Whether a launcher (`accelerate launch`, `torchrun`, `--processes`) started this process."""
    return "WORLD_SIZE" in environ or "ACCELERATE_MIXED_PRECISION" in environ


def launcher_names_engine(environ: Mapping[str, str]) -> bool:
    """Whether the launcher itself asks for an engine (FSDP or DeepSpeed variables)."""
    names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    return ENGINE in environ or any(_flag(environ, name) for name in names)


def is_silent_accelerate(environ: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` started several processes and named no engine, which is DDP under
    the name of its own."""
    is_its = "ACCELERATE_MIXED_PRECISION" in environ
    return is_its and world_size_of(environ) > 1 and not launcher_names_engine(environ)


def launcher_precision(environ: Mapping[str, str]) -> Literal["bf16", "fp16"] | None:
    """The launcher's precision; None where it asks for none ("no" is its silence). Raises
    ConfigError: one that we do not run."""
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked == "no":
        return None
    if asked in ("bf16", "fp16"):
        return asked  # type: ignore[return-value]
    raise _refusal(
        f"accelerate launch: mixed_precision {asked} is not supported; use no, bf16 or fp16",
        environ,
        "ACCELERATE_MIXED_PRECISION",
    )


def launcher_axes(environ: Mapping[str, str]) -> dict[str, Config]:
    """What the launcher's ParallelismConfig says besides data parallelism: field of the train
    module -> config. Raises ConfigError: context parallelism asked for in two ways."""
    asked: dict[str, Config] = {}
    if not _flag(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return asked
    if (degree := _parallel_size(environ, "tp")) > 1:
        asked["tp_config"] = TensorParallelConfig(degree=degree)
    context, sequence = _parallel_size(environ, "cp"), _parallel_size(environ, "sp")
    if context > 1 and sequence > 1:
        raise _refusal(
            f"accelerate launch: parallelism_config_cp_size {context} and "
            f"parallelism_config_sp_size {sequence} both share the positions of a row; keep one",
            environ,
            "PARALLELISM_CONFIG_CP_SIZE",
            "PARALLELISM_CONFIG_SP_SIZE",
        )
    if context > 1:
        name = "PARALLELISM_CONFIG_CP_COMM_STRATEGY"
        rotates = environ.get(name, "allgather")
        if rotates not in _CONTEXT_STYLES:
            raise _refusal(
                f"accelerate launch: parallelism_config_cp_comm_strategy {rotates!r} is not known; "
                "use allgather or alltoall",
                environ,
                name,
            )
        style = _CONTEXT_STYLES[rotates]
        asked["cp_config"] = ContextParallelConfig(degree=context, style=style)
    elif sequence > 1:
        asked["cp_config"] = ContextParallelConfig(degree=sequence, style="ulysses")
    return asked


def check_data_axes(environ: Mapping[str, str], dp_replicate: int, dp_shard: int) -> None:
    """Check that the launcher's ParallelismConfig, if any, has the degrees of data parallelism that
    the run will have. Raises ConfigError."""
    if not _flag(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return
    for axis, degree in (("dp_replicate", dp_replicate), ("dp_shard", dp_shard)):
        said = _parallel_size(environ, axis)
        if said not in (1, degree):
            text = (
                f"accelerate launch: parallelism_config_{axis}_size is {said}, but {degree} fits "
                f"the engine and the number of processes; set it to {degree} "
                f"(--parallelism_config_{axis}_size {degree})"
            )
            if not launcher_names_engine(environ):
                text += ", or to have weights sharded, distributed_type: FSDP"
            raise _refusal(text, environ, f"PARALLELISM_CONFIG_{axis.upper()}_SIZE")


def launcher_choice(environ: Mapping[str, str]) -> Choice | None:
    """The engine that `--engine` or the launcher asks for; None where neither does. Raises
    ConfigError: they ask for two; or for what we do not run, FSDP1 or NVMe offload."""
    theirs = _accelerate_choice(environ)
    asked = environ.get(ENGINE)
    if asked is None:
        return theirs
    if asked not in get_args(EngineName):
        raise ConfigError(
            f"{ENGINE}={asked!r} in the environment is no engine; unset it, or give --engine: "
            + ", ".join(get_args(EngineName))
        )
    if theirs is not None and theirs.config.name != asked:
        raise ConfigError(
            f"two engines asked for: {theirs.origin} says {theirs.config.name}, --engine says "
            f"{asked}; leave out --engine, or launch without a YAML"
        )
    name: Any = asked
    return theirs or Choice(DataParallelConfig(name=name), "--engine")


def _accelerate_choice(environ: Mapping[str, str]) -> Choice | None:
    if _flag(environ, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed_choice(environ)
    if not _flag(environ, "ACCELERATE_USE_FSDP"):
        return None
    origin = "accelerate launch (FSDP)"
    if environ.get("FSDP_VERSION", "1") != "2":
        raise _refusal(
            f"{origin}: only FSDP2 is supported; set fsdp_version: 2 in the YAML",
            environ,
            "ACCELERATE_USE_FSDP",
            "FSDP_VERSION",
        )
    common: dict[str, Any] = {
        "reshard_after_forward": _flag(environ, "FSDP_RESHARD_AFTER_FORWARD", default=True),
        "cpu_offload": _flag(environ, "FSDP_OFFLOAD_PARAMS"),
    }
    if not _flag(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return Choice(DataParallelConfig(name="fsdp", **common), origin)
    shards = _parallel_size(environ, "dp_shard")
    if (replicas := _parallel_size(environ, "dp_replicate")) > 1:
        common |= {"num_replicas": replicas, "shard_degree": shards}
    name: Any = "hsdp" if replicas > 1 else "fsdp"
    config = DataParallelConfig(name=name, **common)
    return Choice(config, origin)


def launcher_notices(environ: Mapping[str, str]) -> tuple[str, ...]:
    """One line for each option of the launcher that the run's config decides instead."""
    ignored = []
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        ignored.append(("dynamo_backend", "train_module.compile_model"))
    if _flag(environ, "FSDP_ACTIVATION_CHECKPOINTING"):
        ignored.append(("fsdp_activation_checkpointing", "train_module.ac_config"))
    if environ.get("ACCELERATE_GRADIENT_CLIPPING", "none") not in ("none", "auto"):
        ignored.append(("gradient_clipping", "train_module.max_grad_norm"))
    if environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("none", "auto", "1"):
        ignored.append(("gradient_accumulation_steps", "train_module.rank_microbatch_size"))
    return tuple(_notice("accelerate launch", name, ours) for name, ours in ignored)


def check_deepspeed(config: Mapping[str, Any], where: str) -> None:
    """Refuse what a DeepSpeed JSON may not say here. Raises ConfigError: an optimizer or scheduler,
    fp16, another reduction of gradients than ours, or offload to anything but the CPU."""
    for key, (value, reason) in DEEPSPEED_FIXED.items():
        if config.get(key, value) not in (value, "auto"):
            raise ConfigError(f"{where}: remove {key!r} there ({config[key]}): {reason}")
    for owned, ours in (("optimizer", "optim"), ("scheduler", "scheduler")):
        if owned in config:
            raise ConfigError(
                f"{where}: remove {owned!r} there; it is train_module.{ours} of the JSON config"
            )
    if _section(config, "fp16").get("enabled") is True:
        raise ConfigError(f"{where}: fp16 is not supported; use train_module.precision: bf16")
    zero = _section(config, "zero_optimization")
    for holder, name in (
        (config, "zero_optimization"),
        (zero, "offload_optimizer"),
        (zero, "offload_param"),
    ):
        if not isinstance(holder.get(name, {}), dict):
            raise ConfigError(f"{where}: {name} must be an object, not {holder[name]!r}")
    if zero.get("compute_grad_norm", True) is False:
        raise ConfigError(f"{where}: remove 'compute_grad_norm' there; the norm is always needed")
    for part in ("offload_optimizer", "offload_param"):
        device = _section(zero, part).get("device", "none")
        if device not in ("cpu", "none"):
            raise ConfigError(f"{where}: {part} to {device} is not supported; use cpu or none")


def deepspeed_notices(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """One line for each key of a DeepSpeed JSON that the run's config decides instead."""
    return tuple(
        _notice(where, key, ours)
        for key, ours in _OURS_IN_DEEPSPEED.items()
        if config.get(key, "auto") != "auto"
    )


def offloads(config: DataParallelConfig) -> bool:
    """Whether the engine this asks for keeps state in host memory."""
    zero = _section(config.deepspeed_config, "zero_optimization")
    parts = ("offload_optimizer", "offload_param")
    return config.cpu_offload or any(_section(zero, part).get("device") == "cpu" for part in parts)


def _deepspeed_choice(environ: Mapping[str, str]) -> Choice:
    origin = "accelerate launch (DeepSpeed)"
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() not in ("", "none"):
        try:
            config = read_json(_deepspeed_file(file), ConfigError)
        except FileNotFoundError:
            here = "" if Path(file).is_absolute() else f" in {Path.cwd()}"
            raise ConfigError(
                f"{origin}: there is no {file}{here}; give the path of the DeepSpeed config with "
                "--deepspeed_config_file (deepspeed_config_file in the YAML)"
            ) from None
        except ConfigError as error:
            raise ConfigError(f"{origin}: cannot read the DeepSpeed config: {error}") from None
    else:
        devices = {
            part: environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
            for part in ("optimizer", "param")
        }
        zero = {f"offload_{p}": {"device": d} for p, d in devices.items() if d != "none"}
        config = {"zero_optimization": zero} if zero else {}
        file = origin
    check_deepspeed(config, file)
    notices = deepspeed_notices(config, file)
    fallback = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    stage = _section(config, "zero_optimization").get("stage", fallback)
    if str(stage) not in ("1", "2", "3"):
        raise _refusal(
            f"{origin}: zero stage {stage!r} is not supported; use 1, 2 or 3",
            environ,
            "ACCELERATE_USE_DEEPSPEED",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        )
    name: Any = f"zero{stage}"
    return Choice(DataParallelConfig(name=name, deepspeed_config=config), origin, notices)


def _deepspeed_file(name: str) -> Path:
    """Where the DeepSpeed JSON of a YAML is: relative to the current folder; for those that come
    along, which their YAMLs call ds_configs/NAME.json, anywhere."""
    path = Path(name)
    if path.parent == Path(DEEPSPEED_FOLDER) and not path.exists():
        shipped = ENGINE_FILES / path.name
        return shipped if shipped.is_file() else path
    return path


def _refusal(message: str, environ: Mapping[str, str], *names: str) -> ConfigError:
    """`message` about what the variables `names` say, which may be left of another command."""
    found = [f"{name}={environ[name]}" for name in names if name in environ]
    if not found or is_accelerated():
        return ConfigError(message)
    rest = message.partition(": ")[2]
    return ConfigError(
        f"{' and '.join(found)} in the environment, where no `accelerate launch` started this "
        f"process: {rest}; or `unset {' '.join(names)}`"
    )


def _notice(origin: str, option: str, ours: str) -> str:
    return f"{origin}: {option} is not used; {ours} of the config decides"


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A nested object, {} where it is absent or not an object."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _parallel_size(environ: Mapping[str, str], axis: str) -> int:
    name = f"PARALLELISM_CONFIG_{axis.upper()}_SIZE"
    text = environ.get(name, "1")
    if not text.isdecimal() or int(text) < 1:
        raise _refusal(
            f"accelerate launch: parallelism_config_{axis}_size must be a whole number, 1 or more, "
            f"not {text!r}",
            environ,
            name,
        )
    return int(text)


def _flag(environ: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    value = environ.get(name)
    return default if value is None else value.lower() in ("true", "1", "yes")
