"""Time of an optimizer step under each kind of parallelism, against DDP on as many ranks.

    python benchmarks/parallel_step.py
    python benchmarks/parallel_step.py --only tp cp-ring --rounds 9
    python benchmarks/parallel_step.py --only fsdp ddp-muon fsdp-muon --batch 16384
    torchrun --nproc-per-node 8 benchmarks/parallel_step.py --d-model 4096 --sequence 8192

Every variant trains the same model class on the same global batch, its reduction of gradients and
the optimizer included. All take turns in the same processes, so that other load on the machine hits
all of them; on CPUs each process has one thread. The pipelines have `--microbatches` microbatches,
the others one per rank.
"""

import argparse
import dataclasses
import os
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from toolkit.distributed.config import (
    ContextParallelConfig,
    DataParallelConfig,
    ExpertParallelConfig,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.distributed.environment import TrainingEnvironment, prepare_training_environment
from toolkit.distributed.layout import resolve_layout
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import MoEConfig
from toolkit.optim.config import MuonConfig
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Progress
from toolkit.train.transformer import TransformerTrainModule

VOCAB = 8_192


def variants(ranks: int) -> dict[str, dict[str, Any]]:
    """Name -> fields of the train module."""

    def context(style: Any) -> dict[str, Any]:
        return {"cp_config": ContextParallelConfig(degree=ranks, style=style)}

    def pipeline(schedule: Any) -> dict[str, Any]:
        return {"pp_config": PipelineParallelConfig(degree=ranks, schedule=schedule)}

    return {
        "ddp": {"dp_config": DataParallelConfig(name="ddp")},
        "fsdp": {"dp_config": DataParallelConfig(name="fsdp")},
        "tp": {"tp_config": TensorParallelConfig(degree=ranks)},
        "cp-allgather": context("allgather"),
        "cp-ulysses": context("ulysses"),
        "cp-ring": context("ring"),
        "pp-1F1B": pipeline("1F1B"),
        "pp-Interleaved1F1B": pipeline("Interleaved1F1B"),
        "pp-ZBVZeroBubble": pipeline("ZBVZeroBubble"),
        "ep": {"ep_config": ExpertParallelConfig(degree=ranks)},
        "ddp-muon": {"dp_config": DataParallelConfig(name="ddp"), "optim": MuonConfig()},
        "fsdp-muon": {"dp_config": DataParallelConfig(name="fsdp"), "optim": MuonConfig()},
    }


def main() -> None:
    options = parse()
    if "RANK" in os.environ:
        measure(options)
        return
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    os.environ |= environ | {"WORLD_SIZE": str(options.ranks), "TOOLKIT_NUM_THREADS": "1"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(options.ranks)}
    torch.multiprocessing.spawn(worker, (options,), nprocs=options.ranks)


def worker(rank: int, options: argparse.Namespace) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    measure(options)


def measure(options: argparse.Namespace) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    chosen = variants(ranks)
    for name in options.only or []:
        if name not in chosen:
            raise SystemExit(f"{name}: no such variant; there are {', '.join(chosen)}")
    wanted = options.only or [n for n in chosen if n not in ("ep", "fsdp") and "muon" not in n]
    names = ["ddp", *(name for name in wanted if name != "ddp")]
    steps = {}
    environment = open_environment(options)
    for name in names:
        steps[name] = Step(options, environment, chosen[name])
        steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, step in steps.items():
            dist.barrier()
            began = time.perf_counter()
            step()
            dist.barrier()
            seconds[name].append(time.perf_counter() - began)
    if environment.is_main:
        table = Table("variant", "best s", "median s", "of ddp (best)", "of ddp (median)")
        best, middle = min(seconds["ddp"]), statistics.median(seconds["ddp"])
        for name, values in seconds.items():
            least, median = min(values), statistics.median(values)
            row = (f"{least:.3f}", f"{median:.3f}", f"{least / best:.2f}x")
            table.add_row(name, *row, f"{median / middle:.2f}x")
        Console().print(table)
    environment.close()


def open_environment(options: argparse.Namespace) -> TrainingEnvironment:
    trainer = SimpleNamespace(deterministic=False, collective_timeout=600.0)
    module = TransformerTrainModuleConfig(precision=options.precision)
    return prepare_training_environment(
        SimpleNamespace(seed=0, train_module=module, trainer=trainer)
    )


class Step:
    """One optimizer step of a variant, forward and backward of the global batch included."""

    def __init__(
        self, options: argparse.Namespace, base: TrainingEnvironment, parts: dict[str, Any]
    ) -> None:
        axes = {n: config for n, config in parts.items() if n not in ("dp_config", "optim")}
        layout = resolve_layout(options.precision, parts.get("dp_config"), os.environ, **axes)
        environment = dataclasses.replace(base, layout=layout)
        rows = options.batch // options.sequence // layout.batch_ranks
        cuts = options.microbatches if layout.pp > 1 else 1
        config = TransformerTrainModuleConfig(
            rank_microbatch_size=rows // cuts * options.sequence,
            precision=options.precision,
            compile_model=options.compile,
            **parts,
        )
        experts = MoEConfig(num_experts=8, top_k=2, intermediate_size=options.d_model)
        model = TransformerConfig(
            vocab_size=VOCAB,
            d_model=options.d_model,
            num_layers=options.layers,
            num_heads=options.d_model // 64,
            num_key_value_heads=options.d_model // 128,
            intermediate_size=options.d_model * 3,
            max_sequence_length=options.sequence,
            moe=experts if "ep_config" in parts else None,
        )
        self._module = TransformerTrainModule(
            config, model.build(init_device="meta"), environment=environment
        )
        generator = torch.Generator().manual_seed(layout.batch_rank(base.rank))
        self._batch = {
            "input_ids": torch.randint(VOCAB, (rows, options.sequence), generator=generator)
        }

    def __call__(self) -> None:
        self._module.train_batch(self._batch)
        outcome = self._module.optim_step(Progress(1, 1, 100, 100, 1))
        assert float(outcome["skipped"].value) == 0.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8_192, help="tokens of the global batch")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="VARIANT")
    parser.add_argument("--port", type=int, default=29_511)
    return parser.parse_args()


if __name__ == "__main__":
    main()
