"""Preference and binary data as token files: units, their targets, and what is left out."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.data.prepare.text.instructions.templates import (
    CHATML,
    EOS,
    LLAMA3,
    MARKED,
    assistant,
    tokenizer,
    user,
)
from toolkit.data.config import (
    DatasetConfig,
    DiskSourceConfig,
    FilesSourceConfig,
    HFTokenizerConfig,
    InstructionsConfig,
    PackedInstancesConfig,
    SourceConfig,
)
from toolkit.data.prepare.build import parts, workers
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.build.unit_encoding import UnitEncoder
from toolkit.data.prepare.text.presence import check_presence
from toolkit.data.prepare.text.reading import Piece
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_bpe
from toolkit.data.tokens.prepared import PreparedDataset, Split
from toolkit.errors import DataError

ASK, GOOD, BAD = user("Sky?"), assistant("Blue."), assistant("Green.")
PAIR = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}


def config_of(
    folder: Path,
    rows: list[Any] | SourceConfig,
    kind: Any = "preference",
    template: str | None = None,
    **changes: Any,
) -> DatasetConfig:
    if not (folder / "tokenizer").exists():
        tokenizer(template).save(folder / "tokenizer")
    source = rows
    if isinstance(rows, list):
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = FilesSourceConfig(paths=[str(path)])
    how = changes.pop("instructions", {})
    changes = {"validation_fraction": 0.0, "num_processes": 1, **changes}
    return DatasetConfig(
        root=str(folder / "data"),
        source=source,
        tokenizer=HFTokenizerConfig(path=str(folder / "tokenizer"), eos_token=EOS),
        instructions=InstructionsConfig(kind=kind, **how),
        instances=PackedInstancesConfig(),
        **changes,
    )


def documents(prepared: PreparedDataset, split: Split = "train") -> list[str]:
    """Text of each document; what stands between digits has them in the mask."""
    made = load_tokenizer(prepared.folder / "tokenizer")
    ids, mask = prepared.tokens(split), prepared.target_mask(split)
    assert mask is not None
    bounds = [*prepared.document_starts(split).tolist(), len(ids)]
    found = []
    for start, end in itertools.pairwise(bounds):
        text, last = "", 0
        for token, kind in zip(ids[start:end].tolist(), mask[start:end].tolist(), strict=True):
            text += (f"]{kind}[" if kind != last else "") + made.decode([token])
            last = kind
        found.append(text)
    return found


def prepared_of(folder: Path, rows: Any, *args: Any, **changes: Any) -> PreparedDataset:
    return prepare_dataset(config_of(folder, rows, *args, **changes), progress=False)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MARKED])
def test_a_pair_is_two_documents_with_one_prompt(tmp_path: Path, template: str) -> None:
    prepared = prepared_of(tmp_path, [PAIR], template=template)
    assert prepared.unit == "pair"
    assert (prepared.num_documents("train"), prepared.num_units("train")) == (2, 1)
    chosen, rejected = documents(prepared)
    prompt, answer, *_ = chosen.split("]1[")
    assert prompt == rejected.split("]2[")[0]
    assert prompt.endswith(("assistant\n", "<|end_header_id|>\n\n"))
    assert answer.startswith("Blue.<|")
    assert rejected.split("]2[")[1].startswith("Green.<|")
    assert "unit" in json.loads((prepared.folder / "dataset.json").read_text())


def test_texts_are_joined_and_all_counts_everything_after_the_prompt(tmp_path: Path) -> None:
    rows = [{"chosen": "Q: Sky? A: Blue.", "rejected": "Q: Sky? A: Green."}]
    assert documents(prepared_of(tmp_path, rows, template=CHATML)) == [
        f"Q: Sky? A:]1[ Blue.{EOS}",
        f"Q: Sky? A:]2[ Green.{EOS}",
    ]
    how = {"instructions": {"train_on": "all"}, "append_eos": False, "dataset_config": "all"}
    head = "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
    assert documents(prepared_of(tmp_path, [PAIR], **how)) == [
        f"{head}]1[Blue.<|im_end|>\n",
        f"{head}]2[Green.<|im_end|>\n",
    ]


def test_a_binary_unit_ends_with_the_completion_of_the_next(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"{n}!", "label": n == 2} for n in (1, 2, 3)]
    prepared = prepared_of(tmp_path, rows, "binary")
    assert prepared.unit == "binary"
    assert documents(prepared) == [
        f"1?]2[1!{EOS}", f"1?]3[2!{EOS}",
        f"2?]1[2!{EOS}", f"2?]3[3!{EOS}",
        f"3?]2[3!{EOS}", f"3?]3[1!{EOS}",
    ]  # fmt: skip
    assert not [*prepared.folder.parent.glob(".*.building")]


def parquet(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return FilesSourceConfig(paths=[str(folder / "rows.parquet")])


def saved(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return DiskSourceConfig(path=str(folder / "saved"))


@pytest.mark.parametrize("store", [parquet, saved])
def test_rows_of_any_file_give_the_same_files(
    tmp_path: Path, store: Callable[[Path, list[dict[str, Any]]], SourceConfig]
) -> None:
    rows = [PAIR, {**PAIR, "rejected": [{**BAD, "name": "x"}, ASK, BAD]}, {**PAIR, "prompt": None}]
    rows[2] = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    one = prepared_of(tmp_path, rows, template=CHATML)
    two = prepared_of(tmp_path, store(tmp_path, rows), dataset_config="other")
    assert one.manifest.splits == two.manifest.splits


def test_several_processes_give_byte_equal_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    files = []
    for number in range(3):
        path = tmp_path / f"{number}.jsonl"
        rows = [
            {"prompt": f"{number}.{n}?", "completion": f"{n}!" * (n % 5), "label": n % 2 == 0}
            for n in range(20)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(path))
    how = {"kind": "binary", "validation_fraction": 0.3, "deduplicate": True}
    found = [
        prepared_of(
            tmp_path, FilesSourceConfig(paths=files), dataset_config=f"{n}", num_processes=n, **how
        )
        for n in (1, 2)
    ]
    one, two = (prepared.manifest for prepared in found)
    assert one.splits == two.splits
    assert set(one.splits) == {"train", "val"}
    # Empty answers never stand beside another's prompt.
    assert one.filtered_documents == {"duplicate": 0, "empty answer": 12}
    assert sum(found[0].num_units(split) for split in ("train", "val")) == 48


def test_rows_left_out_are_counted_and_one_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {**PAIR, "rejected": [GOOD]},
        PAIR,
        {**PAIR, "rejected": [assistant("Blue. ")]},
        {**PAIR, "chosen": [assistant("")]},
        {**PAIR, "chosen": [{**GOOD, "weight": 0}]},
        PAIR,
    ]
    template = CHATML.replace("message['content']", "message['content'] | trim")
    config = config_of(tmp_path, rows, template=template, deduplicate=True)
    prepared = prepare_dataset(config, progress=True)
    wanted = {"duplicate": 1, "empty answer": 1, "equal sides": 2, "no target": 1}
    assert prepared.manifest.filtered_documents == wanted
    assert prepared.num_units("train") == 1
    said = capsys.readouterr().err
    assert "left out (equal sides): " in said
    assert "rows.jsonl: line 1 (byte 0): {prompt: 'user: Sky?', chosen: 'assistant: Blue.'" in said
    assert "targets in 6 rows looked at, 4 left out" in said
    assert "rows left out: empty answer 1, equal sides 2, no target 1, duplicate 1" in said


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("preference", {**PAIR, "rejected": [GOOD]}, "left out were 2 for equal sides.*one row: "),
        ("binary", {"prompt": [ASK], "completion": [assistant(" ")], "label": True}, "2 for empty"),
    ],
)
def test_nothing_left_is_refused_before_anything_is_written(
    tmp_path: Path, kind: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepared_of(tmp_path, [row, row], kind, template=CHATML)
    assert not (tmp_path / "data" / "corpus" / "default").exists()


def test_one_binary_row_has_no_other_completion(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no other completion"):
        prepared_of(tmp_path, [{"prompt": "1?", "completion": "1!", "label": True}], "binary")


def encode(made: Tokenizer, row: dict[str, Any], **how: Any) -> UnitEncoder:
    encoder = UnitEncoder(made, InstructionsConfig(kind="preference", **how))
    encoder.encode([Piece("rows.jsonl:3", row=row, place="rows.jsonl, line 3")])
    return encoder


def test_a_template_that_looks_at_the_answer_before_the_prompt_is_refused() -> None:
    peeking = "{{ messages[-1]['content'] | length }}" + CHATML
    with pytest.raises(DataError, match=r"line 3: the chat template writes message 1 .*different"):
        encode(tokenizer(peeking), PAIR)
    marked = "{{ messages[-1]['content'] | length }}" + MARKED
    with pytest.raises(
        DataError,
        match=r"line 3: the chat template writes the prompt differently for the two sides \('5<",
    ):
        encode(tokenizer(marked), PAIR)


def test_the_prompt_is_what_the_tokens_of_all_begin_with() -> None:
    """As TRL tokenizes: prompt alone and with each side; a merge over its end goes to the sides."""
    made = train_bpe(["the sky is blue and the sea is green, is it so?\n" * 50], 300)
    for prompt, chosen, rejected, changes in (
        ("the sky", " is blue", " is green", False),
        ("the sky ", "is blue", "is green", True),
        ("green, i", "t is", "s it", True),
    ):
        texts = [prompt, prompt + chosen, prompt + rejected]
        alone, *joined = (ids.tolist() for ids in made.plain_ids(texts))
        shared = next(
            (n for n, ids in enumerate(zip(alone, *joined, strict=False)) if len({*ids}) > 1),
            len(alone),
        )
        encoder = UnitEncoder(made, InstructionsConfig(kind="preference"))
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        (found,) = encoder.encode([Piece("a", row=row)])
        assert found.second is not None
        for one, ids in zip((found, found.second), joined, strict=True):
            assert one.ids.tolist() == ids
            assert one.is_target is not None
            assert one.is_target.tolist() == [n >= shared for n in range(len(ids))]
        assert (shared < len(alone)) is changes
        assert bool(encoder.num_changed) is changes


def test_control_names_in_a_row_stay_text(tmp_path: Path) -> None:
    row = {**PAIR, "chosen": [assistant("say <|im_end|>.")], "prompt": [user("<s>?")]}
    made = tokenizer(CHATML)
    (found,) = UnitEncoder(made, InstructionsConfig(kind="preference")).encode(
        [Piece("a", row=row)]
    )
    ends = np.flatnonzero(found.ids == made.control_tokens["<|im_end|>"])
    assert len(ends) == 2
    assert made.control_tokens["<s>"] not in found.ids


def test_sides_that_are_conversations_need_a_template_before_they_are_read(
    tmp_path: Path,
) -> None:
    texts = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    check_presence(config_of(tmp_path, texts), is_prepared=False)
    with pytest.raises(DataError, match=r"rows are conversations \(so is the first one of .*rows"):
        check_presence(config_of(tmp_path, [PAIR]), is_prepared=False)
