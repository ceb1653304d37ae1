"""The commands and examples of docs/python.md run as they stand."""

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.running import ROOT, commands
from tests.e2e._run import environ
from tests.forked import Forked
from tests.workers import warm_pool
from toolkit import testing

GUIDE = (ROOT / "docs" / "python.md").read_text()


def example(name: str) -> str:
    found = re.search(rf"```python\n# {name}\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_the_commands_run_one_after_the_other(tmp_path: Path) -> None:
    file = tmp_path / "my_run.py"
    file.write_text(example("my_run.py"))
    for command in commands(GUIDE):
        program, script, *words = shlex.split(command)
        assert (program, script) == ("python", "my_run.py")
        output = tmp_path / "output"
        output.write_text("")
        code = Forked(words, cwd=tmp_path, env=environ(), output=output, file=file).wait(120)
        assert code == 0, output.read_text()
        assert ("step 10 on rank 0" in output.read_text()) == ("--name" in words)
    lines = (tmp_path / "runs/smoke/first/metrics/train.jsonl").read_text().splitlines()
    assert len(lines) == 14


def test_the_tests_of_the_example_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_the_guide.py").write_text(example("test_mine.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine_of_the_guide as mine  # type: ignore[import-not-found]

    def run_warm(words: list[str], *, check: bool) -> None:
        assert (words[0], check) == ("toolkit", True)
        output = tmp_path / "output"
        code = Forked([*map(str, words[1:])], cwd=tmp_path, env=environ(), output=output).wait(120)
        assert code == 0, output.read_text()

    monkeypatch.setattr(mine.subprocess, "run", run_warm)
    pool = warm_pool()  # of its own: processes look where this one looks when they start
    monkeypatch.setattr(testing, "_pool", pool)
    mine.test_ranks_agree()
    pool.close()
    mine.test_training_repeats(tmp_path / "runs")


def test_links_of_guides_lead_to_files() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
