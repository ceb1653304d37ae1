"""`toolkit export-hf`, and what it tells."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.hf.test_source import save
from toolkit.cli import main as cli
from toolkit.commands.convert import parse_size
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.errors import ConfigError
from toolkit.hf.source import find_source, load_model


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def export(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.run(["export-hf", *map(str, args)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_a_run_becomes_a_folder_that_transformers_loads(tiny_run, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = export(capsys, tiny_run, "out", "--check")
    assert text.splitlines() == [
        f"out: LlamaForCausalLM in float32, 0.2 MB in 1 file ({tiny_run}, step 4)",
        "checked: transformers loads it and gives the same logits and token ids",
        "note: the card names no license; --license ID gives one",
        "next: toolkit generate out --prompt '...'",
        '  or: AutoModelForCausalLM.from_pretrained("out")',
    ]
    ids = AutoTokenizer.from_pretrained("out")("line 3: é", return_tensors="pt")["input_ids"]
    source = find_source(tiny_run)
    assert source.tokenizer_folder == tiny_run / "tokenizer"
    assert ids[0].tolist() == load_tokenizer(source.tokenizer_folder).prompt_ids("line 3: é")
    theirs = AutoModelForCausalLM.from_pretrained("out").eval()
    with torch.no_grad():
        ours = load_model(source)(ids)
        assert (theirs(ids).logits - ours).abs().max() <= 1e-4 * ours.abs().max()
    assert theirs.generation_config.eos_token_id == 256


def test_the_card_tells_what_the_run_recorded(tiny_run, capsys):
    export(capsys, tiny_run, "out", "--no-check")
    card = Path("out/README.md").read_text()
    train = [json.loads(line) for line in (tiny_run / "metrics/train.jsonl").open()]
    val = [json.loads(line) for line in (tiny_run / "metrics/eval.jsonl").open()][-1]
    for row in (
        "| Architecture | LlamaForCausalLM |",
        "| Parameters | 37,088 (41,120 in training, which pads the vocabulary to a multiple of ",
        "| Length | 4 steps, 4,096 tokens (",
        "| Tokenizer | byte |",
        "  global_batch_size: 1024\n",
        "| Sequence length | 64 tokens |",
        "| Batch | 1,024 tokens |",
        "| Optimizer | adamw, lr 0.01, betas 0.9 0.95, eps 1e-08, weight_decay 0.1, state_dtype ",
        "| Schedule | cosine, units steps, warmup 5, alpha_f 0.1 |",
        f"loss {train[-1]['loss']:.4f}, perplexity {train[-1]['ppl']:.4f} |",
        f"loss {val['loss']:.4f}, perplexity {val['ppl']:.4f}, bits per byte",
        "torch " + torch.__version__,
    ):
        assert row in card
    assert "base_model" not in card
    text = json.loads((tiny_run / "metadata/config.json").read_text())["dataset"]["source"]
    assert f"| Data | `{text['paths'][0]}` |" in card
    # The recipe's own line tells of other data.
    description = json.loads((tiny_run / "metadata/config.json").read_text())["description"]
    assert description
    assert description not in card
    earlier = export(capsys, tiny_run / "checkpoints/step2", "step2", "--no-check")
    assert "not checked: not asked for" in earlier
    card = Path("step2/README.md").read_text()
    assert "| Length | 2 steps, 2,048 tokens (" in card
    assert f"loss {train[1]['loss']:.4f}" in card


def test_type_and_size_of_files_are_as_asked(tiny_run, capsys):
    text = export(capsys, tiny_run, "out", "--dtype", "bf16", "--max-shard-size", "30KB")
    assert text.startswith("out: LlamaForCausalLM in bfloat16, 0.1 MB in 3 files")
    assert "checked: " in text
    assert len(list(Path("out").glob("model-0000?-of-00003.safetensors"))) == 3
    assert "| Weights | bfloat16 |" in Path("out/README.md").read_text()


def test_a_checkpoint_away_from_its_run_has_no_tokenizer_unless_given(tiny_run, capsys):
    shutil.copytree(tiny_run / "checkpoints/step4", "alone/step4")
    text = export(capsys, "alone/step4", "out")
    assert "no tokenizer is known for this model; --tokenizer FOLDER adds one" in text
    card = Path("out/README.md").read_text()
    assert "| Engine x processes | single x 1 |" in card
    assert "| Evaluation `val/loss` | " in card
    export(capsys, "alone/step4", "with", "--tokenizer", tiny_run / "tokenizer")
    assert Path("with/tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["used"], "used: already exists; remove it or choose another folder"),
        (["out", "--max-shard-size", "big"], "--max-shard-size big: not a size; write it as 5GB"),
        (["out", "--merge-adapter"], "holds no adapter; leave the option out"),
        (["out", "--tokenizer", "used"], "--tokenizer used: no tokenizer.json there"),
        (["used/file.txt/out"], "used/file.txt/out: cannot be made: File exists"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(args, message, tiny_run, capsys):
    Path("used").mkdir()
    Path("used/file.txt").write_text("x")
    error = export(capsys, tiny_run, *args, code=2)
    assert error.count("\n") == 1
    assert message in error
    assert [str(p) for p in Path().rglob("*")] == ["used", "used/file.txt"]


def test_what_holds_no_model_is_one_line(capsys):
    Path("empty").mkdir()
    for path, message in (("gone", "no such folder"), ("empty", "neither a run, a checkpoint")):
        error = export(capsys, path, "out", code=2)
        assert error.startswith(f"error: {path}: ")
        assert error.count("\n") == 1
        assert message in error
    assert not Path("out").exists()


def test_damage_that_sizes_do_not_show_is_an_error(tiny_run, capsys):
    shutil.copytree(tiny_run / "checkpoints/step4", "step4")
    file = next(Path("step4/model_and_optim").glob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))
    error = export(capsys, "step4", "out", code=2)
    assert "cannot be read" in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_family_of_origin_survives_training(tiny_run, capsys):
    source = find_source(tiny_run)
    model = load_model(source)
    origin: dict[str, Any] = {
        "name": "some/model", "model_type": "mistral", "dtype": "bfloat16", "license": "mit",
    }  # fmt: skip
    save(Path("base"), 0, model, model=msgspec.to_builtins(source.config), source=origin)
    config = json.loads((tiny_run / "metadata/config.json").read_text())
    config["run"] = {"save_folder": "tuned"}
    config["trainer"] |= {"load_path": "base", "load_weights_only": True}
    config["trainer"]["max_duration"]["value"] = 2
    config["train_module"]["scheduler"]["warmup"] = 1
    config["trainer"]["callbacks"]["checkpointer"] |= {"interval": 1, "export_hf": True}
    Path("tune.json").write_text(json.dumps(config))
    assert cli.run(["train", "tune.json"]) == 0
    # Through a resume too.
    assert cli.run(["resume", "tuned", "--trainer.max_duration.value=3"]) == 0
    assert find_source("tuned").origin == origin
    last = json.loads(Path("tuned/checkpoints/step3/hf/config.json").read_text())
    assert (last["model_type"], last["dtype"]) == ("mistral", "bfloat16")
    text = export(capsys, "tuned", "out")
    assert text.startswith("out: MistralForCausalLM in bfloat16")
    card = Path("out/README.md").read_text()
    assert "base_model: some/model" in card
    assert "license: mit" in card
    assert "| Started from | some/model |" in card


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("300", 300), ("2TB", 2 * 10**12)],
)
def test_sizes_are_read_as_transformers_reads_them(text, size):
    assert parse_size(text, "--x") == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5 gigs", "GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text, "--x")
