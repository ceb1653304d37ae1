"""What a training loop costs beside the model: the Trainer against bare loops, in turns.

    python benchmarks/loop_overhead.py

A model of 27k parameters and 128 tokens a step, so that the loop shows; one thread on one core, so
that background threads (metrics, reading ahead, system monitor) are paid for in the same currency.
All variants train the same model class on the same tokens with fused AdamW and clipping at 1.0:

- bare: forward, backward, clip_grad_norm_, step, zero_grad; batches lie ready in a list. No
  schedule, no metrics, no skipping of non-finite steps.
- toolkit: `Trainer` with every default callback, JSONL and TensorBoard, from a memmapped corpus.
- Accelerate: the bare loop with a prepared model, optimizer and DataLoader.
- HF Trainer: `transformers.Trainer`, logging every 5 steps, no progress bar and no TensorBoard.

With `--tracker wandb` (in offline mode; or trackio, mlflow), toolkit also runs with that tracker.
Its process shares the core, but not the CPU time that is shown. Its start takes seconds of CPU, so
a turn should have some thousand steps.

A turn is a whole run of each; its first steps and what comes after the last are not counted. Time
per step is a turn's time divided by its steps, so that work done every n steps counts too.
"""

import argparse
import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from _report import Figure, write_json
from _synthetic import write_corpus
from rich.console import Console
from rich.table import Table

from toolkit.data.config import DataConfig, DataLoaderConfig, DatasetConfig
from toolkit.data.loader import TrainLoader, get_dataloaders
from toolkit.distributed.environment import single_environment
from toolkit.models.config import TransformerConfig
from toolkit.models.loss import shift_labels
from toolkit.models.transformer import Transformer
from toolkit.runs.registry import start_run
from toolkit.train.callbacks.config import CallbacksConfig
from toolkit.train.config import Duration, TrainerConfig, TransformerTrainModuleConfig
from toolkit.train.trainer import Trainer

ROWS, SEQUENCE = 4, 32
NUM_TARGETS = ROWS * (SEQUENCE - 1)
UNCOUNTED = 100
MODEL = TransformerConfig(
    vocab_size=256,
    vocab_multiple=64,
    d_model=32,
    num_layers=1,
    num_heads=2,
    intermediate_size=64,
    max_sequence_length=SEQUENCE,
)
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}


class Cost(NamedTuple):
    """Milliseconds per step of one turn."""

    wall: float
    cpu: float


