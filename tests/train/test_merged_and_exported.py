"""`model_merger` and `hf_converter` where a run is longer than it was, or something fails."""

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.checkpoint.retention import Retention, Saved, prune_checkpoints
from toolkit.errors import ConfigError
from toolkit.experiment.load import load_experiment
from toolkit.hf import hf_converter
from toolkit.hf.hf_converter import HFConverter
from toolkit.train.callbacks import model_merger
from toolkit.train.callbacks.config import HFConverterConfig, ModelMergerConfig
from toolkit.train.callbacks.model_merger import ModelMerger
from toolkit.train.callbacks.savers import MetricSaver
from toolkit.train.state import TrainState


class Averaged:
    """The steps whose weights an average is of."""

    def __init__(self, state: Any) -> None:
        self.state, self.steps, self.tensors = state, list[int](), {"w": 0}

    def copy(self) -> None:
        self.steps = [self.state.step]

    def update(self, share: float) -> None:
        self.steps.append(self.state.step)
        assert share == 1 / len(self.steps)


def test_a_longer_run_averages_its_own_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_merger, "Average", Averaged)
    merger = ModelMerger(ModelMergerConfig(enabled=True, last_percent=30))
    state: Any = SimpleNamespace(step=0, total_steps=10)
    state.train_module = state
    merger.state = state
    for total, expected in ((10, [8, 9, 10]), (20, [15, 16, 17, 18, 19, 20])):
        state.total_steps = total
        while state.step < total:
            state.step += 1
            merger.post_step()
        assert isinstance(merger._average, Averaged)
        assert merger._average.steps == expected
        assert merger.state_dict() == {"count": len(expected)}


def run_in(folder: Path) -> Any:
    return SimpleNamespace(path=lambda name: folder / name, folder=folder)


def test_a_full_disk_ends_no_run_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_merger, "saved_steps", lambda root: [1, 2, 3])
    monkeypatch.setattr(model_merger, "merge_checkpoints", full)
    merger = ModelMerger(ModelMergerConfig(enabled=True))
    merger.state = SimpleNamespace(is_main=True, run=run_in(tmp_path))  # type: ignore[assignment]
    merger.post_train()
    assert "model_merger: [Errno 28] No space left on device" in caplog.text


def test_three_checkpoints_of_two_cannot_be_merged() -> None:
    given = "--trainer.callbacks={model_merger: {enabled: true}, checkpointer: {keep_last: 2}}"
    with pytest.raises(ConfigError, match=r"last_checkpoints 3 is more than .*keep_last 2 keeps"):
        load_experiment("smoke", [given])


def converter(folder: Path, **state: Any) -> HFConverter:
    made = HFConverter(HFConverterConfig(enabled=True, interval=2))
    made.state = SimpleNamespace(  # type: ignore[assignment]
        is_main=True, saved_step=None, exported_weights=None, steps_in_use=set(),
        run=run_in(folder), **state,
    )  # fmt: skip
    return made


def test_every_second_checkpoint_is_exported_over_a_resume_too(tmp_path: Path) -> None:
    def continued(steps: range, saves: dict[str, Any], seen: int | None) -> dict[int, Any]:
        """Steps with a checkpoint each; what each checkpoint keeps."""
        made, kept = converter(tmp_path), {}
        made._export = exported.append  # type: ignore[method-assign, assignment]
        made.load_state_dict(saves)
        made.state.saved_step = seen
        for step in steps:
            kept[step] = made.state_dict()
            made.post_record()  # the background has not saved this one yet
            made.state.saved_step = step
            made.post_record()
            made.on_stop()
        return kept

    exported: list[int | None] = []
    kept = continued(range(1, 6), {}, None)
    assert exported == [2, 4]
    for step in (3, 4):
        exported.clear()
        continued(range(step + 1, 8), kept[step], step)
        assert exported == [4, 6]  # that of a checkpoint which was loaded may have been cut off


def test_an_export_keeps_its_checkpoint_and_replaces_another_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = converter(tmp_path)
    old = tmp_path / "hf/step4"
    old.mkdir(parents=True)
    (old / "config.json").write_text("old")
    begun, go_on = threading.Event(), threading.Event()

    def export(source: Any, folder: Path, **_: Any) -> None:
        begun.set()
        assert go_on.wait(60)
        folder.mkdir()
        (folder / "config.json").write_text("new")
        if source.is_bad:
            raise OSError("disk full")

    source = SimpleNamespace(config=None, origin={}, is_bad=True)
    monkeypatch.setattr(hf_converter, "find_source", lambda folder: source)
    monkeypatch.setattr(hf_converter, "hf_architecture", lambda *_: "Llama")
    monkeypatch.setattr(hf_converter, "export_source", export)
    for is_bad, content in ((True, "old"), (False, "new")):
        source.is_bad, made._saves, made._seen = is_bad, 1, None
        made.state.saved_step = 4
        begun.clear()
        go_on.clear()
        made.post_record()
        assert begun.wait(60)
        assert made.state.steps_in_use == {4}
        go_on.set()
        made.on_stop()
        assert (old / "config.json").read_text() == content
    assert made.state.steps_in_use == set()
    assert "hf_converter: step 4: OSError: disk full" in caplog.text
    with caplog.at_level(logging.INFO):
        made._export(4)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["step4"]


def test_a_checkpoint_in_use_goes_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolkit.checkpoint import retention

    for step in (1, 2, 3):
        (tmp_path / f"step{step}").mkdir()
        (tmp_path / f"step{step}/.metadata.json").write_text("{}")
    monkeypatch.setattr(retention, "read_metadata", lambda folder: int(folder.name[4:]))
    monkeypatch.setattr(retention, "check_files", lambda *_: None)
    monkeypatch.setattr(Retention, "saved", lambda rule, step: Saved(step))
    for in_use, left in (({1}, ["step1", "step3"]), (set(), ["step3"])):
        prune_checkpoints(tmp_path, Retention(keep_last=1), newest=3, in_use=in_use)
        assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_the_state_of_a_callback_is_that_of_its_step() -> None:
    saver = MetricSaver(config=None)  # type: ignore[arg-type]
    saver.on_metrics("eval", [{"name": "val", "step": 1}])
    state: Any = SimpleNamespace(_callbacks={"metric_saver": saver}, step=1)
    saved = TrainState._state_of(state, "metric_saver")
    saver.on_metrics("eval", [{"name": "other", "step": 2}])
    assert saved == {"train": {}, "evaluations": {"val": {"name": "val", "step": 1}}}
