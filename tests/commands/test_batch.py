"""Which documents and tokens a step was made of."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.corpus import files_config, random_text, write_texts
from toolkit import get_dataloaders, prepare_dataset, read_prepared
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.cli import main as cli
from toolkit.commands.batch import step_batch
from toolkit.data.instances.base import target_mask
from toolkit.errors import ConfigError, DataError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.models.loss import IGNORE_INDEX, shift_labels


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    folder = tmp_path_factory.mktemp("batch")
    texts = write_texts(folder / "text", [random_text(2, seed=i) for i in range(80)])
    dataset = files_config(folder / "data", texts, sequence_length=64)
    prepare_dataset(dataset)
    return load_experiment("smoke").config.replace(dataset=dataset, seed=5)


@pytest.fixture
def run(tmp_path: Path, config: ExperimentConfig) -> Path:
    folder = tmp_path / "run"
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "config.json").write_bytes(config.to_json())
    return folder


def save(run: Path, fingerprint: str) -> None:
    save_checkpoint(
        run / "checkpoints", step=3, tokens=0, tensors={"model.a": torch.ones(1)}, rank_state={},
        engine="single", rank=0, group=None,
        extra={
            "data": {
                "batch": 3, "segments": [[0, 0, 16]], "fingerprint": fingerprint,
                "sequence_length": 64,
            }
        },
    )  # fmt: skip


@pytest.mark.parametrize("step", [1, 4, 13])
def test_the_batch_is_what_the_loader_gives_that_step(
    step: int, run: Path, config: ExperimentConfig
) -> None:
    loader, _ = get_dataloaders(config.data, batch_rank=0, batch_ranks=1)
    found = step_batch(run, step, show=99)
    expected = loader.instance_indices(step - 1)
    assert [instance.instance for instance in found.instances] == expected.tolist()
    assert (found.num_tokens, found.num_targets) == (1024, 16 * 63)
    assert found.batches_per_epoch == loader.steps_per_epoch
    assert (found.epoch, found.batch) == divmod(step - 1, loader.steps_per_epoch)
    rows = loader.global_batch(step - 1)["input_ids"].tolist()
    for row, instance in zip(rows, found.instances, strict=True):
        text = "".join(piece.text for piece in instance.text or [])
        assert text == "".join("<|endoftext|>" if i == 256 else chr(i) for i in row)
        parts = instance.documents
        assert sum(part.end - part.start for part in parts) == 64
        assert [p.document for p in parts] == sorted({piece.document for piece in instance.text})


def test_document_ranges_name_the_tokens_of_train_bin(run: Path, config: ExperimentConfig) -> None:
    prepared = read_prepared(config.dataset)
    assert prepared is not None
    tokens, starts = prepared.tokens("train"), prepared.document_starts("train")
    for instance in step_batch(run, 2, show=0).instances:
        assert instance.text is None
        pieces = [
            tokens[int(starts[p.document]) + p.start : int(starts[p.document]) + p.end]
            for p in instance.documents
        ]
        first = instance.instance * 64
        assert np.concatenate(pieces).tolist() == tokens[first : first + 64].tolist()


def test_the_mask_is_that_of_the_labels() -> None:
    ids = np.arange(24).reshape(3, 8)
    rows = {
        "input_ids": ids,
        "label_mask": ids % 5 > 0,
        "document_ids": np.repeat([[0, 0, 0, 1, 1, 2, 2, 3]], 3, axis=0),
    }
    for keys in (["input_ids"], ["input_ids", "label_mask"], list(rows)):
        some = {key: rows[key] for key in keys}
        tensors = {key: torch.from_numpy(value) for key, value in some.items()}
        labels = shift_labels(*(tensors.get(key) for key in rows))
        predicted = (labels != IGNORE_INDEX).numpy()
        assert np.array_equal(target_mask(some)[:, 1:], predicted[:, :-1])
        assert not target_mask(some)[:, 0].any()
        assert target_mask(some).sum() == predicted.sum()


def test_steps_and_data_that_are_not_the_runs_are_refused(
    run: Path, config: ExperimentConfig
) -> None:
    for step in (0, 21):
        with pytest.raises(ConfigError, match=f"--step {step}: the run has steps 1 to 20"):
            step_batch(run, step)
    with pytest.raises(ConfigError, match="--show -1"):
        step_batch(run, 1, show=-1)
    prepared = read_prepared(config.dataset)
    assert prepared is not None
    save(run, prepared.fingerprint("train"))
    assert step_batch(run, 1).is_checked
    save(run, "something else")
    with pytest.raises(DataError, match=r"was something else, is .* since checkpoint step3"):
        step_batch(run, 1)
    missing = config.replace(dataset=config.dataset.replace(dataset_name="gone"))
    (run / "metadata" / "config.json").write_bytes(missing.to_json())
    with pytest.raises(DataError, match="prepared data is not there"):
        step_batch(run, 1)


def test_the_verb_shows_a_table_and_marks_what_is_no_target(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["batch", str(run), "2"]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert lines[0].startswith("step 2: batch 2 of ")
    assert lines[0].endswith("epoch 1; 16 instances, 1,024 tokens, 1,008 targets")
    assert lines[1].endswith("(the run has no checkpoint)")
    found = step_batch(run, 2)
    assert sum(line.split()[1:3] == ["64", "63"] for line in lines[3:]) == 16
    shown = output[output.index("\n\ninstance ") :]
    assert "\n\n[[ ]]: targets, the tokens that the loss asks for\n\ninstance " in output
    # The first token, which nothing predicts, stands before them.
    assert shown.count("[[") == shown.count("]]") == len(found.instances[0].documents)
    assert re.search(r"    .\[\[", shown)
    assert shown.count("  document ") == len(found.instances[0].documents)
    assert cli.run(["batch", str(run), "--step", "2", "--show", "0", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["instances"][3]["instance"] == found.instances[3].instance
    assert data["instances"][0]["text"] is None
    for steps in ([], ["2", "--step", "3"]):
        assert cli.run(["batch", str(run), *steps]) == 2
    assert capsys.readouterr().err.count("which step? Give one: toolkit batch") == 2
