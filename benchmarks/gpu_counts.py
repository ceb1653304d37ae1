"""What a training step asks of GPUs, counted without one: ours, nanochat's and torchtitan's.

    python benchmarks/gpu_counts.py --preset gpt2_124M --preset llama_1B \
        --nanochat PATH --torchtitan PATH [--compiled] [--json FILE]

Tensors are fake (shapes and types, no values) and so are the other ranks. A subject's step is its
own code, from a checkout that is given. `--compiled` counts the kernels that inductor makes of one
block, forward and backward: its C++ ones, which it fuses by the same rules as those for GPUs.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad

from benchmarks import _counted_peers as peers
from benchmarks._op_counting import OpCounter, compiled_kernels, counted_kernels
from benchmarks._report import Figure, write_json
from toolkit.distributed import fully_sharded, materialize, torch_engine
from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.layout import resolve_layout
from toolkit.models import attention, loss, norms, projections, rope, shapes, weight_gradient
from toolkit.models.config import ModelConfig, TransformerConfig
from toolkit.models.layer_inputs import layer_inputs
from toolkit.models.presets import PRESETS
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Progress

RANKS = 8
LLAMA_1B = TransformerConfig(
    vocab_size=128_256, d_model=2_048, num_layers=16, num_heads=32, num_key_value_heads=8,
    intermediate_size=8_192, max_sequence_length=8_192, rope_theta=500_000.0, tie_embeddings=True,
)  # fmt: skip
"""Llama 3.2 1B's shape."""
NANOCHAT = TransformerConfig(
    vocab_size=32_768, d_model=768, num_layers=12, num_heads=6, num_key_value_heads=6,
    intermediate_size=3_072, max_sequence_length=2_048, qk_norm="per_head", feed_forward="gelu",
    bias=False, logit_soft_cap=15.0,
)  # fmt: skip
"""nanochat's d12 without what only nanochat has (value embeddings, mixing with the input)."""
OWN = {"llama_1B": LLAMA_1B, "nanochat_d12": NANOCHAT}
TITANS = {"llama_1B": "1B", "llama3_8B": "8B"}
"""Models that torchtitan has too, by its names."""


class Size(NamedTuple):
    """Of a step on one rank."""

    rows: int
    length: int
    passes: int


SIZES = {"gpt2_124M": Size(64, 1_024, 1), "nanochat_d12": Size(32, 2_048, 1)}
OTHERS = Size(2, 8_192, 2)


class Counts(NamedTuple):
    """Of one step."""

    subject: str
    model: str
    computing: OpCounter
    """Forward and backward of all microbatches."""
    stepping: OpCounter
    """Clipping and the optimizer."""


def model_of(name: str) -> Any:
    return OWN.get(name) or msgspec.convert(PRESETS[name], ModelConfig)


class _AsIs:
    def prepare(self, *things: Any) -> Any:
        return things


@contextlib.contextmanager
def fake_ranks(number: int) -> Iterator[None]:
    """Rank 0 of so many, which only seem to be there; of one alone no group."""
    if number == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def chosen_as_on_a_gpu() -> contextlib.ExitStack:
    """Branches of the code that look at the device take those of a GPU."""
    stack = contextlib.ExitStack()
    for owner, name, value in (
        (shapes, "CPU_CHUNK_BYTES", shapes.CHUNK_BYTES),
        (weight_gradient, "widens_products", lambda _: True),
        (norms, "fuses_norms", lambda _: True),
        (loss, "has_one_softmax", lambda _: True),
        (rope, "rounds_in_kernels", lambda _: True),
        (projections, "joins_products", lambda _: True),
        (torch_engine, "build_accelerator", lambda *_: _AsIs()),
        (materialize, "draw_initial_values", lambda *_: None),
        (fully_sharded, "device_memory", lambda _: 139 << 30),
        (clip_grad, "_has_foreach_support", lambda *_: True),
    ):
        stack.enter_context(mock.patch.object(owner, name, value))
    return stack


def ours(name: str, size: Size, ranks: int, engine: Any = "fsdp", **dp: Any) -> Counts:
    config = model_of(name).to_transformer()
    computing, stepping = OpCounter(), OpCounter()
    asked = DataParallelConfig(name=engine, **dp) if ranks > 1 else None
    environ = {"RANK": "0", "WORLD_SIZE": str(ranks)}
    layout = msgspec.structs.replace(resolve_layout("bf16", asked, environ), precision="bf16")
    tokens = size.rows * size.length
    module_config = TransformerTrainModuleConfig(precision="bf16", rank_microbatch_size=tokens)
    rope.rotary_table.cache_clear()
    with fake_ranks(ranks), chosen_as_on_a_gpu():
        environment = TrainingEnvironment(
            rank=0, local_rank=0, device=torch.device("cpu"), layout=layout, seed=0
        )
        model: Any = config.build(init_device="meta")
        for axes in (("dp_replicate", "dp_shard"), ("dp_replicate",)):
            environment.group(*axes)
        _ = environment.fsdp_mesh if ranks > 1 else None
        with FakeTensorMode(allow_non_fake_inputs=True):
            fill(model)
            model.to = lambda *_: model
            module = module_config.build(model, environment=environment)
            ids = torch.zeros(size.passes * size.rows, size.length, dtype=torch.int64)
            for counting in (False, True):  # what is made once, in the first
                first = computing if counting else OpCounter()
                with counted_kernels(first):
                    attend = torch.nn.functional.scaled_dot_product_attention
                    own = mock.patch.object(attention, "scaled_dot_product_attention", attend)
                    with own, first:
                        module.train_batch({"input_ids": ids})
                with stepping if counting else OpCounter():
                    module.optim_step(Progress(1, 1, 100, 100, 1))
    rope.rotary_table.cache_clear()
    return Counts("toolkit" + (f" {dp}" if dp else ""), name, computing, stepping)


