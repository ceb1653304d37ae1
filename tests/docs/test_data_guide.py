"""The commands and the example of docs/data.md run as they stand."""

import re
from pathlib import Path

import pytest

from tests.docs.running import ROOT, commands, reader_folder, run_command
from toolkit.experiment.load import load_experiment

GUIDE = (ROOT / "docs" / "data.md").read_text()


@pytest.mark.timeout(900)
def test_the_commands_run_one_after_the_other(tmp_path: Path) -> None:
    """They share a folder and build on each other, as they do for a reader."""
    folder = reader_folder(tmp_path)
    example = re.search(r"```python\n# my_data\.py\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert example is not None
    (folder / "my_data.py").write_text(example.group(1))
    for command in commands(GUIDE):
        run_command(command, folder)
        if "my_data" in command:
            lines = (folder / "runs/smoke/arithmetic/metrics/train.jsonl").read_text().splitlines()
            assert len(lines) == 3


def test_json_examples_are_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixes").mkdir()
    (tmp_path / "mixes" / "math.json").write_text('{"sources": {"proofs": {"ratio": 1}}}')
    examples = re.findall(r'```json\n"dataset": (.*?)```', GUIDE, flags=re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        path = tmp_path / "section.json"
        path.write_text(f'{{"model": {{"preset": "gpt2_124M"}}, "dataset": {example}}}')
        dataset = load_experiment(str(path)).config.dataset
        assert dataset.instances.to_dict()["type"] == "packed"
