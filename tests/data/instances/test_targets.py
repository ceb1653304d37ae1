"""What rows do to targets: counted, said, and refused where nothing is left."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.corpus import data_config, files_config
from toolkit.data.config import (
    DatasetConfig,
    FixedInstancesConfig,
    InstancesConfig,
    InstructionsConfig,
    PackedInstancesConfig,
    VariableInstancesConfig,
)
from toolkit.data.corpus import open_corpus
from toolkit.data.instances import targets
from toolkit.data.instances.base import target_mask
from toolkit.data.instances.open import open_instances
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.corpus import prepare_corpus
from toolkit.errors import DataError

LENGTH = 128


def chats(folder: Path, *sizes: tuple[int, int], **changes: Any) -> DatasetConfig:
    """Prompts and answers of so many bytes, an end-of-document token after each answer."""
    rows = [{"prompt": "p" * prompt, "completion": "a" * answer} for prompt, answer in sizes]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"sequence_length": LENGTH, "instances": PackedInstancesConfig(), **changes}
    instructions = InstructionsConfig()
    return files_config(
        folder / "data", folder / "chat.jsonl", instructions=instructions, **changes
    )


def said(config: DatasetConfig, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said of the targets when the data is prepared."""
    caplog.clear()
    targets._said.clear()  # as in another process
    with caplog.at_level(logging.WARNING, "toolkit.data"):
        prepare_corpus(data_config(config), progress=False)
    return [r.getMessage() for r in caplog.records if "no target" in r.getMessage()]


def test_chats_longer_than_a_row_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # 6 documents of 861 tokens are 6 full rows of 128 each, and rests of 93.
    config = chats(tmp_path, *[(850, 10)] * 6)
    for _ in range(2):  # the second time, the counts are read
        (line,) = said(config, caplog)
        assert "36 of 42 rows of 128 tokens have no target, and 6 of 6 documents have" in line
    assert said(chats(tmp_path, *[(100, 10)] * 6, dataset_name="short"), caplog) == []
    # Long, but the answer's beginning is where its prompt is, and all of its end too.
    line, *_ = said(chats(tmp_path, (100, 200), dataset_name="answer"), caplog)
    assert "0 of 3 rows of 128 tokens have no target, and 1 of 1 document has" in line


def test_a_process_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = chats(tmp_path, *[(850, 10)] * 6)
    assert len(said(config, caplog)) == 1
    with caplog.at_level(logging.WARNING, "toolkit.data"):
        for _ in range(2):
            open_corpus(data_config(config))
    assert sum("no target" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("instances", "cut"),
    [
        (PackedInstancesConfig(), 2),
        (FixedInstancesConfig(), 3),
        (FixedInstancesConfig(intra_document_masking=True), 3),
        (VariableInstancesConfig(min_sequence_length=2), 4),
    ],
)
def test_counts_are_those_of_the_rows_that_are_trained_on(
    instances: InstancesConfig, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "BLOCK_TOKENS", 2 * LENGTH)
    sizes = [(20, 5), (300, 10), (100, 5), (130, 70)]
    config = chats(tmp_path, *sizes, instances=instances)
    prepared = ensure_prepared(config, progress=False)
    opened = open_instances(prepared, "train", config)
    counts = targets._counts(prepared, "train", opened)
    rows = open_instances(prepared, "train", config)
    masks = [target_mask(rows.read(np.array([i]))).any() for i in range(rows.num_instances)]
    assert (counts.num_rows, counts.rows_without_targets) == (len(masks), masks.count(False))
    assert counts.rows_without_targets > 0
    assert (counts.cut_answers, counts.num_documents) == (cut, 4)


def test_rows_without_any_target_are_refused(tmp_path: Path) -> None:
    config = chats(tmp_path, (300, 0), (200, 1), instances=FixedInstancesConfig())
    config = config.replace(sequence_length=64, append_eos=True)
    prepared = ensure_prepared(config, progress=False)
    prepared.target_mask("train")
    mask = prepared.folder / "train.mask"
    mask.write_bytes(bytes(mask.stat().st_size))
    with pytest.raises(DataError, match=r"none of its \d rows of 64 tokens has a target"):
        prepare_corpus(data_config(config), progress=False)


def test_nothing_held_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = chats(tmp_path, *[(10, 10)] * 8, validation_fraction=0.001, sequence_length=16)
    ensure_prepared(config)
    line = "none of its 8 documents was held out (dataset.validation_fraction 0.001)"
    assert line in capsys.readouterr().err
    with caplog.at_level(logging.WARNING, "toolkit.data"):
        open_corpus(data_config(config, global_batch_size=16))
    assert re.search(f"no evaluation: .*{re.escape(line)}", caplog.text)
    without = config.replace(validation_fraction=0.0, dataset_config="other")
    caplog.clear()
    ensure_prepared(without)
    open_corpus(data_config(without, global_batch_size=16))
    assert "held out" not in caplog.text