class Clock:
    """Told when a batch is asked for, it gives the cost of the steps after the first ones."""

    def __init__(self) -> None:
        self._ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        self._ticks.append((time.perf_counter(), time.process_time()))

    def around(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            self.tick()
            yield batch

    def cost(self) -> Cost:
        counted = self._ticks[UNCOUNTED:]
        steps = len(counted) - 1
        wall, cpu = (1e3 * (counted[-1][i] - counted[0][i]) / steps for i in (0, 1))
        return Cost(wall, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=500, help="steps of one turn")
    parser.add_argument("--core", type=int, help="core to stay on; default: the last one")
    parser.add_argument("--tracker", help="a tracker, which toolkit is also run with")
    parser.add_argument("--only", help="comma-separated names of variants")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        core = max(os.sched_getaffinity(0)) if arguments.core is None else arguments.core
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    variants: dict[str, Callable[[Path, int], Cost]] = {
        "bare": bare,
        "toolkit": trainer,
        "Accelerate": accelerate,
        "HF Trainer": hf_trainer,
    }
    if (tracker := arguments.tracker) is not None:
        variants[f"with {tracker}"] = functools.partial(trainer, tracker=tracker)
    if arguments.only:
        variants = {name: variants[name] for name in arguments.only.split(",")}
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus" / "default", 2_000_000, is_sparse=False)
        for _ in range(arguments.rounds):
            for name, variant in variants.items():
                costs[name].append(variant(Path(folder), arguments.steps))
    over = {name: over_bare(turns, costs["bare"]) for name, turns in costs.items()}
    report(costs, over, arguments)
    figures: list[Figure] = [
        {"name": f"{name}, CPU over bare", "value": cost.cpu, "unit": "ms", "better": "lower"}
        for name, cost in over.items()
        if name != "bare"
    ]
    if {"toolkit", "Accelerate"} <= over.keys():
        ratio = over["toolkit"].cpu / over["Accelerate"].cpu
        print(f"toolkit's CPU time over bare is {ratio:.2f} of Accelerate's")
        figures.append(
            {"name": "toolkit of Accelerate", "value": ratio, "unit": "x", "better": "lower"}
        )
    write_json(arguments.json, figures)


def over_bare(turns: list[Cost], bare_turns: list[Cost]) -> Cost:
    """Median of the differences within a round: both sides met the same load."""
    rounds = list(zip(turns, bare_turns, strict=True))
    wall, cpu = (statistics.median(mine[i] - its[i] for mine, its in rounds) for i in (0, 1))
    return Cost(wall, cpu)


def report(
    costs: dict[str, list[Cost]], over: dict[str, Cost], arguments: argparse.Namespace
) -> None:
    table = Table(
        title=f"{MODEL.num_parameters:,} parameters, {ROWS * SEQUENCE} tokens a step, 1 thread, "
        f"{arguments.rounds} turns of {arguments.steps} steps; ms per step"
    )
    table.add_column("")
    for column in ("wall (median)", "wall (best)", "CPU (median)", "over bare: wall", "CPU"):
        table.add_column(column, justify="right")
    for name, turns in costs.items():
        table.add_row(
            name,
            f"{statistics.median(turn.wall for turn in turns):.3f}",
            f"{min(turn.wall for turn in turns):.3f}",
            f"{statistics.median(turn.cpu for turn in turns):.3f}",
            *(f"{difference:+.3f}" for difference in over[name]),
        )
    Console(width=110).print(table)


def bare(folder: Path, steps: int) -> Cost:
    model, clock = Transformer(MODEL), Clock()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for batch in clock.around(ready_batches(folder, steps)):
        ids = batch["input_ids"]
        loss = model(ids, shift_labels(ids)).loss / NUM_TARGETS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return clock.cost()


def trainer(folder: Path, steps: int, tracker: str | None = None) -> Cost:
    clock = Clock()
    loader = open_loader(folder)
    iterate = loader.iterate
    loader.iterate = lambda start=0: clocked(iterate(start), clock)  # type: ignore[method-assign]
    environment = single_environment(precision="fp32", device="cpu")
    module = TransformerTrainModuleConfig(precision="fp32").build(
        MODEL.build(init_device="meta"), environment=environment
    )
    run = start_run("loop_overhead", root=folder / "runs")
    callbacks: dict[str, Any] = {}
    if tracker is not None:
        callbacks = {
            tracker: {"enabled": True} | ({"mode": "offline"} if tracker == "wandb" else {})
        }
    config = TrainerConfig(
        max_duration=Duration(value=steps), callbacks=msgspec.convert(callbacks, CallbacksConfig)
    )
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        Trainer(config, module, loader, run=run).fit()
    return clock.cost()


def clocked(batches: Any, clock: Clock) -> Iterator[Any]:
    with contextlib.closing(batches):
        yield from clock.around(batches)


def accelerate(folder: Path, steps: int) -> Cost:
    from accelerate import Accelerator

    accelerator, clock = Accelerator(cpu=True), Clock()
    model = Transformer(MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    loader = torch.utils.data.DataLoader(ready_batches(folder, steps), batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in clock.around(loader):
        ids = batch["input_ids"]
        loss = model(ids, shift_labels(ids)).loss / NUM_TARGETS
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return clock.cost()


class ForHFTrainer(torch.nn.Module):
    """The model in the form that `transformers.Trainer` calls."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(MODEL)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.model(input_ids, shift_labels(input_ids)).loss / NUM_TARGETS}


def hf_trainer(folder: Path, steps: int) -> Cost:
    import transformers

    clock = Clock()

    class Ticks(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "hf"),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=ADAMW["lr"],
        weight_decay=ADAMW["weight_decay"],
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [
        {"input_ids": row} for batch in ready_batches(folder, steps) for row in batch["input_ids"]
    ]
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        transformers.Trainer(
            ForHFTrainer(), arguments, train_dataset=rows, callbacks=[Ticks()]
        ).train()
    return clock.cost()


def open_loader(folder: Path) -> TrainLoader:
    config = DataConfig(
        dataset=DatasetConfig(root=str(folder), sequence_length=SEQUENCE),
        data_loader=DataLoaderConfig(global_batch_size=ROWS * SEQUENCE),
    )
    return get_dataloaders(config)[0]


def ready_batches(folder: Path, steps: int) -> list[dict[str, torch.Tensor]]:
    loader = open_loader(folder)
    return [loader.global_batch(number) for number in range(steps)]


if __name__ == "__main__":
    main()
