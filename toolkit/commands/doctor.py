"""`toolkit doctor`: whether this machine can train, and what would make it train better."""

import contextlib
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from toolkit import __version__
from toolkit.commands import doctor_files
from toolkit.distributed.ranks import loopback_interface
from toolkit.errors import ToolkitError
from toolkit.launch.nodes import DEFAULT_PORT
from toolkit.runs.environment import installed_version
from toolkit.wording import count, prefixed

_LEAST_FREE_GB = 5.0
_LEAST_FILES = 4096
"""Open files: data workers, connections and shards of many ranks."""
_CHECKED = (
    *("toolkit", "torch", "torchvision", "torchaudio", "torchao", "accelerate", "deepspeed"),
    *("transformers", "datasets", "peft"),
)
"""Packages whose own requirements are compared with what is installed: builds against another
torch fail with errors that name neither."""
_KNOWN_BAD = {
    "pynvml": ("<12", "it hides nvidia-ml-py, which has the same module; pip uninstall pynvml"),
}
"""Name -> versions (empty: all) and what is wrong with them."""
_MOST_SHOWN = 3


class Finding(NamedTuple):
    """One answer about the machine."""

    level: Literal["ok", "note", "failed"]
    """`failed`: training does not work so; `note`: it works, slower or with less."""
    about: str
    text: str


def examine(*, folder: Path | None = None, has_peers: bool = False) -> list[Finding]:
    """All findings, in the order of a report; `folder` (default: the current one) is where runs
    would be written. Trains a tiny layer on the device and measures speeds for a few tenths of a
    second each; writes nothing that stays. With `has_peers` this is a process of several, which
    have met at the port already."""
    place = folder or Path.cwd()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "packages": _packages,
        "driver": _driver,
        "device": _device,
        "matmul": _matmul,
        "compiler": _compiler,
        "disks": lambda: _disks(place),
        "speed": lambda: _disk_speeds(place),
        "file system": lambda: _file_system(place),
        "locks": lambda: _locks(place / "runs"),
        "limits": _limits,
        "network": lambda: _network(has_peers=has_peers),
    }
    found: list[Finding] = []
    for about, check in checks.items():
        try:
            found += check()
        except (ToolkitError, OSError, RuntimeError, ImportError, ValueError) as error:
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


def _packages() -> Iterator[Finding]:
    """Versions that do not fit each other, or are known to make trouble."""
    odd = []
    for name, (versions, why) in _KNOWN_BAD.items():
        version = installed_version(name)
        if version is not None and SpecifierSet(versions).contains(version, prereleases=True):
            odd.append(f"{name} {version}: {why}")
    for name in _CHECKED:
        odd += [f"{name} needs {needed}, here is {has}" for needed, has in _unmet(name)]
    for text in odd:
        yield Finding("note", "packages", text)
    if not odd:
        yield Finding("ok", "packages", "versions fit each other")


def _unmet(name: str) -> Iterator[tuple[str, str]]:
    """Requirements of an installed package that another version is installed of, and which."""
    try:
        requirements = list(map(Requirement, metadata.requires(name) or ()))
    except metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version and not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name}{requirement.specifier}", version


def _driver() -> Iterator[Finding]:
    import torch

    from toolkit.distributed.devices import nvidia_driver

    found = nvidia_driver()
    if found is not None:
        _, version, cuda = found
        text = f"NVIDIA {version}, for CUDA up to {'.'.join(map(str, cuda))}"
    else:
        text = "none: no GPU of NVIDIA"
    built = "CPUs"
    if torch.version.hip is not None:
        built = f"ROCm {torch.version.hip}"
    elif torch.version.cuda is not None:
        built = f"CUDA {torch.version.cuda}"
        with contextlib.suppress(AttributeError, ImportError, RuntimeError):
            built += f" with NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    yield Finding("ok", "driver", f"{text}; torch {torch.__version__} is built for {built}")


def _matmul() -> Iterator[Finding]:
    import torch

    from toolkit.commands.doctor_speed import matmul_speeds
    from toolkit.distributed.devices import pick_device, unused_gpus

    if unused_gpus() is not None:  # "device" has said so
        return
    try:
        speeds = matmul_speeds(pick_device(local_rank=0))
    except torch.OutOfMemoryError:
        yield Finding("note", "matmul", "not measured: another program has the GPU's memory")
        return
    text = ", ".join(f"{name} {prefixed(speed, 'FLOP/s')}" for name, speed in speeds.items())
    yield Finding("ok", "matmul", text)


