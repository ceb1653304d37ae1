"""Which steps can be replayed, with what, and how losses are compared."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from toolkit.autotune.choices import Choices
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.commands.receipt import BIT_FOR_BIT, compare, relative_difference
from toolkit.commands.replay import plan_replay, replay_config, replay_steps
from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.layout import Layout, resolve_layout
from toolkit.distributed.ranks import ENGINE
from toolkit.errors import ConfigError, DataError, RunError
from toolkit.experiment import run as running
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.experiment.recorded import metadata_of_attempt
from toolkit.experiment.training import describe_engine
from toolkit.launch.capacity import Capacity
from toolkit.launch.plan import LaunchPlan
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.train.callbacks.config import CallbacksConfig


def engine(world_size: int = 1, **changes: Any) -> Layout:
    settings: dict[str, Any] = {"name": "single" if world_size == 1 else "fsdp"}
    config = DataParallelConfig(**(settings | changes))
    return resolve_layout("fp32", config, {"WORLD_SIZE": str(world_size)})


def config_in(folder: Path, *overrides: str) -> ExperimentConfig:
    config = load_experiment("smoke", overrides).config
    text = folder / "text.txt"
    text.write_text("a line of text\n" * 400)
    source = FilesSourceConfig(paths=[str(text)])
    dataset = config.dataset.replace(root=str(folder / "data"), source=source, num_processes=1)
    return config.replace(dataset=dataset)


def attempt(folder: Path, config: ExperimentConfig, engine: Layout, *, steps: range) -> None:
    """What one attempt leaves behind: metadata, recorded steps, a checkpoint every 5."""
    (folder / "metadata").mkdir(exist_ok=True, parents=True)
    (folder / "metrics").mkdir(exist_ok=True)
    run = RunManager(folder, experiment="a", name="b")
    run.log_metadata(config, RUN_FILES.config)
    run.log_metadata(describe_engine(engine), RUN_FILES.engine)
    run.log_metadata({"versions": {"torch": "1", "numpy": "2"}}, RUN_FILES.environment)
    with (folder / "metrics" / "train.jsonl").open("a") as file:
        for step in steps:
            line = {"step": step, "attempt": run.attempt, "loss": 1 / step, "lr": 0.1}
            file.write(json.dumps(line) + "\n")
            if step % 5 == 0:
                save_checkpoint(
                    folder / "checkpoints", step=step, tokens=0, rank_state={},
                    tensors={"model.a": torch.ones(1)}, engine=engine.name, rank=0, group=None,
                )  # fmt: skip
    run.close("finished")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 1 to 8 on one process; 9 to 20 on two, with another learning rate from 13 on."""
    config = config_in(tmp_path)
    prepare_dataset(config.dataset)
    folder = tmp_path / "run"
    attempt(folder, config, engine(), steps=range(1, 9))
    attempt(folder, config, engine(2), steps=range(9, 13))
    changed = config_in(tmp_path, "--train_module.optim.lr=0.5", "--trainer.hard_stop.value=9")
    attempt(folder, changed, engine(2), steps=range(13, 21))
    with (folder / "metrics" / "train.jsonl").open("a") as file:
        file.write('{"step": 21, "los')
    return folder


def test_metadata_is_what_it_was_during_an_attempt(run: Path) -> None:
    names = [metadata_of_attempt(run, RUN_FILES.engine, n).name for n in (1, 2, 3)]
    assert names == ["engine.attempt1.json", "engine.json", "engine.json"]
    names = [metadata_of_attempt(run, RUN_FILES.config, n).name for n in (1, 2, 3)]
    assert names == ["config.attempt2.json", "config.attempt2.json", "config.json"]


@pytest.mark.parametrize(
    ("steps", "step", "start", "lr", "world_size"),
    [
        (3, None, 15, 0.5, 2),
        (5, None, 15, 0.5, 2),
        (2, 10, 10, 0.01, 2),
        (3, 5, 5, 0.01, 1),
    ],
)
def test_the_plan_takes_config_and_engine_of_the_steps_own_attempt(
    steps: int, step: int | None, start: int, lr: float, world_size: int, run: Path
) -> None:
    plan = plan_replay(run, steps, step)
    assert (plan.step, plan.checkpoint.name) == (start, f"step{start}")
    assert [line.step for line in plan.recorded] == list(range(start + 1, start + steps + 1))
    assert plan.config.train_module.optim.lr == lr
    assert plan.engine is not None
    assert plan.engine.world_size == world_size
    assert plan.versions["torch"] == "1"


