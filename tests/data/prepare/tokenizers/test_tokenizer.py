import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpus import files_config, write_texts
from toolkit.data.config import ByteTokenizerConfig, HFTokenizerConfig
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.tokenizers.choice import load_hf_tokenizer, tokenizer_files_hash
from toolkit.data.prepare.tokenizers.tokenizer import (
    EOS_TOKEN,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from toolkit.data.prepare.tools.inspect import inspect_path
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


def wordlevel(folder: Path, words: list[str], **config: str) -> HFTokenizerConfig:
    """A folder with a tokenizer whose ids are the numbers of `words`; none is marked as special."""
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(words)}
    backend = BackendTokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return HFTokenizerConfig(path=str(folder))


def test_control_tokens_of_a_word_level_vocabulary_stay_text(tmp_path: Path) -> None:
    config = wordlevel(tmp_path, ["<unk>", "<s>", "</s>", "a"], eos_token="</s>", bos_token="<s>")
    tokenizer = load_hf_tokenizer(config)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode_batch(["a <s> a </s>"])[0].tolist() == [3, 0, 3, 0]
    [(ids, offsets)] = tokenizer.encode_offsets(["<s> a </s>"], special_tokens=True)
    assert ids.tolist() == [1, 3, 2]
    assert offsets.tolist() == [[0, 3], [4, 5], [6, 10]]


def test_an_eos_token_that_is_no_special_token_stays_text_too(tmp_path: Path) -> None:
    train_bpe(TEXTS, 300).save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    entry = {**data["added_tokens"][0], "content": "<end>", "id": 300, "special": False}
    data["added_tokens"] += [entry, {**entry, "content": "<tag>", "id": 301}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_hf_tokenizer(HFTokenizerConfig(path=str(tmp_path), eos_token="<end>"))
    largest = tokenizer.vocab_size - 1
    ids = tokenizer.encode_batch(["the<end><tag>"])[0].tolist()
    assert tokenizer.eos_id == largest - 1
    assert tokenizer.eos_id not in ids
    # The other added token is an ordinary one and keeps its id.
    assert ids[-1] == largest
    assert tokenizer.decode(ids) == "the<end><tag>"


def test_bos_token_is_the_tokenizers_own_or_the_configs(tmp_path: Path) -> None:
    config = wordlevel(tmp_path, ["<unk>", "<s>", "</s>", "a"], eos_token="</s>", bos_token="<s>")
    assert load_hf_tokenizer(config).bos_token == "<s>"
    other = load_hf_tokenizer(HFTokenizerConfig(path=config.path, bos_token="</s>"))
    assert other.bos_id == 2
    other.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").bos_id == 2
    with pytest.raises(DataError, match=r"bos_token: the tokenizer has no token '<bos>'"):
        load_hf_tokenizer(HFTokenizerConfig(path=config.path, bos_token="<bos>"))


def test_a_bos_token_that_the_vocabulary_lacks_is_no_bos_token(tmp_path: Path) -> None:
    config = wordlevel(tmp_path, ["<unk>", "</s>"], eos_token="</s>", bos_token="<gone>")
    assert load_hf_tokenizer(config).bos_id is None


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe(TEXTS, 300)])
def test_offsets_cover_the_text_and_control_tokens_are_read_where_asked(make) -> None:
    tokenizer: Tokenizer = make()
    text = f"the é  cat{EOS_TOKEN} \U0001f600"
    [(plain, offsets)] = tokenizer.encode_offsets([text], special_tokens=False)
    assert np.array_equal(plain, tokenizer.encode_batch([text])[0])
    assert plain.dtype == np.uint32
    assert offsets.shape == (len(plain), 2)
    assert offsets[0, 0] == 0
    assert offsets[-1, 1] == len(text)
    # Each token begins where the one before ends, or shares its character.
    assert all(a[1] == b[0] or np.array_equal(a, b) for a, b in itertools.pairwise(offsets))
    [(ids, places)] = tokenizer.encode_offsets([text], special_tokens=True)
    [eos] = np.flatnonzero(ids == tokenizer.eos_id)
    assert text[places[eos, 0] : places[eos, 1]] == EOS_TOKEN
    assert tokenizer.encode_offsets([""], special_tokens=True)[0][1].shape == (0, 2)


