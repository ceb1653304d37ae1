"""What only a GPU can tell, in one command of five minutes: `python -m tests.gpu_check`.

Run it from the repository's root on a machine with one GPU (of several, the first is used). Each
part runs by itself, the speeds first; a table says at the end what held, `--json FILE` keeps it,
and the exit code is 1 if something did not hold. No part begins after `--minutes`, and one that
does not end soon after is given up. `--device cpu` runs what a CPU can run, on tiny sizes: that is
how the suite keeps this file alive.
"""

import argparse
import contextlib
import gc
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts

import msgspec
import torch
import torch.distributed as dist

from tests.gpu_machine import CheckFailed, Machine, NotHere, check_close, no_waiting, step
from tests.gpu_report import FIGURES, GRACE, Line, Report
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.distributed import torch_engine
from toolkit.metrics.flops import device_peak_flops
from toolkit.models import grouped, masks
from toolkit.models import loss as loss_module
from toolkit.models.attention import attend
from toolkit.models.config import ModelConfig
from toolkit.models.presets import PRESETS
from toolkit.train.module import Progress

SPEED_STEPS = 5
GOALS = {"gpt2_124M": (500_000, 0.45), "olmo2_1B": (None, 0.52)}
"""Tokens/s and MFU to reach on one H200."""
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def no_sync(
    machine: Machine, *, compiled: bool, documents: bool = False, experts: bool = False
) -> str:
    if compiled and not machine.is_gpu:
        raise NotHere("compiles for GPUs only")
    if experts and machine.is_gpu and grouped_on(machine) == "loop":
        raise NotHere("experts by a loop, which waits once a layer on this GPU")
    config = machine.moe() if experts else machine.model()
    module, batch = (
        machine.module(config, compile_model=compiled),
        machine.batch(documents=documents),
    )
    # Liger waits for the number of targets; a compiled loss is ours.
    with mock.patch.object(loss_module, "liger_function", return_value=None):
        for number in range(3):
            step(module, batch, number)
        machine.synchronize()
        with no_waiting(machine):
            loss, _ = step(module, batch, 3)
    return f"loss {float(loss):.4f}"


def grouped_on(machine: Machine) -> str:
    x = torch.empty(8, 32, device=machine.device, dtype=machine.dtype)
    return grouped.grouped_backend(x, torch.empty(1, 32, 32, device=machine.device))


def ddp(machine: Machine) -> str:
    """DDP as accelerate makes it, `device_ids` given, against the same steps without it."""
    device_ids = [machine.device.index or 0] if machine.is_gpu else None

    class Accelerator:
        def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
            from torch.nn.parallel import DistributedDataParallel

            wrapped = DistributedDataParallel(
                model, device_ids=device_ids, gradient_as_bucket_view=True
            )
            return wrapped, optimizer

    backend = "cpu:gloo,cuda:nccl" if machine.is_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    module = None
    try:
        batch, losses = machine.batch(), []
        for engine in ("single", "ddp"):
            with mock.patch.object(torch_engine, "build_accelerator", return_value=Accelerator()):
                if engine == "ddp":
                    module = machine.module(machine.model())
                else:
                    with mock.patch.object(Accelerator, "prepare", lambda self, m, o: (m, o)):
                        module = machine.module(machine.model())
            losses.append([float(step(module, batch, number)[0]) for number in range(3)])
        return check_close("loss", losses[1][-1], losses[0][-1], 1e-3)
    finally:
        if module is not None:
            module.environment.close()
        elif dist.is_initialized():
            dist.destroy_process_group()


def experts(machine: Machine) -> str:
    """The device's grouped product against the loop, with groups that have no rows."""
    kind = {"device": machine.device, "dtype": machine.dtype}
    torch.manual_seed(0)
    x = torch.randn(100, 64, **kind, requires_grad=True)  # type: ignore[call-overload]
    weight = torch.randn(8, 32, 64, **kind, requires_grad=True)  # type: ignore[call-overload]
    ends = torch.tensor([3, 3, 20, 21, 21, 60, 99, 100], device=machine.device, dtype=torch.int32)
    chosen, results = grouped_on(machine), []
    for backend in (chosen, "loop"):
        size = (64 << 20) if machine.is_gpu else 1 << 16
        dirty = torch.full((size,), float("nan"), device=machine.device)
        del dirty  # what memory that was freed may hold
        with mock.patch.object(grouped, "grouped_backend", return_value=backend):
            out = grouped.grouped_linear(x, weight, ends)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (x, weight))))
    for got, expected in zip(*results, strict=True):
        worst = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
        check_close("largest difference", 1.0 + float(worst.detach()), 1.0, 2e-2)
    if results[0][2][[1, 4]].abs().sum() != 0:
        raise CheckFailed("the gradient of a group without rows is not zero")
    return f"{chosen} equals the loop, empty groups have zero gradients"


