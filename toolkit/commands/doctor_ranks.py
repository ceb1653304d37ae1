"""`toolkit doctor` as the processes that a run would have: each machine is examined, and the ranks
exchange tensors and look at each other's files."""

import contextlib
import datetime
import os
import secrets
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import toolkit
from toolkit.commands.doctor import Finding, examine
from toolkit.commands.doctor_speed import all_reduce_speed, matmul_speeds
from toolkit.distributed.devices import pick_device
from toolkit.distributed.launcher import rank_of, world_size_of
from toolkit.distributed.process_groups import close_process_groups, open_process_groups
from toolkit.experiment.recorded import VERSIONED
from toolkit.launch.capacity import capacity_here, check_processes
from toolkit.launch.messages import Common
from toolkit.launch.nodes import host_name
from toolkit.launch.plan import LaunchPlan
from toolkit.launch.workers import launch, toolkit_command
from toolkit.runs.environment import installed_version
from toolkit.storage.locks import locked
from toolkit.wording import count, prefixed

_TIMEOUT = datetime.timedelta(minutes=2)
_SLOW = 0.8
"""Of the median's speed: a GPU below it holds up the others at every step."""


class Gathered(NamedTuple):
    """What all machines say."""

    machines: list[str]
    """By rank of their first process; told apart where two have the same name."""
    findings: list[tuple[Finding, list[str]]]
    """Each with the machines that say it, in the order of a report."""

    def told(self) -> list[Finding]:
        """As one report: what is not true of all machines names them."""
        return [
            finding
            if len(where) == len(self.machines)
            else finding._replace(text=f"{finding.text} [{', '.join(where)}]")
            for finding, where in self.findings
        ]

    def as_records(self) -> list[dict[str, Any]]:
        """The report as JSON's values."""
        return [{**finding._asdict(), "machines": where} for finding, where in self.findings]


def usual_processes() -> int:
    """As many as this machine has GPUs; without one, two."""
    capacity = capacity_here()
    return capacity.gpus or min(2, capacity.most)


def start(plan: LaunchPlan, words: Sequence[str], *, debug: bool = False) -> int:
    """Run `toolkit WORDS` as the processes of `plan`; returns the exit code. Raises what `launch`
    does."""
    check_processes(plan.processes)
    versions = {name: installed_version(name) for name in VERSIONED}
    common = Common(versions=versions | {"toolkit": toolkit.__version__}, run="doctor")
    command = toolkit_command(words, debug=debug)
    return launch(
        command, plan.processes, verb="doctor", nodes=plan.nodes,
        common=common if plan.nodes is not None else None,
    )  # fmt: skip


def examine_ranks(*, folder: Path | None = None) -> Gathered:
    """The report of all processes of this launch, the same on each. Raises ConfigError: this
    process has no GPU for itself, or see `open_process_groups`."""
    environ, place = os.environ, folder or Path.cwd()
    local, here = int(environ.get("LOCAL_RANK", "0")), environ.get("LOCAL_WORLD_SIZE")
    device = pick_device(local, int(here) if here else None)
    open_process_groups(device, world_size_of(environ), timeout=_TIMEOUT)
    try:
        group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        found = examine(folder=place, has_peers=True) if local == 0 else None
        answers = _gather((host_name(), found), group)
        hosts = [host for host, findings in answers if findings is not None]
        machines = _told_apart(hosts)
        merged: dict[Finding, list[str]] = {}
        reports = [findings for _, findings in answers if findings is not None]
        # By check, so that what machines say of the same thing stands together.
        order = list(dict.fromkeys(f.about for findings in reports for f in findings))
        for about in order:
            for machine, findings in zip(machines, reports, strict=True):
                for finding in findings:
                    if finding.about == about:
                        merged.setdefault(finding, []).append(machine)
        together = [*_exchange(device), *_gpus(device, group)]
        if len(machines) > 1:
            together += _shared_folder(place, machines, answers, group)
        return Gathered(machines, [*merged.items(), *((f, machines) for f in together)])
    finally:
        close_process_groups()


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _told_apart(hosts: Sequence[str]) -> list[str]:
    if len(set(hosts)) == len(hosts):
        return list(hosts)
    return [f"{host} (node {node})" for node, host in enumerate(hosts)]


def _exchange(device: torch.device) -> Iterator[Finding]:
    devices = [device] if device.type == "cpu" else [device, torch.device("cpu")]
    ranks = count(dist.get_world_size(), "rank")
    for each in devices:
        name = "NCCL" if each.type == "cuda" else "gloo"
        speed = all_reduce_speed(each)
        text = f"{name}, {ranks}: {prefixed(speed.bandwidth, 'B/s')} on each link"
        yield Finding("ok", "all-reduce", f"{text}, {speed.latency * 1e6:,.0f} us for one number")


def _gpus(device: torch.device, group: dist.ProcessGroup | None) -> Iterator[Finding]:
    """All GPUs at once: one that is slower than the others holds them up."""
    if device.type != "cuda":
        return
    speeds = _gather(matmul_speeds(device)["bf16"], group)
    middle, slowest = statistics.median(speeds), min(speeds)
    text = f"bf16 at once: {prefixed(slowest, 'FLOP/s')} to {prefixed(max(speeds), 'FLOP/s')}"
    if slowest < _SLOW * middle:
        rank = speeds.index(slowest)
        yield Finding("note", "GPUs", f"{text}; rank {rank} is slow (heat, power, another program)")
    else:
        yield Finding("ok", "GPUs", text)


def _shared_folder(
    place: Path, machines: Sequence[str], answers: Sequence[Any], group: dist.ProcessGroup | None
) -> Iterator[Finding]:
    """Whether all machines see the files and the locks of the first one's `place`."""
    is_head = rank_of(os.environ) == 0
    box: list[str | None] = [f".doctor-{secrets.token_hex(4)}"]
    with contextlib.ExitStack() as stack:
        if is_head:
            path = place / str(box[0])
            try:
                path.touch()
                stack.callback(path.unlink, missing_ok=True)
                stack.enter_context(locked(path))
            except (OSError, NotImplementedError):
                box = [None]
        dist.broadcast_object_list(box, src=0, group=group)
        if box[0] is None:  # "disks" and "file system" have said so
            return
        views = _gather(_view(place / box[0], is_head=is_head), group)
    firsts = [view for view, (_, found) in zip(views, answers, strict=True) if found is not None]
    pairs = list(zip(machines, firsts, strict=True))
    if blind := [machine for machine, (sees, _) in pairs if not sees]:
        text = (
            f"{place}: {', '.join(blind)} cannot see the files of {machines[0]}; put runs on a "
            "shared disk (run.root) or at a URL (run.mirror)"
        )
        yield Finding("note", "shared folder", text)
    elif deaf := [machine for machine, (_, locks) in pairs if not locks]:
        text = f"{place}: {', '.join(deaf)} cannot see locks of {machines[0]}"
        yield Finding("note", "shared folder", f"{text}; start a run from one machine only")
    else:
        text = f"{place}: all {count(len(machines), 'machine')} see the same files and locks"
        yield Finding("ok", "shared folder", text)


def _view(path: Path, *, is_head: bool) -> tuple[bool, bool]:
    """Whether the file is there, and whether it is seen to be locked."""
    if is_head:
        return True, True
    if not path.exists():
        return False, False
    try:
        with locked(path, wait=False) as is_free:
            return True, not is_free
    except (OSError, NotImplementedError):
        return True, False
