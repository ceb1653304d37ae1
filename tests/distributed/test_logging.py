"""Who writes what: the console of rank 0, and a file for each rank."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from toolkit.distributed.logging import add_log_file, log_failure, setup_logging

log = logging.getLogger("toolkit.anything")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    logger = logging.getLogger("toolkit")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_only_rank_0_speaks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for rank in (0, 1):
        setup_logging(rank)
        add_log_file(tmp_path, rank)
        log.warning("from %d", rank)
        assert f"from {rank}" in (tmp_path / f"rank{rank}.log").read_text()
    assert capsys.readouterr().err == "warning: from 0\n"


def test_a_failure_is_in_the_file_with_rank_step_and_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    setup_logging(0)
    file = add_log_file(tmp_path, 0)
    try:
        raise OSError("disk full")
    except OSError as error:
        log_failure(file, error, rank=0, step=17)
    written = (tmp_path / "rank0.log").read_text()
    assert "ERROR toolkit.failure: rank 0 on " in written
    assert "failed at step 17\nTraceback " in written
    assert written.endswith("OSError: disk full\n")
    assert capsys.readouterr() == ("", "")


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    setup_logging(rank=0)
    handler = add_log_file(tmp_path / "logs", rank=0)
    log = logging.getLogger("toolkit.test")
    handler.setStream(open("/dev/full", "w"))  # noqa: SIM115
    try:
        log.info("one")
        log.info("two")
    finally:
        logging.getLogger("toolkit").removeHandler(handler)
        handler.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "lines are lost" not in line] == ["one", "two"]
    assert sum("rank0.log: lines are lost: [Errno 28]" in line for line in lines) == 1


def test_a_log_that_cannot_be_opened_is_a_warning(tmp_path, capsys):
    setup_logging(rank=0)
    (tmp_path / "logs").write_text("a file")
    handler = add_log_file(tmp_path / "logs", rank=0)
    logging.getLogger("toolkit").removeHandler(handler)
    assert capsys.readouterr().err.startswith("warning: no log file: ")
