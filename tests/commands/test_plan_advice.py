"""What `toolkit plan` tells a user to type: it does what the plan says."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from toolkit.cli import main as cli
from toolkit.commands.plan.search import ROOM


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert cli.run(["plan", *words]) == code
    output = capsys.readouterr()
    return output.out if code == 0 else output.err.strip()


def data(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(said(capsys, *words, "--json"))


def copied(folder: Path, recipe: str, **module: Any) -> str:
    """A copy of a recipe with other fields of its train module."""
    path = folder / "my.json"
    assert cli.run(["recipes", "copy", recipe, str(path)]) == 0
    config = json.loads(path.read_text())
    config["train_module"] |= module
    path.write_text(json.dumps(config))
    return str(path)


LONG = [
    "--sequence-length", "65536", "--model.max_sequence_length", "65536",
    "--train_module.rank_microbatch_size=65536", "--data_loader.global_batch_size=524288",
]  # fmt: skip
AXES = {
    "dp_config": {"name": "fsdp", "reduce_dtype": "bfloat16", "reshard_after_forward": False},
    "tp_config": {"degree": 2}, "cp_config": {"degree": 2, "style": "ring"},
    "pp_config": {"degree": 2}, "ac_config": {"mode": "full"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "module", "ranks", "words"),
    [
        ("llama3_8B", {}, 16, LONG),
        ("llama3_70B", {}, 64, ["--device", "a100-40"]),
        ("smoke", {"pp_config": {"degree": 2}}, 2, ["--device", "cpu"]),
        ("llama_271M", AXES, 16, ["--train_module.tp_config.degree=4", "--model.num_layers=4"]),
        ("olmoe_1B_7B", {"dp_config": {"name": "zero2"}}, 8, ["--dataset.sequence_length=2048"]),
    ],
)
def test_the_command_of_a_search_has_the_numbers_of_its_winner(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    recipe: str,
    module: dict[str, Any],
    ranks: int,
    words: list[str],
) -> None:
    source = copied(tmp_path, recipe, **module)
    capsys.readouterr()
    machine = ["--world-size", f"{ranks}"]
    if words[0] == "--device":
        machine += words
    found = data(capsys, source, *machine, *words, "--search")
    again = data(capsys, source, *machine, *found["flags"])
    assert again["seconds"] == found["seconds"]
    assert again["memory"] == found["memory"]
    assert again["layout"] == found["layout"]
    assert again["rank_microbatch_size"] == found["rank_microbatch_size"]
    assert again["length"] == found["length"]
    if module is AXES:
        assert found["dp_config"]["reduce_dtype"] == "bfloat16"
    text = said(capsys, source, *machine, *words, "--search")
    command = text.partition("start it with\n")[2].replace("\\\n", " ")
    assert shlex.split(command)[-len(found["flags"]) :] == found["flags"]


def test_a_search_leaves_room(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["llama3_70B", "--world-size", "64"]
    for layout in data(capsys, *words, "--search")["layouts"]:
        assert layout["memory"] <= ROOM * 79.1 * 2**30
    # One device on which only the last bytes do is said to be nearly full.
    tight = [*words, "--device=h100", "--train_module.cp_config.style=ulysses"]
    assert "of 79.1: fits, but leaves less than 5%" in said(capsys, *tight)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["llama3_8B", "--train_module.dp_config={name: ddp}"], "dp_config={name: fsdp}"),
        (
            ["llama3_70B", "--train_module.dp_config={name: fsdp, wrapping_strategy: blocks}"],
            "ac_config={mode: selected_blocks}",
        ),
    ],
)
def test_a_plan_that_does_not_fit_names_one_that_does(
    capsys: pytest.CaptureFixture[str], words: list[str], flags: str
) -> None:
    text = said(capsys, *words, "--world-size", "64")
    assert "does NOT fit" in text
    (line,) = [line for line in text.splitlines() if " a step: " in line]
    named = shlex.split(line.partition(" a step: ")[2])
    assert any(flags in flag for flag in named)
    again = said(capsys, *words, "--world-size", "64", *named)
    assert "NOT" not in again
    assert line.split()[0] in again


def test_a_batch_that_is_too_small_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["smoke", "--world-size", "64", "--search"]
    line = said(capsys, *words, code=2)
    assert "each rank of data parallelism needs a row: plan for 16 ranks or fewer" in line
    flag = line.rpartition(" ")[2]
    assert "64 x h100: the fastest" in said(capsys, *words, flag)


def test_small_models_have_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "smoke", "--device", "cpu", "--world-size", "2", "--search")
    assert "0.00" not in text
    assert " 0 ms" not in text
    assert "MiB  weights, fp32" in text
    assert "1 microbatches" not in text
    assert "bubble" not in said(capsys, "smoke", "--device", "cpu", "--world-size", "1", "--search")


def test_kept_weights_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    kept = "--train_module.dp_config={name: fsdp, reshard_after_forward: false}"
    text = said(capsys, "llama3_8B", "--world-size", "8", kept)
    assert "dp 8: fsdp, weights kept after forward" in text
    # A pipeline keeps them in any case.
    text = said(capsys, "llama3_8B", "--world-size", "8", kept, "--train_module.pp_config.degree=2")
    assert "kept" not in text
