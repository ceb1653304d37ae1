"""Forward and backward of a small mixture of experts: ours by both grouped products, against
`transformers`' OLMoE by both of its own.

    python benchmarks/moe_step.py
    python benchmarks/moe_step.py --bf16 --experts 64 --top-k 8 --width 128
    python benchmarks/moe_step.py --device cuda --bf16 --batch 16 --sequence 1024

All take turns, so that other load on the machine hits all of them. On a CPU this program's own
seconds are counted; on a GPU, time until it is done.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from toolkit.models import grouped
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import MoEConfig

VOCAB = 4_096
Step = Callable[[], None]


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    shape = (options.batch, options.sequence)
    ids = torch.randint(VOCAB, shape, device=options.device)
    steps = {
        "toolkit, loop": toolkit_step(options, ids, "loop"),
        "toolkit, grouped_mm": toolkit_step(options, ids, "grouped_mm"),
        "transformers, eager": transformers_step(options, ids, "eager"),
        "transformers, grouped_mm": transformers_step(options, ids, "grouped_mm"),
    }
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            step()  # brings the caches back
            seconds[name].append(timed(step, options.device))
    table = Table("implementation", "best ms", "median ms", "tokens/s (median)")
    for name, values in seconds.items():
        best, median = min(values), statistics.median(values)
        rate = f"{ids.numel() / median:,.0f}"
        table.add_row(name, f"{best * 1e3:.1f}", f"{median * 1e3:.1f}", rate)
    Console().print(table)


def timed(step: Step, device: str) -> float:
    if device == "cpu":
        before = time.process_time()
        step()
        return time.process_time() - before
    torch.cuda.synchronize()
    before = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - before


def toolkit_step(
    options: argparse.Namespace, ids: torch.Tensor, backend: Literal["loop", "grouped_mm"]
) -> Step:
    config = TransformerConfig(
        vocab_size=VOCAB,
        d_model=options.d_model,
        num_layers=options.layers,
        num_heads=4,
        intermediate_size=options.width,
        max_sequence_length=options.sequence,
        qk_norm="full",
        moe=MoEConfig(
            num_experts=options.experts,
            top_k=options.top_k,
            intermediate_size=options.width,
            normalize_top_k=False,
        ),
    )
    model = config.build().to(options.device)

    def step() -> None:
        grouped.grouped_backend = lambda x, weight: backend
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            loss = model(ids, ids).loss / ids.numel()
        finish(model, loss)

    return step


def transformers_step(options: argparse.Namespace, ids: torch.Tensor, experts: str) -> Step:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=options.d_model,
        intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        max_position_embeddings=options.sequence,
        pad_token_id=None,
        eos_token_id=None,
    )
    model: Any = OlmoeForCausalLM(config).to(options.device)
    model.set_experts_implementation(experts)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        finish(model, loss)

    return step


def finish(model: torch.nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    return parser.parse_args()


if __name__ == "__main__":
    main()
