"""Runs, checkpoints and folders of transformers as sources of weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.folder import read_metadata
from toolkit.checkpoint.tensors import stored_types
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer
from toolkit.errors import CheckpointError
from toolkit.hf.export import export_hf
from toolkit.hf.source import find_source, load_model, source_tensors
from toolkit.models.config import TransformerConfig
from toolkit.models.lora_config import LoRAConfig

TINY = TransformerConfig(
    vocab_size=100,
    d_model=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=24,
    max_sequence_length=32,
    init_std=0.2,
)


def save(
    root: Path,
    step: int,
    model: torch.nn.Module,
    /,
    *,
    tensors: dict[str, torch.Tensor] | None = None,
    **extra: Any,
) -> Path:
    """A checkpoint of `model` with an optimizer's state, as a run has it."""
    own = tensors or model.state_dict()
    state = {f"model.{k}": v for k, v in own.items()}
    return save_checkpoint(
        root,
        step=step,
        tokens=step * 32,
        tensors=state | {f"optim.{k}.exp_avg": torch.zeros_like(v) for k, v in own.items()},
        rank_state={"trainer": {}},
        engine="single",
        rank=0,
        group=None,
        extra={"model": msgspec.to_builtins(model.config)} | extra,
    )


def make_run(folder: Path) -> Path:
    (folder / "metadata").mkdir(parents=True)
    times = dict.fromkeys(("created", "started", "updated"), "2026-01-01T00:00:00Z")
    status = {"state": "finished", "experiment": "e", "name": "n", "attempt": 1, **times}
    (folder / "metadata/status.json").write_text(json.dumps({**status, "host": "h", "pid": 1}))
    return folder


def test_weights_of_a_run_a_checkpoint_and_a_transformers_folder_are_the_same(tmp_path):
    run, model = make_run(tmp_path / "run"), TINY.build(seed=1)
    save(run / "checkpoints", 1, TINY.build(seed=0))
    step = save(run / "checkpoints", 2, model)
    export_hf(TINY, model.state_dict(), tmp_path / "hf")
    ids = torch.arange(20)[None]
    expected = model(ids)
    for path, kind in ((run, "run"), (step, "checkpoint"), (tmp_path / "hf", "hf")):
        source = find_source(path)
        assert source.kind == kind
        assert torch.equal(load_model(source)(ids), expected)
    assert find_source(run).checkpoint == step
    assert find_source(step).run == run
    names = [name for name, _ in source_tensors(find_source(run))]
    assert sorted(names) == sorted(model.state_dict())


def test_model_is_loaded_in_the_type_asked_for(tmp_path):
    model = TINY.build()
    halves = {k: v.bfloat16() for k, v in model.state_dict().items()}
    source = find_source(save(tmp_path, 0, model, tensors=halves))
    assert set(stored_types(source.checkpoint / "model_and_optim", "model.").values()) == {
        torch.bfloat16
    }
    assert load_model(source).head.norm.weight.dtype == torch.float32
    loaded = load_model(source, dtype=torch.bfloat16)
    assert torch.equal(loaded.embeddings.tokens.weight, halves["embeddings.tokens.weight"])


def test_damaged_checkpoints_are_passed_over_with_a_word(tmp_path, caplog):
    run = make_run(tmp_path / "run")
    good = save(run / "checkpoints", 1, TINY.build())
    cut = save(run / "checkpoints", 2, TINY.build())
    file = next((cut / "model_and_optim").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])
    assert find_source(run).checkpoint == good
    assert "step2: damaged, so an older checkpoint is used" in caplog.text
    with pytest.raises(CheckpointError, match=r"step2: model_and_optim/.* bytes, expected"):
        find_source(cut)
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint; `toolkit verify "):
        find_source(run)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone", "gone: no such folder; give a run folder"),
        ("file.txt", "is a file; give a run folder"),
        ("empty", "neither a run, a checkpoint, nor a folder with a config.json"),
        ("s3://bucket/run", "copy the checkpoint to a local folder and give that"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(path, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(CheckpointError, match=message):
        find_source(path if "://" in path else tmp_path / path)


def test_checkpoint_of_an_unknown_model_is_refused(tmp_path):
    model = TINY.build()
    step = save(tmp_path, 1, model, model={"type": "transformer", "wings": 2})
    with pytest.raises(CheckpointError, match=r"step1: its model is not known here: .*wings"):
        find_source(step)


def test_tokenizer_is_found_in_the_run_beside_checkpoints_or_with_the_data(tmp_path):
    run = make_run(tmp_path / "run")
    step = save(run / "checkpoints", 1, TINY.build())
    assert find_source(run).tokenizer_folder is None
    data = {"dataset": {"root": "data", "dataset_name": "d"}, "data_loader": {}}
    (run / "metadata/data_config.json").write_text(json.dumps(data))
    (run / "metadata/command.json").write_text(json.dumps({"cwd": str(tmp_path / "there")}))
    ByteTokenizer().save(tmp_path / "there/data/d/default/tokenizer")
    assert find_source(step).tokenizer_folder == tmp_path / "there/data/d/default/tokenizer"
    ByteTokenizer().save(run / "tokenizer")
    assert find_source(step).tokenizer_folder == run / "tokenizer"
    converted = save(tmp_path / "converted", 0, TINY.build())
    ByteTokenizer().save(tmp_path / "converted/tokenizer")
    assert find_source(converted).tokenizer_folder == tmp_path / "converted/tokenizer"


def test_adapters_are_merged_into_the_base_they_were_trained_on(tmp_path):
    model, lora = TINY.build(), LoRAConfig(rank=2, alpha=4.0)
    base = save(tmp_path / "base", 0, model)
    layer = "blocks.1.feed_forward.down"
    adapter = {f"{layer}.lora_A.weight": torch.randn(2, 24)}
    adapter[f"{layer}.lora_B.weight"] = torch.randn(16, 2)
    recorded = {"path": str(base), "step": 0, "fingerprint": read_metadata(base).xxh3}
    step = save(
        tmp_path / "tuned", 3, model, tensors=adapter, adapter=lora.to_dict(), base=recorded
    )
    expected = model.state_dict()
    expected[f"{layer}.weight"] = (
        expected[f"{layer}.weight"]
        + 2.0 * adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
    )
    source = find_source(step)
    assert source.lora == lora
    loaded = load_model(source).state_dict()
    torch.testing.assert_close(loaded, expected)
    save(tmp_path / "base", 0, TINY.build(seed=5))
    with pytest.raises(CheckpointError, match=r"an adapter, whose base .* is another checkpoint"):
        load_model(source)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="is not there any more; put it back, or a link"):
        load_model(source)
