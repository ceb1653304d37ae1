"""Runs on every kind of data: stopped, resumed on other ranks or with other batches, shown."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import random_text, write_texts
from tests.workers import WorkerPool
from toolkit.commands.batch import step_batch
from toolkit.commands.explain import explain_resume
from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.corpus import as_prepared
from toolkit.data.tokens.prepared import dataset_folder
from toolkit.errors import ConfigError, DataError, ToolkitError
from toolkit.experiment.checks import check_experiment
from toolkit.experiment.load import load_experiment

STEPS, BATCH, LENGTH = 12, 512, 32
MIXTURE = {
    "sources": {"b": {"ratio": 0.25}, "a": {"ratio": 0.75}},
    "schedule": [{"at_tokens": 4 * BATCH, "ratios": {"a": 0.5, "b": 0.5}}],
}


def run(place: str, name: str, dataset: dict[str, Any], *flags: str) -> tuple[int, str]:
    """A run in this worker, begun or resumed; exit code and message."""
    from toolkit.commands.train import train
    from toolkit.experiment.load import load_experiment

    config = load_experiment(
        "smoke",
        [
            f"--run.save_folder={place}/{name}",
            f"--dataset={json.dumps(dataset)}",
            f"--data_loader.global_batch_size={BATCH}",
            "--data_loader.eval_tokens=256",
            "--train_module.precision=fp32",
            f"--trainer.max_duration.value={STEPS}",
            "--trainer.callbacks.lm_evaluator={interval: 6}",
            "--trainer.callbacks.checkpointer={interval: 4, export_hf: false, keep_last: null}",
            "--trainer.callbacks.console_logger.enabled=false",
            "--trainer.callbacks.system_monitor.enabled=false",
            *flags,
        ],
    ).config
    try:
        return train(config), ""
    except ToolkitError as error:
        return error.exit_code, str(error)


def run_batch_by_batch(*arguments: Any) -> tuple[int, str]:
    """`run`, with batches as large as what is read at once: others are read many together."""
    from toolkit.data import loader

    before, loader.CHUNK_TOKENS = loader.CHUNK_TOKENS, 1
    try:
        return run(*arguments)
    finally:
        loader.CHUNK_TOKENS = before


def records(folder: Path, stream: str = "train") -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "metrics" / f"{stream}.jsonl").read_text().split()]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """`dataset` sections by the kind of data."""
    place = tmp_path_factory.mktemp("corpora")
    paths = {
        name: str(write_texts(place / name, [random_text(3, seed=seed + i) for i in range(60)]))
        for name, seed in (("a", 0), ("b", 1000))
    }
    chats = place / "chats.jsonl"
    rows = [{"prompt": f"say {'x' * (i % 9)}", "completion": "y" * (i % 14)} for i in range(1, 400)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"root": str(place / "data"), "sequence_length": LENGTH, "validation_fraction": 0.1}
    text = common | {"source": {"type": "files", "paths": [paths["a"]]}}
    mixture = json.loads(json.dumps(MIXTURE))
    for name, path in paths.items():
        mixture["sources"][name]["source"] = {"type": "files", "paths": [path]}
    return {
        "fixed": text,
        "packed": text | {"instances": {"type": "packed"}},
        "variable": text | {"instances": {"type": "variable", "min_sequence_length": 8}},
        "mixture": common
        | {
            "mix": mixture,
            "instances": {"type": "packed"},
            "tokenizer": {"type": "bpe", "vocab_size": 300},
        },
        "instructions": common
        | {
            "dataset_name": "chats",
            "source": {"type": "files", "paths": [str(chats)]},
            "instructions": {},
            "instances": {"type": "packed"},
        },
        "custom": {
            "sequence_length": LENGTH,
            "custom": {
                "target": "tests.data.instances.custom_examples:Counting",
                "args": {"count": 100},
            },
        },
    }


def test_ranks_that_happen_to_read_other_kinds_of_rows_agree(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path
) -> None:
    """Plain text on one rank and a conversation on the other: both count their targets."""
    text, chats = corpora["fixed"], corpora["instructions"]
    sources = {
        "text": {"ratio": 0.9, "source": text["source"]},
        "chats": {"ratio": 0.1, "source": chats["source"], "instructions": {}},
    }
    dataset = {key: text[key] for key in ("root", "sequence_length", "validation_fraction")}
    dataset |= {"dataset_config": "both", "mix": {"sources": sources}}
    flags = [f"--data_loader.global_batch_size={2 * LENGTH}", *VOCABULARY]
    flags += ["--train_module.rank_microbatch_size=32"]
    found = []
    for ranks in (1, 2):
        place = (str(tmp_path), f"r{ranks}", dataset)
        results = workers.run(ranks, run_batch_by_batch, *place, *flags)
        assert results == [(0, "")] * ranks
        found.append([record["loss"] for record in records(tmp_path / f"r{ranks}")])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


KINDS = ["fixed", "packed", "variable", "mixture", "instructions", "custom"]
VOCABULARY = ["--model.vocab_size=1024"]
WITH_MEMORY = [
    "--train_module.precision=fp16",
    "--train_module.optim={type: skip_step_adamw, rolling_interval_length: 4, sigma_factor: 1.5}",
]
"""A loss scale and a window of accepted steps, which a checkpoint keeps besides the tensors."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_and_resumed_is_the_undisturbed_run(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    dataset, place = corpora[kind], str(tmp_path)
    flags = VOCABULARY + (WITH_MEMORY if kind == "custom" else [])
    assert workers.run(1, run, place, "whole", dataset, *flags) == [(0, "")]
    stop = "--trainer.hard_stop={value: 8, unit: steps}"
    assert workers.run(1, run, place, "parts", dataset, stop, *flags) == [(0, "")]
    assert workers.run(1, run, place, "parts", dataset, *flags) == [(0, "")]
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    for name in ("loss", "skipped", *(("loss_scale",) if kind == "custom" else ())):
        assert [r[name] for r in parts] == [r[name] for r in whole]
    if kind == "custom":
        assert 0 < sum(r["skipped"] for r in whole) < STEPS / 2
    assert len(whole) == STEPS
    assert (
        records(tmp_path / "whole", "eval")[-1]["loss"]
        == (records(tmp_path / "parts", "eval")[-1]["loss"])
    )
    found = step_batch(tmp_path / "parts", 9, show=2)
    assert (found.num_tokens, found.is_checked) == (BATCH, True)
    assert sum(piece.num_tokens for piece in found.instances[0].text or []) == (
        found.instances[0].num_tokens
    )


