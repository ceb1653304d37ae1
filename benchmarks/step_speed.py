"""Tokens per second of a training step: the toolkit, bare PyTorch, OLMo-core, litgpt, in turns.

    python benchmarks/step_speed.py --olmo-python olmo-venv/bin/python \\
        --litgpt-python litgpt-venv/bin/python

The model has 7.6M parameters (preset `bench_7M`), a step has 2,048 tokens in instances of 256.
"toolkit" is the path of real runs: `TransformerTrainModule.train_batch` and `.optim_step`. "bare"
is the loop anybody would write around the same model: forward, backward, clip, fused AdamW,
zero_grad. "OLMo-core" is the same bare loop around OLMo-core's Transformer with its AdamW, eager
(it does not compile on CPUs). "litgpt" is the inner loop of `litgpt pretrain`, compiled. Both are
in processes of their own because their dependencies differ; without `--olmo-python` and
`--litgpt-python` they are left out. "bare" shares a process with the toolkit, and with it the
settings that runs make: memory that is kept, and fp32 products by oneDNN on AMD's processors. "bare
PyTorch, MKL" is without the latter.

All take turns of a few steps, so that other load on the machine hits all of them; only one computes
at any time. The first two steps of a turn refill the caches and are not counted. On a machine that
others use too, `--threads 1 --cpu-time` counts this program's own seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# As the command line does; read when torch is loaded, by the OLMo-core worker too.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import msgspec
import torch
from _report import Figure, write_json
from rich.console import Console
from rich.table import Table

from toolkit.distributed.environment import single_environment
from toolkit.distributed.tuning import keep_freed_memory, take_fast_products
from toolkit.models.compile import compile_model
from toolkit.models.config import ModelConfig
from toolkit.models.loss import shift_labels
from toolkit.models.presets import preset
from toolkit.models.transformer import Transformer
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Progress

BATCH, SEQUENCE, VOCABULARY = 8, 256, 8192
TOKENS = BATCH * SEQUENCE
UNCOUNTED = 2
MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

Turn = Callable[[int], list[float]]
"""Does that many steps; seconds of each."""
Clock = Callable[[], float]
"""Seconds: `time.perf_counter` or `time.process_time`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--olmo-python", help="interpreter of an environment with ai2-olmo-core")
    parser.add_argument("--litgpt-python", help="interpreter of an environment with litgpt")
    parser.add_argument("--json", help="write the figures there too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of one turn")
    parser.add_argument("--cpu-time", action="store_true", help="count seconds of the CPU")
    parser.add_argument("--only", help="comma-separated parts of names, e.g. 'compiled fp32,OLMo'")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    own_products = MATMUL.fp32_precision
    take_fast_products()
    console = Console(width=110)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    makers: dict[str, Callable[[], Turn]] = {}
    for precision in ("bf16", "fp32"):
        for kind in ("compiled", "eager"):
            how: Any = {"precision": precision, "compiled": kind == "compiled", "clock": clock}
            makers[f"toolkit, {kind} {precision}"] = partial(toolkit_turn, **how)
            makers[f"bare PyTorch, {kind} {precision}"] = partial(bare_turn, **how)
    if MATMUL.fp32_precision != own_products:
        makers["bare PyTorch, MKL, compiled fp32"] = lambda: with_products(
            own_products, lambda: bare_turn(precision="fp32", compiled=True, clock=clock)
        )
    for name, python, script in (
        ("OLMo-core, eager", arguments.olmo_python, "_olmo_core_worker.py"),
        ("litgpt, compiled", arguments.litgpt_python, "_litgpt_worker.py"),
    ):
        if not python:
            console.print(f"{name.split(',')[0]} is left out: its --...-python was not given")
            continue
        worker = Worker(python, script, arguments.threads, clock)
        for precision in ("bf16", "fp32"):
            makers[f"{name} {precision}"] = partial(worker.turn, precision)
    if arguments.only:
        parts = arguments.only.split(",")
        makers = {n: make for n, make in makers.items() if any(part in n for part in parts)}
    turns = {name: make() for name, make in makers.items()}
    for turn in turns.values():
        turn(2)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(arguments.rounds):
        for name, turn in turns.items():
            seconds[name] += turn(UNCOUNTED + arguments.steps)[UNCOUNTED:]
    report(console, seconds, arguments)


