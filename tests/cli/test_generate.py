"""`toolkit generate`: sources, prompts, chat, and what is left on disk."""

import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.cli import generate as chat
from toolkit.cli import main as cli
from toolkit.commands.generate import open_generator
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer
from toolkit.errors import CheckpointError
from toolkit.evaluate.continuation import Sampling, TransformersContinuation
from toolkit.evaluate.text import TextGenerator
from toolkit.hf import loading
from toolkit.hf.export import export_source
from toolkit.hf.source import find_source, source_tensors
from toolkit.models.config import TransformerConfig

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
FEW = ["--max-new-tokens", "8"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a folder of `transformers`, whose tokenizer can chat."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_source(find_source(tiny_run), folder, check=False)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert cli.run(["generate", *args]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_run_step_and_folder_give_the_same_text_and_leave_nothing(
    tiny_run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--prompt", "line", *FEW, "--seed", "5"]
    text = output(capsys, str(tiny_run), *args)
    assert len(text) > 1
    assert output(capsys, str(tiny_run / "checkpoints/step4"), *args) == text
    assert output(capsys, str(exported), *args) == text
    assert output(capsys, str(exported), *args, "--no-stream") == text
    assert output(capsys, str(exported), *args[:-1], "6") != text
    assert not list((tmp_path / "temporary").iterdir())


def test_an_interrupted_generation_leaves_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        assert list((tmp_path / "temporary").glob("toolkit-generate-*/hf/config.json"))
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersContinuation, "__call__", interrupted)
    assert cli.run(["generate", str(tiny_run), "--prompt", "a"]) == 130
    assert not list((tmp_path / "temporary").iterdir())