@pytest.mark.parametrize(
    ("steps", "step", "expected"),
    [
        (6, None, r"no checkpoint has 6 steps recorded after it by one config and engine; "
                  r"can be replayed: step 5 \(3 after it\), 10 \(2 after it\), 15 \(5 after it\)"),
        (4, 5, "step5 has not 4 steps"),
        (1, 20, "step20 has not 1 steps"),
        (1, 7, "no checkpoint step7"),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed_is_refused_with_what_can(
    steps: int, step: int | None, expected: str, run: Path
) -> None:
    with pytest.raises(RunError, match=expected):
        plan_replay(run, steps, step)


def test_a_step_folder_stands_for_its_run_and_step(run: Path, tmp_path: Path) -> None:
    assert plan_replay(run / "checkpoints" / "step10", 2).step == 10
    with pytest.raises(ConfigError, match="is a checkpoint already"):
        plan_replay(run / "checkpoints" / "step10", 2, 10)
    with pytest.raises(ConfigError, match="--replay 0"):
        plan_replay(run, 0)
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="prepared data is not there"):
        plan_replay(run, 1)


def test_a_replay_starts_the_processes_that_are_asked_for_else_as_many_as_there_were(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def launch(command: list[str], processes: int, **more: Any) -> int:
        started.append(
            (command[command.index("toolkit") + 1 :], processes, more["verb"], more["folder"])
        )
        return 7

    monkeypatch.setattr(running, "launch", launch)
    words = ["verify", str(run), "--replay", "2", "--step", "15"]
    assert replay_steps(run, 2) == 7
    assert replay_steps(run, 2, asked=LaunchPlan(4)) == 7
    assert started == [(words, 2, "verify", run), (words, 4, "verify", run)]
    monkeypatch.setenv(ENGINE, "hsdp")
    with pytest.raises(ConfigError, match="hsdp mesh num_replicas 2 x shard_degree 1 does not fit"):
        replay_steps(run, 2, asked=LaunchPlan(3))


def test_a_replay_writes_nothing_but_its_own_steps(run: Path, tmp_path: Path) -> None:
    plan = plan_replay(run, 2, 10)
    config = replay_config(plan, str(tmp_path / "scratch"), {"WORLD_SIZE": "2"})
    trainer = config.trainer
    assert config.run.root == str(tmp_path / "scratch")
    assert (config.run.registry, config.run.save_folder, config.dataset.source) == (None,) * 3
    assert (trainer.load_path, trainer.load_strategy) == (str(plan.checkpoint), "always")
    assert not trainer.load_weights_only
    assert trainer.hard_stop is not None
    assert (trainer.hard_stop.value, trainer.max_duration) == (12, plan.config.trainer.max_duration)
    assert trainer.no_checkpoints
    assert trainer.no_evals
    assert trainer.stop_file is None
    ours = set(CallbacksConfig.__struct_fields__) - {"custom"}
    assert not any(getattr(trainer.callbacks, name).enabled for name in ours)
    module = config.train_module
    assert module.precision == "fp32"
    assert module.dp_config is not None
    assert module.dp_config.name == "fsdp"
    alone = replay_config(plan, "x", {"WORLD_SIZE": "1"}).train_module
    assert alone.dp_config is None


def test_a_replay_takes_the_recorded_kernel_of_attention_where_there_are_gpus(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_replay(run, 2, 10)
    assert plan.engine is not None
    record = msgspec.structs.replace(plan.engine, chosen=Choices(attention="cudnn"))
    plan = plan._replace(engine=record)
    for gpus, expected in ((2, "cudnn"), (0, "auto")):
        capacity = Capacity(2, "", gpus)
        monkeypatch.setattr("toolkit.commands.replay.capacity_here", lambda _, c=capacity: c)
        module = replay_config(plan, "x", {"WORLD_SIZE": "2"}).train_module
        assert module.attention_backend == expected


def compared(run: Path, tmp_path: Path, losses: list[Any], now: Layout | None = None) -> Any:
    """The receipt of steps 6 to 8 with these replayed losses."""
    plan = plan_replay(run, 3, 5)
    again = tmp_path / "again"
    attempt(again, plan.config, now or engine(), steps=range(0))
    lines = [json.dumps({"step": 6 + i, "loss": loss}) for i, loss in enumerate(losses)]
    (again / "metrics" / "train.jsonl").write_text("\n".join(lines) + "\n")
    return compare(plan, again)


def test_equal_losses_give_a_receipt_that_says_so(run: Path, tmp_path: Path) -> None:
    receipt = compared(run, tmp_path, [1 / 6, 1 / 7, 1 / 8])
    stored = json.loads((run / "metadata" / "verify-replay-step5.json").read_text())
    assert (stored["verdict"], stored["comparison"]) == ("equal", BIT_FOR_BIT)
    assert (stored["first_step"], stored["last_step"], stored["compared"]) == (6, 8, 3)
    assert stored["replayed"]["name"] == "single"
    assert stored["replayed_versions"]["torch"] == "1"
    assert (receipt.largest_difference, receipt.first_difference) == (0.0, None)


def test_the_last_bit_counts_on_the_same_engine(run: Path, tmp_path: Path) -> None:
    off = math.nextafter(1 / 7, 1)
    receipt = compared(run, tmp_path, [1 / 6, off, 0.5])
    assert receipt.verdict == "differs"
    first = receipt.first_difference
    assert (first.step, first.recorded, first.replayed) == (7, 1 / 7, off)
    assert receipt.largest_difference == pytest.approx(0.75)


def test_another_engine_may_round_otherwise_and_the_receipt_says_why(
    run: Path, tmp_path: Path
) -> None:
    receipt = compared(run, tmp_path, [1 / 6, 1 / 7 * (1 + 9e-6), 1 / 8], engine(2))
    assert receipt.verdict == "equal"
    assert receipt.comparison == "within a relative 1e-05"
    assert receipt.reasons == ["engine: single then, fsdp now", "processes: 1 then, 2 now"]
    receipt = compared(run, tmp_path / "more", [1 / 6, 1 / 7 * (1 + 2e-5), 1 / 8], engine(2))
    assert (receipt.verdict, receipt.first_difference.step) == ("differs", 7)


def test_a_missing_or_non_finite_loss_is_a_difference(run: Path, tmp_path: Path) -> None:
    receipt = compared(run, tmp_path, [1 / 6, 1 / 7])
    assert (receipt.first_difference.step, receipt.first_difference.replayed) == (8, None)
    assert relative_difference("nan", "nan") == 0
    assert relative_difference("nan", 1.0) == math.inf