def flex(machine: Machine, **changes: Any) -> str:
    """The device's kernel for masks against SDPA: loss and gradients of packed documents."""
    config, batch = machine.model(**changes), machine.batch(documents=True)
    chosen = masks.attention_backend(machine.device, machine.dtype, config.attention_head_dim)
    results = []
    for backend in (chosen if machine.is_gpu else "flex", "sdpa"):
        with mock.patch.object(masks, "attention_backend", return_value=backend):
            module = machine.module(config)
            if machine.is_gpu:
                results.append([float(value) for value in step(module, batch)])
            else:  # flex attention has no backward there, and is slow to compile
                with torch.compiler.set_stance("force_eager"):
                    results.append([float(module.eval_batch(batch).loss)])
    if machine.is_gpu and chosen == "sdpa":
        return f"sdpa on this GPU, loss {results[0][0]:.5g}"
    said = [check_close("loss", results[0][0], results[1][0], 1e-2)]
    if machine.is_gpu:
        said.append(check_close("grad_norm", results[0][1], results[1][1], 3e-2))
    return ", ".join(said)


def fp32_grouped(machine: Machine) -> str:
    """Grouped queries in fp32: no scores of all pairs in memory, and the right numbers."""
    seq = 4096 if machine.is_gpu else 64
    torch.manual_seed(0)
    shapes = ((1, 16, seq, 64), (1, 4, seq, 64), (1, 4, seq, 64))
    parts = [torch.randn(s, device=machine.device, requires_grad=True) for s in shapes]
    if machine.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if machine.is_gpu else 0
    out = attend(*parts, None)
    grads = torch.autograd.grad(out.square().sum(), parts)
    used = torch.cuda.max_memory_allocated() - before if machine.is_gpu else 0
    if used > 16 * seq * seq * 4:
        raise CheckFailed(f"{used / 1e9:.1f} GB used: all scores were kept")
    wide = [part.detach().double()[:, :, :256].requires_grad_() for part in parts]
    short = torch.autograd.grad(attend(*wide, None).square().sum(), wide)
    own = [part.detach()[:, :, :256].clone().requires_grad_() for part in parts]
    got = torch.autograd.grad(attend(*own, None).square().sum(), own)
    for a, b in zip(got, short, strict=True):
        check_close("gradient", float(a.double().norm()), float(b.norm()), 1e-3)
    if not all(bool(grad.isfinite().all()) for grad in grads):
        raise CheckFailed("gradients are not finite")
    return f"{used / 1e6:.0f} MB, all scores would be {16 * seq * seq * 4 / 1e6:.0f} MB"