def report(
    console: Console, seconds: dict[str, list[float]], arguments: argparse.Namespace
) -> None:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rivals = {
        "OLMo-core, eager bf16": "x OLMo bf16",
        "litgpt, compiled bf16": "x litgpt bf16",
        "litgpt, compiled fp32": "x litgpt fp32",
    }
    shown = [name for name in rivals if name in medians]
    table = Table(
        title=f"{TOKENS:,} tokens a step, {arguments.threads} thread(s), "
        f"{arguments.rounds} rounds of {arguments.steps} steps, "
        f"{'CPU' if arguments.cpu_time else 'clock'} seconds"
    )
    table.add_column("")
    for column in (
        "ms (median)",
        "tok/s (median)",
        "tok/s (best)",
        *(rivals[name] for name in shown),
    ):
        table.add_column(column, justify="right")
    for name, times in seconds.items():
        table.add_row(
            name,
            f"{1e3 * medians[name]:.0f}",
            f"{TOKENS / medians[name]:,.0f}",
            f"{TOKENS / min(times):,.0f}",
            *(f"{medians[rival] / medians[name]:.2f}" for rival in shown),
        )
    console.print(table)
    figures: list[Figure] = [
        {"name": name, "value": TOKENS / median, "unit": "tok/s", "better": "higher"}
        for name, median in medians.items()
    ]
    write_json(arguments.json, figures)


def with_products(kind: str, make: Callable[[], Turn]) -> Turn:
    """Turns of what `make` makes, with another precision of oneDNN's products."""
    turn = make()

    def run(count: int) -> list[float]:
        before, MATMUL.fp32_precision = MATMUL.fp32_precision, kind
        try:
            return turn(count)
        finally:
            MATMUL.fp32_precision = before

    return run


def toolkit_turn(*, precision: str, compiled: bool, clock: Clock) -> Turn:
    config = msgspec.convert(
        {"precision": precision, "compile_model": compiled}, TransformerTrainModuleConfig
    )
    environment = single_environment(precision=config.precision, device="cpu")
    module = config.build(new_model("meta"), environment=environment)
    batches = new_batches()
    done = 0

    def step() -> None:
        nonlocal done
        module.train_batch({"input_ids": batches[done % len(batches)]})
        module.optim_step(Progress(done, done * TOKENS, 10_000, 10_000 * TOKENS, TOKENS))
        done += 1

    return timed(step, clock)


def bare_turn(*, precision: str, compiled: bool, clock: Clock) -> Turn:
    model = new_model("cpu")
    if compiled:
        compile_model(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batches = new_batches()
    done = 0

    def step() -> None:
        nonlocal done
        ids = batches[done % len(batches)]
        done += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if compiled:
                loss = model(ids, shift_labels(ids)).loss / (BATCH * (SEQUENCE - 1))
            else:
                logits = model(ids)[:, :-1].flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, clock)


class Worker:
    """The process of another program; it sleeps while it has no order."""

    def __init__(self, python: str, script: str, threads: int, clock: Clock) -> None:
        worker = Path(__file__).with_name(script)
        self._script = script
        self._process = subprocess.Popen(
            [python, str(worker), str(threads), clock.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        parameters = self._answer()["parameters"]
        assert parameters == new_model("meta").config.num_parameters, "the models differ in size"

    def turn(self, precision: str) -> Turn:
        def run(count: int) -> list[float]:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{precision} {count}\n")
            return self._answer()

        return run

    def _answer(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._script} ended; run it by hand to see why")
        return json.loads(line)


def new_model(device: str) -> Transformer:
    config = msgspec.convert(preset("bench_7M"), ModelConfig)
    return config.build(init_device=device)


def new_batches() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(0, VOCABULARY, (BATCH, SEQUENCE)) for _ in range(16)]


def timed(step: Callable[[], None], clock: Clock) -> Turn:
    def run(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            started = clock()
            step()
            seconds.append(clock() - started)
        return seconds

    return run


if __name__ == "__main__":
    main()
