"""The commands of docs/launching.md run as they stand, and its links lead somewhere."""

import re
from pathlib import Path

from tests.docs.running import ROOT, commands, run_command
from toolkit.launch.capacity import BYTES_PER_PROCESS, PROCESSES_PER_CORE
from toolkit.launch.joining import TOKEN
from toolkit.launch.nodes import DEFAULT_PORT, JOIN_SECONDS, LOST_SECONDS
from toolkit.launch.workers import SECONDS_TO_SAVE

GUIDE = (ROOT / "docs" / "launching.md").read_text()


def test_the_commands_run(tmp_path: Path) -> None:
    found = commands(GUIDE)
    assert len(found) == 4
    said = [run_command(command, tmp_path) for command in found]
    assert "fsdp, 4 processes, from --engine" in said[0]
    assert (tmp_path / "fsdp.yaml").is_file()


def test_its_links_and_numbers_are_right() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (ROOT / "docs" / link).exists(), link
    text = " ".join(GUIDE.split())
    for fact in (
        f"They have {SECONDS_TO_SAVE} s for that",
        f"at most {PROCESSES_PER_CORE} for each core, and at most one for every "
        f"{BYTES_PER_PROCESS / 1e9} GB",
        f"port {DEFAULT_PORT} by default",
        f"`{JOIN_SECONDS / 60:.0f}m` by default",
        f"silent for {LOST_SECONDS:.0f} s",
        f"`{TOKEN}`",
    ):
        assert fact in text
