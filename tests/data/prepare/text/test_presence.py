"""What a dry run says of files that a data set names."""

import json
from pathlib import Path

import pytest

from toolkit.data.config import (
    DatasetConfig,
    FilesSourceConfig,
    HFTokenizerConfig,
    InstructionsConfig,
)
from toolkit.data.prepare.text.presence import check_presence
from toolkit.errors import ConfigError, DataError


def chats(folder: Path, template: str) -> DatasetConfig:
    (folder / "a.jsonl").write_text("{}\n")
    (folder / "tokenizer.json").write_text("{}")
    return DatasetConfig(
        source=FilesSourceConfig(paths=[str(folder / "a.jsonl")]),
        tokenizer=HFTokenizerConfig(path=str(folder)),
        instructions=InstructionsConfig(chat_template=template),
    )


@pytest.mark.parametrize("as_files", [True, False])
def test_a_template_may_be_one_of_the_tokenizers_by_its_name(
    tmp_path: Path, as_files: bool
) -> None:
    if as_files:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    else:
        named = [{"name": "tool_use", "template": "{{ messages }}"}]
        config = json.dumps({"chat_template": named})
        (tmp_path / "tokenizer_config.json").write_text(config)
    check_presence(chats(tmp_path, "tool_use"), is_prepared=False)
    with pytest.raises(ConfigError, match="'tool_us' is no Jinja text"):
        check_presence(chats(tmp_path, "tool_us"), is_prepared=False)


def test_a_template_of_the_tokenizer_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ a }}\xff")
    with pytest.raises(DataError, match=r"chat_template.jinja: not UTF-8 text \(byte 7\); correct"):
        check_presence(chats(tmp_path, "default"), is_prepared=False)
