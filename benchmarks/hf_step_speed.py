"""Tokens per second of a training step on an imported model: ours against `transformers`.

    python benchmarks/hf_step_speed.py --model smollm_135M
    python benchmarks/hf_step_speed.py --model gpt2_124M --device cuda --batch 16 --sequence 1024

A model with random weights is made from a `transformers` config; "toolkit" is what `convert-hf`
makes of it. Both go through the same bare loop: forward with loss, backward, clip, fused AdamW,
zero_grad. `transformers` runs with its SDPA attention and its own loss; compiled, its whole forward
is one `torch.compile`.

Each is a process of its own, "toolkit" with the memory settings of `toolkit train`
(`keep_freed_memory`), "transformers" as Python starts; `--same-settings` gives them to both. They
take turns of a few steps, so that other load on the machine hits both; only one computes at any
time. The first step of a turn refills the caches and is not counted. On a machine that others use
too, `--threads 1 --cpu-time` counts the processes' own seconds.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from rich.console import Console
from rich.table import Table

from toolkit.distributed.tuning import keep_freed_memory
from toolkit.hf.source import find_source, load_model
from toolkit.models.compile import compile_model
from toolkit.models.loss import shift_labels

# Field names and values of the published configs.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # HuggingFaceTB/SmolLM2-135M
    "smollm_135M": (
        "llama",
        {
            "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "max_position_embeddings": 8_192, "rope_theta": 100_000.0,
            "tie_word_embeddings": True,
        },
    ),
    # openai-community/gpt2
    "gpt2_124M": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    # Qwen/Qwen3-0.6B
    "qwen3_0.6B": (
        "qwen3",
        {
            "vocab_size": 151_936, "hidden_size": 1_024, "intermediate_size": 3_072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0,
            "tie_word_embeddings": True,
        },
    ),
    # EleutherAI/pythia-160m
    "pythia_160M": (
        "gpt_neox",
        {
            "vocab_size": 50_304, "hidden_size": 768, "intermediate_size": 3_072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "rotary_pct": 0.25,
            "max_position_embeddings": 2_048,
        },
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="smollm_135M")
    parser.add_argument("--layers", type=int, help="fewer layers than published, to save time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of one turn")
    parser.add_argument("--cpu-time", action="store_true", help="count seconds of the CPU")
    parser.add_argument("--same-settings", action="store_true", help="of memory, for both")
    parser.add_argument("--only", help="comma-separated parts of names, e.g. 'eager fp32'")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "hf"
        save_random(arguments, folder)
        for precision in ("fp32", "bf16"):
            for kind in ("eager", "compiled"):
                name = f"{kind} {precision}"
                if arguments.only and not any(part in name for part in arguments.only.split(",")):
                    continue
                pair = {
                    f"{who}, {name}": Worker(who, folder, name, arguments)
                    for who in ("toolkit", "transformers")
                }
                measure(pair, seconds, arguments)
                for worker in pair.values():
                    worker.close()
    report(seconds, arguments)


def save_random(arguments: argparse.Namespace, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = MODELS[arguments.model]
    if arguments.layers is not None:
        key = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
        fields = {**fields, key: arguments.layers}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    model.save_pretrained(folder)


LossFunction = Callable[[torch.Tensor], torch.Tensor]
"""`(batch, seq)` ids to the mean cross entropy of their next tokens."""


def ours(
    folder: Path, compiled: bool, arguments: argparse.Namespace
) -> tuple[torch.nn.Module, LossFunction]:
    model = load_model(find_source(str(folder)), device=arguments.device, dtype=torch.float32)
    model.train()
    if compiled:
        compile_model(model)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, shift_labels(ids)).loss / (ids.shape[0] * (ids.shape[1] - 1))

    return model, loss


def theirs(
    folder: Path, compiled: bool, arguments: argparse.Namespace
) -> tuple[torch.nn.Module, LossFunction]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(arguments.device).train()
    forward = torch.compile(model) if compiled else model

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return forward(input_ids=ids, labels=ids, use_cache=False).loss

    return model, loss


class Worker:
    """A process that trains one of the two and does turns when asked."""

    def __init__(self, who: str, folder: Path, name: str, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=work, args=(there, who, folder, name, arguments))
        self._process.start()

    def turn(self, count: int) -> list[float]:
        """Seconds of each of `count` steps."""
        self._pipe.send(count)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(0)
        self._process.join()


def work(
    pipe: Connection, who: str, folder: Path, name: str, arguments: argparse.Namespace
) -> None:
    torch.set_num_threads(arguments.threads)
    if who == "toolkit" or arguments.same_settings:
        keep_freed_memory()
    make = ours if who == "toolkit" else theirs
    model, loss_of = make(folder, "compiled" in name, arguments)
    step = new_step(model, loss_of, "bf16" in name, arguments)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    while count := pipe.recv():
        times = []
        for _ in range(count):
            started = clock()
            step()
            times.append(clock() - started)
        pipe.send(times)


def new_step(
    model: torch.nn.Module, loss_of: LossFunction, bf16: bool, arguments: argparse.Namespace
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    vocabulary = MODELS[arguments.model][1].get("vocab_size", 50_257)
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.batch, arguments.sequence)
    ids = torch.randint(vocabulary, shape, generator=generator).to(arguments.device)
    device = torch.device(arguments.device).type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(
    pair: dict[str, Worker], seconds: dict[str, list[float]], arguments: argparse.Namespace
) -> None:
    for worker in pair.values():
        worker.turn(2)  # compiles
    for _ in range(arguments.rounds):
        for name, worker in pair.items():
            seconds.setdefault(name, []).extend(worker.turn(1 + arguments.steps)[1:])


def report(seconds: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    tokens = arguments.batch * arguments.sequence
    clock = "CPU" if arguments.cpu_time else "clock"
    table = Table(
        title=f"{arguments.model} on {arguments.device}: {arguments.batch} x "
        f"{arguments.sequence} tokens a step, {arguments.threads} thread(s), {arguments.rounds} "
        f"rounds of {arguments.steps} steps, {clock} seconds"
    )
    table.add_column("")
    for column in ("ms (median)", "tok/s (median)", "tok/s (best)", "x transformers"):
        table.add_column(column, justify="right")
    for name, times in seconds.items():
        median = statistics.median(times)
        rival = statistics.median(seconds[name.replace("toolkit", "transformers")])
        table.add_row(
            name,
            f"{1e3 * median:.0f}",
            f"{tokens / median:,.0f}",
            f"{tokens / min(times):,.0f}",
            f"{rival / median:.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
