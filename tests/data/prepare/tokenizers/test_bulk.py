"""`fastokens` gives the ids of the other ways, is not asked about others, and is held in bounds."""

import json
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from tests.data.corpus import files_config, random_text, write_texts
from toolkit.data.config import HFTokenizerConfig
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.tokenizers import bulk as module
from toolkit.data.prepare.tokenizers.bulk import (
    KNOWN_PATTERNS,
    LONG_S,
    BulkEncoder,
    IdsDiffer,
    bulk_encoder,
)
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE, Files
from toolkit.data.prepare.tokenizers.fast_bpe import byte_characters
from toolkit.data.prepare.tokenizers.tokenizer import (
    EOS_TOKEN,
    ByteTokenizer,
    Tokenizer,
    fast_config,
    train_bpe,
)

pytest.importorskip("fastokens")
STDLIB = Path(sysconfig.get_paths()["stdlib"])
PARTS = (
    *" \t\n\r\x00\x0b\x0c\x1c\x85\u00a0\u2003\u2028\u3000\u200b\u200d\ufeff\u180e",
    *("  ", "\r\n", "\n\n", " \n ", "   \n", "\t ", "'s", "'S", "'re", "'LL", "’s", "'", "''"),
    *("the", "The", "THE", " hello", "camelCase", "HelloWorld", "foo_bar", "ÉCOLE", "привет"),
    *("0", "12", "1234", "3.14", "1,000", "½", "²", "٣", "Ⅷ", "𝟙", "!", "?!", "...", "//", "/\n"),
    *("e\u0301", "é", "a\u0308\u0323", "क्षि", "한", "\u1112\u1161\u11ab", "中文", "ß", "İ", "ǅ"),
    *("👍🏽", "👨‍👩‍👧", "🇩🇪", "❤️", "1️⃣", "<|endoftext|>", "<|endoftext", "|>", "Ġ", "Ċ"),
    *("\U0010ffff", "\u0c5c", "\u0870", "\ua7cb", "\U00010940", "\U000113c5", "\U0001ccd6"),
)  # fmt: skip


def hard_texts(count: int) -> list[str]:
    generator = random.Random(0)
    texts = ["", *(part * n for part in ("a", " ", "\n", "=", "é", "\x00", "1") for n in (3, 5000))]
    for _ in range(count):
        parts = generator.choices(PARTS, k=generator.randrange(1, 12))
        parts.append(chr(generator.choice((generator.randrange(0xD800), 0x10400, 0x1F680))))
        texts.append("".join(part * generator.choice((1, 1, 1, 2, 9)) for part in parts))
    return texts


@pytest.fixture(scope="module")
def backend() -> BackendTokenizer:
    files = ("argparse.py", "heapq.py", "ast.py", "typing.py")
    texts = [*((STDLIB / name).read_text() for name in files), *hard_texts(200)]
    return train_bpe(texts, 3000)._ordinary


def cut_by(backend: BackendTokenizer, pattern: str) -> BackendTokenizer:
    """Trained on the same kind of text, but cut by another pattern."""
    found = BackendTokenizer(models.BPE(ignore_merges=pattern != KNOWN_PATTERNS["qwen2"]))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=byte_characters(), show_progress=False
    )
    texts = [(STDLIB / "argparse.py").read_text(), *hard_texts(200)]
    found.train_from_iterator(texts, trainer)
    return found


def changed(backend: BackendTokenizer, **values: object) -> Tokenizer:
    content = json.loads(backend.to_str()) | values
    return Tokenizer(BackendTokenizer.from_str(json.dumps(content)), None, {})


def same(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    bulk = bulk_encoder(tokenizer)
    assert bulk is not None
    found, wanted = bulk(texts), tokenizer.plain_ids(texts)
    assert all(ids.dtype == np.uint32 for ids in found)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in wanted]


def test_ids_are_those_of_tokenizers(backend: BackendTokenizer) -> None:
    tokenizer = Tokenizer(backend, EOS_TOKEN, {})
    same(tokenizer, hard_texts(400))
    same(tokenizer, [path.read_text() for path in sorted(STDLIB.glob("[a-c]*.py"))])


@pytest.mark.parametrize("name", KNOWN_PATTERNS)
def test_ids_by_other_patterns(name: str, backend: BackendTokenizer) -> None:
    other = cut_by(backend, KNOWN_PATTERNS[name])
    if name == "qwen2":
        other.normalizer = normalizers.NFC()
    same(Tokenizer(other, None, {}), hard_texts(400))
    same(Tokenizer(other, None, {}), [f"I'{LONG_S} it'{LONG_S}", "a\U00011382\U000113c9b"])


def test_other_tokenizers_and_releases_are_left_alone(
    backend: BackendTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bulk_encoder(ByteTokenizer()) is None
    assert bulk_encoder(changed(backend)) is not None
    for change in (
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                           "use_regex": True}},
        {"model": json.loads(backend.to_str())["model"] | {"dropout": 0.1}},
    ):  # fmt: skip
        assert bulk_encoder(changed(backend, **change)) is None
    with monkeypatch.context() as patch:
        patch.setattr(module, "RELEASES", ("0.0",))
        assert bulk_encoder(changed(backend)) is None
    plain = changed(backend)
    plain.ordinary_backend.add_tokens(["something"])
    assert bulk_encoder(plain) is None


def test_what_the_library_refuses_goes_the_other_way(
    backend: BackendTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    def panic(self: BulkEncoder, texts: Sequence[str]) -> list[np.ndarray]:
        raise PanicException

    monkeypatch.setattr(BulkEncoder, "_encode_some", panic)
    same(Tokenizer(backend, None, {}), hard_texts(5))


def test_it_is_made_anew_when_the_process_has_grown(
    backend: BackendTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_CHARACTERS", 1000)
    tokenizer, text = Tokenizer(backend, None, {}), random_text(30)
    made: list[object] = []
    for growth, number in ((-(1 << 40), 5), (1 << 40, 1)):
        monkeypatch.setattr(module, "MAX_GROWTH", growth)
        bulk = bulk_encoder(tokenizer)
        assert bulk is not None
        made = [bulk._library]
        for _ in range(4):
            assert bulk([text])[0].tolist() == tokenizer.encode_batch([text])[0].tolist()
            made.append(bulk._library)
        assert len({id(library) for library in made}) == number


def test_other_ids_are_noticed_and_nothing_is_made_of_them(
    backend: BackendTokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    files: Files = {TOKENIZER_CONFIG_FILE: fast_config()}
    Tokenizer(backend, EOS_TOKEN, files).save(tmp_path / "tok")
    tokenizer = HFTokenizerConfig(path=str(tmp_path / "tok"))
    texts = write_texts(tmp_path / "text", ["some words\n" * 50, "others"])

    def prepared(name: str) -> list[int]:
        config = files_config(tmp_path / name, texts, tokenizer=tokenizer)
        return ensure_prepared(config, progress=name == "noticed").tokens("train").tolist()

    wanted = prepared("right")
    right = BulkEncoder._encode_some
    monkeypatch.setattr(
        BulkEncoder, "_encode_some", lambda self, texts: [ids + 1 for ids in right(self, texts)]
    )
    with pytest.raises(IdsDiffer):
        same(Tokenizer(backend, None, {}), ["a"])
    assert prepared("noticed") == wanted
    assert capfd.readouterr().err.count("fastokens gives other ids") == 1
