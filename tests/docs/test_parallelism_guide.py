"""The commands of docs/parallelism.md run as they stand, and its tables name what exists."""

import re
from pathlib import Path

from tests.docs.running import ROOT, commands, reader_folder, run_command
from toolkit.commands.plan import plan_experiment
from toolkit.experiment.load import load_experiment

GUIDE = (ROOT / "docs" / "parallelism.md").read_text()


def test_the_commands_run(tmp_path: Path) -> None:
    folder = reader_folder(tmp_path)
    found = commands(GUIDE)
    assert len(found) == 4
    for command in found:
        run_command(command, folder)


def test_it_names_files_that_exist() -> None:
    for name in re.findall(r"accelerate_configs/\w+\.yaml", GUIDE):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (ROOT / "docs" / link).exists(), link


def test_the_table_of_recipes_is_what_the_plan_says() -> None:
    rows = re.findall(r"\| `(\w+)` \| (\d+)[^|]*GPUs \| [^|]* \| (\d+) GiB[^|]*\| (\d+)% \|", GUIDE)
    assert len(rows) == 4
    for name, ranks, memory, mfu in rows:
        found = plan_experiment(load_experiment(name), {}, world_size=int(ranks)).data
        assert round(found["memory"]["total"] / 2**30) == int(memory), name
        assert round(100 * found["seconds"]["mfu"]) == int(mfu), name