def test_reading_control_tokens_leaves_documents_encoded_at_the_same_time_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = train_bpe(TEXTS, 300)
    text = f"the cat{EOS_TOKEN}" * 50

    def encode(special: bool) -> int:
        if special:
            ids, _ = tokenizer.encode_offsets([text], special_tokens=True)[0]
        else:
            ids = tokenizer.encode_batch([text])[0]
        return int((ids == tokenizer.eos_id).sum())

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(encode, [True, False] * 100))
    assert counts == [50, 0] * 100


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe(TEXTS, 300)])
def test_chat_template_is_saved_and_read_by_transformers(make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = make()
    assert tokenizer.chat_template is None
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    changed = tokenizer.with_chat_template(template)
    assert tokenizer.chat_template is None
    changed.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.chat_template == template
    assert again.encode_batch(["aé"])[0].dtype == tokenizer.encode_batch(["aé"])[0].dtype
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "[user] hi"


def test_chat_template_of_the_config_is_found_and_replaced(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    train_bpe(TEXTS, 300).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "yes"
    tokenizer.with_chat_template("new").save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "chat_template" not in saved
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "new"


def test_files_hash_tells_a_changed_tokenizer(tmp_path: Path) -> None:
    train_bpe(TEXTS, 300).save(tmp_path)
    config = HFTokenizerConfig(path=str(tmp_path))
    first = tokenizer_files_hash(config)
    assert first == tokenizer_files_hash(config)
    assert first == tokenizer_files_hash(HFTokenizerConfig(path=str(tmp_path / "tokenizer.json")))
    train_bpe(TEXTS, 280).save(tmp_path)
    assert tokenizer_files_hash(config) != first
    assert tokenizer_files_hash(HFTokenizerConfig(path="org/name")) is None
    assert tokenizer_files_hash(ByteTokenizerConfig()) is None


def test_prompts_start_as_documents_do(tmp_path: Path) -> None:
    config = wordlevel(tmp_path, ["<unk>", "<s>", "</s>", "a"], eos_token="</s>", bos_token="<s>")
    tokenizer = load_hf_tokenizer(config)
    assert (tokenizer.prompt_ids("a a"), tokenizer.prompt_ids("")) == ([3, 3], [2])
    tokenizer.with_bos_policy(True).save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.prepends_bos
    assert (again.prompt_ids("a a"), again.prompt_ids("")) == ([1, 3, 3], [1])
    assert again.fingerprint != tokenizer.fingerprint
    assert again.fingerprint == tokenizer.with_bos_policy(True).fingerprint
    assert not again.with_bos_policy(False).prepends_bos
    assert again.with_bos_policy(False).prompt_ids("a") == [3]
    assert ByteTokenizer().with_bos_policy(True).prompt_ids("a") == [97]


def test_ids_above_16_bits_are_stored_exactly(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", *(f"w{number}" for number in range(2, 70_000))]
    tokenizer = wordlevel(tmp_path / "tokenizer", words, eos_token="</s>")
    ids = [2, 65_534, 65_535, 65_536, 65_537, 69_999, 131_072 - 65_536, 4_464]
    texts = write_texts(tmp_path / "texts", [" ".join(f"w{i}" for i in ids)] * 3)
    prepared = prepare_dataset(
        files_config(tmp_path / "data", texts, tokenizer=tokenizer), progress=False
    )
    assert prepared.manifest.dtype == "uint32"
    assert prepared.vocab_size == 70_000
    assert prepared.tokens("train").tolist() == [*ids, 1] * 3
    assert (prepared.folder / "train.bin").stat().st_size == 27 * 4
    report = inspect_path(prepared.folder, progress=False)
    assert report.problems == []
    assert report.splits[0].largest_id == 69_999


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_type_changes_where_the_largest_id_needs_it(
    size: int, dtype: str, tmp_path: Path
) -> None:
    words = ["<unk>", "</s>", *(f"w{number}" for number in range(2, size))]
    tokenizer = wordlevel(tmp_path / "tokenizer", words, eos_token="</s>")
    texts = write_texts(tmp_path / "texts", [f"w{size - 1} w{size - 2}"])
    prepared = prepare_dataset(
        files_config(tmp_path / "data", texts, tokenizer=tokenizer), progress=False
    )
    assert prepared.manifest.dtype == dtype
    assert prepared.tokens("train").tolist() == [size - 1, size - 2, 1]


def test_bos_and_eos_of_the_data_are_in_its_manifest_and_its_tokenizer(tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "</s>", "a"]
    tokenizer = wordlevel(tmp_path / "tokenizer", words, eos_token="</s>", bos_token="<s>")
    texts = write_texts(tmp_path / "texts", ["a <s> a", "</s> a"])
    config = files_config(tmp_path / "data", texts, tokenizer=tokenizer, prepend_bos=True)
    prepared = prepare_dataset(config, progress=False)
    assert prepared.tokens("train").tolist() == [1, 3, 0, 3, 2, 1, 0, 3, 2]
    assert (prepared.manifest.bos_id, prepared.manifest.prepend_bos) == (1, True)
    assert inspect_path(prepared.folder, progress=False).problems == []
    assert prepared.tokenizer_folder is not None
    assert load_tokenizer(prepared.tokenizer_folder).prompt_ids("a") == [1, 3]
