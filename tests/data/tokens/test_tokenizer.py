import json
from pathlib import Path

import numpy as np
import pytest

from toolkit.data.config import HFTokenizerConfig
from toolkit.data.tokens.bpe_tokenizer import train_bpe
from toolkit.data.tokens.byte_tokenizer import ByteTokenizer
from toolkit.data.tokens.hf_tokenizer import load_hf_tokenizer
from toolkit.data.tokens.tokenizer import EOS_TOKEN, Tokenizer, load_tokenizer
from toolkit.errors import DataError

TEXTS = ["the cat sat on the mat\n" * 20, "def f(x):\n    return x + 1\n" * 20]
HARD_TEXT = f"the é \U0001f600 \x00 {EOS_TOKEN}\r\n  mat"


def test_byte_tokenizer_gives_the_bytes_and_an_eos_after_them() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 257
    assert tokenizer.eos_id == 256
    assert tokenizer.encode_batch(["aé"])[0].tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 0xC3, 0xA9, 256]) == "aé" + EOS_TOKEN


def test_bpe_trained_twice_on_the_same_text_is_the_same() -> None:
    first, second = train_bpe(TEXTS, 300), train_bpe(TEXTS, 300)
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != train_bpe(TEXTS, 260).fingerprint
    assert first.vocab_size <= 300


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe(TEXTS, 300)])
def test_saved_tokenizer_loads_here_and_with_transformers(make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = make()
    tokenizer.save(tmp_path)
    ids = tokenizer.encode_batch([HARD_TEXT])[0]
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.encode_batch([HARD_TEXT])[0], ids)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs("the é mat")["input_ids"] == tokenizer.encode_batch(["the é mat"])[0].tolist()


def test_control_tokens_in_text_stay_text() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    ids = tokenizer.encode_batch([HARD_TEXT])[0]
    assert tokenizer.eos_id not in ids.tolist()
    assert tokenizer.decode(ids) == HARD_TEXT


def test_hf_folder_and_file_give_the_same_tokenizer(tmp_path: Path) -> None:
    train_bpe(TEXTS, 300).save(tmp_path)
    folder = load_hf_tokenizer(HFTokenizerConfig(path=str(tmp_path)))
    file = load_hf_tokenizer(HFTokenizerConfig(path=str(tmp_path / "tokenizer.json")))
    assert folder.fingerprint == file.fingerprint
    assert folder.eos_token == EOS_TOKEN


def test_gaps_in_a_vocabulary_count_as_ids(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["vocab"]["zz"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS_TOKEN}))
    assert load_hf_tokenizer(HFTokenizerConfig(path=str(tmp_path))).vocab_size == 70_001


def test_missing_and_damaged_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.tokenizer\.path: .*no such file or folder"):
        load_hf_tokenizer(HFTokenizerConfig(path=str(tmp_path / "absent")))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer that can be read"):
        load_hf_tokenizer(HFTokenizerConfig(path=str(tmp_path)))


def test_unknown_eos_token_is_an_error(tmp_path: Path) -> None:
    train_bpe(TEXTS, 300).save(tmp_path)
    with pytest.raises(DataError, match=r"eos_token: the tokenizer has no token '</s>'"):
        load_hf_tokenizer(HFTokenizerConfig(path=str(tmp_path), eos_token="</s>"))
