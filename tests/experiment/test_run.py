"""What one process of a run concludes about the others, and about the run it continues."""

import time
from pathlib import Path
from typing import Any

import pytest

from toolkit.data.corpus_info import data_places
from toolkit.data.tokens.prepared import MANIFEST_NAME
from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.layout import Layout, resolve_layout
from toolkit.errors import ConfigError, TrainingError
from toolkit.experiment import run as experiment
from toolkit.experiment.found_data import find_data
from toolkit.experiment.load import load_experiment
from toolkit.experiment.training import Training
from toolkit.launch import failures
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.storage.atomic import write_json_atomic


@pytest.mark.parametrize(
    ("state", "message", "expected"),
    [
        ("failed", "step 7: disk full", True),
        ("failed", "step 7: something else", False),
        ("running", None, False),
    ],
)
def test_an_error_is_rank_0s_too_when_it_failed_with_the_same_words(
    state: Any, message: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(failures, "SECONDS_FOR_RANK_0", 0.05)
    (tmp_path / "metadata").mkdir()
    run = RunManager(tmp_path, experiment="a", name="b")
    run.set_status(state, message=message)
    error = TrainingError("step 7: disk full\nmore")
    assert failures._ends_rank_0(error, run) is expected


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Resume a run that recorded an engine; returns (config trained with, config stored)."""
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)

    def resume(engine: Layout, *overrides: str, **environ: str) -> tuple[Any, Any]:
        (tmp_path / "metadata").mkdir()
        run = RunManager(tmp_path, experiment="a", name="b")
        Training.log_configs(load_experiment("smoke").config, run, engine, {})
        run.close("stopped")
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        seen: list[tuple[Any, Any]] = []

        def train(config: Any, *, origins: Any, stored: Any, data: Any, anew: Any) -> int:
            seen.append((config, stored))
            return 0

        monkeypatch.setattr(experiment, "train", train)
        assert experiment.resume(tmp_path, overrides) == 0
        return seen[0]

    return resume


def engine(name: Any, precision: Any, **more: Any) -> Layout:
    return resolve_layout(precision, DataParallelConfig(name=name, **more), {})


@pytest.mark.parametrize(
    ("recorded", "flags", "launched", "expected"),
    [
        ("bf16", [], {}, "bf16"),
        ("bf16", [], {"ACCELERATE_MIXED_PRECISION": "no"}, "bf16"),
        ("fp32", [], {"ACCELERATE_MIXED_PRECISION": "bf16"}, "auto"),
        ("bf16", ["--train_module.precision=fp32"], {}, "fp32"),
        ("bf16", ["--train_module.precision=auto"], {}, "auto"),
        ("bf16", ["--train_module.dp_config={name: single, param_dtype: float32}"], {}, "auto"),
    ],
)
def test_a_resumed_run_keeps_its_precision_where_nobody_says_another(
    recorded: str, flags: list[str], launched: dict[str, str], expected: str, resumed: Any
) -> None:
    config, _ = resumed(engine("single", recorded), *flags, **launched)
    assert config.train_module.precision == expected


def test_a_resumed_run_keeps_its_deepspeed_settings(resumed: Any) -> None:
    settings = {"zero_optimization": {"reduce_bucket_size": 1000}}
    config, stored = resumed(engine("zero2", "fp32", deepspeed_config=settings))
    module = config.train_module
    again = resolve_layout(module.precision, module.dp_config, {})
    assert (again.name, again.dp_config.deepspeed_config) == ("zero2", settings)
    assert stored.train_module.dp_config is None
    assert stored.train_module.precision == "auto"


def test_a_password_in_a_url_is_refused_and_a_variable_is_stored_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"run.registry: holds a secret.*me:\$\{NAME\}@host/runs"):
        load_experiment("smoke", ["--run.registry=postgresql://me:secret@host/runs"])
    monkeypatch.setenv("DB_PASSWORD", "secret-of-the-test")
    flag = "--run.registry=postgresql://me:${DB_PASSWORD}@host/runs"
    loaded = load_experiment("smoke", [flag])
    assert loaded.config.run.registry == "postgresql://me:secret-of-the-test@host/runs"
    (tmp_path / "metadata").mkdir()
    run = RunManager(tmp_path, experiment="a", name="b")
    Training.log_configs(loaded.stored, run, engine("single", "fp32"), loaded.origins)
    for file in tmp_path.rglob("*.json"):
        assert "secret-of" not in file.read_text()
    for file in ("metadata/config.json", "metadata/origins.json"):
        assert "postgresql://me:${DB_PASSWORD}@host" in run.path(file).read_text()


def test_data_behind_a_variable_is_found_on_every_resume_and_stays_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, run_dir = tmp_path / "started", tmp_path / "run"
    monkeypatch.setenv("CORPUS_OF_TEST", "data")
    loaded = load_experiment("smoke", ["--dataset.root=${CORPUS_OF_TEST}/x"])
    (place,) = data_places(loaded.config.data)
    (started / place).mkdir(parents=True)
    (started / place / MANIFEST_NAME).write_text("{}")
    (run_dir / "metadata").mkdir(parents=True)
    write_json_atomic(run_dir / RUN_FILES.command, {"cwd": str(started)})
    config = find_data(loaded.config, run_dir)
    stored = find_data(loaded.stored, run_dir, is_filled=False)
    assert stored.dataset.root == f"{started}/${{CORPUS_OF_TEST}}/x"
    assert config.dataset.root == f"{started}/data/x"
    monkeypatch.setenv("CORPUS_OF_TEST", str(started / "data"))
    absolute = find_data(loaded.stored, run_dir, is_filled=False)
    assert absolute.dataset.root == "${CORPUS_OF_TEST}/x"


def test_who_speaks_on_the_console_is_the_config_s_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "toolkit.experiment.run.setup_logging",
        lambda rank, **options: said.append((rank, *options.values())),
    )
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    flags = ["--trainer.log_ranks=all", "--data_loader.global_batch_size=7"]
    with pytest.raises(ConfigError, match="global_batch_size 7"):
        experiment.train(load_experiment("smoke", flags).config)
    assert said == [(0, 0, "all")]
    with pytest.raises(ConfigError, match="log_ranks"):
        load_experiment("smoke", ["--trainer.log_ranks=some"])
    with pytest.raises(ConfigError, match="collective_timeout must be greater than 0"):
        load_experiment("smoke", ["--trainer.collective_timeout=0"])
