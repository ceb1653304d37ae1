"""What does exporting a checkpoint cost, in time and in memory?

    python benchmarks/export_hf.py

A model of 135M parameters (SmolLM's shape) with the state of its optimizer is exported, without the
comparison, in a process of its own. Time is that of a second export (the first one also loads
parts of torch, 0.7 s) against copying the exported bytes with fsync; from fp32 to bf16 twice as
many are read. Memory is the peak of the whole process, libraries included, against 1.3 x the
largest file of weights + 300 MB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.hf.export import export_source
from toolkit.hf.source import find_source
from toolkit.models.config import TransformerConfig

SMOLLM = TransformerConfig(
    vocab_size=49_152,
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    tie_embeddings=True,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIECE = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    table = Table(title=f"exporting 135M parameters, median of {arguments.rounds}")
    for column in ("from", "to", "files", "seconds", "of copying", "peak (MB)", "allowed (MB)"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as root:
        for kept, asked, size in (
            ("fp32", "fp32", "5GB"),
            ("fp32", "bf16", "5GB"),
            ("bf16", "bf16", "5GB"),
            ("fp32", "fp32", "100MB"),
        ):
            step = make_checkpoint(Path(root) / kept, DTYPES[kept])
            found = [run(str(step), asked, size) for _ in range(arguments.rounds)]
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            table.add_row(
                kept,
                asked,
                f"{middle['files']:.0f}",
                f"{middle['seconds']:.2f}",
                f"{middle['copying'] / middle['seconds']:.0%}",
                f"{middle['peak'] / 1e6:.0f}",
                f"{(1.3 * middle['largest'] + 300e6) / 1e6:.0f}",
            )
    Console().print(table)


def make_checkpoint(root: Path, dtype: torch.dtype) -> Path:
    step = root / "step1"
    if step.exists():
        return step
    tensors = SMOLLM.build().state_dict()
    slots = {f"optim.{k}.{slot}": v for k, v in tensors.items() for slot in ("exp_avg", "sq")}
    return save_checkpoint(
        root,
        step=1,
        tokens=1,
        tensors={f"model.{k}": v.to(dtype) for k, v in tensors.items()} | slots,
        rank_state={},
        engine="single",
        rank=0,
        group=None,
        extra={"model": msgspec.to_builtins(SMOLLM)},
    )


def run(step: str, dtype: str, size: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", step, dtype, size]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def measure(step: str, dtype: str, size: str) -> None:
    """Export in this process, then copy what was written."""
    from toolkit.commands.convert import parse_size

    with tempfile.TemporaryDirectory(dir=Path(step).parent) as root:
        for out in (Path(root) / "first", Path(root) / "second"):
            begin = time.perf_counter()
            export_source(
                find_source(step),
                out,
                dtype=DTYPES[dtype],
                max_shard_bytes=parse_size(size, "size"),
                check=False,
            )
            seconds = time.perf_counter() - begin
        peak = peak_bytes()
        files = sorted(out.glob("*.safetensors"))
        begin = time.perf_counter()
        for file in files:
            copy(file, Path(root) / file.name)
        copying = time.perf_counter() - begin
        largest = max(file.stat().st_size for file in files)
    result = {
        "seconds": seconds,
        "copying": copying,
        "peak": peak,
        "largest": largest,
        "files": len(files),
    }
    print(json.dumps(result))


def peak_bytes() -> int:
    """Largest memory of this process; `ru_maxrss` would count that of its parent too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def copy(source: Path, target: Path) -> None:
    """Through user space, synced, as the export does it."""
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        buffer = memoryview(bytearray(PIECE))
        while count := reading.readinto(buffer):
            writing.write(buffer[:count])
        os.fsync(writing.fileno())


if __name__ == "__main__":
    main()
