"""In which type a run computes: what config and launcher say. No torch."""

from collections.abc import Mapping
from typing import Literal

from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.launcher import Choice, launcher_precision
from toolkit.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
PRECISION_OF: dict[str | None, Precision] = {
    None: "auto", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"
}  # fmt: skip


def choose_precision(
    asked: Precision,
    dp_config: DataParallelConfig | None,
    choice: Choice,
    environ: Mapping[str, str],
) -> tuple[Precision, tuple[str, ...]]:
    """The precision that is `asked` for, by `dp_config` or by the launcher; and notices. Raises
    ConfigError: they contradict one another, or the engine cannot."""
    dtype = dp_config.param_dtype if dp_config else None
    from_dp = PRECISION_OF[dtype]
    if "auto" not in (asked, from_dp) and asked != from_dp:
        raise ConfigError(
            f"two precisions asked for: train_module.precision is {asked}, "
            f"train_module.dp_config.param_dtype is {dtype}; keep one"
        )
    explicit = asked if asked != "auto" else from_dp
    launched: Precision | None = launcher_precision(environ)
    if "fp16" in (explicit, launched) and choice.config.name.startswith("zero"):
        raise ConfigError(
            f"train_module.precision: fp16 does not go with {choice.config.name}; use ddp, fsdp or "
            "hsdp, or bf16"
        )
    bf16 = choice.config.deepspeed_config.get("bf16")
    if isinstance(bf16, dict) and bf16.get("enabled") is True:
        launched = "bf16"
    if explicit == "auto":
        return launched or "auto", ()
    overridden = f"precision {explicit} from the config overrides the launcher's {launched}"
    return explicit, (overridden,) if launched not in (None, explicit) else ()