def test_the_export_in_a_checkpoint_is_taken_and_a_cut_one_is_refused(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    original = loading.load_causal_lm

    def spy(folder: Path, **kwargs: Any) -> Any:
        seen.append(folder)
        return original(folder, **kwargs)

    monkeypatch.setattr(loading, "load_causal_lm", spy)
    source = find_source(tiny_run)

    def export(unfinished: Path) -> None:
        export_source(source, unfinished / "hf", check=False)

    assert source.metadata is not None
    save_checkpoint(
        tmp_path / "own", step=1, tokens=0, rank_state={}, engine="single", rank=0, group=None,
        tensors={f"model.{name}": tensor for name, tensor in source_tensors(source)},
        extra={"model": source.metadata.extra["model"]}, export=export,
    )  # fmt: skip
    ByteTokenizer().save(tmp_path / "own/tokenizer")
    with open_generator(str(tmp_path / "own")):
        pass
    assert seen.pop() == tmp_path / "own/step1/hf"
    with (tmp_path / "own/step1/hf/model.safetensors").open("ab") as file:
        file.truncate(100)
    with (
        pytest.raises(CheckpointError, match="holds no whole checkpoint"),
        open_generator(str(tmp_path / "own")),
    ):
        pass


def test_models_that_no_class_holds_go_without_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TransformerConfig(
        vocab_size=257, d_model=16, num_layers=1, num_heads=2, intermediate_size=24,
        max_sequence_length=32, norm="layer_norm", positions="rope", feed_forward="geglu",
        attention_soft_cap=3.0, init_std=0.5,
    )  # fmt: skip
    tensors = {f"model.{name}": p.detach() for name, p in config.build().named_parameters()}
    save_checkpoint(
        tmp_path / "odd", step=1, tokens=0, tensors=tensors, rank_state={}, engine="single",
        rank=0, group=None, extra={"model": json.loads(config.to_json())},
    )  # fmt: skip
    ByteTokenizer().save(tmp_path / "odd/tokenizer")
    args = ["generate", str(tmp_path / "odd"), "--prompt", "ab", *FEW]
    assert cli.run(args) == 0
    first = capsys.readouterr()
    assert first.err.startswith("no transformers class holds this model: ")
    assert first.err.count("\n") == 1
    assert cli.run(args) == 0
    assert capsys.readouterr().out == first.out


def test_prompts_come_from_files_and_pipes(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [output(capsys, str(exported), "--prompt", text, *FEW) for text in ("one", "two")]
    Path("a.txt").write_text("one\ntwo\n")
    assert output(capsys, str(exported), "--file", "a.txt", *FEW) == "\n".join(alone)
    line = output(capsys, str(exported), "--file", "a.txt", "--output", "o.jsonl", *FEW)
    assert line == "o.jsonl: 2 texts\n"
    found = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in found] == ["one", "two"]
    assert [entry["completion"] + "\n" for entry in found] == alone
    assert {entry["stopped"] for entry in found} == {"length"}
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert output(capsys, str(exported), *FEW) == alone[0]


def test_chat_remembers_resets_and_answers_by_the_template(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[dict[str, str]]] = []
    original = TextGenerator.answer

    def spy(self: Any, messages: Any, *args: Any) -> Any:
        seen.append([dict(message) for message in messages])
        return original(self, messages, *args)

    monkeypatch.setattr(TextGenerator, "answer", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n/what\nyou\n/reset\nhi\n/exit\nnever\n"))
    text = output(capsys, str(exported), "--chat", "--system", "S", "--temperature", "0", *FEW)
    system = {"role": "system", "content": "S"}
    first = [system, {"role": "user", "content": "hi"}]
    assert seen[0] == seen[2] == first
    answer = seen[1][2]
    assert seen[1] == [*first, answer, {"role": "user", "content": "you"}]
    assert answer["role"] == "assistant"
    assert text.startswith(answer["content"] + "\n")
    assert text.endswith(answer["content"] + "\n")


def test_ctrl_c_ends_an_answer_and_a_full_context_a_turn(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_generator(str(exported)) as generator:
        lines = iter(["hi", "x" * 200, "and"])
        monkeypatch.setattr(chat, "_next_line", lambda asking: next(lines, None))
        seen: list[int] = []

        def answer(messages: Any, sampling: Any, on_text: Any) -> Any:
            seen.append(len(messages))
            if len(seen) == 2:
                return TextGenerator.answer(generator, messages, sampling, on_text)
            on_text("begun")
            raise KeyboardInterrupt

        monkeypatch.setattr(generator, "answer", answer)
        chat.converse(generator, Sampling(), system=None, stream=True)
    out, err = capsys.readouterr()
    assert out == "begun\nbegun\n"
    assert "the conversation has 2" in err
    assert "tokens; the context of" in err
    assert "/reset starts over" in err
    assert seen == [1, 3, 3]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--prompt", "a", "--file", "b"], "--prompt and --file do not go together"),
        (["--file", "b", "--chat"], "--file and --chat do not go together"),
        (["--prompt", "a", "--system", "b"], "--system goes with --chat"),
        (["--prompt", "a", "--output", "b"], "--output goes with --file"),
        (["--file", "x", "--output", "there"], "--output: there: exists; give another file name"),
        (["--prompt", "a", "--top-p", "2"], "--top-p 2.0: give a sum of probabilities"),
        (["--file", "none"], "--file: none: cannot be read: No such file or directory"),
        (["--prompt", "a" * 200], "the prompt has 200 tokens; the context of "),
        (["--chat"], "{source}: its tokenizer has no chat template, so it cannot chat; give one"),
        ([], "no text to continue; give --prompt, --file or --chat, or pipe it in"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    args: list[str],
    expected: str,
    tiny_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("there").touch()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    capsys.readouterr()
    assert cli.run(["generate", str(tiny_run), *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {expected.format(source=tiny_run)}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("harm", ["config", "weights", "tokenizer"])
def test_a_damaged_folder_is_named(
    harm: str, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported, "model")
    if harm == "config":
        Path("model/config.json").write_text("{")
        expected = "model: transformers cannot load it: It looks like the config file at "
    elif harm == "weights":
        with Path("model/model.safetensors").open("ab") as file:
            file.truncate(1000)
        expected = "model: transformers cannot load it: "
    else:
        Path("model/tokenizer.json").unlink()
        Path("model/tokenizer_config.json").unlink()
        expected = "model: no tokenizer here; give one with --tokenizer FOLDER"
    capsys.readouterr()
    assert cli.run(["generate", "model", "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {expected}")
    assert err.count("\n") == 1


def test_a_hub_name_that_cannot_be_had_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "nobody/nothing", "--prompt", "a"]) == 2
    expected = "error: nobody/nothing: no such local folder, and the hub gave no model of this name"
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert err.endswith("; if it is meant to be a run, `toolkit runs` lists the runs there are\n")
