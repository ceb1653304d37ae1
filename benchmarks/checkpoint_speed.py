"""Saving and loading 510 MB of model and optimizer: the toolkit, a plain file, other trainers.

    python benchmarks/checkpoint_speed.py --olmo-python olmo-venv/bin/python

The state is a Llama-like model of 42M parameters with AdamW's two moments, fp32, in one process on
the CPU. All take turns, each into a new folder that is removed afterwards; before each turn the
disk's backlog is written out, untimed. Files are read back while the system still has them in
memory, so loading does not measure the disk.

"durable": until everything is on the disk. Programs that do not sync their files are given the
fsync of each file afterwards that the toolkit does by itself. "check": the toolkit compares every
file with its hash before it loads any. "extra": growth of the resident memory at its peak, in a
turn of its own. In the background: real steps of 512 tokens of the same model, ten without a save
and the ten after a save has begun, in turns. "stall": how much longer training waits at a save, for
the plan and the copy, and before the optimizer of the next step for what a thread still copies.
"ten steps": all that, and what the thread that writes takes from the steps. `--profile` adds where
the time of a blocking save goes.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

# As the command line does; read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from _report import Figure, write_json
from rich.console import Console
from rich.table import Table

from toolkit.checkpoint.commit import Save, save_checkpoint, write_checkpoint
from toolkit.checkpoint.find import find_checkpoint
from toolkit.checkpoint.host_copy import HostCopy, changed_by_optimizer
from toolkit.checkpoint.load import load_checkpoint
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.checkpoint.shard_file import frame_of
from toolkit.distributed.environment import single_environment
from toolkit.distributed.tuning import keep_freed_memory
from toolkit.models.config import TransformerConfig
from toolkit.storage.atomic import fsync_tree
from toolkit.threads import Thread
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Progress, TrainModule

MODEL = TransformerConfig(
    vocab_size=16_384,
    d_model=512,
    num_layers=8,
    num_heads=8,
    intermediate_size=1408,
    max_sequence_length=256,
)
BYTES = 12 * MODEL.num_parameters
STEPS, ROWS = 10, 2
"""Steps beside a save, and instances of each."""

Tensors = dict[str, torch.Tensor]


class Contestant(NamedTuple):
    """One way to save and load; both return the seconds they took."""

    save: Callable[[Path], float]
    load: Callable[[Path], float]
    is_durable: bool
    """Whether `save` syncs."""
    check: Callable[[Path], float] = lambda folder: 0.0
    has_own_process: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--olmo-python", help="interpreter of an environment with ai2-olmo-core")
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", choices=("compare", "background"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    console = Console(width=130)
    module = toolkit_module()
    tensors = module.state_tensors()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.only != "background":
            contestants = {
                "plain file": plain_file(tensors),
                "toolkit": toolkit(tensors),
                "accelerate.save_state": accelerate_state(),
                "HF Trainer": hf_trainer(),
            }
            if arguments.olmo_python:
                contestants["OLMo-core"] = olmo_core(arguments.olmo_python, arguments.threads)
            else:
                console.print("OLMo-core is left out: no --olmo-python given (docs/benchmarks.md)")
            figures += compare(console, Path(folder), contestants, arguments.rounds)
            del contestants
        if arguments.only != "compare":
            figures += background(console, Path(folder), module, arguments.rounds)
        if arguments.profile:
            profile(console, Path(folder), tensors, arguments.rounds)
    write_json(arguments.json, figures)


def compare(
    console: Console, folder: Path, contestants: dict[str, Contestant], rounds: int
) -> list[Figure]:
    columns = ("save", "durable", "check", "load")
    seconds: dict[str, dict[str, list[float]]] = {
        name: {column: [] for column in columns} for name in contestants
    }
    for number in range(rounds + 1):  # the first is not counted
        for name, contestant in contestants.items():
            with place(folder) as where:
                saved = contestant.save(where)
                synced = saved if contestant.is_durable else saved + timed(fsync_tree, where)
                times = (saved, synced, contestant.check(where), contestant.load(where))
            for column, value in zip(columns, times, strict=True):
                seconds[name][column] += [value] if number else []
    table = Table(title=f"{BYTES / 1e6:.0f} MB, {rounds} rounds, medians in seconds")
    table.add_column("")
    for column in (*columns, "durable MB/s", "of plain", "load MB/s", "of plain"):
        table.add_column(column, justify="right")
    for column in ("extra MB saving", "extra MB loading"):
        table.add_column(column, justify="right")
    plain = {column: statistics.median(seconds["plain file"][column]) for column in columns}
    for name, contestant in contestants.items():
        medians = {column: statistics.median(seconds[name][column]) for column in columns}
        speeds = []
        for column in ("durable", "load"):
            speeds.append(f"{BYTES / 1e6 / medians[column]:,.0f}")
            speeds.append(f"{plain[column] / medians[column]:.0%}")
        table.add_row(
            name,
            *(f"{medians[column]:.3f}" for column in columns),
            *speeds,
            *(
                "" if extra is None else f"{extra / 1e6:,.0f}"
                for extra in peaks(contestant, folder)
            ),
        )
    console.print(table)
    ours = {column: statistics.median(times) for column, times in seconds["toolkit"].items()}
    return [
        figure("save, of a plain write", plain["durable"] / ours["durable"], "x", "higher"),
        figure("load, of a plain read", plain["load"] / ours["load"], "x", "higher"),
        figure("save", ours["durable"], "s", "lower"),
        figure("load", ours["load"], "s", "lower"),
        figure("check of all hashes", ours["check"], "s", "lower"),
    ]


def background(console: Console, folder: Path, module: TrainModule, rounds: int) -> list[Figure]:
    """A save while training goes on, beside blocking ones and steps without one."""
    steps = Steps(module)
    steps.run(2)
    shards = ShardWriter(None)
    times: dict[str, list[float]] = {name: [] for name in ("blocking", "alone", "beside", "write")}
    stalls: list[float] = []
    with place(folder) as where, peak_growth() as growth:
        BackgroundSave(module, ShardWriter(None), where).wait()
    for number in range(rounds + 1):  # the first is not counted, but for its stall
        with place(folder) as where:
            blocking = timed(save_blocking, where, module.state_tensors())
        alone = timed(steps.run, STEPS)
        with place(folder) as where:
            started = time.perf_counter()
            save = BackgroundSave(module, shards, where)
            stall = time.perf_counter() - started
            stall += steps.run(STEPS, save.copy)
            beside = time.perf_counter() - started
            written = save.wait() - started
        stalls.append(stall)
        for name, value in zip(times, (blocking, alone, beside, written), strict=True):
            times[name] += [value] if number else []
    usual = {name: statistics.median(values) for name, values in times.items()}
    pairs = zip(times["beside"], times["alone"], strict=True)
    slower = statistics.median(beside / alone for beside, alone in pairs) - 1.0
    stall = statistics.median(stalls[1:])
    table = Table(title=f"Saving in the background, {rounds} rounds, medians in seconds")
    for column in ("blocking save", "first stall", "stall", "until written", "ten steps", "beside"):
        table.add_column(column, justify="right")
    table.add_column("extra MB", justify="right")
    table.add_row(
        f"{usual['blocking']:.3f}",
        f"{stalls[0]:.3f}",
        f"{stall:.4f} ({stall / usual['blocking']:.1%} of a blocking save)",
        f"{usual['write']:.3f}",
        f"{usual['alone']:.3f}",
        f"{usual['beside']:.3f} ({slower:+.1%})",
        f"{growth() / 1e6:,.0f} ({growth() / BYTES:.2f} x the state)",
    )
    console.print(table)
    return [
        figure("stall of a background save", stall, "s", "lower"),
        figure("stall, of a blocking save", stall / usual["blocking"], "x", "lower"),
        figure("ten steps beside a save, of ten without", 1.0 + slower, "x", "lower"),
    ]


class Steps:
    """Training of `module`, step after step."""

    def __init__(self, module: TrainModule) -> None:
        self._module = module
        generator = torch.Generator().manual_seed(0)
        shape = (ROWS, MODEL.max_sequence_length)
        self._ids = torch.randint(MODEL.vocab_size, shape, generator=generator)
        self._done = 0

    def run(self, number: int, copy: HostCopy | None = None) -> float:
        """Seconds that the first optimizer step waits for `copy`."""
        waited, tokens = 0.0, self._ids.numel()
        for _ in range(number):
            self._module.train_batch({"input_ids": self._ids})
            if copy is not None:
                waited, copy = timed(copy.hold_back), None
            done = self._done
            progress = Progress(done, done * tokens, 10_000, 10_000 * tokens, tokens)
            self._module.optim_step(progress)
            self._done += 1
        return waited


class BackgroundSave:
    """What `Checkpointer` does."""

    def __init__(self, module: TrainModule, shards: ShardWriter, folder: Path) -> None:
        tensors = module.state_tensors()
        self._folder, self._shards = folder, shards
        self._ended = 0.0
        self.copy = shards.copy(tensors, late=changed_by_optimizer(tensors))
        self._thread = Thread(target=self._write)
        self._thread.start()

    def wait(self) -> float:
        """When it was written."""
        self._thread.join()
        return self._ended

    def _write(self) -> None:
        self.copy.finish()
        write_checkpoint(order(self._folder), self._shards, self.copy, rank=0, group=None)
        self._ended = time.perf_counter()


def figure(name: str, value: float, unit: str, better: Literal["lower", "higher"]) -> Figure:
    return {"name": f"checkpoint: {name}", "value": value, "unit": unit, "better": better}


def profile(console: Console, folder: Path, tensors: Tensors, rounds: int) -> None:
    """The parts of a blocking save, each by itself on the same tensors."""
    import xxhash

    def serialise() -> None:
        for tensor in tensors.values():
            torch.save(tensor, Nowhere())

    def frames() -> None:
        frame_of.cache_clear()
        for tensor in tensors.values():
            frame_of(tensor.dtype, tensor.shape)

    def hash_all() -> None:
        digest = xxhash.xxh3_64()
        for tensor in tensors.values():
            digest.update(view_of(tensor))

    def write_only() -> None:
        with open(folder / "profile", "wb", buffering=0) as file:
            write_all(file, tensors)

    def sync() -> None:
        with open(folder / "profile", "rb") as file:
            os.fsync(file.fileno())

    parts: dict[str, Callable[[], None]] = {
        "torch.save into nothing": serialise,
        "what it writes around the numbers (as it is done)": frames,
        "xxh3 of all bytes": hash_all,
        "write to the page cache": write_only,
        "fsync after it": sync,
        "the whole save": lambda: save_blocking(folder / "whole", tensors),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        os.sync()
        for name, part in parts.items():
            seconds[name].append(timed(part))
        (folder / "profile").unlink()
        shutil.rmtree(folder / "whole")
    table = Table(title="Parts of a blocking save, each alone")
    table.add_column("")
    table.add_column("seconds (median)", justify="right")
    for name, times in seconds.items():
        table.add_row(name, f"{statistics.median(times):.3f}")
    console.print(table)


def toolkit_module() -> TrainModule:
    return TransformerTrainModuleConfig(precision="fp32").build(
        MODEL.build(init_device="meta"), environment=single_environment(device="cpu")
    )


def plain_file(tensors: Tensors) -> Contestant:
    """The same bytes in one file: what no format can beat."""
    buffers = {name: torch.empty_like(tensor).zero_() for name, tensor in tensors.items()}

    def save(folder: Path) -> None:
        with open(folder / "all", "wb", buffering=0) as file:
            write_all(file, tensors)
            os.fsync(file.fileno())

    def load(folder: Path) -> None:
        with open(folder / "all", "rb", buffering=0) as file:
            for buffer in buffers.values():
                view, done = view_of(buffer), 0
                while done < len(view):
                    done += file.readinto(view[done:]) or 0

    return Contestant(lambda f: timed(save, f), lambda f: timed(load, f), is_durable=True)


def toolkit(tensors: Tensors) -> Contestant:
    def load(folder: Path) -> None:
        load_checkpoint(folder / "step1", tensors=tensors, rank=0, group=None)

    return Contestant(
        lambda f: timed(save_blocking, f, tensors),
        lambda f: timed(load, f),
        is_durable=True,
        check=lambda f: timed(find_checkpoint, f),
    )


def save_blocking(folder: Path, tensors: Tensors) -> None:
    save_checkpoint(
        folder, step=1, tokens=0, tensors=tensors, rank_state={}, engine="single",
        rank=0, group=None,
    )  # fmt: skip


def order(folder: Path) -> Save:
    return Save(root=folder, step=1, tokens=0, engine="single", rank_state=lambda: {})


def accelerate_state() -> Contestant:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = MODEL.build(init_device="cpu")
    accelerator.prepare(model, optimizer_of(model))

    def save(folder: Path) -> None:
        accelerator.save_state(str(folder / "state"))

    def load(folder: Path) -> None:
        accelerator.load_state(str(folder / "state"))

    return Contestant(lambda f: timed(save, f), lambda f: timed(load, f), is_durable=False)


def hf_trainer() -> Contestant:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.d_model,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        intermediate_size=MODEL.intermediate_size,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    arguments = TrainingArguments(output_dir=tempfile.gettempdir(), report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, optimizers=(optimizer, scheduler))
    trainer.state.global_step = 1

    def save(folder: Path) -> None:
        arguments.output_dir = str(folder)
        trainer._save_checkpoint(trainer.model, trial=None)

    def load(folder: Path) -> None:
        checkpoint = str(folder / "checkpoint-1")
        trainer._load_from_checkpoint(checkpoint)
        trainer._load_optimizer_and_scheduler(checkpoint)

    return Contestant(lambda f: timed(save, f), lambda f: timed(load, f), is_durable=False)


def olmo_core(python: str, threads: int) -> Contestant:
    worker = Path(__file__).with_name("_olmo_core_checkpoint_worker.py")
    process = subprocess.Popen(
        [python, str(worker), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )

    def answer() -> float:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the OLMo-core worker ended; run it by hand to see why")
        return json.loads(line)

    def ask(what: str, folder: Path) -> float:
        assert process.stdin is not None
        process.stdin.write(f"{what} {folder / 'state'}\n")
        return answer()

    assert answer() == MODEL.num_parameters, "the models differ in size"
    return Contestant(
        lambda f: ask("save", f), lambda f: ask("load", f), is_durable=False, has_own_process=True
    )


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW after one step, so that its moments exist."""
    assert sum(p.numel() for p in model.parameters()) == MODEL.num_parameters, "sizes differ"
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def peaks(contestant: Contestant, folder: Path) -> tuple[float | None, float | None]:
    """Extra bytes at most resident while saving and while loading."""
    if contestant.has_own_process:
        return None, None
    with place(folder) as where:
        with peak_growth() as saving:
            contestant.save(where)
        with peak_growth() as loading:
            contestant.load(where)
    return saving(), loading()


@contextlib.contextmanager
def peak_growth() -> Iterator[Callable[[], float]]:
    """Bytes by which resident memory grew at most inside the block; asked for after it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free already must not be used unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
    before, after = resident("VmRSS"), 0.0
    yield lambda: after
    after = max(0.0, resident("VmHWM") - before)


def resident(field: str) -> float:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024.0


@contextlib.contextmanager
def place(folder: Path) -> Iterator[Path]:
    """A new folder on a disk that has nothing left to do."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=folder) as where:
        yield Path(where)


def timed(action: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started


def write_all(file: io.RawIOBase, tensors: Tensors) -> None:
    for tensor in tensors.values():
        view, done = view_of(tensor), 0
        while done < len(view):
            done += file.write(view[done:]) or 0


def view_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).numpy()).cast("B")  # type: ignore[arg-type]


class Nowhere(io.RawIOBase):
    """A file that forgets."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


if __name__ == "__main__":
    main()
