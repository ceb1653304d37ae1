"""A tokenizer.json from elsewhere that would end the process, or fill its memory, is one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer, train_bpe
from toolkit.errors import DataError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_bpe(["some words and more words"] * 20, 280).save(folder)
    return folder


def changed(whole: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    data = json.loads((whole / "tokenizer.json").read_text())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_bytes((whole / "tokenizer_config.json").read_bytes())
    return folder


def pad(data: dict[str, Any]) -> None:
    data["padding"] = {
        "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip


def charsmap(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pad, r"tokenizer\.json: pads texts to 1,000,000,000,000 tokens; remove its padding"),
        (lambda data: data["model"]["vocab"].update(zz=10**9), "a token has id 1,000,000,000"),
        (charsmap, r"tokenizer\.json: not a tokenizer that can be read: "),
        (lambda data: data.pop("model"), r"tokenizer\.json: not a tokenizer that can be read: "),
    ],
)
def test_what_cannot_be_a_tokenizer_is_named(
    whole: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(changed(whole, tmp_path, change))


def test_a_panic_at_a_text_is_one_line(whole: Path, tmp_path: Path) -> None:
    def backtrack(data: dict[str, Any]) -> None:
        pattern = {"Regex": "(a+)+$"}
        data["pre_tokenizer"] = {
            "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False,
        }  # fmt: skip

    tokenizer = load_tokenizer(changed(whole, tmp_path, backtrack))
    line = "dataset.tokenizer: the tokenizers library fails at a text: .*retry-limit"
    for encode in (
        lambda: tokenizer.encode_batch(["a" * 40 + "b"]),
        lambda: tokenizer.encode_offsets(["a" * 40 + "b"], special_tokens=True),
    ):
        with pytest.raises(DataError, match=line):
            encode()