def _device() -> Iterator[Finding]:
    import torch

    from toolkit.autotune.question import measures
    from toolkit.distributed.devices import device_name, pick_device, unused_gpus, usable_gpus
    from toolkit.distributed.environment import is_fast_at_bf16
    from toolkit.distributed.tuning import tune_cpu

    if (reason := unused_gpus()) is not None:
        yield Finding("failed", "device", reason)
    device, gpus = pick_device(local_rank=0), usable_gpus()
    if device.type == "cpu":
        tune_cpu()  # speeds are to be those of a run
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
        return
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
        if (reason := _why_not_written(place)) is not None:
            yield Finding("failed", about, f"{place}: cannot be written: {reason}")
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


def _why_not_written(place: Path) -> str | None:
    """Why files in `place` cannot be written; None: they can."""
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"x")
    except OSError as error:
        return error.strerror
    return None


def _disk_speeds(folder: Path) -> Iterator[Finding]:
    """Of the run folder, and of the folder of caches where that is another disk."""
    from toolkit.commands.doctor_speed import disk_speed

    places = {"run folder": folder}
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if cache.is_dir() and cache.stat().st_dev != folder.stat().st_dev:
        places["cache folder"] = cache
    for about, place in places.items():
        if _why_not_written(place) is not None:  # "disks" has said so of the run folder
            continue
        try:
            with _scratch(place) as inside:
                speed = disk_speed(inside / "file")
        except OSError as error:
            yield Finding("note", about, f"{place}: speed not measured: {error.strerror}")
        else:
            read = "" if speed.read is None else f", read {prefixed(speed.read, 'B/s')}"
            text = f"write {prefixed(speed.write, 'B/s')}{read}"
            yield Finding("ok", about, f"{text}, from memory {prefixed(speed.cached, 'B/s')}")


def _file_system(folder: Path) -> Iterator[Finding]:
    if _why_not_written(folder) is not None:  # "disks" has said so
        return
    kind = doctor_files.kind_of_file_system(folder) or "of unknown kind"
    with _scratch(folder) as place:
        failing = doctor_files.missing_guarantees(place)
        lacking = doctor_files.missing_comforts(place)
    if failing:
        text = f"{kind}: not working: {', '.join(failing)}; put runs on another disk (run.root)"
        yield Finding("failed", "file system", text)
    if lacking:
        text = f"{kind}: not to be relied on: {', '.join(lacking)}; start a run from one machine"
        yield Finding("note", "file system", text)
    if not failing and not lacking:
        text = f"{kind}: fsync, rename, exclusive files, locks, links and clock work"
        yield Finding("ok", "file system", text)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
        yield Path(name)


def _locks(root: Path) -> Iterator[Finding]:
    stale = doctor_files.stale_locks(root)
    if not stale:
        yield Finding("ok", "locks", f"{root}: none that a dead run left")
        return
    shown = ", ".join(f"{run.parent.name}/{run.name}" for run in stale[:_MOST_SHOWN])
    more = f" and {len(stale) - _MOST_SHOWN} more" if len(stale) > _MOST_SHOWN else ""
    text = f"{root}: left by dead writers of {shown}{more}; `toolkit resume RUN` takes them over"
    yield Finding("note", "locks", text)


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


def _network(*, has_peers: bool = False) -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
    here = f"processes meet on {loopback_interface()}"
    if has_peers:
        yield Finding("ok", "network", here)
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEFAULT_PORT))
        except OSError as error:
            text = (
                f"{here}; port {DEFAULT_PORT}: {error.strerror}; "
                f"machines meet elsewhere with --head HOST:PORT"
            )
            yield Finding("note", "network", text)
            return
    yield Finding("ok", "network", f"{here}; port {DEFAULT_PORT}, for several machines, is free")


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


def as_records(found: list[Finding]) -> list[dict[str, Any]]:
    """The report as JSON's values."""
    return [finding._asdict() for finding in found]
