"""What does `toolkit convert-hf` cost, in time and in memory?

    python benchmarks/convert_hf.py

A random model of 135M parameters (SmolLM's shape) is converted without the comparison: by the
command, as a whole process, and by the function behind it once all is imported. Time stands against
`cp` of the same weights with fsync, taken in turn; memory is the peak of the whole process,
libraries included, against 1.3 x the largest file of weights + 300 MB.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHAPE: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
DTYPES = ("float32", "bfloat16")
COLUMNS = (
    "weights", "copy (s)", "conversion (s)", "of copying", "command (s)", "peak (MB)",
    "allowed (MB)",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--make", nargs=1, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(Path(arguments.make[0]))
    elif arguments.measure:
        measure(*map(Path, arguments.measure))
    else:
        compare(arguments.rounds)


def compare(rounds: int) -> None:
    table = Table(title=f"converting 135M parameters, median of {rounds}")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    # On the disk at hand: a temporary folder may be memory.
    with tempfile.TemporaryDirectory(dir=".") as root:
        subprocess.run([sys.executable, __file__, "--make", root], check=True)
        for source in sorted(Path(root).iterdir()):
            out = Path(root) / "out"
            files = sorted(source.glob("*.safetensors"))
            copying, converting, commands, peaks = [], [], [], []
            for turn in range(rounds + 1):
                seconds = (
                    copy(files, out),
                    run([__file__, "--measure", str(source), str(out)], out)[2],
                )
                wall, peak, _ = run(
                    ["-m", "toolkit", "convert-hf", str(source), str(out), "--no-validate"], out
                )
                if turn:
                    copying.append(seconds[0])
                    converting.append(seconds[1])
                    commands.append(wall)
                    peaks.append(peak)
            largest = max(file.stat().st_size for file in files)
            table.add_row(
                source.name,
                f"{statistics.median(copying):.2f}",
                f"{statistics.median(converting):.2f}",
                f"{statistics.median(copying) / statistics.median(converting):.0%}",
                f"{statistics.median(commands):.2f}",
                f"{max(peaks) / 1e6:.0f}",
                f"{(1.3 * largest + 300e6) / 1e6:.0f}",
            )
    Console().print(table)


def make(root: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for dtype in DTYPES:
        model.to(getattr(torch, dtype)).save_pretrained(root / dtype)


def measure(source: Path, out: Path) -> None:
    """The conversion in this process, after imports."""
    from toolkit.hf.convert import ConvertOptions, convert_hf
    from toolkit.hf.read_config import read_hf_config

    read_hf_config(source)
    begin = time.perf_counter()
    convert_hf(
        source,
        out,
        name="model",
        add=lambda made, folder: None,
        options=ConvertOptions(validate=False),
    )
    print(time.perf_counter() - begin)


def run(words: list[str], out: Path) -> tuple[float, int, float]:
    """Seconds and peak memory (bytes) of a Python process, and the number that it printed last."""
    os.sync()
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen([sys.executable, *words], stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begin
        if process.returncode:
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}")
        printed.seek(0)
        last = printed.read().split()[-1:]
    shutil.rmtree(out)
    try:
        number = float(last[0])
    except (IndexError, ValueError):
        number = 0.0
    return wall, usage.ru_maxrss * 1024, number


def copy(files: list[Path], out: Path) -> float:
    """Seconds of `cp` and fsync."""
    out.mkdir()
    os.sync()
    begin = time.perf_counter()
    subprocess.run(["cp", *files, out], check=True)
    for file in files:
        descriptor = os.open(out / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - begin
    shutil.rmtree(out)
    return seconds


if __name__ == "__main__":
    main()
