"""One tiny run for the verbs that read runs."""

from pathlib import Path

import pytest

from toolkit.cli import main as cli


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with evaluations and checkpoints at 2 and 4; the last has no hf/."""
    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "text.txt"
    text.write_text("".join(f"line {n}: é and {n * n}\n" for n in range(400)), encoding="utf-8")
    args = [
        "train", "smoke", "--save-folder", str(folder / "run"), "--data-root", str(folder / "data"),
        f"--run.root={folder / 'runs'}",
        f"--dataset.source={{type: files, paths: ['{text}']}}", "--dataset.num_processes=1",
        "--data_loader.eval_tokens=600", "--trainer.max_duration.value=4",
        "--trainer.callbacks.lm_evaluator.interval=2",
        "--trainer.callbacks.checkpointer={interval: 2, export_hf: false}",
        "--trainer.callbacks.system_monitor.enabled=false",
    ]  # fmt: skip
    assert cli.run(args) == 0
    return folder / "run"
