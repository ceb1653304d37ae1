"""What `toolkit eval`, `toolkit generate` and `toolkit export-hf` ask of a model on disk."""

from pathlib import Path
from typing import Literal

import torch

from toolkit.checkpoint.folder import kind_of
from toolkit.distributed.devices import pick_device as pick_any
from toolkit.distributed.devices import use_device
from toolkit.distributed.tuning import tune_cpu
from toolkit.errors import ConfigError
from toolkit.hf.loading import fetch_model, is_hub_name

DType = Literal["fp32", "bf16"]
"""Precisions of a computation."""
WeightType = Literal["fp32", "bf16", "fp16"]
"""Types that weights are kept in."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def hf_folder_of(where: str) -> Path | None:
    """The local folder of `transformers` that `where` is, or that the hub has under this name
    (downloaded now if it is not yet); None where it is something else."""
    kind = kind_of(where)
    if kind == "hf":
        return Path(where).expanduser()
    if kind != "missing":
        return None
    return fetch_model(where) if is_hub_name(where) else None


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; default: the first GPU, else the CPU, with all of its cores."""
    if name is None:
        device = pick_any(local_rank=0)
    else:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"--device {name}: not a device of this machine: {reason}") from None
    if device.type == "cpu":
        tune_cpu()
    else:
        use_device(device)
    return device
