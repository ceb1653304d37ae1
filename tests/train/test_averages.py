"""Averages of weights: on every engine's shards, in evaluations, over a resume, and on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import ROWS, build, global_batch, module_config, open_environment, train_steps
from tests.train.test_remote_runs import run as run_smoke
from tests.workers import WorkerPool
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.commands.evaluate import evaluate
from toolkit.errors import CheckpointError

STEPS = 3


def averaged(engine: str, folder: str, dp: dict[str, Any]) -> tuple[bool, list[float]]:
    """Steps with an average; whether each rank's part of it is that of its weights, and the loss
    of the weights, of the average, and of the weights again. What the average was is saved."""
    from toolkit.checkpoint.commit import save_checkpoint
    from toolkit.distributed.shards import memory_of
    from toolkit.train.callbacks.averages import Average, trained_weights

    config = module_config(engine, dp=dp)
    env = open_environment(config)
    try:
        module = build(config, env)
        average, reference = Average(module), {}
        average.copy()
        for name, weight in trained_weights(module).items():
            reference[name] = memory_of(weight).clone()
        for step in range(STEPS):
            train_steps(module, step, step + 1)
            average.update(0.25)
            for name, weight in trained_weights(module).items():
                reference[name].lerp_(memory_of(weight), 0.25)
        equal = all(
            torch.equal(memory_of(tensor), reference[name])
            for name, tensor in average.tensors.items()
        )

        def loss() -> float:
            layout = env.layout
            rows, share = ROWS // layout.batch_ranks, layout.batch_rank(env.rank)
            own = global_batch(99)[share * rows : (share + 1) * rows]
            total = module.eval_batch({"input_ids": own}).loss.double()
            if env.world_size > 1:
                torch.distributed.all_reduce(total)
            return total.item()

        losses = [loss()]
        with average.held():
            losses.append(loss())
            save_checkpoint(
                Path(folder),
                tensors=module.state_tensors(),
                rank_state={},
                rank=env.rank,
                group=env.checkpoint_group,
                step=STEPS,
                tokens=0,
                engine=engine,
            )
        losses.append(loss())
        return equal, losses
    finally:
        env.close()


@pytest.fixture(scope="module")
def single(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("single")
    (found,) = workers.run(1, averaged, "single", str(folder), {})
    return found[1], weights(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(iterate_tensors(folder / f"step{STEPS}/model_and_optim", "model."))


# Two ranks of the stages 1 and 2 hold flat slices like those of stage 3.
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "engine", ["ddp", "fsdp", "zero3", *(pytest.param(f"zero{s}", marks=SLOW) for s in (1, 2))]
)
def test_an_average_is_the_same_on_every_engine(
    workers: WorkerPool, tmp_path: Path, single: Any, engine: str
) -> None:
    found = workers.run(2, averaged, engine, str(tmp_path), {})
    assert all(equal for equal, _ in found)
    before, inside, after = found[0][1]
    assert before == after != inside
    assert [before, inside] == pytest.approx(single[0][:2], rel=1e-5)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, single[1][name], rtol=1e-3, atol=1e-4)


EMA = '--trainer.callbacks.ema={"enabled": true, "decay": [0.9, 0.5], "start_step": 2}'
FSDP = "--train_module.dp_config={name: fsdp}"


def test_two_ranks_resume_averages_bit_equal_and_agree_on_an_early_end(
    workers: WorkerPool, tmp_path: Path
) -> None:
    shared = [str(tmp_path / "data"), FSDP, "--trainer.callbacks.checkpointer.keep_last=null"]
    stopping = {"enabled": True, "metric": "train/loss", "min_delta": 100.0, "patience": 3}
    for name, flags in (
        ("whole", [EMA]),
        ("parts", [EMA, "--trainer.hard_stop.value=6"]),
        ("parts", [EMA, "--trainer.hard_stop=null"]),
        (
            "early",
            [
                f"--trainer.callbacks.early_stopping={json.dumps(stopping)}",
                '--trainer.callbacks.metric_saver={"enabled": true}',
                "--trainer.metrics_collect_interval=1",
                "--trainer.max_duration.value=400",
            ],
        ),
    ):
        done = workers.run(2, run_smoke, str(tmp_path / name), *shared, *flags)
        assert done == [(0, "")] * 2
    whole, parts = (
        dict(iterate_tensors(tmp_path / name / "checkpoints/step12/model_and_optim", ""))
        for name in ("whole", "parts")
    )
    assert sum(key.startswith("callback.ema.") for key in whole) == 2 * sum(
        key.startswith("model.") for key in whole
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())
    evaluations = [records(tmp_path / name, "eval") for name in ("whole", "parts")]
    names = [(r["step"], r["name"]) for r in evaluations[0]]
    suffixes = ("", "_ema_0.9", "_ema_0.5")
    assert names == [(step, f"val{suffix}") for step in (0, 6, 12) for suffix in suffixes]
    assert [r["loss"] for r in evaluations[0]] == [r["loss"] for r in evaluations[1]]
    recorded = {r["name"]: r["loss"] for r in evaluations[0] if r["step"] == 12}
    for given, name in ((None, "val"), ("ema/0.5", "val_ema_0.5")):
        found = evaluate(str(tmp_path / "whole"), weights=given)
        assert found.scores[0].loss == pytest.approx(recorded[name], rel=1e-6)
        assert found.settings.get("weights") == given
    with pytest.raises(CheckpointError, match=r"averages 'ema': there are ema/0\.5, ema/0\.9"):
        evaluate(str(tmp_path / "whole"), weights="ema")
    status = json.loads((tmp_path / "early/metadata/status.json").read_text())
    assert (status["state"], status["exit_reason"]) == ("finished", "early_stopping")
    assert 4 <= status["step"] < 400
    assert (tmp_path / f"early/checkpoints/step{status['step']}/.metadata.json").is_file()
    final = json.loads((tmp_path / "early/metrics/final.json").read_text())
    assert final["train"]["step"] == final["eval"]["val"]["step"] == status["step"]


def records(folder: Path, stream: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"metrics/{stream}.jsonl").open()]


def ended(place: str) -> list[Any]:
    from toolkit.checkpoint.load import load_rank_state
    from toolkit.errors import ToolkitError
    from toolkit.hf.source import averaged, find_source, kept_tensors

    folder = Path(place)
    flags = [
        '--trainer.callbacks.ema={"enabled": true, "decay": 0.5, "evaluate": "instead"}',
        '--trainer.callbacks.model_merger={"enabled": true}',
        '--trainer.callbacks.hf_converter={"enabled": true, "interval": 2}',
        '--trainer.callbacks.config_saver={"enabled": true}',
        '--trainer.callbacks.early_stopping={"enabled": true, "min_delta": 100, "patience": 2}',
        "--trainer.callbacks.lm_evaluator={interval: 3}",
        "--trainer.callbacks.checkpointer.export_hf=true",
    ]
    found: list[Any] = [run_smoke(f"{place}/run", f"{place}/data", *flags) for _ in range(2)]
    source = find_source(folder / "run")
    found.append(dict(kept_tensors(averaged(source, "ema")))["embeddings.tokens.weight"])
    for name in ("ema/0.9", "other"):
        try:
            averaged(source, name)
        except ToolkitError as error:
            found.append(str(error))
    state = load_rank_state(folder / "run/checkpoints/step9", 0)["trainer"]["callbacks"]
    found.append(state["early_stopping"])
    return found


def test_a_run_that_ends_early_is_averaged_merged_and_exported(
    workers: WorkerPool, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from toolkit.commands.merge import merge

    (found,) = workers.run(1, ended, str(tmp_path))
    first, again, average, *messages, state = found
    assert first == again == (0, "")  # nothing is left to do the second time
    assert messages[0].endswith("run: averages 'ema/0.9': there are ema/0.5")
    assert messages[1].endswith("run: averages 'other': there are ema/0.5")
    assert (state["without"], state["best_at"]) == (2, 3)
    run = tmp_path / "run"
    stored = {
        step: dict(iterate_tensors(run / f"checkpoints/step{step}/model_and_optim", ""))
        for step in (3, 6, 9)
    }
    assert not torch.equal(average, stored[9]["model.embeddings.tokens.weight"])
    for exported in (run / "checkpoints/step9/hf", run / "hf/step9"):
        table = load_file(exported / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(table, average[: len(table)])
    assert (run / "hf/step6/config.json").is_file()
    assert "torch==" in (run / "metadata/requirements.txt").read_text()

    def mean(*steps: int) -> dict[str, np.ndarray]:
        keys = (key for key in stored[9] if key.startswith("model."))
        of = {key: np.stack([stored[step][key].numpy() for step in steps]) for key in keys}
        return {k: v.astype(np.float64).mean(0).astype(np.float32) for k, v in of.items()}

    two = merge(str(run), steps=[3, 9], out=str(tmp_path / "merged"))
    for folder, expected in ((run / "merged/step9", mean(3, 6, 9)), (two, mean(3, 9))):
        merged = dict(iterate_tensors(folder / "model_and_optim", ""))
        assert merged.keys() == expected.keys()
        assert all(np.array_equal(merged[key].numpy(), expected[key]) for key in expected)


def test_the_mean_of_the_last_steps_is_that_of_their_checkpoints(
    workers: WorkerPool, tmp_path: Path
) -> None:
    flags = [
        str(tmp_path / "run"),
        str(tmp_path / "data"),
        "--trainer.no_evals",
        "--trainer.max_duration.value=8",
        '--trainer.callbacks.model_merger={"enabled": true, "last_percent": 40}',
        "--trainer.callbacks.checkpointer={interval: 1, keep_last: null, export_hf: false}",
    ]
    for stop in ("{value: 6}", "null"):
        assert workers.run(1, run_smoke, *flags, f"--trainer.hard_stop={stop}") == [(0, "")]
    folders = [f"checkpoints/step{step}" for step in (6, 7, 8)] + ["merged/step8"]
    *parts, merged = (
        dict(iterate_tensors(tmp_path / "run" / folder / "model_and_optim", "model."))
        for folder in folders
    )
    for name, tensor in merged.items():
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --steps or --last"),
        ({"steps": [3, 4]}, "no checkpoint step4; there are: 3"),
        ({"last": 2}, "--last 2: .* has 1 checkpoints"),
        ({"steps": [3, 3]}, "--steps 3,3: one is there twice"),
    ],
)
def test_a_merge_of_what_is_not_there_is_one_line(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    from toolkit.commands.merge import merge
    from toolkit.errors import ToolkitError

    (tmp_path / "step3").mkdir()
    (tmp_path / "step3/.metadata.json").write_text("{}")
    with pytest.raises(ToolkitError, match=message) as error:
        merge(str(tmp_path), **options)
    assert "\n" not in str(error.value)