def deterministic(machine: Machine) -> str:
    """`trainer.deterministic`: two runs give the same bits."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        runs = []
        for _ in range(2):
            module, batch = machine.module(machine.moe()), machine.batch(documents=True)
            runs.append([[float(v) for v in step(module, batch, n)] for n in range(3)])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.backends.cuda.enable_cudnn_sdp(True)
    if runs[0] != runs[1]:
        raise CheckFailed(f"{runs[0][-1]} and {runs[1][-1]}")
    return f"loss {runs[0][-1][0]:.5g} twice"


def save(machine: Machine) -> str:
    """A checkpoint written by a thread while training goes on."""
    big = {"d_model": 1024, "intermediate_size": 4096} if machine.is_gpu else {}
    module, batch = machine.module(machine.model(**big)), machine.batch()
    step(module, batch)
    alone = min(machine.seconds(lambda: step(module, batch)) for _ in range(3))
    pieces, tensors = ShardWriter(None), module.state_tensors()
    pieces.copy(tensors)  # the first makes room in host memory
    expected = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    copied: list[Any] = []
    stall = machine.seconds(lambda: copied.append(pieces.copy(tensors)))
    with tempfile.TemporaryDirectory() as folder:
        written: list[Any] = []
        start = time.perf_counter()
        ended: list[float] = []

        def write() -> None:
            written.append(pieces.write(Path(folder), copied[0]))
            ended.append(time.perf_counter())

        thread = threading.Thread(target=write)
        thread.start()
        beside = [machine.seconds(lambda: step(module, batch))]
        while thread.is_alive():
            beside.append(machine.seconds(lambda: step(module, batch)))
        thread.join()
        if not written:
            raise CheckFailed("the thread that writes failed")
        pieces.write_metadata(Path(folder), [written[0].results])
        for name, tensor in iterate_tensors(Path(folder), ""):
            if not torch.equal(tensor, expected[name]):
                raise CheckFailed(f"{name} is not as it was when the copy was made")
    rate = pieces.nbytes / 1e6 / (ended[0] - start)
    mean = sum(beside) / len(beside)
    return (
        f"{pieces.nbytes / 1e6:.0f} MB at {rate:.0f} MB/s; training stood still for "
        f"{stall * 1e3:.0f} ms, steps took {mean * 1e3:.0f} ms beside it, {alone * 1e3:.0f} alone"
    )


def speed(machine: Machine, preset: str, length: int, most_rows: int) -> str:
    """Tokens per second and MFU of compiled steps, with as many rows as fit."""
    config = msgspec.convert(PRESETS[preset], ModelConfig) if machine.is_gpu else machine.model()
    rows = most_rows
    while True:
        try:
            return _speed(machine, preset, config, length if machine.is_gpu else 64, rows)
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise NotHere("needs more memory than this GPU has") from None
            rows //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _speed(machine: Machine, preset: str, config: Any, length: int, rows: int) -> str:
    module = machine.module(config, tokens=rows * length, compile_model=machine.is_gpu)
    batch = machine.batch(rows=rows, length=length)
    tokens = batch["input_ids"].numel()

    def steps() -> None:
        for number in range(SPEED_STEPS):
            module.train_batch(batch)
            module.optim_step(Progress(number, number, 100, 100, 1))

    steps()  # compiles
    if machine.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    rate = SPEED_STEPS * tokens / machine.seconds(steps)
    said = f"{rate:,.0f} tokens/s, {1e3 * tokens / rate:.1f} ms a step of {tokens:,} tokens"
    FIGURES[f"{preset} tokens/s"] = rate
    if machine.is_gpu:
        peak = device_peak_flops(torch.cuda.get_device_name(machine.device))
        mfu = rate * module.flops_per_token(length) / peak if peak else 0.0
        FIGURES[f"{preset} MFU"] = mfu
        least_rate, least_mfu = GOALS[preset]
        goal = f"MFU {least_mfu:.0%}" + (f", {least_rate:,} tokens/s" if least_rate else "")
        holds = mfu >= least_mfu and rate >= (least_rate or 0)
        said += f", MFU {f'{mfu:.1%}' if peak else 'unknown'} (goal {goal} on an H200: "
        said += f"{'reached' if holds else 'not reached'})"
        said += f", {torch.cuda.max_memory_allocated() / 1e9:.0f} GB"
        said += f"; {'; '.join(f'{part} by {k}' for part, k in module.kernels.items())}"
    return said


PARTS: dict[str, Callable[[Machine], str]] = {
    "speed: gpt2_124M": lambda m: speed(m, "gpt2_124M", 1024, 64),
    "speed: olmo2_1B": lambda m: speed(m, "olmo2_1B", 4096, 4),
    "no sync: dense, eager": lambda m: no_sync(m, compiled=False),
    "no sync: dense, compiled": lambda m: no_sync(m, compiled=True),
    "no sync: documents, eager": lambda m: no_sync(m, compiled=False, documents=True),
    "no sync: documents, compiled": lambda m: no_sync(m, compiled=True, documents=True),
    "no sync: experts, compiled": lambda m: no_sync(m, compiled=True, experts=True),
    "DDP with device_ids": ddp,
    "experts against the loop": experts,
    "flex against SDPA: heads of 64": lambda m: flex(m, head_dim=64),
    "flex against SDPA: windows, 128": lambda m: flex(
        m, head_dim=128, sliding_window=100, attention_pattern=("sliding", "full")
    ),
    "flex against SDPA: soft cap, 256": lambda m: flex(m, head_dim=256, attention_soft_cap=30.0),
    "flex against SDPA: sinks, gates": lambda m: flex(
        m, head_dim=64, attention_sinks=True, attention_gate="elementwise"
    ),
    "fp32 with grouped queries": fp32_grouped,
    "deterministic twice": deterministic,
    "save beside training": save,
}


def run_part(name: str, machine: Machine) -> Line:
    start = time.perf_counter()
    try:
        state, detail = "ok", PARTS[name](machine)
    except NotHere as reason:
        state, detail = "-", str(reason)
    except CheckFailed as reason:
        state, detail = "FAIL", str(reason)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = (str(error).strip().splitlines() or [""])[0]
        state = "FAIL"
        detail = f"{type(error).__name__}: {message} ({Path(last.filename).name}:{last.lineno})"
    gc.collect()
    if machine.is_gpu:
        with contextlib.suppress(RuntimeError):  # after a fault on the device everything raises
            torch.cuda.empty_cache()
    return Line(state, name, time.perf_counter() - start, detail)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print the table; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", metavar="TEXT", nargs="+", help="parts whose name contains one")
    parser.add_argument("--minutes", type=float, default=4.5, help="no part begins after (4.5)")
    parser.add_argument("--json", metavar="FILE", help="keep the table here too")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu runs what a CPU can")
    wanted = options.only or [""]
    names = [name for name in PARTS if any(text in name for text in wanted)]
    for text in wanted:
        if not any(text in name for name in PARTS):
            parser.error(f"no part contains {text!r}: {'; '.join(PARTS)}")
    machine = Machine(torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu"))
    if machine.is_gpu:
        torch.cuda.set_device(machine.device)
    report, end = Report(machine, options.json), time.monotonic() + 60 * options.minutes
    guard = threading.Timer(60 * options.minutes + GRACE, report.give_up)
    guard.daemon = True
    guard.start()
    with mock.patch.dict(os.environ):
        for name in LAUNCHER:  # accelerate would join a group of theirs
            os.environ.pop(name, None)
        for name in names:
            if time.monotonic() > end:
                report.lines.append(Line("-", name, 0.0, "no time was left"))
                continue
            print(f"{name} ...", flush=True)
            report.running = name
            report.lines.append(run_part(name, machine))
    guard.cancel()
    return report.end()


if __name__ == "__main__":
    raise SystemExit(main())
