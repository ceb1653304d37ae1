"""What `toolkit resume --explain` says, and that saying it changes nothing."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest

from tests.data.corpus import files_config, random_text, write_texts
from tests.e2e._run import content
from tests.tiny import empty_weights
from toolkit import get_dataloaders, prepare_dataset
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.cli import main as cli
from toolkit.commands.explain import Explanation, explain_resume
from toolkit.distributed.config import DataParallelConfig
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    folder = tmp_path_factory.mktemp("explain")
    texts = write_texts(folder / "text", [random_text(2, seed=i) for i in range(80)])
    dataset = files_config(folder / "data", texts, sequence_length=64)
    prepare_dataset(dataset)
    return load_experiment("smoke").config.replace(dataset=dataset)


@pytest.fixture
def run(tmp_path: Path, config: ExperimentConfig) -> Path:
    """A run of two FSDP processes: stopped, recorded to step 14, with no checkpoint yet."""
    folder = tmp_path / "run"
    for name in ("metadata", "metrics"):
        (folder / name).mkdir(parents=True)
    manager = RunManager(folder, experiment="a", name="b")
    manager.log_metadata(config, RUN_FILES.config)
    lines = [f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 15)]
    (folder / "metrics" / "train.jsonl").write_text("".join(lines))
    engine = msgspec.to_builtins(DataParallelConfig(name="fsdp"))
    manager.set_status("running", engine="fsdp", world_size=2, dp_config=engine, precision="fp32")
    manager.close("stopped")
    return folder


def save(run: Path, config: ExperimentConfig, step: int) -> None:
    loader, _ = get_dataloaders(config.data, batch_rank=0, batch_ranks=1)
    loader.batches_done = step
    save_checkpoint(
        run / "checkpoints", step=step, tokens=step * 1024, tensors=empty_weights(config.model),
        rank_state={"trainer": {"step": step, "data": loader.state_dict()}}, engine="fsdp", rank=0,
        group=None,
        extra={
            "model": msgspec.to_builtins(config.model),
            "optim": msgspec.to_builtins(config.train_module.optim),
            "data_fingerprint": loader.fingerprint,
            "versions": {"torch": version("torch"), "numpy": "0.1"},
        },
    )  # fmt: skip


def explain(run: Path, *overrides: str, **environ: str) -> Explanation:
    before = content(run)
    explanation = explain_resume(run, overrides, environ)
    assert content(run) == before
    return explanation


def test_step_engine_data_and_versions_are_told(run: Path, config: ExperimentConfig) -> None:
    save(run, config, 5)
    save(run, config, 10)
    explanation = explain(run)
    rows = dict(explanation.rows)
    root = run / "checkpoints"
    assert rows["run"] == [f"{run}: stopped, attempt 1"]
    assert rows["checkpoint"] == [
        f"{root / 'step10'}: step 10, 10,240 tokens",
        "steps 11 to 14 were recorded, and are done again",
    ]
    assert "skipped" not in rows
    assert rows["engine"][0] == "saved by fsdp x 1, goes on with fsdp x 2 in fp32"
    assert "this command launches 2 processes" in rows["engine"]
    assert rows["config"] == ["nothing changes"]
    assert [line.partition(" then")[0] for line in rows["versions"]] == ["numpy: 0.1"]
    steps = get_dataloaders(config.data, batch_rank=0, batch_ranks=1)[0].steps_per_epoch
    assert rows["data"][0] == f"next is batch {10 % steps} (from 0) of epoch {10 // steps + 1}, " \
                              f"of {steps}"  # fmt: skip
    assert rows["goes on"] == ["from step 11 to 20"]
    assert explanation.refused == []
    assert str(explanation).endswith("refused     nothing: it would start")
    past = dict(explain(run, "--trainer.max_duration={value: 2, unit: steps}").rows)["goes on"][0]
    assert past.endswith("to go on, add --trainer.max_duration='{value: 20, unit: steps}'")


def test_a_launcher_decides_the_engine(run: Path, config: ExperimentConfig) -> None:
    save(run, config, 5)
    rows = dict(explain(run, WORLD_SIZE="4").rows)
    assert rows["engine"][0] == "saved by fsdp x 1, goes on with fsdp x 4 in fp32"
    assert not any("launches" in line for line in rows["engine"])
    rows = dict(explain(run, "--train_module.dp_config={name: zero1}", WORLD_SIZE="2").rows)
    assert rows["engine"][0] == "saved by fsdp x 1, goes on with zero1 x 2 in fp32"


def test_processes_and_engine_can_be_asked_for(
    run: Path, config: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, config, 10)
    words = ["resume", "--explain", str(run), "--processes", "2", "--engine", "zero1"]
    assert cli.run(words) == 0
    assert "goes on with zero1 x 2 in " in capsys.readouterr().out


def test_damaged_newer_checkpoints_are_skipped_with_the_reason(
    run: Path, config: ExperimentConfig
) -> None:
    save(run, config, 5)
    save(run, config, 10)
    (run / "checkpoints" / "step10" / "train" / "rank0.pt").unlink()
    rows = dict(explain(run).rows)
    assert rows["skipped"] == ["step10: train/rank0.pt is missing (becomes step10.invalid)"]
    assert rows["checkpoint"][0].endswith("step5: step 5, 5,120 tokens")


def test_folders_of_where_the_run_was_started_are_no_change(
    run: Path, config: ExperimentConfig
) -> None:
    started = Path(config.dataset.root).parent
    dataset = config.dataset.replace(root=Path(config.dataset.root).name)
    manager = RunManager(run, experiment="a", name="b")
    manager.log_metadata(config.replace(dataset=dataset), RUN_FILES.config)
    manager.log_metadata({"cwd": str(started)}, RUN_FILES.command)
    manager.close("stopped")
    rows = dict(explain(run).rows)
    assert rows["config"] == ["nothing changes"]
    assert rows["data"][-1].startswith(str(started))


def test_all_that_is_refused_is_told_with_exit_2(
    run: Path, config: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, config, 5)
    changes = [
        "--train_module.optim={type: sgd}", "--data_loader.seed=4", "--model.d_model=64",
        "--train_module.optim.lr=0.5", "--trainer.max_duration.value=30",
    ]  # fmt: skip
    explanation = explain(run, *changes)
    assert len(explanation.refused) == 3
    for expected in ("model.d_model (was 32, is 64)", "was adamw, is sgd", "seed (was 0, is 4)"):
        assert sum(expected in reason for reason in explanation.refused) == 1
    assert "train_module.optim.lr: 0.01 -> 0.5" in dict(explanation.rows)["config"]
    assert cli.run(["resume", "--explain", str(run), *changes]) == 2
    assert "from step 6 to 30" in capsys.readouterr().out
    assert cli.run(["resume", str(run), "--explain", "--train_module.optim.lr=0.5"]) == 0
    (reason,) = explain(run, "--seed=4").refused
    assert ": seed, which data_loader.seed follows (was 0, is 4); set it back" in reason
    (reason,) = explain(run, "--data_loader.seed=4").refused
    assert ": data_loader.seed (was 0, is 4); set it back" in reason
    wrong = ["resume", "--explain", str(run), "--data_loader.global_batch_size=1000"]
    assert cli.run(wrong) == 2
    assert "global_batch_size 1000 is not divisible" in capsys.readouterr().out
    assert cli.run(["resume", "--explain", str(run.parent)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_a_run_that_is_being_written_is_refused(run: Path, config: ExperimentConfig) -> None:
    save(run, config, 5)
    status = json.loads((run / RUN_FILES.status).read_text())
    (run / RUN_FILES.status).write_text(json.dumps(status | {"state": "running"}))
    assert explain(run).refused == []
    assert dict(explain(run).rows)["run"] == [f"{run}: dead, attempt 1"]
    from toolkit.runs.lock import RunLock

    lock = RunLock(run)
    lock.acquire()
    try:
        assert "another process is writing this run" in explain_resume(run, (), {}).refused[0]
    finally:
        lock.release()


def test_without_a_checkpoint_torch_is_not_imported(run: Path) -> None:
    program = (
        "import sys; from toolkit.cli.main import run; "
        f"code = run(['resume', '--explain', {str(run)!r}]); "
        "print(code, 'torch' in sys.modules)"
    )
    environ = {"PATH": "", "WORLD_SIZE": "1", "RANK": "0"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=False
    )
    assert "none that is whole" in result.stdout, result.stderr
    refused = f"{run}: it has done 14 steps, and no checkpoint of it is whole (it was never saved)"
    assert f"refused     {refused}; --trainer.start_anew starts it" in result.stdout
    assert result.stdout.splitlines()[-1] == "2 False"
