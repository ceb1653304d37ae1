"""The same conversations stored in files of any kind train on the same tokens and masks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from tests.data.prepare.text.instructions.templates import EOS, assistant, tokenizer, user
from toolkit.data.config import (
    DatasetConfig,
    DiskSourceConfig,
    FilesSourceConfig,
    HFTokenizerConfig,
    InstructionsConfig,
    SourceConfig,
)
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.errors import DataError

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments if call.function.arguments is string "
    "else call.function.arguments | tojson }}{% endfor %}"
    "{% if message.name is defined %}({{ message.name }}){% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


WEATHER = tool("weather", city={"type": "string", "enum": ["Oslo", "Rome"]})
ADD = tool("add", a={"type": "number"}, b={"type": "number", "description": "second"})
NOW = tool("now", zone={"type": "string"})
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            user("Oslo?"),
            call("weather", {"city": "Oslo"}),
            {"role": "tool", "content": "rain", "name": "weather"},
            assistant("Rain."),
        ],
        "tools": [WEATHER],
    },
    {"messages": [user("3+4?"), call("add", {"a": 3, "b": 4})], "tools": [ADD, WEATHER]},
    {"messages": [user("3+0.5?"), call("add", {"a": 3, "b": 0.5})], "tools": [ADD]},
    {"messages": [user("Time?"), call("now", {})], "tools": [NOW]},
    {"messages": [user("Hi"), {**assistant("Hello"), "tool_calls": []}], "tools": []},
    {"messages": [user("Bye"), {**assistant("So long"), "weight": 0}, user("?"), assistant("!")]},
]


def explicit_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """As a program writes it that knows all keys."""
    messages = [{"name": None, "tool_calls": None, "weight": None, **m} for m in row["messages"]]
    return {"tools": None, "other": None, **row, "messages": messages}


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FilesSourceConfig(paths=[str(folder / "rows.jsonl")])


def json_list(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    return FilesSourceConfig(paths=[str(folder / "rows.json")])


def jsonl_with_nulls(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    return jsonl(folder, [explicit_nulls(row) for row in rows])


def parquet(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_schema(rows)), path)
    return FilesSourceConfig(paths=[str(path)])


def arrow(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    table = pyarrow.Table.from_pylist(rows, schema=_schema(rows))
    with pyarrow.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return FilesSourceConfig(paths=[str(folder / "rows.arrow")])


def _schema(rows: list[dict[str, Any]]) -> pyarrow.Schema:
    columns = ("messages", "tools")
    return pyarrow.schema(
        [(name, pyarrow.array([row.get(name) for row in rows]).type) for name in columns]
    )


def saved(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    datasets.Dataset.from_list([explicit_nulls(row) for row in rows]).save_to_disk(folder / "saved")
    return DiskSourceConfig(path=str(folder / "saved"))


def _typed(folder: Path, rows: list[dict[str, Any]]) -> datasets.Dataset:
    """What `datasets` makes of JSON Lines: parts of the rows are text of the type arrow.json."""
    jsonl(folder, rows)
    loaded = datasets.load_dataset(
        "json", data_files=str(folder / "rows.jsonl"), cache_dir=str(folder / "cache")
    )
    return loaded["train"]


def saved_with_json(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    _typed(folder, rows).save_to_disk(folder / "saved")
    return DiskSourceConfig(path=str(folder / "saved"))


def parquet_with_json(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    _typed(folder, rows).to_parquet(folder / "rows.parquet")
    return FilesSourceConfig(paths=[str(folder / "rows.parquet")])


def parquet_with_text(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    tools = [None if row.get("tools") is None else json.dumps(row["tools"]) for row in rows]
    return parquet(folder, [row | {"tools": t} for row, t in zip(rows, tools, strict=True)])


Store = Callable[[Path, list[dict[str, Any]]], SourceConfig]
STORES: list[Store] = [
    json_list, jsonl_with_nulls, parquet, arrow, saved, saved_with_json, parquet_with_json,
    parquet_with_text,
]  # fmt: skip


def trained(folder: Path, store: Store, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """All text, and what of it is trained on."""
    folder.mkdir()
    tokenizer().save(folder / "tokenizer")
    config = DatasetConfig(
        root=str(folder / "data"),
        source=store(folder, rows),
        tokenizer=HFTokenizerConfig(path=str(folder / "tokenizer"), eos_token=EOS),
        instructions=InstructionsConfig(chat_template=TEMPLATE),
        validation_fraction=0.0,
        num_processes=1,
    )
    prepared = prepare_dataset(config, progress=False)
    ids, mask = np.asarray(prepared.tokens("train")), prepared.target_mask("train")
    assert mask is not None
    decode = load_tokenizer(folder / "tokenizer").decode
    return decode(ids.tolist()), decode(ids[np.asarray(mask) != 0].tolist())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return trained(tmp_path_factory.mktemp("rows") / "jsonl", jsonl, ROWS)


def test_only_what_the_rows_say_is_trained_on(expected: tuple[str, str]) -> None:
    text, targets = expected
    assert "null" not in text
    assert targets.split("<|im_end|>")[:-1] == [
        'weather{"city": "Oslo"}', "Rain.", 'add{"a": 3, "b": 4}', 'add{"a": 3, "b": 0.5}',
        "now{}", "Hello", "!",
    ]  # fmt: skip
    assert json.dumps(WEATHER) in text


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
def test_rows_are_the_same_in_every_kind_of_file(
    store: Store, expected: tuple[str, str], tmp_path: Path
) -> None:
    assert trained(tmp_path / "here", store, ROWS) == expected


def test_maps_are_objects(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("w"), call("weather", {"city": "Oslo"})]},
        {"messages": [user("n"), call("now", {"zone": "CET"})]},
    ]
    arguments = pyarrow.map_(pyarrow.string(), pyarrow.string())
    function = pyarrow.struct([("name", pyarrow.string()), ("arguments", arguments)])
    message = pyarrow.struct(
        [
            ("role", pyarrow.string()),
            ("content", pyarrow.string()),
            ("tool_calls", pyarrow.list_(pyarrow.struct([("function", function)]))),
        ]
    )

    def with_maps(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
        schema = pyarrow.schema([("messages", pyarrow.list_(message))])
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(table, folder / "rows.parquet")
        return FilesSourceConfig(paths=[str(folder / "rows.parquet")])

    found = trained(tmp_path / "maps", with_maps, rows)
    assert found == trained(tmp_path / "jsonl", jsonl, rows)
    twice = [("city", "Oslo"), ("city", "Rome")]
    with pytest.raises(DataError, match=r"rows\.parquet: .*row 0: the key 'city' stands twice"):
        trained(tmp_path / "twice", with_maps, [{"messages": [user("w"), call("weather", twice)]}])


def test_arguments_that_are_text_stay_as_they_are(tmp_path: Path) -> None:
    rows = [{"messages": [user("w"), call("weather", '{"city": null,  "n": 1.0}')]}]
    for store in (jsonl, parquet):
        _, targets = trained(tmp_path / store.__name__, store, rows)
        assert targets == 'weather{"city": null,  "n": 1.0}<|im_end|>'


def test_numbers_that_json_does_not_have_are_refused_where_they_are_used(tmp_path: Path) -> None:
    rows = [{"messages": [user("w"), call("add", {"a": float("nan")})], "score": float("nan")}]
    with pytest.raises(DataError, match=r"messages\[1\]: holds nan, which is no number of JSON"):
        trained(tmp_path / "used", jsonl, rows)
    rows[0]["messages"][1] = assistant("yes")
    assert trained(tmp_path / "unused", jsonl, rows)[1] == "yes<|im_end|>"
