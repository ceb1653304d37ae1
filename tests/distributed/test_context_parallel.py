"""Rows shared by ranks: the loss, gradients and logits of one process, in float64."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.workers import WorkerPool
from toolkit.distributed.context_parallel import apply_context_parallel
from toolkit.distributed.process_groups import close_process_groups, open_process_groups
from toolkit.models.config import TransformerConfig
from toolkit.models.init import canonical_parameters
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.loss import IGNORE_INDEX, shift_labels

VOCAB, SEQ, ROWS = 60, 32, 2
BOUND = 1e-12
STYLES = ("allgather", "ulysses", "ring")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "windows": {"sliding_window": 11, "attention_pattern": ("sliding", "full")},
    "short windows": {"sliding_window": 3, "norm_placement": "reordered", "qk_norm": "full"},
    "caps": {
        "attention_soft_cap": 2.0,
        "logit_soft_cap": 4.0,
        "norm_placement": "sandwich",
        "sliding_window": 10,
        "attention_pattern": ("sliding", "full"),
        "tie_embeddings": True,
    },
    "gates and sinks": {
        "attention_gate": "headwise",
        "attention_sinks": True,
        "rope_pattern": ("rope", "none"),
    },
    "ngpt": {"norm_placement": "normalized"},
    "learned": {
        "positions": "learned",
        "norm": "layer_norm",
        "feed_forward": "gelu",
        "bias": True,
        "tie_embeddings": True,
    },
    "moe": {
        "moe": MoEConfig(
            num_experts=6,
            top_k=2,
            intermediate_size=16,
            load_balancing_multiplier=0.5,
            router_z_loss_multiplier=0.1,
        )
    },
}
CASES: dict[int, list[tuple[str, str]]] = {
    2: [
        ("llama", "rows"), ("llama", "odd"), ("windows", "masked"), ("caps", "documents"),
        ("learned", "odd"), ("moe", "masked"), ("gates and sinks", "documents"), ("ngpt", "rows"),
    ],
    4: [
        ("llama", "masked"), ("windows", "documents"), ("short windows", "rows"), ("caps", "odd"),
        ("moe", "documents"),
    ],
}  # fmt: skip


def build(name: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_sequence_length": SEQ,
        "init_std": 0.2,
    }
    return TransformerConfig(**settings | MODELS[name] | changes).build(seed=1).double()


def inputs(batch: str) -> dict[str, torch.Tensor]:
    """`rows`: full; `documents`: one that is longer than a rank's part, many short ones;
    `masked`: documents, and targets in the front of rows alone; `odd`: of a length to be padded."""
    generator = torch.Generator().manual_seed(5)
    length = SEQ - 3 if batch == "odd" else SEQ
    ids = torch.randint(VOCAB, (ROWS, length), generator=generator)
    documents = mask = None
    if batch != "rows":
        ends = torch.rand(ROWS, length, generator=generator) < 0.15
        ends[0, 5:27] = False
        documents = ends.cumsum(1)
    if batch == "masked":
        mask = torch.rand(ROWS, length, generator=generator) < torch.linspace(1.0, 0.0, length)
    given = {"input_ids": ids, "labels": shift_labels(ids, mask, documents)}
    return given if documents is None else {**given, "document_ids": documents}


def backward(model: Any, given: dict[str, torch.Tensor]) -> tuple[dict[str, Any], Any]:
    """Sums, and gradients by name, on this rank alone."""
    model.zero_grad()
    sums = model(**given, z_loss_multiplier=1e-2)
    (sums.loss / (given["labels"] != IGNORE_INDEX).sum()).backward()
    parameters = canonical_parameters(model).items()
    grads = {name: p.grad for name, p in parameters if p.grad is not None}
    return {name: grad.clone() for name, grad in grads.items()}, sums


def compare(styles: tuple[str, ...], cases: list[tuple[str, str]]) -> dict[tuple, dict[str, float]]:
    """Worst relative errors on rank 0, by style and case."""
    found = {}
    for name, batch in cases:
        given = inputs(batch)
        whole = build(name)
        expected, wanted = backward(whole, given)
        with torch.no_grad():
            logits = whole(given["input_ids"], document_ids=given.get("document_ids"))
        for style in styles:
            if style == "ring" and name in ("caps", "gates and sinks"):
                continue
            for balance in ("head_tail", "none"):
                if balance == "none" and ("windows" not in name or style == "ulysses"):
                    continue
                model = build(name)
                group: Any = dist.group.WORLD
                options: Any = {"style": style, "load_balance": balance}
                apply_context_parallel(model, group, **options)
                gradients, sums = backward(model, given)
                if name == "windows":
                    again = backward(model, given)[0].items()
                    assert all(torch.equal(gradients[key], grad) for key, grad in again)
                for gradient in gradients.values():
                    dist.all_reduce(gradient)
                # Without rotations the bias of keys has a gradient of zero, and rounding is left.
                whole_norm = torch.nn.utils.get_total_norm(list(expected.values())).item()
                worst = 0.0
                for key, grad in expected.items():
                    least = whole_norm if key.endswith("key.bias") else 1e-12
                    worst = max(worst, error(gradients[key], grad, least))
                errors = {"gradients": worst}
                for which in ("loss", "ce", "z"):
                    value = getattr(sums, which).detach().clone()
                    dist.all_reduce(value)
                    errors[which] = error(value, getattr(wanted, which).detach())
                if sums.router is not None:
                    for which in ("balance", "z"):
                        value = getattr(sums.router, which).clone()
                        dist.all_reduce(value)
                        errors[f"router {which}"] = error(value, getattr(wanted.router, which))
                    errors["load"] = error(sums.router.load, wanted.router.load)
                with torch.no_grad():
                    got = model(given["input_ids"], document_ids=given.get("document_ids"))
                assert got.shape == logits.shape
                errors["logits"] = error(got, logits)
                found[style, name, batch, balance] = errors
    return found


def error(got: torch.Tensor, expected: torch.Tensor, least: float = 1e-12) -> float:
    return ((got - expected).norm() / expected.norm().clamp(min=least)).item()


def in_a_group(function: Any, *args: Any) -> Any:
    open_process_groups(torch.device("cpu"), int(os.environ["WORLD_SIZE"]))
    try:
        return function(*args)
    finally:
        close_process_groups()


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_sums_and_logits_are_those_of_one_process(
    workers: WorkerPool, ranks: int
) -> None:
    for found in workers.run(ranks, in_a_group, compare, STYLES, CASES[ranks]):
        assert len(found) >= len(CASES[ranks]) * 2
        worst = {(case, what): e for case, errors in found.items() for what, e in errors.items()}
        assert {which: e for which, e in worst.items() if not e <= BOUND} == {}


def through_stages() -> dict[str, float]:
    """Errors of a model in two stages, each over this rank's positions of rows that are padded."""
    given, whole = inputs("odd"), build("windows", max_sequence_length=SEQ - 3)
    expected, wanted = backward(whole, given)
    with torch.no_grad():
        logits = whole(given["input_ids"])
    stages = []
    for layers in (range(1), range(1, 2)):
        stages.append(build("windows", max_sequence_length=SEQ - 3))
        stages[-1].keep_layers(layers)
        group: Any = dist.group.WORLD
        apply_context_parallel(stages[-1], group)
    others = {name: value for name, value in given.items() if name != "input_ids"}
    stream, _ = stages[0](given["input_ids"], **others)
    sums = stages[1](stream, **others, z_loss_multiplier=1e-2)
    (sums.loss / (given["labels"] != IGNORE_INDEX).sum()).backward()
    gradients: Any = [
        (n, p.grad) for stage in stages for n, p in canonical_parameters(stage).items()
    ]
    loss = sums.loss.detach().clone()
    for summed in (loss, *(gradient for _, gradient in gradients)):
        dist.all_reduce(summed)
    with torch.no_grad():
        got = stages[1](stages[0](given["input_ids"])[0])
    errors = {name: error(gradient, expected[name]) for name, gradient in gradients}
    assert errors.keys() == expected.keys()
    errors["logits"] = error(got[:, : logits.shape[1]], logits)
    return errors | {"loss": error(loss, wanted.loss.detach())}


def test_stages_of_a_pipeline_pass_on_the_positions_of_a_rank(workers: WorkerPool) -> None:
    for errors in workers.run(2, in_a_group, through_stages):
        assert {which: e for which, e in errors.items() if not e <= BOUND} == {}
