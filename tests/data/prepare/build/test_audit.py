"""Some rows of conversations are looked at before all are encoded; what they tell is kept."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.data.prepare.text.instructions.templates import (
    CHATML,
    EOS,
    assistant,
    system,
    tokenizer,
    user,
)
from toolkit.cli import main as cli
from toolkit.data.config import DatasetConfig, HFTokenizerConfig, InstructionsConfig
from toolkit.data.prepare.build import audit, prepare
from toolkit.data.prepare.build.parts import reading_of
from toolkit.data.prepare.build.vocabulary import plan_of_text
from toolkit.data.source_config import FilesSourceConfig
from toolkit.data.tokens.audit import Counted
from toolkit.errors import DataError

EVERYTHING = (
    "{% generation %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>"
    "{% endfor %}{% endgeneration %}"
)


def config_of(folder: Path, rows: list[Any], template: str | None, **how: Any) -> DatasetConfig:
    tokenizer(template).save(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DatasetConfig(
        root=str(folder / "data"),
        source=FilesSourceConfig(paths=[str(folder / "rows.jsonl")]),
        tokenizer=HFTokenizerConfig(path=str(folder / "tokenizer"), eos_token=EOS),
        instructions=InstructionsConfig(**how),
        validation_fraction=0.0,
        num_processes=1,
    )


def test_shares_are_counted_by_role_and_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [system("Be brief."), user("Hi"), assistant("Hello!")]},
        {"messages": [user("only a question")]},
        {"messages": [user("Bye"), assistant("So"), user("?"), assistant("long")]},
    ]
    config = config_of(tmp_path, rows, CHATML)
    prepared = prepare.prepare_dataset(config, progress=True)
    found = prepared.manifest.audit
    assert found is not None
    # Control tokens are one token; `<|im_start|>`, the role, a line feed; the end of turn, another.
    around = {role: 2 + len(role) + 2 for role in ("system", "user", "assistant")}
    assert found.roles == {
        "assistant": Counted(3 * around["assistant"] + 6 + 2 + 4, 6 + 2 + 4 + 3),
        "system": Counted(around["system"] + 9, 0),
        "user": Counted(3 * around["user"] + 2 + 3 + 1, 0),
    }
    total = sum(counted.num_tokens for counted in found.roles.values())
    assert found.templates == {"default": Counted(total, 15)}
    assert (found.num_rows, found.without_target) == (3, 1)
    assert found.sample is not None
    assert found.sample.endswith("<|im_start|>assistant\\n[[Hello!<|im_end|>]]\\n")
    said = capsys.readouterr().err
    for line in found.lines():
        assert line in said
    assert f"targets: 15 of {total + 2} tokens" in said
    assert cli.run(["data", "inspect", str(prepared.folder), "-n", "0"]) == 0
    shown = capsys.readouterr().out
    assert "targets in 3 rows looked at, 1 without a target: 15.0% of 100 tokens" in shown
    assert "by role: assistant 29.4%, system 0.0%, user 0.0%; by template: default 15.0%" in shown
    assert f"one row, targets in [[ ]]: {found.sample}" in shown


def test_joined_prompts_have_no_template(tmp_path: Path) -> None:
    config = config_of(tmp_path, [{"prompt": "2+2=", "completion": "4"}], None)
    found = prepare.prepare_dataset(config, progress=False).manifest.audit
    assert found is not None
    assert found.templates == {"none": Counted(5, 1)}
    assert found.roles == {"user": Counted(4, 0), "assistant": Counted(1, 1)}


@pytest.mark.parametrize(("row", "template", "message"), [
    ({"messages": [user("a b"), user("c d")]}, CHATML,
     r"would count no token of this data: 256 rows have no answer"),
    ({"messages": [user("a b"), assistant("c d")]}, EVERYTHING,
     r"would count every token of this data, prompts included"),
])  # fmt: skip
def test_nothing_and_everything_of_the_first_rows_is_a_warning_and_of_all_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, template: str, message: str
) -> None:
    # Few rows are all looked at: the error is enough.
    with pytest.raises(DataError, match=message.replace("256 rows have", "1 row has")):
        prepare.prepare_dataset(config_of(tmp_path, [row], template), progress=True)
    assert "warning" not in capsys.readouterr().err
    good = {"messages": [user("a b"), assistant("c d")]}
    rows = [row] * (audit.NUM_ROWS + 1)
    with pytest.raises(DataError, match=message.replace("256", "257")):
        prepare.prepare_dataset(config_of(tmp_path, rows, template), progress=True)
    warned = capsys.readouterr().err
    assert re.search(message, warned)
    assert "(told by the first 256 rows; the others are encoded all the same)" in warned
    if template is CHATML:  # under the other all rows are alike
        prepared = prepare.prepare_dataset(config_of(tmp_path, [*rows, good], template))
        assert re.search(message, capsys.readouterr().err)
        assert prepared.manifest.splits["train"].num_documents == 1


def test_rows_are_spread_over_the_source(tmp_path: Path) -> None:
    config = config_of(tmp_path, [], CHATML)
    for number in range(20):
        rows = [{"messages": [user(f"{number}"), assistant("a")]}] * 30
        (tmp_path / f"part{number:02d}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = FilesSourceConfig(paths=[str(tmp_path / "part*.jsonl")])
    config = config.replace(source=source)
    plan = plan_of_text(config, None)
    pieces, is_all = audit._some_rows(plan.shards, reading_of(config, None))
    assert not is_all
    assert len(pieces) == min(audit.NUM_ROWS, 600)
