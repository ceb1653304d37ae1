"""`auto` on all ranks, over a run's life, and what keeps it from measuring."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import build, module_config, tiny_model
from toolkit.autotune import cache
from toolkit.autotune.choices import Choices, Timings
from toolkit.autotune.question import MEASURE
from toolkit.commands.dry_run import summarize
from toolkit.commands.train import resume, train
from toolkit.distributed import choosing
from toolkit.distributed import environment as environments
from toolkit.distributed.choosing import may_compile, question_of, recorded_choices
from toolkit.distributed.environment import prepare_training_environment, single_environment
from toolkit.distributed.layout import layout_of
from toolkit.distributed.tuning import cpu_name
from toolkit.errors import EXIT_DONE
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.experiment.recorded import engine_of
from toolkit.models import sdpa
from toolkit.models.kernels import Hardware
from toolkit.runs.registry import start_run
from toolkit.runs.status import read_status
from toolkit.testing import WorkerPool, assert_same_training, tiny_experiment

BF16 = Timings(precision={"fp32": 2.0, "bf16": 1.0})
FP32 = Timings(precision={"fp32": 1.0, "bf16": 2.0})
STEPS: dict[str, Any] = {"max_duration": {"value": 4, "unit": "steps"}}


@pytest.fixture(autouse=True)
def _measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` asks the cache of this test."""
    monkeypatch.setenv(MEASURE, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TOOLKIT_NUM_THREADS", "1")
    monkeypatch.delenv("RANK", raising=False)


def keep(config: ExperimentConfig, timings: Timings, world_size: int = 1) -> None:
    """Put `timings` where this machine will look for those of `config`."""
    environ = {**os.environ, "WORLD_SIZE": str(world_size)}
    layout = layout_of(config.train_module, environ)
    question = question_of(
        config, layout, device="cpu", name=cpu_name(), local_world_size=world_size
    )
    assert question is not None
    file = cache._path(question.key)
    file.unlink(missing_ok=True)
    assert cache.find_or_measure(question.key, lambda: timings, []) == timings


def chosen_of(folder: Path, rank_0: Timings, rank_1: Timings) -> tuple[str, Choices, tuple]:
    rank = int(os.environ["RANK"])
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache{rank}")
    os.environ[MEASURE] = "1"
    config = tiny_experiment(folder / "experiment")
    keep(config, (rank_0, rank_1)[rank], world_size=2)
    environment = prepare_training_environment(config)
    try:
        layout = environment.layout
        return layout.precision, environment.choices, layout.notices
    finally:
        environment.close()


def test_all_ranks_take_what_rank_0_has_measured(workers: WorkerPool, tmp_path: Path) -> None:
    for mine, other, expected in ((BF16, FP32, "bf16"), (FP32, BF16, "fp32")):
        first, second = workers.run(2, chosen_of, tmp_path, mine, other)
        assert first == second
        assert first[0] == first[1].precision == expected
        assert f"precision {expected} (measured" in first[2][0]


def said_in(run: Path) -> str:
    return "".join(file.read_text() for file in (run / "logs").iterdir())


def run_in(folder: Path, config: ExperimentConfig, stop: int | None = None) -> Path:
    trainer = config.trainer.replace(
        hard_stop=None if stop is None else type(config.trainer.max_duration)(value=stop)
    )
    place = config.run.replace(save_folder=str(folder))
    assert train(config.replace(run=place, trainer=trainer)) == EXIT_DONE
    return folder


@pytest.mark.slow
def test_a_resume_keeps_the_recorded_precision_whatever_is_measured_now(
    tmp_path: Path,
) -> None:
    config = tiny_experiment(tmp_path, trainer=STEPS)
    keep(config, BF16)
    run = run_in(tmp_path / "run", config, stop=2)
    assert "precision bf16 (measured 2.0x of fp32 on this CPU)" in said_in(run)
    status = read_status(run)
    assert status is not None
    assert status.other["chosen"]["precision"] == "bf16"
    assert (engine := engine_of(run, 1)) is not None
    assert engine.chosen.precision == engine.precision == "bf16"

    keep(config, FP32)
    assert resume(run, ["--trainer.hard_stop.value=3"]) == EXIT_DONE
    assert (
        "precision bf16, as the run recorded it; this machine would choose fp32 (measured on this "
        "CPU: bf16 is 0.5x of it): --train_module.precision=fp32 takes it"
    ) in said_in(run)
    run_in(run, config)  # `train` into a run folder goes on too
    pinned = config.replace(train_module=config.train_module.replace(precision="bf16"))
    same = tmp_path / "pinned"
    for stop in (2, 3, None):
        run_in(same, pinned, stop)
    assert_same_training(run, same)
    other = pinned.replace(train_module=pinned.train_module.replace(precision="fp32"))
    with pytest.raises(AssertionError, match="step=1"):
        assert_same_training(run, run_in(tmp_path / "fp32", other, 1))


def test_auto_that_is_asked_for_again_is_measured_again(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path, trainer=STEPS)
    keep(config, BF16)
    run = run_in(tmp_path / "run", config, stop=1)
    keep(config, FP32)
    flags = ["--trainer.hard_stop.value=2", "--train_module.precision=auto"]
    assert resume(run, flags) == EXIT_DONE
    assert (engine := engine_of(run, 2)) is not None
    assert engine.chosen.precision == engine.precision == "fp32"


def test_a_run_that_is_started_again_by_its_command_keeps_its_choices(tmp_path: Path) -> None:
    """As after a preemption, with `--train_module.precision=auto` on the command line."""
    config = tiny_experiment(tmp_path, trainer=STEPS)
    config = config.replace(run=config.run.replace(save_folder=str(tmp_path / "run")))
    for timings, stop in ((BF16, 1), (FP32, 2)):
        keep(config, timings)
        hard_stop = type(config.trainer.max_duration)(value=stop)
        part = config.replace(trainer=config.trainer.replace(hard_stop=hard_stop))
        origins = {"train_module.precision": "--train_module.precision=auto"}
        assert train(part, origins=origins) == EXIT_DONE
    assert (engine := engine_of(tmp_path / "run", 2)) is not None
    assert engine.precision == "bf16"


@pytest.mark.parametrize("how", ["config", "launcher", "variable", "model"])
def test_what_is_said_is_not_measured(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Timings:
        raise AssertionError("measured")

    monkeypatch.setattr("toolkit.autotune.measure.measure", refuse)
    config = tiny_experiment(tmp_path)
    module = config.train_module.replace(compile_model=False)
    expected = "fp32"
    if how == "config":
        module, expected = module.replace(precision="bf16"), "bf16"
    elif how == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        expected = "bf16"
    elif how == "variable":
        monkeypatch.setenv(MEASURE, "0")
    config = config.replace(train_module=module)
    if how == "model":
        question = question_of(
            config.replace(model=tiny_model()),
            layout_of(module, {}),
            device="mps",
            name="a GPU of Apple's",
        )
        assert question is None
        return
    environment = prepare_training_environment(config)
    assert environment.layout.precision == expected
    assert environment.layout.notices == ()


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("train_module", {}, True),
        ("train_module", {"schedules": {"weight_decay": {"type": "constant"}}}, False),
        ("train_module", {"activation_offload": True}, False),
        ("train_module", {"dp_config": {"name": "zero3"}}, False),
        ("dataset", {"instances": {"type": "packed"}}, True),
        ("dataset", {"instances": {"type": "padded"}}, False),
        ("model", {"moe": {"num_experts": 4, "top_k": 2, "intermediate_size": 16}}, False),
    ],
)
def test_auto_compiles_what_is_compiled_once(
    section: str, changes: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    config = tiny_experiment(tmp_path, **{section: changes})
    assert may_compile(config, layout_of(config.train_module, {})) is expected


@pytest.mark.parametrize("asked", ["auto", True, False])
def test_a_choice_to_compile_counts_where_nobody_says_otherwise(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr("toolkit.models.compile.compile_model", lambda m, **_: compiled.append(m))
    for chosen in (True, False, None):
        environment = dataclasses.replace(
            single_environment(precision="fp32"), choices=Choices(compile_model=chosen)
        )
        build(module_config(compile_model=asked), environment)
    assert len(compiled) == {"auto": 1, True: 3, False: 0}[asked]


def test_a_run_of_an_earlier_release_keeps_its_precision(tmp_path: Path) -> None:
    run = start_run("a", "b", save_folder=str(tmp_path / "run"))
    run.set_status("running", precision="bf16")
    assert recorded_choices(run.folder) is None  # it has just begun
    run.set_status("running", step=3)
    assert recorded_choices(run.folder) == Choices(precision="bf16")
    run.close("stopped")


def test_a_measurement_that_fails_is_said_and_leaves_the_fixed_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Timings:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr("toolkit.autotune.measure.measure", fail)
    environment = prepare_training_environment(tiny_experiment(tmp_path))
    assert environment.layout.precision == "fp32"
    assert environment.layout.notices == ("auto could not measure: could not create a primitive",)


def test_an_error_while_choosing_keeps_what_was_recorded_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks wait for rank 0's answer, whatever is wrong there."""

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("auto")

    config = tiny_experiment(tmp_path)
    monkeypatch.setattr("toolkit.autotune.measure.measure", fail)
    environment = prepare_training_environment(config)
    assert environment.choices == Choices(precision="fp32")
    assert environment.layout.notices == ("auto could not measure: 'auto' is missing",)

    run = start_run("a", "b", save_folder=str(tmp_path / "run"))
    run.set_status("running", chosen={"precision": "bf16"})
    anew: Any = frozenset({"compile_model"})
    environment = prepare_training_environment(config, run_dir=run.folder, anew=anew)
    assert environment.layout.precision == "bf16"
    run.close("stopped")


@pytest.mark.parametrize("section", ["dataset", "data_loader", "trainer"])
def test_a_script_without_a_section_chooses_nothing(section: str, tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path)
    sections = ("model", "train_module", "trainer", "dataset", "data_loader", "data")
    part = SimpleNamespace(**{n: getattr(config, n) for n in sections if n != section})
    layout = layout_of(config.train_module, {})
    assert question_of(part, layout, device="cpu", name="a CPU") is None


@pytest.mark.parametrize(
    ("backend", "capability", "is_asked"),
    [("auto", (9, 0), True), ("efficient", (9, 0), False), ("auto", (12, 0), False)],
)
def test_attention_is_measured_only_where_the_answer_counts(
    backend: Any,
    capability: tuple[int, int],
    is_asked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(sdpa, "hardware_of", lambda *_: Hardware("cuda", capability))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_500)
    monkeypatch.setattr(choosing, "choose", lambda question, *_, **__: asked.append(question))
    config = tiny_experiment(tmp_path, train_module={"attention_backend": backend})
    layout = layout_of(config.train_module, {})
    gpu = torch.device("cuda", 0)
    choosing.answer_of(config, layout, gpu, fixed="bf16", name="a GPU")
    assert ("attention" in asked[0].asks) is is_asked


def compiles_in(folder: Path, run_dir: Path) -> tuple[Choices, tuple]:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    can_compile = environments.can_compile
    environments.can_compile = lambda: os.environ["RANK"] == "0"
    environment = prepare_training_environment(tiny_experiment(folder), run_dir=run_dir)
    try:
        return environment.choices, environment.layout.notices
    finally:
        environments.can_compile = can_compile
        environment.close()


def test_nothing_is_compiled_where_a_rank_has_no_compiler(
    workers: WorkerPool, tmp_path: Path
) -> None:
    run = start_run("a", "b", save_folder=str(tmp_path / "run"))
    run.set_status("running", chosen={"precision": "fp32", "compile_model": True})
    first, second = workers.run(2, compiles_in, tmp_path, run.folder)
    assert first == second
    assert first[0] == Choices(precision="fp32", compile_model=False)
    assert "not compiled: no C++ compiler" in first[1][-1]
    run.close("stopped")


def test_a_dry_run_tells_what_is_known_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "answer_of", None)
    config = tiny_experiment(tmp_path)
    loaded = load_experiment(str(tmp_path / "tiny.json"))
    for is_busy in (False, True):
        monkeypatch.setattr(choosing, "machine_is_busy", lambda busy=is_busy: busy)
        text = summarize(loaded, os.environ)
        assert "precision auto: measured at start" in text
        assert ("other programs use this machine" in text) is is_busy
    keep(config, BF16)
    text = summarize(loaded, os.environ)
    assert "precision bf16 (measured 2.0x of fp32 on this CPU)" in text