@pytest.mark.parametrize("kind", ["packed", "mixture", "instructions"])
def test_two_ranks_train_on_the_same_batches(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    for ranks in (1, 2):
        results = workers.run(ranks, run, str(tmp_path), f"r{ranks}", corpora[kind], *VOCABULARY)
        assert results == [(0, "")] * ranks
    one, two = records(tmp_path / "r1"), records(tmp_path / "r2")
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-5)
    assert [r["grad_norm"] for r in two] == pytest.approx([r["grad_norm"] for r in one], rel=1e-3)


def test_a_mixture_counts_what_each_source_gave(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path
) -> None:
    assert workers.run(1, run, str(tmp_path), "mix", corpora["mixture"], *VOCABULARY) == [(0, "")]
    for record in records(tmp_path / "mix"):
        drawn = record["step"] * BATCH // LENGTH
        before = min(drawn, 64)
        assert abs(record["instances/a"] - (0.75 * before + 0.5 * (drawn - before))) < 1
        assert record["instances/a"] + record["instances/b"] == drawn
    last = [record for record in records(tmp_path / "mix", "eval") if record["step"] == STEPS]
    assert [record["name"] for record in last] == ["a", "b", "val"]
    targets = [record["num_targets"] for record in last]
    assert targets[2] == targets[0] + targets[1]
    mean = sum(r["loss"] * r["num_targets"] for r in last[:2]) / targets[2]
    assert last[2]["loss"] == pytest.approx(mean)
    checkpoint = tmp_path / f"mix/checkpoints/step{STEPS}/.metadata.json"
    scores = json.loads(checkpoint.read_text())["scores"]
    assert {f"{r['name']}/loss": r["loss"] for r in last}.items() <= scores.items()
    assert step_batch(tmp_path / "mix", 1).instances[0].source in ("a", "b")
    assert explain_resume(tmp_path / "mix", [], {}).refused == []
    assert all("bits_per_byte" in record for record in last)
    ahead = "--dataset.mix.schedule.0.at_tokens=999936"
    assert explain_resume(tmp_path / "mix", [ahead], {}).refused[0].count("source ") == 2


