"""`toolkit data show`, from rows in a file to marked text; and what `prepare` refuses before."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.prepare.text.instructions.templates import CHATML, assistant, user
from toolkit.cli import main as cli

ARGS = [
    "smoke", "--data-root", "D", "--dataset.validation_fraction=0", "--dataset.num_processes=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def write(rows: list[dict[str, Any]]) -> list[str]:
    Path("chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("chat.jinja").write_text(CHATML)
    return [
        *ARGS,
        "--dataset.source={type: files, paths: [chat.jsonl]}",
        "--dataset.dataset_name=chat",
        "--dataset.instructions={chat_template: chat.jinja}",
    ]


def chat(number: int) -> dict[str, Any]:
    return {"messages": [user(f"Hi {number}"), assistant(f"Hello\n{number}")]}


def run(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> str:
    assert cli.run(args) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


PACKED = ["--dataset.instances={type: packed}", "--sequence-length", "256"]


def test_packed_conversations_show_documents_and_targets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = write([chat(0), chat(1)])
    text = run(capsys, "data", "show", *args, *PACKED, "-n", "1")
    length = (
        len("<|im_start|>user\nHi 0<|im_end|>\n<|im_start|>assistant\nHello\n0<|im_end|>\n") + 1
    )
    targets = 2 * len("Hello\n0<|im_end|>\n")

    def document(number: int) -> str:
        return (
            f"  document {number}, tokens 0 to {length - 1} of {length}\n"
            f"    <|im_start|>user\n    Hi {number}<|im_end|>\n    <|im_start|>assistant\n"
            f"    [[Hello\n    {number}<|im_end|>\n    <|endoftext|>]]\n"
        )

    assert text == (
        "D/chat/bytes_small train: 1 instance of up to 256 tokens (packed)\n"
        "[[ ]]: targets, the tokens that the loss asks for\n\n"
        f"instance 0: 256 tokens, {256 - 2 * length} of padding, {targets + 2} targets, "
        f"2 documents\n{document(0)}{document(1)}  padding, {256 - 2 * length} tokens\n"
    )


def test_terminals_get_colours_and_the_same_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["data", "show", *write([chat(0), chat(1)]), *PACKED]
    plain = run(capsys, *args)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = run(capsys, *args)
    assert "\x1b[32m[[Hello" in coloured
    assert "\x1b[2m<|im_start|>user" in coloured
    assert "\x1b[36m  document 0" in coloured
    assert "\x1b[35m  document 1" in coloured
    from rich.text import Text

    assert Text.from_ansi(coloured).plain.strip() == plain.strip()


def test_start_and_split_choose_instances(capsys: pytest.CaptureFixture[str]) -> None:
    args = [*write([chat(number) for number in range(40)]), "--dataset.instances={type: padded}"]
    args = [word for word in args if "validation_fraction" not in word]
    text = run(capsys, "data", "show", *args, "--start", "2", "-n", "2", "--sequence-length", "99")
    assert text.count("\ninstance ") == 2
    assert "\ninstance 2: 99 tokens" in text
    text = run(capsys, "data", "show", *args, "--split", "val", "--sequence-length", "99")
    assert text.startswith("D/chat/bytes_small val: ")
    error = run(capsys, "data", "show", *args, "--start", "99", code=2)
    assert "--start 99: D/chat/bytes_small has instances 0 to " in error
    assert "-n 0: give a number" in run(capsys, "data", "show", *args, "-n", "0", code=2)
    error = run(capsys, "data", "show", *args, "--source", "web", code=2)
    assert "--source web: dataset.mix is null" in error


def test_plain_text_shows_where_instances_cut_documents(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("a.txt").write_text("abcdefgh\x1b[1m")
    source = "--dataset.source={type: files, paths: [a.txt]}"
    text = run(capsys, "data", "show", *ARGS, source, "--sequence-length", "6", "-n", "9")
    assert "instance 1: 6 tokens, 5 targets, 1 document\n" in text
    assert "  document 0, tokens 6 to 11 of 13\n    g[[h\\x1b[1m]]\n" in text
    error = run(capsys, "data", "show", *ARGS, source, "--split", "val", code=2)
    assert "has no val split; it has train" in error


def test_source_of_a_mixture_is_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    sources = {}
    for name in ("one", "two"):
        Path(f"{name}.txt").write_text(f"{name} " * 50)
        sources[name] = {"ratio": 1, "source": {"type": "files", "paths": [f"{name}.txt"]}}
    mix = [
        "--dataset.source=null", f"--dataset.mix={json.dumps({'sources': sources})}",
        "--sequence-length", "32",
    ]  # fmt: skip
    error = run(capsys, "data", "show", *ARGS, *mix, code=2)
    assert "--source is needed for a mixture; there are one, two" in error
    text = run(capsys, "data", "show", *ARGS, *mix, "--source", "two", "-n", "1")
    assert "t[[wo two" in text
    assert "D/two/" in text
    error = run(capsys, "data", "show", *ARGS, *mix, "--source", "three", code=2)
    assert "--source three: no such source; there are one, two" in error


def test_a_data_set_that_does_not_say_how_long_it_is_shows_no_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    custom = '--dataset.custom={"target": "tests.data.instances.custom_examples:Lines"}'
    args = ["smoke", "--dataset.source=null", custom, "--sequence-length", "4", "-n", "1"]
    text = run(capsys, "data", "show", *args, "--start", "12")
    assert text.startswith(
        "tests.data.instances.custom_examples:Lines train: instances of unknown number, of up to "
        "4 tokens (custom)\n[[ ]]: targets, the tokens that the loss asks for\n\n"
        "instance 12: 4 tokens, 3 targets, 1 document\n"
    )


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        ([{"messages": [user("Hi")]}] * 3, [], "3 rows have no answer of the assistant; "),
        ([{"question": "a"}], [], "columns question fit no shape of instruction data"),
        (
            [{"prompt": "", "completion": "story"}],
            ["--dataset.instructions={train_on: assistant}"],
            "would count every token of this data",
        ),
        (
            [chat(1)],
            ["--dataset.instructions.chat_template={{ messages[0].content }}"],
            "the chat template drops text: message 1 (assistant)",
        ),
    ],
)
def test_instruction_data_that_teaches_nothing_is_refused_and_leaves_no_folder(
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    extra: list[str],
    message: str,
) -> None:
    error = run(capsys, "prepare", *write(rows), *extra, code=2)
    assert message in error
    assert len(error.split("error:")[1].splitlines()) == 1
    assert not Path("D/chat/bytes_small").exists()


def test_rows_without_an_answer_are_counted_and_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = write([chat(0), {"messages": [user("Hi")]}, chat(1)])
    run(capsys, "prepare", *args)
    manifest = json.loads(Path("D/chat/bytes_small/dataset.json").read_text())
    assert manifest["filtered_documents"] == {"no target": 1}
    assert manifest["splits"]["train"]["num_documents"] == 2
    stored = Path("D/chat/bytes_small/tokenizer/chat_template.jinja")
    assert stored.read_text() == CHATML
