"""From folders and checkpoints to folders: types, special tokens, comparison after writing."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hf.fidelity import random_model, tensors_of, their_config
from tests.hf.test_source import TINY, save
from toolkit.data.config import HFTokenizerConfig
from toolkit.data.prepare.tokenizers.choice import load_hf_tokenizer
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer, train_bpe
from toolkit.errors import CheckpointError
from toolkit.hf import compare, export
from toolkit.hf.export import export_hf, export_source
from toolkit.hf.read_config import read_hf_config
from toolkit.hf.source import find_source, load_model
from toolkit.models.lora_config import LoRAConfig

GPT2: dict[str, Any] = {
    "vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
}  # fmt: skip


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Names, types and bits."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def converted(folder: Path, root: Path, **origin: Any) -> Path:
    """`folder` as a checkpoint in its own types, with the record of where it came from."""
    read = read_hf_config(folder)
    model = read.config.build(init_device="meta")
    source = {"name": "model", "model_type": read.family.model_type, **origin}
    return save(root, 0, model, tensors=tensors_of(read, folder), source=source)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that Llama's class could hold too, in bf16 but for one tensor, in several files."""
    folder = tmp_path_factory.mktemp("mistral")
    model = random_model(their_config("mistral", sliding_window=None)).bfloat16()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name].float() + 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_an_imported_model_comes_back_in_its_family_with_the_same_bits(mistral, tmp_path):
    step = converted(mistral, tmp_path / "converted", dtype="bfloat16")
    for path, name in ((step, "a"), (mistral, "b")):
        exported = export_source(
            find_source(path), tmp_path / name, max_shard_bytes=20_000, check=True
        )
        assert exported.not_checked is None
        assert len(exported.weight_files) > 2
        assert same(weights_of(tmp_path / name), weights_of(mistral))
    assert json.loads((tmp_path / "a/config.json").read_text())["model_type"] == "mistral"


def test_trained_weights_get_the_type_that_the_model_had(mistral, tmp_path):
    state = {k: v.float() + 0.01 for k, v in tensors_of(read_hf_config(mistral), mistral).items()}
    model = find_source(mistral).config.build(init_device="meta")
    for name, origin, expected in (
        ("imported", {"model_type": "mistral", "dtype": "bfloat16"}, torch.bfloat16),
        ("own", None, torch.float32),
    ):
        step = save(tmp_path / name, 7, model, tensors=state, source=origin)
        exported = export_source(find_source(step), tmp_path / f"{name}-hf", check=True)
        assert exported.dtype == expected
        assert {t.dtype for t in weights_of(tmp_path / f"{name}-hf").values()} == {expected}
    assert exported.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_asked_for_is_written_and_compared_as_rounded(dtype, tmp_path):
    random_model(their_config("gpt2", **GPT2)).save_pretrained(tmp_path / "gpt2")
    exported = export_source(
        find_source(tmp_path / "gpt2"), tmp_path / "hf", dtype=dtype, check=True
    )
    assert (exported.not_checked, exported.dtype) == (None, dtype)
    assert {t.dtype for t in weights_of(tmp_path / "hf").values()} == {dtype}


