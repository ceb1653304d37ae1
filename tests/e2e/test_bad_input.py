"""Bad input ends with one clear line and exit code 2; what is on disk stays as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e._run import Result, committed, content, losses, read_json, run
from tests.e2e.conftest import STEPS

MY = "my.json"


def assert_one_line(result: Result, *parts: str) -> None:
    """Exit 2, one `error: ` line that holds all `parts`, as the last line, and no traceback."""
    assert result.code == 2, result.output
    assert len(result.errors) == 1, result.output
    assert result.output.splitlines()[-1] == result.errors[0]
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.errors[0]


@pytest.fixture
def here(place: Path, tmp_path: Path) -> Path:
    """A folder of its own for every test: my.json writes runs and looks for data here, but for
    the prepared corpus, which is the session's."""
    config = json.loads((place / MY).read_text())
    config["run"]["root"] = "runs"
    (tmp_path / MY).write_text(json.dumps(config))
    return tmp_path


def written(folder: Path) -> set[str]:
    """What a command left in the user's folder, but for hidden files (locks)."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if not any(part.startswith(".") for part in path.parts)}


def source(*paths: str, **more: Any) -> tuple[str, ...]:
    value = json.dumps({"type": "files", "paths": list(paths), **more})
    return f"--dataset.source={value}", "--dataset.dataset_name=own", "--dataset.root=data"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--train_module.optim.lrr=1"],
         ["train_module.optim.lrr: no such field; did you mean 'lr'?"]),
        (["--train_module.optim.lr=fast"], ["train_module.optim.lr", "fast"]),
        (["--trainer.hard_stop={value: 0}"], ["trainer.hard_stop", "value", "greater than 0"]),
        (["--data_loader.global_batch_size=1000"],
         ["data_loader.global_batch_size 1000", "dataset.sequence_length 64", "960 or 1024"]),
        (["--train_module.rank_microbatch_size=384"],
         ["data_loader.global_batch_size 1024", "train_module.rank_microbatch_size 384",
          "256 or 512"]),
        (["--model.vocab_size=100"],
         ["model.vocab_size 100 is too small for dataset.tokenizer", "257"]),
        (["--save-folder", "my.json/run"], ["my.json/run: cannot write there"]),
        (["--dataset.source=null", "--dataset.root=nowhere"],
         ["nowhere/python_stdlib/bytes_small: no prepared data"]),
        (source("nope.txt"), ["dataset.source.paths: nope.txt: no such file or folder"]),
        (source("empty.txt"), ["empty.txt: the file is empty"]),
    ],
)  # fmt: skip
def test_one_line_and_nothing_written(flags: list[str], parts: list[str], here: Path) -> None:
    (here / "empty.txt").touch()
    assert_one_line(run("toolkit", "train", MY, *flags, cwd=here), *parts)
    assert written(here) == {MY, "empty.txt"}


def test_text_that_is_not_utf_8_is_refused_or_replaced_and_counted(
    here: Path,
) -> None:
    (here / "latin.txt").write_bytes(b"caf\xe9 au lait, th\xe9 au citron\n" * 50)
    result = run("toolkit", "train", MY, *source("latin.txt"), cwd=here)
    assert_one_line(
        result, "latin.txt: not UTF-8 at byte 3 (0xe9)", "dataset.source.encoding_errors=replace"
    )
    assert written(here) == {MY, "latin.txt"}
    result = run(
        *("toolkit", "train", MY, *source("latin.txt", encoding_errors="replace")),
        *("--data_loader.global_batch_size=1536", "--data_loader.shuffle=false"),
        cwd=here,
    )
    manifest = read_json(here / "data" / "own" / "bytes_small" / "dataset.json")
    assert manifest["replaced_bytes"] == 100
    assert "100 bytes were not UTF-8 and became U+FFFD" in result.output.splitlines()
    # 1,441 of the 1,602 tokens are not held out: 22 instances of 64.
    assert_one_line(result, "not enough data for one batch: 22 instances of 64", "needs 24")
    assert not (here / "runs").exists()


def test_a_name_that_exists_is_refused_before_anything(
    single: tuple[Path, Result], place: Path
) -> None:
    before = content(single[0] / "metadata")
    for more in ([], ["--dry-run"]):
        result = run("toolkit", "train", MY, "--name", "single", *more, cwd=place)
        assert_one_line(result, "this run exists", f"`toolkit resume {single[0]}`")
    assert content(single[0] / "metadata") == before


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (['--train_module.optim.group_overrides=[{params: ["*nope*"], opts: {lr: 0.1}}]'],
         ["train_module.optim.group_overrides.0.params: '*nope*' matches no parameter",
          "embeddings.tokens.weight"]),
        (["--trainer.load_path=runs", "--trainer.load_strategy=always"],
         ["trainer.load_path runs: holds no valid checkpoint"]),
    ],
)  # fmt: skip
def test_what_needs_the_model_is_checked_before_the_run_folder(
    flags: list[str], parts: list[str], here: Path, single: tuple[Path, Result]
) -> None:
    assert_one_line(run("toolkit", "train", MY, *flags, cwd=here), *parts)
    assert written(here) == {MY}


def test_two_engines_asked_for_are_both_named(place: Path) -> None:
    config = Path(__file__).parents[2] / "accelerate_configs" / "fsdp.yaml"
    result = run(
        *("accelerate", "launch", "--config_file", config, "-m", "toolkit", "train", MY),
        "--train_module.dp_config={name: zero2}",
        cwd=place,
    )
    assert result.code != 0
    assert result.errors == [
        "error: two engines asked for: accelerate launch (FSDP) says fsdp, train_module.dp_config "
        "says zero2; remove train_module.dp_config or launch with zero2.yaml (`toolkit recipes "
        "copy zero2.yaml`)"
    ]


def test_processes_that_do_not_fit_the_mesh_are_counted(here: Path) -> None:
    result = run(
        *("torchrun", "--nproc-per-node=3", "-m", "toolkit", "train", MY),
        *("--train_module.dp_config={name: hsdp}", "--data_loader.global_batch_size=1536"),
        cwd=here,
    )
    assert result.code != 0
    assert len(result.errors) == 1
    assert "num_replicas 2 x shard_degree 1 does not fit 3 ranks" in result.errors[0]
    assert written(here) == {MY}


@pytest.fixture(scope="module")
def copy(single: tuple[Path, Result]) -> Path:
    """The undisturbed run again, to be resumed in vain."""
    folder = single[0].with_name("copy")
    shutil.copytree(single[0], folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model.d_model=64"], ["checkpoints/step60", "model.d_model (was 32, is 64)"]),
        (["--dataset.root=other", "--dataset.source=null"],
         ["the training data (was ", "trainer.load_weights_only=true"]),
        (["--data_loader.seed=7"], ["data_loader.seed (was 0, is 7)"]),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_continued_like_this_stays_as_it_is(
    flags: list[str], parts: list[str], copy: Path, place: Path
) -> None:
    if not (place / "other").exists():
        # As if the files had been made anew from other text.
        result = run(
            *("toolkit", "prepare", MY, "--data-root", "other"),
            "--dataset.source.max_bytes=100000",
            cwd=place,
        )
        assert result.code == 0, result.output
    before = content(copy)
    result = run("toolkit", "resume", copy, *flags, "--trainer.max_duration.value=70", cwd=place)
    assert_one_line(result, *parts)
    assert content(copy) == before


@pytest.mark.slow
def test_an_error_of_relaunched_processes_is_still_one_line(fsdp: Path, place: Path) -> None:
    before = content(fsdp)
    result = run("toolkit", "resume", fsdp, "--train_module.rank_microbatch_size=1024", cwd=place)
    assert "relaunching with 2 processes" in result.output
    assert_one_line(result, "train_module.rank_microbatch_size 1024 x 2 ranks = 2048")
    assert content(fsdp) == before


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    single: tuple[Path, Result], copy: Path, place: Path
) -> None:
    damaged = next((copy / "checkpoints" / f"step{STEPS}" / "model_and_optim").glob("*.distcp"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    result = run("toolkit", "resume", copy, cwd=place)
    assert result.code == 0, result.output
    name = f"model_and_optim/{damaged.name}"
    assert f"warning: checkpoint skipped: {copy}/checkpoints/step{STEPS}: {name} has changed" in (
        result.output
    )
    assert "checkpoints/step50 (step 50)" in result.output
    assert losses(copy) == losses(single[0])
    assert committed(copy) == [40, 50, 60]
    assert f"damaged checkpoint renamed: {copy}/checkpoints/step{STEPS}.invalid" in result.output
