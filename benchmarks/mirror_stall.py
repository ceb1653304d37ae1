"""What a mirror costs the training loop beside it while a checkpoint of 500 MB goes up.

    python benchmarks/mirror_stall.py

A small model trains step by step in one process with one thread, on the first core. The mirror of
its run folder, with growing metrics and a checkpoint of 500 MB, runs at the priority that it has in
a run, on any core; with `--share-core` on training's own, which shows the most that it can take.
The S3 server (moto) that it sends to on loopback has another core: it stands for another machine.

The mirror's process is frozen and let go on by turns of some steps, so that what else runs on the
machine disturbs both kinds of turns alike. "ratio" is the time of a turn beside the mirror over
that of the frozen turn which follows; the mirror's own CPU time, over that of the turns, bounds it.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
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
STEPS = 5
"""Of a turn."""
SERVER = """
import os; os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
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
    parser.add_argument("--share-core", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    os.sched_setaffinity(0, [min(cores)])
    assert server.stdout is not None
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
        "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    mirror_module.INTERVAL_SECONDS = 2.0
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = [min(cores)] if arguments.share_core else list(cores)
            measure(Path(folder), arguments.rounds, arguments.megabytes, place)
    finally:
        server.kill()
        server.wait()


def measure(folder: Path, rounds: int, megabytes: int, cores: list[int]) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket="bucket")
    run = start_run("stall", save_folder=folder / "run", root=folder)
    save_checkpoint(
        run.path(RUN_FILES.checkpoints), step=1, tokens=1, engine="single", rank=0, group=None,
        tensors={"model.a": torch.randn(megabytes << 18)}, rank_state={},
    )  # fmt: skip
    step = stepper(run.path(RUN_FILES.train_metrics))
    train(step)
    beside, alone, shares, sent = [], [], [], []
    for number in range(rounds):
        url = f"s3://bucket/run{number}"
        mirror = Mirror(url, run.folder, Retention(), wait_seconds=600)
        mirror.open()
        mirror.start(run)
        there, process = RemoteFolder(f"{url}/checkpoints/step1"), mirror._process
        assert process is not None
        times = psutil.Process(process.pid)
        times.cpu_affinity(cores)
        turns, seconds, before = 0, 0.0, sum(times.cpu_times()[:2])
        while not there.exists(".metadata.json"):
            beside.append(train(step))
            process.send_signal(signal.SIGSTOP)
            alone.append(train(step))
            process.send_signal(signal.SIGCONT)
            turns, seconds = turns + 1, seconds + beside[-1]
        shares.append((sum(times.cpu_times()[:2]) - before) / seconds)
        sent.append(megabytes / seconds)
        mirror.close()
        RemoteFolder(url).remove(first="lease.json")
        print(f"{turns} turns, {seconds:.1f} s: share {shares[-1]:.3f}", flush=True)
    run.close("finished")
    ratios = [one / other for one, other in zip(beside, alone, strict=True)]
    table = Table("", "median", "middle half")
    low, median, high = statistics.quantiles(ratios, n=4)
    table.add_row(f"ratio ({len(ratios)} turns)", f"{median:.4f}", f"{low:.4f} to {high:.4f}")
    quiet = [statistics.quantiles(turns, n=4)[0] for turns in (beside, alone)]
    table.add_row("ratio of the undisturbed quarter", f"{quiet[0] / quiet[1]:.4f}", "")
    table.add_row("CPU of the mirror", f"{statistics.median(shares):.4f}", "")
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


def train(step: Callable[[], None]) -> float:
    """Seconds of a turn."""
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