@pytest.mark.parametrize(("kind", "ranks"), [("packed", 1), ("mixture", 2)])
def test_a_new_batch_size_goes_on_with_the_next_unseen_token(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path, kind: str, ranks: int
) -> None:
    tokens = f"--trainer.max_duration={{value: {10 * BATCH}, unit: tokens}}"
    stop = "--trainer.hard_stop={value: 4, unit: steps}"
    dataset, place = corpora[kind], str(tmp_path)
    flags = [tokens, *VOCABULARY, "--train_module.rank_microbatch_size=128"]
    assert workers.run(1, run, place, "run", dataset, stop, *flags) == [(0, "")]
    small = f"--data_loader.global_batch_size={BATCH // 2}"
    assert workers.run(ranks, run, place, "run", dataset, small, *flags) == [(0, "")] * ranks
    found = records(tmp_path / "run")
    assert [r["tokens"] for r in found[3:6]] == [4 * BATCH, 4.5 * BATCH, 5 * BATCH]
    assert (found[-1]["step"], found[-1]["tokens"]) == (16, 10 * BATCH)
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "512 -> 256 tokens: batch 4 starts at the next unseen instance, 64 of" in log

    assert workers.run(1, run, place, "large", dataset, *flags) == [(0, "")]
    for step, both in ((3, [3]), (5, [5, 6]), (7, [9, 10])):
        parts = [i.instance for s in both for i in step_batch(tmp_path / "run", s).instances]
        assert parts == [i.instance for i in step_batch(tmp_path / "large", step).instances]


