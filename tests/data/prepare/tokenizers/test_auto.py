"""`AutoTokenizer` gives the ids that data is made of, in folders of every class."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer

from tests.data.corpus import files_config, write_texts
from toolkit.data.config import HFTokenizerConfig
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.tokenizers.auto import HARD_TEXTS, difference, make_portable, settle
from toolkit.data.prepare.tokenizers.converted import PATTERNS
from toolkit.data.prepare.tokenizers.fast_bpe import byte_characters
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from toolkit.errors import DataError

TEXT = "\n\nhello\n\n\nworld 650841823 2023"


def split_by(pattern: str) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([cut, byte_level])


def write(folder: Path, pre_tokenizer: Any = None, **config: Any) -> Path:
    """A byte-level BPE with cl100k's pattern, and a tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or split_by(PATTERNS["cl100k_base"])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    backend.train_from_iterator([f"{TEXT} the year a   b\n\n"] * 20, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("name", "differs", "settled"),
    [
        ("GPT2Tokenizer", "which chose GPT2Tokenizer, makes", "PreTrainedTokenizerFast"),
        ("GPTNeoXTokenizerFast", "which chose GPTNeoX.*, makes", "PreTrainedTokenizerFast"),
        ("Qwen2Tokenizer", "which chose Qwen2Tokenizer, makes", "PreTrainedTokenizerFast"),
        ("GemmaTokenizer", "cannot use it: Unk token", "PreTrainedTokenizerFast"),
        # transformers 4 has no class of this name, and refuses names that it does not know.
        ("TokenizersBackend", None, "PreTrainedTokenizerFast"),
        ("NobodysTokenizer", None, "PreTrainedTokenizerFast"),
        ("PreTrainedTokenizerFast", None, "PreTrainedTokenizerFast"),
    ],
)
def test_a_class_with_rules_of_its_own_is_replaced(
    name: str, differs: str | None, settled: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, tokenizer_class=name, model_max_length=77)
    reason = difference(folder)
    assert reason is None if differs is None else re.search(differs, str(reason))
    settle(folder, where="it")
    assert config_of(folder)["tokenizer_class"] == settled
    assert config_of(folder)["model_max_length"] == 77
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in (TEXT, *HARD_TEXTS):
        expected = ours.encode_batch([text])[0].tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected, text
    controls = "a <|im_end|>b<|endoftext|>\n <|im_end|>"
    ((expected, _),) = ours.encode_offsets([controls], special_tokens=True)
    assert theirs(controls, add_special_tokens=False)["input_ids"] == expected.tolist()


def test_what_agrees_stays_as_it_is(tmp_path: Path) -> None:
    for folder, make in ((tmp_path / "bytes", ByteTokenizer().save), (tmp_path / "gpt2", None)):
        if make is not None:
            make(folder)
        else:
            gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
            write(folder, gpt2, tokenizer_class="GPT2Tokenizer")
        before = (folder / "tokenizer_config.json").read_bytes()
        settle(folder, where="it")
        assert (folder / "tokenizer_config.json").read_bytes() == before


def test_tokens_that_the_vocabulary_lacks_are_not_added(tmp_path: Path) -> None:
    """The model has no rows for them."""
    folder = write(tmp_path, tokenizer_class="LlamaTokenizer", pad_token="<pad>")
    named = {"pad_token": "<pad>", "additional_special_tokens": ["<|im_end|>", "<more>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    assert re.search(r"has ids up to 286, tokenizer.json up to 284", str(difference(folder)))
    settle(folder, where="it")
    assert "pad_token" not in config_of(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == load_tokenizer(folder).vocab_size


def test_tokens_that_only_the_config_lists_are_tokens_of_the_data(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    number = load_tokenizer(folder).vocab_size
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    listed = {str(number): {"content": "<|more|>", "special": True, **flags}}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config_of(folder) | {"added_tokens_decoder": listed}))
    assert load_tokenizer(folder).control_tokens["<|more|>"] == number
    assert difference(folder) is None


def test_a_folder_that_cannot_be_put_right_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, tokenizer_class="PreTrainedTokenizerFast", is_byte_tokenizer=True)
    with pytest.raises(DataError, match=r"^here: AutoTokenizer, which chose \w+, makes .*; give a"):
        settle(folder, where="here")


def test_files_are_spelled_so_that_older_releases_read_the_same(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        tokenizer_class="TokenizersBackend",
        backend="tokenizers",
        extra_special_tokens=["<|im_end|>"],
        eos_token="<|im_end|>",
    )
    named = {"eos_token": {"content": "<|endoftext|>"}, "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    make_portable(folder)
    assert config_of(folder) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|im_end|>"],
        "add_prefix_space": True,
        "eos_token": "<|im_end|>",
    }
    found = json.loads((folder / "special_tokens_map.json").read_text())
    assert found == {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    assert difference(folder) is None


def test_prepared_data_has_the_ids_that_transformers_gives(tmp_path: Path) -> None:
    source = write(tmp_path / "tokenizer", tokenizer_class="GPT2Tokenizer")
    text = write_texts(tmp_path / "text", [f"{TEXT}{number}\n\n\n x" for number in range(40)])
    config = files_config(
        tmp_path, text, tokenizer=HFTokenizerConfig(path=str(source)), validation_fraction=0.0
    )
    prepared = ensure_prepared(config, progress=False)
    assert prepared.manifest.tokenizer_checked == transformers.__version__
    theirs = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    first = prepared.tokens("train")[: int(prepared.document_starts("train")[1]) - 1].tolist()
    written = theirs.decode(first)
    assert written.startswith(TEXT)
    assert theirs(written, add_special_tokens=False)["input_ids"] == first
    # The original is nobody's to change.
    assert config_of(source)["tokenizer_class"] == "GPT2Tokenizer"
