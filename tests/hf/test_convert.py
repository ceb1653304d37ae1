"""A folder of theirs becomes a checkpoint of ours, whole or not at all."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hf.fidelity import random_model, their_config
from toolkit.checkpoint.find import find_checkpoint
from toolkit.checkpoint.folder import read_metadata
from toolkit.checkpoint.tensors import iterate_tensors, load_tensors
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from toolkit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
)
from toolkit.hf import compare, convert
from toolkit.hf.compare import check_logits, sample_ids, their_logits
from toolkit.hf.convert import Conversion, ConvertOptions, convert_hf
from toolkit.hf.source import find_source, load_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in bf16 with a tokenizer of 300 ids, a chat template and a licence."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304, hidden_size=36, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=64,
        tie_word_embeddings=True, initializer_range=0.2, eos_token_id=299, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer = train_bpe([" ".join(f"{n} small words" for n in range(900))], 300)
    tokenizer.with_chat_template("{{ messages[0].content }}").save(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


def convert_it(source: Path, out: Path, **options: Any) -> Conversion:
    options.setdefault("validate", False)
    return convert_hf(
        source, out, name="it", add=lambda made, at: None, options=ConvertOptions(**options)
    )


def test_the_checkpoint_is_whole_and_holds_the_bits_of_the_original(
    original: Path, tmp_path: Path
) -> None:
    made = convert_it(original, tmp_path / "out", validate=True)
    assert made.difference is not None
    assert made.difference < 1e-4
    assert made.dtypes == ("bfloat16",)
    checkpoint = find_checkpoint(tmp_path / "out").checkpoint
    assert checkpoint == tmp_path / "out" / "step0"
    metadata = read_metadata(checkpoint)
    origin = metadata.extra["source"]
    assert {key: origin[key] for key in ("name", "model_type", "dtype", "license")} == {
        "name": "it", "model_type": "llama", "dtype": "bfloat16", "license": "mit"
    }  # fmt: skip
    assert origin["generation_config"]["eos_token_id"] == 299
    assert metadata.extra["model"]["vocab_size"] == 304
    assert {"train/rank0.pt", "model_and_optim/.metadata"} < metadata.files.keys()
    source = load_file(original / "model.safetensors")
    stored = dict(iterate_tensors(checkpoint / "model_and_optim", "model."))
    assert len(stored) == len(source)
    embedding = stored["embeddings.tokens.weight"]
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding[:304], source["model.embed_tokens.weight"])
    assert embedding[304:].count_nonzero() == 0
    # fp32 master weights are those numbers exactly.
    masters = {f"model.{name}": torch.empty(t.shape) for name, t in stored.items()}
    load_tensors(checkpoint / "model_and_optim", masters, None)
    assert all(torch.equal(masters[f"model.{name}"], t.float()) for name, t in stored.items())
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_added_tokens_grow_tokenizer_and_model(original: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokens = ["<|im_start|>", "<|im_end|>", "<|a|>", "<|b|>", "<|c|>", "<|im_end|>"]
    template = tmp_path / "chat.jinja"
    template.write_text("{{ 'new' }}")
    made = convert_it(
        original, tmp_path / "out", add_tokens=tokens, chat_template=template, validate=True
    )
    assert made.config.vocab_size == 305
    assert made.difference is not None
    assert made.tokenizer is not None
    assert made.tokenizer.new_tokens == tuple(tokens[:5])
    assert "5 rows for new tokens: the mean of the others" in made.notes
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    ids = theirs("<|im_start|>a<|c|>", add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (300, 304)
    assert theirs.decode(ids, skip_special_tokens=True) == "a"
    assert theirs.chat_template == "{{ 'new' }}"
    rows = load_model(find_source(tmp_path / "out")).embeddings.tokens.weight
    mean = rows[:300].mean(0).bfloat16().float()
    assert all(torch.equal(rows[number], mean) for number in range(300, 305))


def test_a_byte_tokenizer_grows_too(tmp_path: Path) -> None:
    source = tmp_path / "model"
    random_model(their_config("llama", vocab_size=257)).save_pretrained(source)
    ByteTokenizer().save(source)
    made = convert_it(source, tmp_path / "plain")
    assert made.config.vocab_size == 257
    made = convert_it(source, tmp_path / "out", add_tokens=["<|im_start|>", "<|im_end|>"])
    assert made.config.vocab_size == 259
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (259, 256)
    assert tokenizer.control_tokens == {
        "<|endoftext|>": 256,
        "<|im_start|>": 257,
        "<|im_end|>": 258,
    }
    text = "<|im_end|> \x00 h\xe9 \n"
    assert tokenizer.encode_batch([text])[0].tolist() == list(text.encode())
    ((ids, _),) = tokenizer.encode_offsets(["<|im_start|>a<|im_end|>"], special_tokens=True)
    assert ids.tolist() == [257, 97, 258]
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_get_rows_that_were_there_as_padding(tied: bool, tmp_path: Path) -> None:
    """In the embedding and in the head; rows that stay padding keep their bits."""
    model = random_model(their_config("llama", vocab_size=320, tie_word_embeddings=tied))
    source = tmp_path / "model"
    model.save_pretrained(source)
    train_bpe([" ".join(f"{n} small words" for n in range(900))], 300).save(source)
    grown = tmp_path / "grown"
    for options in ({"add_tokens": ["<|a|>", "<|b|>"]}, {"tokenizer": grown}):
        made = convert_it(source, tmp_path / "out", validate=True, **options)
        assert made.notes == ("2 rows for new tokens: the mean of the others",)
        assert made.config.vocab_size == 320
        ours = load_model(find_source(tmp_path / "out"))
        pairs = [(ours.embeddings.tokens.weight, model.get_input_embeddings().weight)]
        if not tied:
            pairs.append((ours.head.weight, model.get_output_embeddings().weight))
        for rows, before in pairs:
            kept = [*range(300), *range(302, 320)]
            assert torch.equal(rows[kept], before[kept])
            mean = before[:300].mean(0, dtype=torch.float32)
            assert torch.equal(rows[300], mean)
            assert torch.equal(rows[301], mean)
            assert not torch.equal(before[300], mean)
        # The tokenizer that has grown elsewhere is the second one that is given.
        if not grown.exists():
            shutil.copytree(tmp_path / "out/tokenizer", grown)
        shutil.rmtree(tmp_path / "out")


def test_tokens_that_the_model_has_keep_their_rows(original: Path, tmp_path: Path) -> None:
    made = convert_it(original, tmp_path / "out", add_tokens=["<|endoftext|>"])
    assert made.notes == ()
    embedding = load_file(original / "model.safetensors")["model.embed_tokens.weight"]
    rows = load_model(find_source(tmp_path / "out")).embeddings.tokens.weight
    assert torch.equal(rows[:304], embedding.float())


def test_a_tokenizer_that_the_models_class_cannot_give_is_refused(
    tmp_path: Path,
) -> None:
    """AutoTokenizer takes the class of the model's type here, whatever the files say."""
    source = tmp_path / "model"
    random_model(their_config("qwen2", vocab_size=304)).save_pretrained(source)
    train_bpe([" ".join(f"{n} small words" for n in range(900))], 300).save(source)
    message = r"model: AutoTokenizer, which chose Qwen2Tokenizer, makes .* of a part of .*; give a"
    with pytest.raises(DataError, match=message):
        convert_it(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 200}, ConfigError, "--vocab-size 200: the model has 304 token ids"),
        (
            {"vocab_size": 304, "add_tokens": [f"<{n}>" for n in range(9)]},
            ConfigError,
            "the tokenizer has 309 ids",
        ),
        ({"tokenizer": Path("gone")}, DataError, "--tokenizer gone: no such file or folder"),
        ({"chat_template": Path("gone")}, DataError, "--chat-template gone: "),
    ],
)
def test_options_that_cannot_be_met_leave_nothing(
    original: Path, tmp_path: Path, options: Any, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        convert_it(original, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_and_a_larger_vocabulary(original: Path, tmp_path: Path) -> None:
    train_bpe(["other text " * 50], 280).save(tmp_path / "other")
    made = convert_it(original, tmp_path / "out", tokenizer=tmp_path / "other", vocab_size=400)
    assert made.config.vocab_size == 400
    assert made.config.padded_vocab_size == 448
    assert load_tokenizer(tmp_path / "out" / "tokenizer").chat_template is None


def test_a_model_without_tokenizer_is_noted(original: Path, tmp_path: Path) -> None:
    source = tmp_path / "bare"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(original / name, source / name)
    made = convert_it(source, tmp_path / "out")
    assert made.tokenizer is None
    assert made.notes == ("there is no tokenizer in it; set dataset.tokenizer before training",)
    with pytest.raises(DataError, match="holds no tokenizer; give one with --tokenizer"):
        convert_it(source, tmp_path / "other", add_tokens=["<x>"])


def test_tokenizers_of_older_formats_become_fast_ones(original: Path, tmp_path: Path) -> None:
    source = tmp_path / "old"
    shutil.copytree(original, source)
    backend = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(backend["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in backend["merges"]]
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (source / "tokenizer.json").unlink()
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert convert_it(source, tmp_path / "out").tokenizer is not None
    text = "a small text"
    ids = load_tokenizer(tmp_path / "out" / "tokenizer").encode_batch([text])[0].tolist()
    assert ids == load_tokenizer(original).encode_batch([text])[0].tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", r"model/tokenizer\.json: not a tokenizer that can be read"),
        ("tokenizer_config.json", b"{", r"model/tokenizer_config\.json: not .*JSON"),
        ("tokenizer_config.json", b'{"eos_token": "<e>"}', r"model: .* has no token '<e>'"),
        ("chat_template.jinja", b"\xff\xfe", r"model/chat_template\.jinja: .*(utf|UTF)-8"),
    ],
)
def test_damaged_tokenizers_are_named_by_their_own_files(
    original: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    source = tmp_path / "model"
    shutil.copytree(original, source)
    (source / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert_it(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        ('license: "apache-2.0"', {"license": "apache-2.0"}),
        ("license:\n- mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: ours\nlicense_link: LICENSE",
            {"license": "other", "license_name": "ours", "license_link": "LICENSE"},
        ),
        ("license: [mit, gpl]", {}),
        ("license: {", {}),
        ("a: &a [1]\nb: *a\nlicense: mit", {}),  # aliases can make a small file a large value
        ("- a", {}),
    ],
)
def test_the_license_is_that_of_the_originals_card(
    head: str, expected: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert convert._license(tmp_path) == expected


def test_a_link_is_followed(original: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("other")
    convert_it(original, tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "other"]
    assert find_checkpoint(tmp_path / "link", quick=True)[0] is not None


def test_a_full_disk_is_one_line(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("toolkit.hf.tokenizer_files.shutil.copyfile", full)
    with pytest.raises(TrainingError, match=r"out: cannot be written, nothing .*: No space left"):
        convert_it(original, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_differ_leave_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        compare, "their_logits", lambda folder, ids, **_: their_logits(folder, ids) * 1.01
    )
    with pytest.raises(CheckpointError, match=r"the logits of transformers differ by .*; nothing"):
        convert_it(original, tmp_path / "out", validate=True)
    assert list(tmp_path.iterdir()) == []


def test_buffers_that_transformers_has_no_use_for_are_no_fault(tmp_path: Path) -> None:
    model = random_model(their_config("gpt2", n_embd=24, n_head=3))
    model.save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2/model.safetensors"
    buffers = {f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(2)}
    save_file(load_file(file) | buffers, file, metadata={"format": "pt"})
    difference = convert_it(tmp_path / "gpt2", tmp_path / "out", validate=True).difference
    assert difference is not None
    assert difference < 1e-5


def test_without_memory_it_is_not_compared_and_says_so(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "has_memory_to_compare", lambda config: False)
    made = convert_it(original, tmp_path / "out", validate=None)
    assert made.difference is None
    assert "not compared with transformers, for which 0.5 GB of memory" in made.notes[-1]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "SPARE_BYTES", 1 << 60)
    with pytest.raises(TrainingError, match="GB are needed on the disk of"):
        convert_it(original, tmp_path / "out")
    monkeypatch.undo()

    def fails(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toolkit.checkpoint.shard_file.ShardFile._pass_on", fails)
    with pytest.raises(TrainingError, match=r"out: not converted, nothing is left of it: .*No spa"):
        convert_it(original, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert_it(original, out)
    before = (out / "step0" / ".metadata.json").read_bytes()
    with pytest.raises(CheckpointError, match="already exists"):
        convert_it(original, out)
    assert (out / "step0" / ".metadata.json").read_bytes() == before


def test_a_killed_conversion_leaves_nothing_that_looks_committed(
    original: Path, tmp_path: Path
) -> None:
    """Killed between the last tensor and the end."""
    child = os.fork()
    if child == 0:
        try:
            convert_hf(
                original,
                tmp_path / "out",
                name="it",
                add=lambda made, at: os.kill(os.getpid(), signal.SIGKILL),
                options=ConvertOptions(validate=False),
            )
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert find_checkpoint(tmp_path).checkpoint is None


def test_sharded_fp32_sources_give_the_same_logits(original: Path, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    shutil.copytree(original, source)
    tensors = load_file(original / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {n: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        part = {n: tensors[n].float() for n in names if files[n] == file}
        save_file(part, source / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    made = convert_it(source, tmp_path / "out")
    assert made.dtypes == ("float32",)
    ids = sample_ids(made.config)
    with torch.no_grad():
        ours = load_model(find_source(tmp_path / "out"))(ids)
    assert check_logits(ours, their_logits(original, ids), "out") < 1e-5