def test_epochs_and_limits_count_what_batches_of_every_size_used(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path
) -> None:
    """A mixture of 2 epochs: larger batches at first, smaller ones then."""
    dataset, place = json.loads(json.dumps(corpora["mixture"])), str(tmp_path)
    del dataset["mix"]["schedule"]
    for source in dataset["mix"]["sources"].values():
        source["max_tokens"] = 96 * LENGTH
    dataset["mix"]["sources"]["b"]["max_repetitions"] = 1.0
    size = 64 * LENGTH
    first = [f"--data_loader.global_batch_size={size}", *VOCABULARY]
    first += ["--trainer.max_duration={value: 2, unit: epochs}"]
    stop = "--trainer.hard_stop={value: 3, unit: steps}"
    assert workers.run(1, run, place, "run", dataset, stop, *first) == [(0, "")]
    # 384 rows in all: 192 of them are used, and a batch of 32 follows another.
    half = [flag.replace(str(size), str(size // 2)) for flag in first]
    explained = str(explain_resume(tmp_path / "run", [half[0], "--trainer.hard_stop=null"], {}))
    assert "from step 4 to 9" in explained
    assert "refused     nothing" in explained
    assert workers.run(1, run, place, "run", dataset, *half) == [(0, "")]
    found = records(tmp_path / "run")
    assert len(found) == 9
    assert [r["epoch"] for r in found] == pytest.approx(
        [1 / 3, 2 / 3, 1, *(1 + n / 6 for n in range(1, 7))]
    )
    assert found[-1]["instances/b"] == 96
    longer = "--trainer.max_duration={value: 10, unit: steps}"
    [(code, message)] = workers.run(1, run, place, "run", dataset, *half, longer)
    assert code == 2
    assert "b breaks its limit of 1 repetitions" in message


def test_other_data_of_a_mixture_is_not_shown_as_the_runs(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path
) -> None:
    dataset = corpora["mixture"] | {"root": str(tmp_path / "data")}
    assert workers.run(1, run, str(tmp_path), "run", dataset, *VOCABULARY) == [(0, "")]
    assert step_batch(tmp_path / "run", 3).is_checked
    config = load_experiment("smoke", [f"--dataset={json.dumps(dataset)}"]).config
    other = next(s for s in as_prepared(config.dataset) if s.name == "a").dataset
    shutil.rmtree(dataset_folder(other))
    texts = write_texts(tmp_path / "other", [random_text(4, seed=i) for i in range(50)])
    prepare_dataset(other.replace(source=FilesSourceConfig(paths=[str(texts)])))
    with pytest.raises(DataError, match="not what the run was trained on: source a "):
        step_batch(tmp_path / "run", 3)


def test_limits_of_a_mixture_are_checked_before_anything_is_written(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path
) -> None:
    dataset = json.loads(json.dumps(corpora["mixture"]))
    dataset["mix"]["sources"]["b"]["max_repetitions"] = 0.01
    [(code, message)] = workers.run(1, run, str(tmp_path), "run", dataset, *VOCABULARY)
    assert code == 2
    assert "b breaks its limit of 0.01 repetitions" in message
    assert not (tmp_path / "run").exists()


TOKENS = [f"--trainer.max_duration={{value: {10 * BATCH}, unit: tokens}}", *VOCABULARY]
TOKENS += ["--train_module.rank_microbatch_size=128"]
TOKENS += ["--train_module.scheduler={type: wsd, units: tokens, warmup: 1024}"]


def test_a_schedule_of_batch_sizes_is_the_sequence_of_runs_made_by_hand(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path
) -> None:
    """512 tokens a step for 4 steps, then 256 for 4, then 1,024 for 2."""
    dataset, place, size = corpora["mixture"], str(tmp_path), "--data_loader.global_batch_size"
    changes = [[4 * BATCH, BATCH // 2], [6 * BATCH, 2 * BATCH]]
    entries = ", ".join(f"{{tokens: {t}, global_batch_size: {s}}}" for t, s in changes)
    schedule = f"--data_loader.batch_size_schedule=[{entries}]"
    [(code, message)] = workers.run(1, run, place, "whole", dataset, schedule, *TOKENS)
    assert (code, message) == (0, "")
    for batch, stop in ((BATCH, 4), (BATCH // 2, 8), (2 * BATCH, 10)):
        flags = [f"{size}={batch}", f"--trainer.hard_stop={{value: {stop}, unit: steps}}"]
        assert workers.run(1, run, place, "hand", dataset, *flags, *TOKENS) == [(0, "")]
    whole, hand = records(tmp_path / "whole"), records(tmp_path / "hand")
    same = ("step", "tokens", "epoch", "loss", "lr", "grad_norm", "instances/a", "instances/b")
    assert [[r[key] for key in same] for r in whole] == [[r[key] for key in same] for r in hand]
    sizes = [BATCH] * 4 + [BATCH // 2] * 4 + [2 * BATCH] * 2
    assert [step_batch(tmp_path / "whole", n + 1).num_tokens for n in range(10)] == sizes
    # Stopped inside, and gone on by two ranks.
    stop = "--trainer.hard_stop={value: 5, unit: steps}"
    assert workers.run(1, run, place, "parts", dataset, schedule, stop, *TOKENS) == [(0, "")]
    explained = explain_resume(tmp_path / "parts", ["--trainer.hard_stop=null"], {})
    assert explained.refused == []
    assert "from step 6 to 10" in str(explained)
    assert "instead of" not in str(explained)
    late = ["--train_module.scheduler.decay_from=3072", "--train_module.scheduler.decay=2048"]
    explained = explain_resume(tmp_path / "parts", ["--trainer.hard_stop=null", *late], {})
    assert explained.refused == []
    assert "train_module.scheduler.decay_from: null -> 3072" in str(explained)
    [refused] = explain_resume(tmp_path / "parts", [late[0].replace("3072", "5120")], {}).refused
    assert "so this decay never starts; use less than 5,120, or a longer run" in refused
    assert workers.run(2, run, place, "parts", dataset, schedule, *TOKENS) == [(0, "")] * 2
    parts = records(tmp_path / "parts")
    assert [r["tokens"] for r in parts] == [r["tokens"] for r in whole]
    assert [r["loss"] for r in parts] == pytest.approx([r["loss"] for r in whole], rel=1e-5)


def test_shorter_rows_hold_the_same_tokens_and_are_resumed(
    workers: WorkerPool, corpora: dict[str, Any], tmp_path: Path
) -> None:
    """Rows of 8 tokens for 4 steps, then of 16 for 4, then of 32."""
    dataset, place = corpora["fixed"], str(tmp_path)
    entries = f"{{tokens: 0, sequence_length: 8}}, {{tokens: {4 * BATCH}}}, {{tokens: {8 * BATCH}}}"
    schedule = [f"--data_loader.sequence_length_schedule=[{entries}]", *TOKENS]
    in_order = "--data_loader.shuffle=false"
    assert workers.run(1, run, place, "whole", dataset, in_order, *schedule) == [(0, "")]
    short = dataset | {"sequence_length": 8}
    stop = "--trainer.hard_stop={value: 4, unit: steps}"
    assert workers.run(1, run, place, "short", short, in_order, stop, *TOKENS) == [(0, "")]
    whole = [r["loss"] for r in records(tmp_path / "whole")]
    assert [r["loss"] for r in records(tmp_path / "short")] == whole[:4]
    stop = "--trainer.hard_stop={value: 6, unit: steps}"
    assert workers.run(1, run, place, "parts", dataset, in_order, stop, *schedule) == [(0, "")]
    assert workers.run(1, run, place, "parts", dataset, in_order, *schedule) == [(0, "")]
    assert [r["loss"] for r in records(tmp_path / "parts")] == whole
    for step, length in ((4, 8), (5, 16), (9, 32)):
        found = step_batch(tmp_path / "whole", step)
        assert found.sequence_length == length
        assert found.num_targets == BATCH // length * (length - 1)


@pytest.mark.parametrize(
    ("kind", "flag", "expected"),
    [
        ("packed", "sequence_length_schedule=[{tokens: 0, sequence_length: 8}]",
         "data_loader.sequence_length_schedule: rows of type packed hold whole documents"),
        ("variable", "sequence_length_schedule=[{tokens: 0, sequence_length: 8}]",
         "data_loader.sequence_length_schedule: rows of type variable have lengths of their own"),
        ("custom", "sequence_length_schedule=[{tokens: 0, sequence_length: 8}]",
         "data_loader.sequence_length_schedule: a data set written in Python makes its own rows"),
        ("variable", "batch_size_schedule=[{tokens: 900}]",
         "data_loader.batch_size_schedule: the order of dataset.instances of type variable"),
        ("fixed", "sequence_length_schedule=[{tokens: 0, sequence_length: 7}]",
         "data_loader.sequence_length_schedule.0.sequence_length: 7 does not divide "
         "dataset.sequence_length 32; nearest that work: 4 or 8"),
        ("fixed", "batch_size_schedule=[{tokens: 9, global_batch_size: 100}]",
         "data_loader.batch_size_schedule.0.global_batch_size 100 is not divisible by "
         "dataset.sequence_length 32 x 1 rank = 32; nearest that work: 96 or 128"),
        ("fixed", "batch_size_schedule=[{tokens: 9, global_batch_size: 640}]",
         "data_loader.batch_size_schedule.0.global_batch_size 640 is not divisible by "
         "train_module.rank_microbatch_size 512"),
    ],
)  # fmt: skip
def test_schedules_that_a_kind_of_data_cannot_follow_are_refused(
    corpora: dict[str, Any], kind: str, flag: str, expected: str
) -> None:
    flags = [f"--dataset={json.dumps(corpora[kind])}", f"--data_loader.{flag}"]
    flags += [f"--data_loader.global_batch_size={BATCH}"]
    flags += [f"--train_module.rank_microbatch_size={BATCH}"]
    config = load_experiment("smoke", flags).config
    with pytest.raises(ConfigError) as error:
        check_experiment(config, 1)
    assert str(error.value).startswith(expected)
