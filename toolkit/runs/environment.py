"""What a run was started with: command, repository, machine. Never secrets."""

import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from toolkit.config.named import module_folders
from toolkit.config.secrets import is_secret_name, mask_secrets
from toolkit.metrics.system import nvml_gpus
from toolkit.threads import cores_here

_LIBRARIES = ("toolkit", "torch", "accelerate", "deepspeed", "transformers", "tokenizers", "numpy")
_VARIABLES = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|NODE_RANK|MASTER_ADDR|MASTER_PORT"
    r"|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|CUDA_DEVICE_MAX_CONNECTIONS|PYTORCH_\w+|TORCH_\w+"
    r"|TORCHELASTIC_\w+|ACCELERATE_\w+|FSDP_\w+|NCCL_\w+|GLOO_\w+"
    r"|SLURM_(JOB|ARRAY|NTASKS|NNODES|NODE|PROCID|CLUSTER)\w*)\Z"
)
_SECRET = re.compile(r"TOKEN|API|PRIVATE|(\b|_)KEY(\b|_)", re.IGNORECASE)


def describe_command() -> dict[str, Any]:
    """Command line, folder, interpreter, and where modules of the user's own are found. What looks
    like a secret is masked."""
    return {
        "argv": mask_secrets(sys.argv),
        "cwd": os.getcwd(),
        "python": sys.executable,
        "modules": module_folders(),
    }


def describe_git(folder: Path | None = None) -> dict[str, Any]:
    """Commit, branch and whether tracked files were changed; `{"repository": None}` outside one."""

    try:
        status = _git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=no")
        lines, top = status.splitlines(), _git(folder, "rev-parse", "--show-toplevel").strip()
    except (OSError, subprocess.SubprocessError):
        return {"repository": None}
    headers = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# branch."))
    return {
        "repository": top,
        "commit": headers.get("branch.oid"),
        "branch": headers.get("branch.head"),
        "dirty": any(not line.startswith("#") for line in lines),
    }


def describe_changes(folder: Path | None = None) -> str:
    """The uncommitted changes of tracked files, as a patch; empty outside a repository."""
    try:
        return _git(folder, "diff", "HEAD")
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


def _git(folder: Path | None, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, timeout=20, check=True,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
    ).stdout  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Python, libraries (without importing them), host, processors, memory, GPUs, launcher."""
    import psutil

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "versions": {name: installed_version(name) for name in _LIBRARIES},
        "cpu_count": os.cpu_count(),
        "cpu_available": cores_here(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 2),
        "gpus": _gpu_names(),
        "variables": {
            name: mask_secrets(value)
            for name, value in sorted(os.environ.items())
            if _VARIABLES.match(name) and not (_SECRET.search(name) or is_secret_name(name))
        },
    }


def installed_version(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu_names() -> list[str]:
    with nvml_gpus() as (nvml, handles):
        try:
            return [str(nvml.nvmlDeviceGetName(handle)) for handle in handles]
        except nvml.NVMLError:
            return []
