"""Batches and rows that change during training, and a scheduled setting, under every engine."""

from pathlib import Path
from typing import Any

import pytest

from tests.train.test_data_kinds import BATCH, TOKENS, corpora, records, run  # noqa: F401
from tests.workers import WorkerPool

SCHEDULES = [
    f"--data_loader.batch_size_schedule=[{{tokens: {4 * BATCH}, global_batch_size: {BATCH // 2}}}, "
    f"{{tokens: {6 * BATCH}, global_batch_size: {2 * BATCH}}}]",
    "--data_loader.sequence_length_schedule=[{tokens: 0, sequence_length: 8}, "
    f"{{tokens: {2 * BATCH}}}, {{tokens: {7 * BATCH}}}]",
    "--train_module.schedules={weight_decay: {type: linear, warmup: 0}}",
    *TOKENS,
]
LAYOUTS = {
    "zero2": "",
    "zero3": "",
    "fsdp": "",
    "fsdp+pp": "pp_config={degree: 2, schedule: 1F1B}",
    "fsdp+cp": "cp_config={degree: 2}",
    "fsdp+tp": "tp_config={degree: 2}",
}


@pytest.mark.slow
def test_every_layout_trains_as_one_process_does(
    workers: WorkerPool,
    corpora: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    place, data = str(tmp_path), corpora["fixed"]
    assert workers.run(1, run, place, "one", data, *SCHEDULES) == [(0, "")]
    expected = [record["loss"] for record in records(tmp_path / "one")]
    for name, axis in LAYOUTS.items():
        flags = [f"--train_module.dp_config={{name: {name.partition('+')[0]}}}"]
        flags += [f"--train_module.{axis}"] if axis else []
        assert workers.run(2, run, place, name, data, *SCHEDULES, *flags) == [(0, "")] * 2
        found = [record["loss"] for record in records(tmp_path / name)]
        assert found == pytest.approx(expected, rel=1e-5), name
