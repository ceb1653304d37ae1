"""What cards say of the run that a model comes from."""

import pytest

from toolkit.commands.card import _command, _sizes, hub_data_sets
from toolkit.data.config import DataLoaderConfig, DatasetConfig, FilesSourceConfig
from toolkit.data.order.schedule import BatchSizeChangeConfig


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/env/bin/toolkit", "train", "my recipe.json"], "toolkit train 'my recipe.json'"),
        (["/code/toolkit/__main__.py", "resume", "runs/a"], "toolkit resume runs/a"),
        (["/env/bin/pytest", "tests"], None),
    ],
)
def test_the_command_can_be_typed_again(argv: list[str], command: str | None) -> None:
    assert _command({"argv": argv}) == command


def test_sizes_are_those_that_were_trained_on() -> None:
    values = DataLoaderConfig(
        global_batch_size=64,
        batch_size_schedule=(
            BatchSizeChangeConfig(tokens=0, global_batch_size=1024),
            BatchSizeChangeConfig(tokens=5000),
            BatchSizeChangeConfig(tokens=9000),
        ),
    )
    assert values.first_batch_size == 1024
    assert _sizes(values.batch_sizes, 8000) == "1,024 tokens, 2,048 tokens after 5,000 tokens"


def test_files_of_a_data_set_on_the_hub_name_it() -> None:
    paths = [
        "hf://datasets/allenai/c4/en/*.json.gz",
        "hf://datasets/allenai/c4@main/fr/1.json.gz",
        "https://huggingface.co/datasets/me/mine.v2/resolve/main/a.jsonl",
        "texts/allenai/c4/",
    ]
    dataset = DatasetConfig(source=FilesSourceConfig(paths=paths))
    assert hub_data_sets(dataset) == ["allenai/c4", "me/mine.v2"]
