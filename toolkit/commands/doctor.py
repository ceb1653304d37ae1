"""`toolkit doctor`: whether this machine can train, and what would make it train better."""

import contextlib
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from toolkit import __version__
from toolkit.distributed.ranks import loopback_interface
from toolkit.errors import ToolkitError
from toolkit.runs.environment import installed_version
from toolkit.wording import count

_LEAST_FREE_GB = 5.0
_LEAST_FILES = 4096
"""Open files: data workers, connections and shards of many ranks."""


class Finding(NamedTuple):
    """One answer about the machine."""

    level: Literal["ok", "note", "failed"]
    """`failed`: training does not work so; `note`: it works, slower or with less."""
    about: str
    text: str


def examine(*, folder: Path | None = None) -> list[Finding]:
    """All findings, in the order of a report; `folder` (default: the current one) is where runs
    would be written. Trains a tiny layer on the device; writes nothing that stays."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "device": _device,
        "compiler": _compiler,
        "disks": lambda: _disks(folder or Path.cwd()),
        "limits": _limits,
        "network": _network,
    }
    found: list[Finding] = []
    for about, check in checks.items():
        try:
            found += check()
        except (ToolkitError, OSError, RuntimeError, ImportError) as error:
            found.append(Finding("failed", about, " ".join(str(error).split())))
    with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
        found += _extras()
    return found


def _versions() -> Iterator[Finding]:
    parts = [f"toolkit {__version__}", f"Python {platform.python_version()}", platform.platform()]
    yield Finding("ok", "versions", ", ".join(parts))
    libraries = ("torch", "accelerate", "deepspeed", "transformers", "datasets")
    versions = {name: installed_version(name) for name in libraries}
    missing = [name for name, version in versions.items() if version is None]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield Finding("ok", "libraries", shown)
    if missing:
        yield Finding("failed", "libraries", f"not installed: {', '.join(missing)}")
    if sys.platform == "win32":
        yield Finding("failed", "system", "Windows is not supported; use Linux under WSL 2")


def _device() -> Iterator[Finding]:
    import torch

    from toolkit.autotune.question import measures
    from toolkit.distributed.devices import device_name, pick_device, unused_gpus, usable_gpus
    from toolkit.distributed.environment import is_fast_at_bf16

    if (reason := unused_gpus()) is not None:
        yield Finding("failed", "device", reason)
    device, gpus = pick_device(local_rank=0), usable_gpus()
    precision = "bf16" if is_fast_at_bf16(device) else "fp32"
    if device.type == "cpu" and measures():
        precision = "fp32 or bf16, as a run measures"
    name = device_name(device)
    if gpus:
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        what = f"{count(gpus, 'GPU')}, the first {name} with {memory:.0f} GiB"
    else:
        kind = "Apple's GPU" if device.type == "mps" else "the CPU"
        what = f"{kind} ({name}, {count(torch.get_num_threads(), 'thread')})"
    started = time.perf_counter()
    layer = torch.nn.Linear(64, 64, device=device)
    loss = layer(torch.ones(8, 64, device=device)).square().mean()
    loss.backward()
    is_right = bool(torch.isfinite(loss).item()) and layer.weight.grad is not None
    seconds = time.perf_counter() - started
    if not is_right:
        yield Finding("failed", "device", f"{what}: a small product is not finite")
    yield Finding("ok", "device", f"{what}; `auto` is {precision}; first product {seconds:.2f} s")
    if gpus > 1:
        yield Finding("ok", "start", f"toolkit train CONFIG --processes {gpus}")


def _compiler() -> Iterator[Finding]:
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        yield Finding(
            "note", "compiler", "no C++ compiler: compile_model fails; install g++ and Python.h"
        )
    else:
        yield Finding("ok", "compiler", f"{found} for compile_model")


def _disks(folder: Path) -> Iterator[Finding]:
    for about, place in (("run folder", folder), ("temporary", Path(tempfile.gettempdir()))):
        try:
            with tempfile.TemporaryFile(dir=place) as probe:
                probe.write(b"x")
        except OSError as error:
            yield Finding("failed", about, f"{place}: cannot be written: {error.strerror}")
            continue
        free = shutil.disk_usage(place).free / 1e9
        level: Literal["ok", "note"] = "ok" if free >= _LEAST_FREE_GB else "note"
        yield Finding(level, about, f"{place}: {free:.1f} GB free")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / 1e9
        if size < 1.0:
            text = f"{shared}: {size:.2f} GB; NCCL wants more (docker run --ipc=host)"
            yield Finding("note", "shared memory", text)


def _limits() -> Iterator[Finding]:
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _LEAST_FILES:
        text = f"{soft} open files (hard limit {hard}); `ulimit -n {_LEAST_FILES}` is safer"
        yield Finding("note", "limits", text)
    else:
        yield Finding("ok", "limits", f"{soft} open files")


def _network() -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
    yield Finding("ok", "network", f"processes meet on {loopback_interface()}")


def _extras() -> Iterator[Finding]:
    """What `pip install "toolkit[NAME]"` has brought."""
    needs: dict[str, list[str]] = {}
    for requirement in map(Requirement, metadata.requires("toolkit") or ()):
        for extra in metadata.metadata("toolkit").get_all("Provides-Extra") or ():
            marker = requirement.marker
            if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                needs.setdefault(extra, []).append(requirement.name)
    names = sorted(needs.keys() - {"dev", "all"})
    here = [name for name in names if None not in map(installed_version, needs[name])]
    yield Finding("ok", "extras", ", ".join(here) or "none")
    if missing := [name for name in names if name not in here]:
        text = f'not installed: {", ".join(missing)} (pip install "toolkit[{missing[0]}]")'
        yield Finding("ok", "extras", text)


def exit_code(found: list[Finding]) -> int:
    """0: this machine can train; 1: it cannot."""
    return int(any(finding.level == "failed" for finding in found))


def describe(found: list[Finding]) -> str:
    """The report: a line a finding."""
    marks = {"ok": "  ", "note": "! ", "failed": "x "}
    width = max(len(finding.about) for finding in found)
    lines = [f"{marks[f.level]}{f.about:<{width}}  {f.text}" for f in found]
    verdict = "cannot train here: see the lines with x" if exit_code(found) else "ready to train"
    return "\n".join([*lines, verdict])


def as_records(found: list[Finding]) -> list[dict[str, str]]:
    """The report as JSON's values."""
    return [finding._asdict() for finding in found]
