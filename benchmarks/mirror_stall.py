"""What a mirror costs the training loop beside it while a checkpoint of 500 MB goes up.

    python benchmarks/mirror_stall.py

A small model trains step by step in one process with one thread. By turns nothing else happens, or
the mirror of a run folder with growing metrics and a checkpoint of 500 MB sends it to an S3 server
(moto) on loopback. The server is a process of its own with the lowest priority: it stands for
another machine. The mirror's process counts: it shares the cores with training, at the priority
that it has in a run.

A turn lasts until the upload is done; the other one takes as many steps. "ratio" is the time per
step beside the mirror over that without it. CPU time tells the same without what else runs on the
machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.retention import Retention
from toolkit.launch import mirror as mirror_module
from toolkit.launch.mirror import Mirror
from toolkit.models.config import TransformerConfig
from toolkit.models.transformer import Transformer
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import start_run
from toolkit.storage.remote import RemoteFolder

MODEL = TransformerConfig(
    vocab_size=512, d_model=128, num_layers=2, num_heads=4, intermediate_size=352,
    max_sequence_length=64,
)  # fmt: skip
SERVER = """
import os; os.nice(19)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
import sys; sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
        "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    mirror_module.INTERVAL_SECONDS = 2.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), arguments.rounds, arguments.megabytes)
    finally:
        server.kill()
        server.wait()


def measure(folder: Path, rounds: int, megabytes: int) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket="bucket")
    run = start_run("stall", save_folder=folder / "run", root=folder)
    save_checkpoint(
        run.path(RUN_FILES.checkpoints), step=1, tokens=1, engine="single", rank=0, group=None,
        tensors={"model.a": torch.randn(megabytes << 18)}, rank_state={},
    )  # fmt: skip
    step = stepper(run.path(RUN_FILES.train_metrics))
    train(step, 100)
    walls, cpus, sent = [], [], []
    for number in range(rounds):
        url = f"s3://bucket/run{number}"
        mirror = Mirror(url, run.folder, Retention(), wait_seconds=600)
        mirror.open()
        mirror.start(run)
        there = RemoteFolder(f"{url}/checkpoints/step1")
        started, steps, beside = time.perf_counter(), 0, (0.0, 0.0)
        while not there.exists(".metadata.json"):
            wall, cpu = train(step, 100)
            steps, beside = steps + 100, (beside[0] + wall, beside[1] + cpu)
        sent.append(megabytes / (time.perf_counter() - started))
        mirror.close()
        RemoteFolder(url).remove(first="lease.json")
        alone = train(step, steps)
        walls.append(beside[0] / alone[0])
        cpus.append(beside[1] / alone[1])
        print(f"{steps} steps: wall {walls[-1]:.4f}, CPU {cpus[-1]:.4f}, {sent[-1]:.0f} MB/s")
    run.close("finished")
    table = Table("", "median", "range")
    for name, values in (("wall per step, ratio", walls), ("CPU per step, ratio", cpus)):
        shown = f"{min(values):.4f} to {max(values):.4f}"
        table.add_row(name, f"{statistics.median(values):.4f}", shown)
    table.add_row("upload, MB/s", f"{statistics.median(sent):.0f}", "")
    Console().print(table)


def stepper(metrics: Path) -> Callable[[], None]:
    """A training step, which also writes a line of metrics."""
    torch.manual_seed(0)
    model = Transformer(MODEL)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 512, (4, 64))
    file = metrics.open("ab", buffering=0)

    def step() -> None:
        optim.zero_grad()
        sums = model(ids, labels=ids)
        sums.loss.backward()
        optim.step()
        file.write(b'{"step": 1, "loss": 1.0}\n')

    return step


def train(step: Callable[[], None], number: int) -> tuple[float, float]:
    """Wall and CPU seconds of so many steps."""
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(number):
        step()
    return time.perf_counter() - wall, time.thread_time() - cpu


if __name__ == "__main__":
    main()
