"""What of a config does nothing is said in one line, and nothing else is."""

import pytest

from toolkit.data.corpus_info import planned_batches
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.experiment.notices import notices


def noticed(config: ExperimentConfig, steps_per_epoch: int) -> list[str]:
    rows = config.data_loader.global_batch_size // config.dataset.sequence_length
    return notices(config, planned_batches(config.data, steps_per_epoch * rows or None))


WARMUP = "train_module.scheduler.warmup is "


@pytest.mark.parametrize(
    ("flags", "beginnings"),
    [
        ([], []),
        (["--train_module.scheduler.warmup=500"],
         [f"{WARMUP}500 steps and the whole run (trainer.max_duration) 20 steps: the rate never"]),
        (["--train_module.scheduler.warmup=20"], []),
        (["--train_module.scheduler.warmup=20", "--trainer.hard_stop.value=3"], []),
        (["--train_module.scheduler={type: linear, units: tokens, warmup: 20481}"],
         [f"{WARMUP}20,481 tokens and the whole run (trainer.max_duration) 20,480 tokens"]),
        (["--train_module.scheduler.warmup=500", "--trainer.max_duration={value: 2, unit: epochs}"],
         [f"{WARMUP}500 steps and the whole run (trainer.max_duration) 20 steps"]),
        (["--trainer.hard_stop.value=30"],
         ["trainer.hard_stop (30 steps) does nothing: the run ends before it, after 20 steps"]),
        (["--data_loader.num_workers=2"], ["data_loader.num_workers 2 does nothing: workers read"]),
        (["--store.max_cache_gb=1"], ["store.max_cache_gb 1 does nothing: without store.perm"]),
        (["--trainer.load_weights_only", "--trainer.load_in_place"],
         ["trainer.load_weights_only does nothing: there is no trainer.load_path",
          "trainer.load_in_place does nothing: there is no trainer.load_path"]),
        (["--trainer.load_path=x", "--trainer.load_in_place"],
         ["trainer.load_in_place does nothing: trainer.load_path is on this machine"]),
        (["--trainer.wall_time_margin=60"], ["trainer.wall_time_margin does nothing: there is no"]),
        (["--trainer.no_checkpoints", "--trainer.callbacks.checkpointer.upload_to=s3://b/p"],
         ["trainer.callbacks.checkpointer.upload_to does nothing: no checkpoints are written"]),
        (["--dataset.source=null", "--dataset.deduplicate"],
         ["dataset.deduplicate does nothing: without dataset.source, token files are taken"]),
        (["--train_module.optim.group_overrides=[{params: ['blocks.*'], opts: {lr: 1e-4}},"
          " {params: ['*query*', 'head*'], opts: {lr: 0}}]"],
         ["train_module.optim.group_overrides.1: '*query*' does nothing: all that it matches is "
          "taken by group_overrides.0 before it"]),
        (["--train_module.optim.group_overrides=[{params: ['*query*'], opts: {lr: 0}},"
          " {params: ['blocks.*'], opts: {lr: 1e-4}}]"], []),
        (["--trainer.callbacks.profiler={enabled: true, skip_first: 17}"],
         ["trainer.callbacks.profiler does nothing: the first step that it looks at is 21, and the "
          "run ends after 20 steps"]),
        (["--trainer.callbacks.profiler={enabled: true, skip_first: 16}"], []),
        (["--trainer.callbacks.profiler={skip_first: 50}"], []),
        (["--trainer.callbacks.ema={enabled: true, start_step: 20}",
          "--trainer.callbacks.stability_monitor.enabled"],
         ["trainer.callbacks.stability_monitor does nothing: the first step that it looks at is 65",
          "trainer.callbacks.ema does nothing: the first step that it looks at is 21"]),
        (["--model.sliding_rope_theta=5000"], ["model.sliding_rope_theta does nothing: no layer"]),
    ],
)  # fmt: skip
def test_notices(flags: list[str], beginnings: list[str]) -> None:
    found = noticed(load_experiment("smoke", flags).config, steps_per_epoch=10)
    assert len(found) == len(beginnings), found
    for line, beginning in zip(found, beginnings, strict=True):
        assert line.startswith(beginning)


def test_a_variable_of_olmo_core_is_taken_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO_SHARED_FS", "1")
    [line] = noticed(load_experiment("smoke").config, steps_per_epoch=10)
    assert line.startswith("OLMO_SHARED_FS does nothing: ")


def test_epochs_are_steps_once_the_data_is_known() -> None:
    flags = [
        "--train_module.scheduler.warmup=500",
        "--trainer.max_duration={value: 2, unit: epochs}",
    ]
    config = load_experiment("smoke", flags).config
    assert noticed(config, steps_per_epoch=0) == []
    assert len(noticed(config, steps_per_epoch=249)) == 1
    assert noticed(config, steps_per_epoch=250) == []
