"""Coordinate check of muP: how much a model's activations move in training, by its width.

    python benchmarks/mup_coordinates.py

For each width a few steps of Adam on random tokens, with and without `optim.mup`. Of each part
(embeddings, residual stream, logits) it reports the root mean square of the change since the first
step, and the slope of its logarithm over the logarithm of the width: near 0 where the change does
not depend on the width, which is what makes a rate hold at another width (Yang et al. 2022,
appendix D.1); above 0 where wider models move further.
"""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from toolkit.models.config import TransformerConfig
from toolkit.optim.config import AdamWConfig
from toolkit.optim.scaling import MuPConfig
from toolkit.optim.schedules import ConstantConfig
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Progress
from toolkit.train.transformer import TransformerTrainModule

HEAD_DIM = 16
"""Kept, as muP's scale of attention wants; heads become more."""
VOCAB, ROWS, LENGTH = 256, 8, 32


class Curve(NamedTuple):
    """Of one part of the model."""

    changes: list[float]
    """Root mean square by width."""
    slope: float
    """Of log(change) over log(width)."""


def coordinate_check(
    widths: Sequence[int], *, base_width: int | None, lr: float, steps: int, seeds: int = 1
) -> dict[str, Curve]:
    """The change of each part after `steps` steps; `base_width` None: without muP."""
    changes: dict[str, list[float]] = {}
    for width in widths:
        found: dict[str, float] = {}
        for seed in range(seeds):
            for part, change in _changes(width, base_width, lr, steps, seed).items():
                found[part] = found.get(part, 0.0) + change / seeds
        for part, change in found.items():
            changes.setdefault(part, []).append(change)
    return {part: Curve(values, slope(widths, values)) for part, values in changes.items()}


def slope(widths: Sequence[int], changes: Sequence[float]) -> float:
    """Of the least-squares line through the logarithms."""
    xs, ys = [math.log(w) for w in widths], [math.log(c) for c in changes]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    pairs = list(zip(xs, ys, strict=True))
    return sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a in xs)


def _changes(
    width: int, base_width: int | None, lr: float, steps: int, seed: int
) -> dict[str, float]:
    module = _module(width, base_width, lr)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    before = _coordinates(module, ids)
    tokens = ROWS * LENGTH
    for step in range(steps):
        module.train_batch({"input_ids": ids})
        module.optim_step(Progress(step, step * tokens, steps, steps * tokens, tokens))
    after = _coordinates(module, ids)
    return {part: (after[part] - before[part]).square().mean().sqrt().item() for part in before}


def _module(width: int, base_width: int | None, lr: float) -> TransformerTrainModule:
    model = TransformerConfig(
        vocab_size=VOCAB,
        d_model=width,
        num_layers=2,
        num_heads=width // HEAD_DIM,
        intermediate_size=2 * width,
        max_sequence_length=LENGTH,
        init_std=0.1,
    )
    mup = None if base_width is None else MuPConfig(base_width=base_width)
    config = TransformerTrainModuleConfig(
        optim=AdamWConfig(lr=lr, weight_decay=0.0, mup=mup),
        scheduler=ConstantConfig(),
        precision="fp32",
        max_grad_norm=None,
        rank_microbatch_size=None,
    )
    return TransformerTrainModule(config, model.build(init_device="meta"))


@torch.no_grad()
def _coordinates(module: TransformerTrainModule, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    model = module.engine.module
    parts = {"embeddings": model.embeddings, "residual stream": model.blocks[len(model.blocks) - 1]}
    hooks = [
        part.register_forward_hook(lambda *call, name=name: found.update({name: _tensor(call[2])}))
        for name, part in parts.items()
    ]
    found["logits"] = module.logits(ids).float()
    for hook in hooks:
        hook.remove()
    return found


def _tensor(output: object) -> torch.Tensor:
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, torch.Tensor)
    return first.detach().clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    table = Table("part", "rates and initial values", *map(str, given.widths), "slope")
    for label, base_width in (("as ever", None), ("muP", given.widths[0])):
        options = {"lr": given.lr, "steps": given.steps, "seeds": given.seeds}
        found = coordinate_check(given.widths, base_width=base_width, **options)
        for part, (changes, exponent) in found.items():
            table.add_row(part, label, *(f"{c:.3f}" for c in changes), f"{exponent:+.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