def fill(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Give every parameter (fake) storage."""
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, device="cpu", dtype=dtype)
            setattr(module, key, nn.Parameter(empty, parameter.requires_grad))


def our_block() -> tuple[nn.Module, tuple]:
    """A small block in bf16, as FSDP gathers it, and inputs."""
    config = TransformerConfig(
        vocab_size=128, d_model=128, num_layers=1, num_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_sequence_length=64,
    )  # fmt: skip
    stream = torch.randn(2, 64, 128, dtype=torch.bfloat16, requires_grad=True)
    block = config.build().blocks[0].to(torch.bfloat16)
    return block, (stream, *layer_inputs(config, stream, None, None)[0])


HEADS = (
    "model", "ranks", "step of", "operators", "TFLOP", "GB moved", "casts", "GB cast",
    "optimizer ops", "collectives", "GB exchanged",
)  # fmt: skip


def row(counts: Counts, ranks: int) -> list[str]:
    first, last = counts.computing, counts.stepping
    exchanged = first.collectives + last.collectives
    return [
        counts.model,
        str(ranks),
        counts.subject,
        f"{first.ops:,}",
        f"{first.flops / 1e12:.2f}",
        f"{first.bytes / 1e9:.1f}",
        f"{first.casts:,}",
        f"{first.cast_bytes / 1e9:.1f}",
        f"{last.ops:,}",
        ", ".join(f"{number} {kind}" for kind, number in sorted(exchanged.items())),
        f"{(first.collective_bytes + last.collective_bytes).total() / 1e9:.2f}",
    ]


def figures(counts: Counts, ranks: int) -> list[Figure]:
    where = f"{counts.model}, {ranks} ranks, {counts.subject}"
    values = {
        "operators": counts.computing.ops,
        "GB moved": counts.computing.bytes / 1e9,
        "GB cast": counts.computing.cast_bytes / 1e9,
        "GB exchanged": counts.computing.collective_bytes.total() / 1e9,
    }
    return [
        {"name": f"{where}: {what}", "value": value, "unit": "", "better": "lower"}
        for what, value in values.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", action="append", choices=[*PRESETS, *OWN])
    parser.add_argument("--nanochat", metavar="PATH", help="a checkout of karpathy/nanochat")
    parser.add_argument("--torchtitan", metavar="PATH", help="a checkout of pytorch/torchtitan")
    parser.add_argument("--compiled", action="store_true", help="inductor's kernels of a block too")
    parser.add_argument("--kinds", type=int, default=0, help="most frequent operators to print")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    os.environ.setdefault("NANOCHAT_DTYPE", "bfloat16")
    found: list[tuple[Counts, int]] = []
    for name in options.preset or ["gpt2_124M", "llama_1B", "nanochat_d12"]:
        size = SIZES.get(name, OTHERS)
        found.append((ours(name, size, 1), 1))
        if name == "nanochat_d12" and options.nanochat:
            found.append((Counts("nanochat", name, *peers.nanochat(options.nanochat, size)), 1))
        if name in TITANS:
            found.append((ours(name, size, RANKS), RANKS))
            found.append((ours(name, size, RANKS, reshard_after_forward=True), RANKS))
            if options.torchtitan:
                with fake_ranks(RANKS):
                    counters = peers.torchtitan(options.torchtitan, TITANS[name], size)
                found.append((Counts("torchtitan", name, *counters), RANKS))
        else:
            found.append((ours(name, size, RANKS), RANKS))
    print(f"| {' | '.join(HEADS)} |")
    print(f"|{' --- |' * len(HEADS)}")
    for counts, ranks in found:
        print(f"| {' | '.join(row(counts, ranks))} |")
    if options.compiled:
        print("\nkernels that inductor writes for a block: forward, backward")
        blocks = {"toolkit": our_block()}
        if options.nanochat:
            blocks["nanochat"] = peers.nanochat_block(options.nanochat)
        if options.torchtitan:
            blocks["torchtitan"] = peers.torchtitan_block(options.torchtitan)
        for name, (block, inputs) in blocks.items():
            print(f"| {name} | {' | '.join(map(str, compiled_kernels(block, inputs)))} |")
    for counts, ranks in found if options.kinds else ():
        print(f"\n{counts.model}, {ranks} ranks, {counts.subject}: ", end="")
        print(*(f"{n} {kind}" for kind, n in counts.computing.kinds.most_common(options.kinds)))
    rows = [figure for counts, ranks in found for figure in figures(counts, ranks)]
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
