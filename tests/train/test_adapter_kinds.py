"""Every kind of adapter trains alike under every engine that holds it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import ROWS, SEQ, build, global_batch, module_config, open_environment
from tests.train.test_lora import adapts, losses, run, tensors_of
from tests.workers import WorkerPool
from toolkit.commands.explain import explain_resume
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    ContextParallelConfig,
    TensorParallelConfig,
)
from toolkit.distributed.shards import local_runs
from toolkit.hf.export import export_source
from toolkit.hf.source import find_source
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.lora_config import LoRAConfig
from toolkit.train.timeline import Progress

STEPS = 3
LINEAR = LoRAConfig(rank=4, dora=True, rslora=True, dropout=0.3)
TOKENS = LoRAConfig(rank=4, target_modules=("*.attention.*",), trainable_tokens=(99, 3))
EXPERTS = LoRAConfig(rank=4)
MOE = {"moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=16)}
TABLE = LoRAConfig(rank=4, target_modules=("*.query", "embeddings.tokens"), rslora=True)
KINDS: dict[str, tuple[LoRAConfig, dict[str, Any]]] = {
    "dora and dropout": (
        LINEAR,
        {"intermediate_size": 48, "qkv_bias": True, "attention_output_bias": True},
    ),
    "rows of tokens": (TOKENS, {}),
    "rows of tied tokens": (TOKENS, {"tie_embeddings": True}),
    "experts": (EXPERTS, MOE),
    "tied embeddings": (TABLE, {"tie_embeddings": True}),
}
OF_LAYERS = ("dora and dropout", "experts")
"""What tensor parallelism holds too."""


def trained(engine: str | None, kinds: tuple[str, ...], changes: dict[str, Any]) -> Any:
    """Of each kind, losses and gradient norms of a few steps, and the weights after them."""
    configs = {
        kind: module_config(engine, **{"max_grad_norm": None, "lora": KINDS[kind][0]} | changes)
        for kind in kinds
    }
    env = open_environment(configs[kinds[0]])
    try:
        return {kind: _steps(build(c, env, **KINDS[kind][1]), env) for kind, c in configs.items()}
    finally:
        env.close()


def _steps(module: Any, env: Any) -> Any:
    before = {name: t.clone() for name, t in module.engine.weight_shards().items()}
    rows, place = ROWS // env.layout.batch_ranks, env.layout.batch_rank(env.rank)
    history = []
    for step in range(STEPS):
        progress = Progress(step, step * ROWS * SEQ, 100, 100 * ROWS * SEQ, ROWS * SEQ)
        module.progress = progress
        own = global_batch(step)[place * rows : (place + 1) * rows]
        metrics = module.train_batch({"input_ids": own})
        metrics |= module.optim_step(progress)
        loss = metrics["loss"].value.clone() * env.owns_loss
        if env.world_size > 1:
            torch.distributed.all_reduce(loss)
        history.append((loss.item(), float(metrics["grad_norm"].value)))
    after = module.engine.weight_shards()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return history, changed


@pytest.fixture(scope="module")
def reference(workers: WorkerPool) -> Any:
    return workers.run(1, trained, "single", tuple(KINDS), {})[0]


@pytest.mark.parametrize(
    ("engine", "kinds", "changes"),
    [
        ("ddp", tuple(KINDS), {"rank_microbatch_size": 2 * SEQ}),
        ("fsdp", tuple(KINDS), {"ac_config": ActivationCheckpointingConfig(mode="full")}),
        ("zero2", ("dora and dropout",), {}),
        ("zero3", tuple(KINDS), {}),
        ("fsdp", OF_LAYERS, {"tp_config": TensorParallelConfig(degree=2)}),
        ("ddp", ("rows of tied tokens", "experts"), {"cp_config": ContextParallelConfig(degree=2)}),
    ],
)
def test_engines_train_all_kinds_alike(
    workers: WorkerPool,
    reference: Any,
    engine: str,
    kinds: tuple[str, ...],
    changes: dict[str, Any],
) -> None:
    results = workers.run(2, trained, engine, kinds, changes)
    for kind in kinds:
        history, changed = reference[kind]
        for result in results:
            for got, want in zip(result[kind][0], history, strict=True):
                assert got[0] == pytest.approx(want[0], rel=1e-5), kind
                assert got[1] == pytest.approx(want[1], rel=1e-4), kind
        assert set.union(*(result[kind][1] for result in results)) == changed, kind


def test_dropout_changes_what_is_trained(workers: WorkerPool, reference: Any) -> None:
    changes = {"lora": LINEAR.replace(dropout=0.0)}
    (plain,) = workers.run(1, trained, "single", ("dora and dropout",), changes)
    ours, without = (found["dora and dropout"][0] for found in (reference, plain))
    assert ours[0][0] == pytest.approx(without[0][0], rel=1e-6)  # B is zero
    assert abs(ours[1][0] - without[1][0]) > 1e-5


def filled(engine: str) -> set[str]:
    """Names of what was not filled as it should be from a base whose weights are all numbered."""
    lora = LINEAR.replace(trainable_tokens=(99, 3))
    config = module_config(engine, lora=lora)
    env = open_environment(config)
    try:
        module = build(config, env)
        numbered: dict[str, torch.Tensor] = {}

        def read(part: dict[str, torch.Tensor]) -> None:
            for key, tensor in part.items():
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) / tensor.numel())
                numbered[key.removeprefix("model.")] = tensor

        module.fill_from_base(read)
        module.state_filled()
        tensors, wrong = module.state_tensors(), set()
        for name, spec in module.engine.shards.items():
            layer, _, kind = name.removesuffix(".weight").rpartition(".")
            if kind not in ("lora_magnitude", "token_rows"):
                continue
            weight = numbered[f"{layer}.weight"]
            whole = weight[[99, 3]] if kind == "token_rows" else weight.square().sum(1).sqrt()
            for memory, start in local_runs(tensors[f"model.{name}"], spec):
                wanted = whole.reshape(-1)[start : start + memory.numel()]
                if not torch.allclose(memory, wanted, rtol=1e-6):
                    wrong.add(name)
        assert len(numbered) == 2 * 7 + 2
        return wrong
    finally:
        env.close()


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp", 2), ("zero3", 2)])
def test_magnitudes_and_rows_begin_as_the_base_has_them(
    workers: WorkerPool, engine: str, ranks: int
) -> None:
    assert workers.run(ranks, filled, engine) == [set()] * ranks


RUNS: dict[str, dict[str, Any]] = {
    "layers": {
        "dora": True, "rslora": True, "dropout": 0.3, "target_modules": ["*.attention.*"],
        "trainable_tokens": [72, 105],
    },
    "experts": {"target_modules": ["*.experts.*", "embeddings.tokens"]},
}  # fmt: skip
MODEL = json.dumps({"num_experts": 4, "top_k": 2, "intermediate_size": 32})


@pytest.fixture(scope="module")
def place(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with experts of 3 steps, and two adapters' runs of 6 on it."""
    root = tmp_path_factory.mktemp("kinds")
    model = [f"--model.moe={MODEL}", "--model.tie_embeddings=false"]
    short = ["--trainer.max_duration.value=3"]
    assert workers.run(1, run, str(root), "base", [*model, *short])[0] == (0, "")
    for name, lora in RUNS.items():
        flags = [*model, *adapts(root / "runs/base", **lora)]
        assert workers.run(1, run, str(root), name, flags)[0] == (0, "")
    return root / "runs"


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bit_equal_and_others_go_on_alike(
    workers: WorkerPool, place: Path, name: str
) -> None:
    for ranks, flags in ((1, []), (2, ["--train_module.dp_config.name=fsdp"])):
        other = f"{name} again on {ranks}"
        shutil.copytree(place / name, place / other)
        shutil.rmtree(place / other / "checkpoints/step6")
        for result in workers.run(ranks, run, str(place.parent), other, flags):
            assert result == (0, "")
    ours, theirs = (
        tensors_of(place / f"{n}/checkpoints/step6") for n in (f"{name} again on 1", name)
    )
    assert losses(place / f"{name} again on 1") == losses(place / name)
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert losses(place / f"{name} again on 2") == pytest.approx(losses(place / name), rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_both_exports_of_a_run_compute_what_it_does(place: Path, tmp_path: Path, name: str) -> None:
    source = find_source(place / name)
    for merges in (False, True):
        exported = export_source(source, tmp_path / f"{merges}", merge_adapter=merges, check=True)
        assert exported.not_checked is None
    assert (place / name / "checkpoints/step6/hf/adapter_config.json").is_file()


def test_dropout_may_change_and_nothing_else_of_an_adapter(place: Path) -> None:
    def explained(change: dict[str, Any]) -> list[str]:
        lora = {"rank": 4, **RUNS["layers"], **change}
        flags = [f"--train_module.lora={json.dumps(lora)}"]
        return explain_resume(place / "layers", flags, {}).refused

    assert explained({"dropout": 0.1}) == []
    (refused,) = explained({"rslora": False})
    assert "another adapter: train_module.lora.rslora (was true, is false)" in refused


def test_a_run_that_no_engine_holds_is_refused_before_it_begins(
    workers: WorkerPool, place: Path
) -> None:
    for lora, axis, message in (
        (
            {"trainable_tokens": [1]},
            "tp",
            "of embeddings or tokens does not go with train_module.tp",
        ),
        (
            {"dropout": 0.1, "target_modules": ["*.query"]},
            "cp",
            "dropout does not go with train_mo",
        ),
    ):
        flags = [
            *adapts(place / "base", **lora),
            "--train_module.dp_config.name=fsdp",
            f"--train_module.{axis}_config.degree=2",
        ]
        for code, error in workers.run(2, run, str(place.parent), "new", flags):
            assert code == 2
            assert message in error
            assert "; use fsdp, hsdp or zero alone" in error
    assert not (place / "new").exists()
