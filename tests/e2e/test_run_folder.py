"""What a finished run leaves behind is whole, and agrees with itself."""

import json
import math
import sqlite3
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e._run import Result, committed, read_json, read_lines, run
from tests.e2e.conftest import STEPS
from toolkit.checkpoint.folder import check_files, read_metadata

TRAIN_FIELDS = (
    "step", "tokens", "epoch", "time", "attempt", "loss", "ppl", "lr", "grad_norm",
    "tokens_per_second", "data_loading_pct", "peak_memory_gb", "skipped",
)  # fmt: skip
TOKENS = 1024
SEQUENCE = 64


@pytest.fixture(scope="session")
def folder(single: tuple[Path, Result]) -> Path:
    return single[0]


def test_metadata_is_complete(folder: Path) -> None:
    names = [
        "config",
        "data_config",
        "model_config",
        "trainer_config",
        "environment",
        "command",
        "git",
        "status",
        "origins",
    ]
    found = {name: read_json(folder / "metadata" / f"{name}.json") for name in names}
    assert found["config"]["model"] == found["model_config"]
    assert found["config"]["trainer"] == found["trainer_config"]["trainer"]
    assert found["config"]["dataset"] == found["data_config"]["dataset"]
    assert found["origins"]["run.name"] == "--name=single"
    assert "train" in found["command"]["argv"]
    assert found["environment"]["versions"]["torch"] == metadata.version("torch")
    assert not (folder / "metadata" / "lock.json").exists()


def test_status_says_finished(folder: Path) -> None:
    status = read_json(folder / "metadata" / "status.json")
    assert status["state"] == "finished"
    assert (status["step"], status["tokens"]) == (STEPS, STEPS * TOKENS)
    assert (status["engine"], status["world_size"], status["attempt"]) == ("single", 1, 1)
    assert (status["exit_reason"], status["message"]) == ("done", None)
    assert status["loss"] == read_lines(folder / "metrics" / "train.jsonl")[-1]["loss"]


def test_train_metrics_have_one_line_a_step(folder: Path) -> None:
    records = read_lines(folder / "metrics" / "train.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert tuple(record)[: len(TRAIN_FIELDS)] == TRAIN_FIELDS
        assert record["tokens"] == record["step"] * TOKENS
        assert record["ppl"] == pytest.approx(math.exp(record["loss"]))
        assert record["skipped"] == 0
        assert record["grad_norm"] > 0
    rates = [record["lr"] for record in records]
    assert max(rates) == rates[4] == 1e-2
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]


def test_eval_metrics_have_the_right_steps(folder: Path) -> None:
    records = read_lines(folder / "metrics" / "eval.jsonl")
    assert [record["step"] for record in records] == [20, 40, 60]
    for record in records:
        assert tuple(record)[:6] == ("step", "tokens", "time", "name", "loss", "ppl")
        assert record["name"] == "val"
        # One byte is one token, but for the ends of documents.
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2), rel=1e-3)


def test_network_and_system_metrics_are_there(folder: Path) -> None:
    network = read_lines(folder / "metrics" / "network.jsonl")
    assert [record["step"] for record in network] == [1, 20, 40, 60]
    train = {r["step"]: r for r in read_lines(folder / "metrics" / "train.jsonl")}
    for record in network:
        layers = [key for key in record if key.startswith("grad_norm/")]
        assert len(layers) >= 4
        assert record["grad_norm/total"] == pytest.approx(
            train[record["step"]]["grad_norm"], rel=1e-5
        )
    system = read_lines(folder / "metrics" / "system.jsonl")
    assert system
    assert all(0 < value < 1e6 for record in system for k, value in record.items() if "memory" in k)


def test_tensorboard_shows_what_the_lines_say(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stream, names in (("train", ("loss", "lr", "grad_norm")), ("eval", ("loss",))):
        events = EventAccumulator(str(folder / "tb" / stream))
        events.Reload()
        records = read_lines(folder / "metrics" / f"{stream}.jsonl")
        for name in names:
            tag = next(t for t in events.Tags()["scalars"] if t.split("/")[-1] == name)
            scalars = events.Scalars(tag)
            assert [event.step for event in scalars] == [record["step"] for record in records]
            expected = np.float32([record[name] for record in records])
            assert np.array_equal(np.float32([event.value for event in scalars]), expected)


def test_checkpoints_are_the_last_three_and_whole(folder: Path) -> None:
    assert committed(folder) == [40, 50, 60]
    assert not list((folder / "checkpoints").glob("*.tmp"))
    for step in committed(folder):
        checkpoint = folder / "checkpoints" / f"step{step}"
        saved = read_metadata(checkpoint)
        check_files(checkpoint, saved, hashes=True)
        assert (saved.step, saved.tokens) == (step, step * TOKENS)
        assert (saved.engine, saved.world_size) == ("single", 1)
        names = set(saved.files)
        assert {"train/rank0.pt", "model_and_optim/.metadata"} <= names
        assert any(name.endswith(".distcp") for name in names)
        assert ("hf/config.json" in names) == (step == STEPS)
    log = (folder / "logs" / "rank0.log").read_text()
    assert [f"step{step}\n" in log for step in committed(folder)] == [True] * 3


@torch.no_grad()
def test_exported_weights_give_the_recorded_validation_loss(folder: Path, place: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / f"step{STEPS}" / "hf")
    data = place / "data" / "python_stdlib" / "bytes_small"
    manifest = json.loads((data / "dataset.json").read_text())
    tokens = np.fromfile(data / "val.bin", dtype=manifest["dtype"])[:4096].astype(np.int64)
    ids = torch.from_numpy(tokens).view(-1, SEQUENCE)
    logits = model(input_ids=ids).logits[:, :-1].float()
    # Rows that pad the vocabulary to a multiple are no token ids; our model never predicts them.
    logits = logits[..., : manifest["vocab_size"]]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    recorded = read_lines(folder / "metrics" / "eval.jsonl")[-1]["loss"]
    assert loss.item() == pytest.approx(recorded, rel=1e-5)


def test_the_registry_and_the_list_know_the_run(folder: Path, place: Path) -> None:
    with sqlite3.connect(place / "runs" / "registry.sqlite") as database:
        row = database.execute(
            "select experiment, state, step, tokens, engine, world_size, parameters from runs "
            "where name = 'single'"
        ).fetchone()
    assert row == ("e2e", "finished", STEPS, STEPS * TOKENS, "single", 1, 41_120)
    result = run("toolkit", "runs", "--root", "runs", "--json", cwd=place)
    found = next(own for own in json.loads(result.output) if own["name"] == "single")
    loss = read_lines(folder / "metrics" / "train.jsonl")[-1]["loss"]
    assert (found["state"], found["step"], found["tokens"]) == ("finished", STEPS, STEPS * TOKENS)
    assert found["loss"] == loss
