"""Two machines on one: network namespaces joined by a cable, each with a host name of its own and,
where a test wants it, folders of its own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.launch.fakes import run, wait_for, write_program
from tests.docs.running import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = ("machine-a", "machine-b")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
BIN = Path(sys.executable).parent
SMALL = (
    *("--trainer.max_duration={value: 12, unit: steps}", "--train_module.rank_microbatch_size=256"),
    *("--trainer.callbacks.checkpointer.interval=6", "--train_module.precision=fp32"),
)


class Machines:
    """A and B, whose shared folder is `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.namespaces = [f"toolkit-{os.getpid()}-{name}" for name in "ab"]
        self.processes: list[subprocess.Popen[str]] = []
        pairs = zip(ADDRESSES, NAMES, strict=True)
        lines = ["127.0.0.1 localhost"]
        lines += [f"{address} {name} node{i}" for i, (address, name) in enumerate(pairs)]
        (place / "hosts").write_text("\n".join(lines) + "\n")
        first, second = self.namespaces
        for namespace in self.namespaces:
            ip("netns", "add", namespace)
        ip("-n", first, "link", "add", "wire0", "type", "veth", "peer", "wire0", "netns", second)
        for namespace, address in zip(self.namespaces, ADDRESSES, strict=True):
            ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "wire0")
            for device in ("lo", "wire0"):
                ip("-n", namespace, "link", "set", device, "up")

    def command(self, number: int, *words: str, private: Path | None = None) -> list[str]:
        """What runs `words` on machine `number`, with `private` as a folder of its own."""
        mount = "" if private is None else f"mount -t tmpfs none {private};"
        names = f"mount --bind {self.place}/hosts /etc/hosts; hostname {NAMES[number]};"
        script = f'{names} {mount} exec "$@"'
        return [
            *("ip", "netns", "exec", self.namespaces[number], "unshare", "--uts", "--mount"),
            *("bash", "-c", script, "_", *words),
        ]

    def start(self, number: int, *words: str, private: Path | None = None) -> None:
        environ = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "wire0",
        }  # fmt: skip
        self.processes.append(
            subprocess.Popen(
                self.command(number, *words, private=private),
                cwd=self.place,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    def both(self, *words: str) -> None:
        """The same words on both; `{rank}` is the number of the machine."""
        for number in (0, 1):
            self.start(number, *(word.format(rank=number) for word in words))

    def end(self, seconds: float = 200.0) -> list[tuple[int, str]]:
        """Exit code and output of what was started."""
        found = []
        for process in self.processes:
            output, _ = process.communicate(timeout=seconds)
            found.append((process.returncode, output))
        self.processes.clear()
        return found

    def succeed(self) -> None:
        for code, output in self.end():
            assert code == 0, output

    def cut(self) -> None:
        ip("-n", self.namespaces[0], "link", "set", "wire0", "down")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for namespace in self.namespaces:
            said = subprocess.run(
                ["ip", "netns", "pids", namespace], capture_output=True, text=True
            )
            for pid in said.stdout.split():
                subprocess.run(["kill", "-KILL", pid], check=False)
            subprocess.run(["ip", "netns", "del", namespace], check=False)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    monkeypatch.chdir(tmp_path)
    try:
        found = Machines(tmp_path)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield found
    found.close()


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics" / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def toolkit(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "toolkit", *words)


NODES = (
    *("--processes", "1", "--nodes", "2", "--node-rank", "{rank}"),
    *("--head", f"{ADDRESSES[0]}:29411"),
)


def test_torchrun_and_nodes_train_the_same_and_a_stopped_run_is_resumed(
    machines: Machines, tmp_path: Path
) -> None:
    torchrun = (
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29410", "--rdzv-id", "r"),
    )
    small = [word.replace("{", "{{").replace("}", "}}") for word in SMALL]
    machines.both(*torchrun, "-m", "toolkit", "train", "smoke", "--save-folder", "elastic", *small)
    machines.succeed()
    stop = "--trainer.hard_stop={{value: 6, unit: steps}}"
    machines.both(*toolkit("train", "smoke", "--save-folder", "nodes", *small, stop, *NODES))
    machines.succeed()
    assert len(losses(tmp_path / "nodes")) == 6
    machines.both(*toolkit("resume", "nodes", "--trainer.hard_stop=null", *NODES))
    machines.succeed()
    assert losses(tmp_path / "nodes") == losses(tmp_path / "elastic")
    assert len(losses(tmp_path / "nodes")) == 12
    hosts = {
        json.loads(file.read_text())["host"]
        for file in (tmp_path / "nodes" / "metadata" / "ranks").glob("rank*.json")
    }
    assert hosts <= set(NAMES)


def test_the_commands_of_the_guide_train_on_both(machines: Machines, tmp_path: Path) -> None:
    """Those of docs/learn/many_machines.md, with a small model, one process a machine and this
    folder as /shared; the last ones resume."""
    page = (ROOT / "docs/learn/many_machines.md").read_text().replace("\\\n", "")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    shutil.copy(ROOT / "accelerate_configs/fsdp.yaml", tmp_path)
    for number, block in enumerate(blocks):
        here = {
            "my.json": "smoke",
            "--processes 8": "--processes 1",
            "--num_processes 16": "--num_processes 2",
            "--nproc-per-node=8": "--nproc-per-node=1",
            "/shared/first": str(tmp_path / str(number % 3)),
        }
        small = [f"--trainer.max_duration={{value: {14 if number == 3 else 12}, unit: steps}}"]
        small += ["--train_module.rank_microbatch_size=256"] if number < 3 else []
        commands = [line for line in block.splitlines() if not line.startswith("#")]
        for machine, command in enumerate(commands * (2 // len(commands))):
            for theirs, ours in here.items():
                command = command.replace(theirs, ours)
            machines.start(machine, *shlex.split(command), *small)
        machines.succeed()
    assert [len(losses(tmp_path / name)) for name in "012"] == [14, 12, 12]
    assert losses(tmp_path / "1") == losses(tmp_path / "2") == losses(tmp_path / "0")[:12]


def test_a_cut_cable_ends_the_run_with_one_line(machines: Machines, tmp_path: Path) -> None:
    long = ("--trainer.max_duration={{value: 100000, unit: steps}}",)
    machines.both(*toolkit("train", "smoke", "--save-folder", "run", *long, *NODES))
    wait_for((tmp_path / "run" / "metrics" / "train.jsonl").exists, 120.0)
    machines.cut()
    began = time.monotonic()
    for code, output in machines.end(300.0):
        assert code == 1, output
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, output
        assert re.match(
            r"error: node [01] \(machine-[ab]\) is lost: its launcher ended, or the", errors[0]
        )
    assert time.monotonic() - began < 240


def test_private_folders_are_refused(machines: Machines, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    words = toolkit("train", "smoke", "--save-folder", "own/run", *SMALL, *NODES)
    for number in (0, 1):
        own = [word.replace("{rank}", str(number)) for word in words]
        machines.start(number, *own, private=tmp_path / "own")
    ends = machines.end()
    assert all(code != 0 for code, _ in ends)
    said = "\n".join(output for _, output in ends)
    assert "own/run: not visible on node 1 (machine-b); a run on several machines needs a s" in said


def fake_ssh(machines: Machines, private: Path | None = None) -> None:
    """An `ssh` that enters the machine whose address it is given; `private` is one of B's own."""
    cases = []
    for number, address in enumerate(ADDRESSES):
        own = private if number == 1 else None
        words = " ".join(
            f"'{word}'" for word in machines.command(number, "bash", "-c", private=own)
        )
        cases.append(f'{address}) exec {words} "$3" ;;')
    (machines.place / "bin").mkdir()
    write_program(
        machines.place / "bin" / "ssh",
        'set -- "$@"\nwhile [ "$1" != -- ]; do shift; done\ncase $2 in\n'
        + "\n".join(cases)
        + "\nesac\n",
    )
    text = (machines.place / "bin" / "ssh").read_text()
    (machines.place / "bin" / "ssh").write_text(f"#!/bin/bash\n{text}")


def test_launch_by_ssh_trains_on_both(
    machines: Machines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_ssh(machines)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ssh = ("launch", "smoke", "--to", "ssh", "--hosts", ",".join(ADDRESSES), *SMALL)
    assert run(*ssh, "--name", "a", "--follow") == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "training 41,120 parameters on 2 processes" in said
    assert f"launch-1-{ADDRESSES[1]}.log: " in said
    assert len(losses(tmp_path / "runs" / "smoke" / "a")) == 12


def test_launch_by_ssh_refuses_private_folders(
    machines: Machines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own").mkdir()
    fake_ssh(machines, private=tmp_path / "own")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    ssh = ("launch", "smoke", "--to", "ssh", "--hosts", ",".join(ADDRESSES), *SMALL)
    assert run(*ssh, "--save-folder", "own/a") == 2
    assert f"{ADDRESSES[1]}: does not see {tmp_path}/own/a of this" in capsys.readouterr().err