def test_what_fp16_cannot_hold_is_refused_by_name(tmp_path):
    model = TINY.build()
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight[0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: holds 1e\+05"):
        export_hf(TINY, model.state_dict(), tmp_path / "hf", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_generation_settings_of_the_original_are_kept(tmp_path):
    settings = {"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}
    origin = {"model_type": "llama", "generation_config": settings}
    source = find_source(save(tmp_path, 5, TINY.build(), source=origin))
    export_source(source, tmp_path / "a", check=False)
    (tmp_path / "a/README.md").write_text("x")
    export_source(find_source(tmp_path / "a"), tmp_path / "b", check=False)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert json.loads((folder / "generation_config.json").read_text()) == settings
        config = json.loads((folder / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 7])


def test_the_end_of_a_turn_ends_texts_of_models_and_adapters(tmp_path):
    """Next to what ended texts before, in the place of which the data has another end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from tests.data.prepare.build.test_stops import CHATML, with_template

    tokenizer = with_template(CHATML)
    end = tokenizer.id_of("<|im_end|>")
    tokenizer.save(tmp_path / "bytes")
    config = HFTokenizerConfig(path=str(tmp_path / "bytes"), eos_token="<|im_end|>")
    load_hf_tokenizer(config).save(tmp_path / "chosen")
    model = TINY.replace(vocab_size=300).build()
    with torch.no_grad():
        # Whatever it reads, this model says the end of a turn.
        model.head.norm.weight.zero_()
        model.head.norm.weight[0] = 1.0
        model.head.weight.zero_()
        model.head.weight[end, 0] = 1.0
        model.embeddings.tokens.weight[:, 0] = 50.0
    generation = {"eos_token_id": 256, "temperature": 0.5, "do_sample": True, "pad_token_id": 9}
    origin = {"name": "b", "model_type": "llama", "generation_config": generation}
    for folder, ends in (("bytes", [256, end]), ("chosen", [end, 256])):
        export_hf(
            model.config,
            model.state_dict(),
            tmp_path / f"{folder}-hf",
            tokenizer_folder=tmp_path / folder,
            generation=generation,
        )
        out = tmp_path / f"{folder}-hf"
        expected = {**generation, "bos_token_id": None, "eos_token_id": ends}
        expected["pad_token_id"] = ends[0]
        assert json.loads((out / "generation_config.json").read_text()) == expected
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == ends
        theirs, loaded = (
            AutoModelForCausalLM.from_pretrained(out),
            AutoTokenizer.from_pretrained(out),
        )
        assert loaded.eos_token_id == ends[0]
        inputs = loaded("a", return_tensors="pt")["input_ids"]
        made = theirs.generate(inputs, max_new_tokens=24, do_sample=False)
        assert made[0].tolist() == [97, end]
    step = save(
        tmp_path / "tuned/checkpoints",
        3,
        model,
        tensors={"blocks.0.attention.query.lora_A.weight": torch.randn(2, TINY.d_model),
                 "blocks.0.attention.query.lora_B.weight": torch.randn(TINY.d_model, 2)},
        adapter=msgspec.to_builtins(LoRAConfig(rank=2, alpha=4.0)),
        base={"path": "/elsewhere/base/checkpoints/step7", "step": 7, "fingerprint": "",
              "source": origin},
    )  # fmt: skip
    source = find_source(step)._replace(tokenizer_folder=tmp_path / "bytes")
    export_source(source, tmp_path / "adapter", check=False)
    settings = GenerationConfig.from_pretrained(tmp_path / "adapter")
    assert settings.eos_token_id == [256, end]
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template == CHATML
    peft = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == "base/checkpoints/step7"


def test_tokenizer_chat_template_and_padding_token_come_along(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = train_bpe(["some text to learn from, some text"] * 3, 280)
    tokenizer.with_chat_template("{{ messages[0].content }}").save(tmp_path / "run/tokenizer")
    path = tmp_path / "run/tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text()) | {"pad_token": "<|endoftext|>"}
    path.write_text(json.dumps(config))
    model = TINY.replace(vocab_size=300).build()
    source = find_source(save(tmp_path / "run", 1, model))
    exported = export_source(source, tmp_path / "hf", check=True)
    assert exported.has_tokenizer
    assert exported.not_checked is None
    assert load_tokenizer(tmp_path / "hf").chat_template == "{{ messages[0].content }}"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    rendered = theirs.apply_chat_template([{"role": "user", "content": "hey"}], tokenize=False)
    assert rendered == "hey"
    assert GenerationConfig.from_pretrained(tmp_path / "hf").pad_token_id == tokenizer.eos_id


def test_a_result_that_computes_something_else_does_not_appear(monkeypatch, tmp_path):
    source = find_source(save(tmp_path / "run", 1, TINY.build()))

    def swapped(tensors: Any, _: Any) -> Any:
        for name, tensor in tensors:
            yield name, tensor.roll(1, 0) if name == "blocks.0.attention.query.weight" else tensor

    monkeypatch.setattr("toolkit.hf.export._rounded", swapped)
    with pytest.raises(CheckpointError, match=r"hf: the logits of .* differ by .*allowed"):
        export_source(source, tmp_path / "hf", check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = TINY.build()
    model.get_parameter("blocks.1.attention.key.weight").data[0, 3] = torch.inf
    source = find_source(save(tmp_path / "run", 1, model))
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attention\.key\.weight holds nan"):
        export_source(source, tmp_path / "hf", check=True)


def test_missing_and_left_over_weights_are_found(tmp_path):
    model = TINY.build()
    for name, change in (
        ("misses", lambda t: t.pop("model.norm.weight")),
        ("has no use for", lambda t: t.update(extra=torch.ones(1))),
    ):
        export_hf(TINY, model.state_dict(), tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"transformers {name} .* \(1 in all\)"):
            compare.compare_with_transformers(tmp_path / name, TINY, model.state_dict().items())


def test_only_ties_may_choose_another_token():
    ours = torch.tensor([[[1.0, 1.00005, -2.0]]])
    assert compare.check_logits(ours, ours.flip(-1).flip(-1), "x") == 0
    tie = torch.tensor([[[1.00005, 1.0, -2.0]]])
    assert compare.check_logits(ours, tie, "x") == pytest.approx(2.5e-5, rel=1e-2)
    for other in (torch.tensor([[[1.0, 1.1, -2.0]]]), torch.full((1, 1, 3), torch.nan)):
        with pytest.raises(CheckpointError, match="x: the logits of transformers differ"):
            compare.check_logits(ours, other, "x")


def test_another_tokenizer_is_noticed(tmp_path):
    train_bpe(["some text to learn from, some text"] * 3, 280).save(tmp_path)
    compare.check_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_byte_tokenizer": True}))
    message = r"AutoTokenizer, which chose \w+, makes .* the training data has"
    with pytest.raises(CheckpointError, match=message):
        compare.check_tokenizer(tmp_path)


def test_an_export_that_does_not_fit_in_memory_is_not_compared(monkeypatch, tmp_path):
    source = find_source(save(tmp_path / "run", 1, TINY.build()))
    monkeypatch.setattr(compare, "has_memory_to_compare", lambda _: False)
    exported = export_source(source, tmp_path / "hf")
    assert exported.not_checked == "it takes about 0.5 GB of memory, which are not free"
    assert export_source(source, tmp_path / "no", check=False).not_checked == "not asked for"


def test_adapters_are_exported_alone_or_merged(tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    random_model(their_config("llama")).save_pretrained(tmp_path / "base-hf")
    base = converted(tmp_path / "base-hf", tmp_path / "base", path=str(tmp_path / "base-hf"))
    recorded = find_source(base)
    assert recorded.metadata is not None
    layer = "blocks.1.attention.query"
    adapter = {f"{layer}.lora_A.weight": torch.randn(2, 36)}
    adapter[f"{layer}.lora_B.weight"] = torch.randn(36, 2)
    step = save(
        tmp_path / "tuned",
        3,
        recorded.config.build(init_device="meta"),
        tensors=adapter,
        adapter=msgspec.to_builtins(LoRAConfig(rank=2, alpha=4.0)),
        base={
            "path": str(base),
            "step": 0,
            "fingerprint": recorded.metadata.xxh3,
            "source": recorded.origin,
        },
    )
    source = find_source(step)
    merged = export_source(source, tmp_path / "merged", merge_adapter=True, check=True)
    assert (merged.not_checked, merged.is_adapter) == (None, False)
    alone = export_source(source, tmp_path / "alone", card="a card", check=True)
    assert (alone.not_checked, alone.is_adapter) == (None, True)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "alone").iterdir()} == files
    assert export_source(source, tmp_path / "half", dtype=torch.bfloat16).not_checked is None
    assert (tmp_path / "alone/README.md").read_text() == "a card"
    settings = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "model"
    assert str(tmp_path) not in json.dumps(settings)
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base-hf")
    tuned = PeftModel.from_pretrained(theirs, tmp_path / "alone").eval()
    expected = load_model(source)(ids)
    torch.testing.assert_close(tuned(ids).logits, expected, rtol=1e-4, atol=1e-4)

    written = export.export_adapter
    doubled = {name: 2 * tensor for name, tensor in adapter.items()}
    monkeypatch.setattr(
        export, "export_adapter", lambda *args, **kw: written(*args[:3], doubled, *args[4:], **kw)
    )
    with pytest.raises(CheckpointError, match=r"wrong: the logits of transformers differ by .* no"):
        export_source(source, tmp_path / "wrong")
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"an adapter, whose base .* is not there any more"):
        export_source(source, tmp_path / "wrong", check=True)
    assert not (tmp_path / "wrong").exists()
    assert "is not there any more" in str(export_source(source, tmp_path / "no base").not_checked)
