import json
import sys
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as BackendTokenizer

from tests.data.corpus import random_text
from toolkit.data.prepare.tokenizers import fast_bpe as module
from toolkit.data.prepare.tokenizers.fast_bpe import FastBPE, fast_bpe
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer, train_bpe

pytest.importorskip("tiktoken")
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def backend() -> BackendTokenizer:
    files = ("argparse.py", "heapq.py", "ast.py", "typing.py", "pydoc_data/topics.py")
    return train_bpe([(STDLIB / name).read_text() for name in files], 4000)._ordinary


def same(fast: FastBPE, backend: BackendTokenizer, texts: list[str]) -> None:
    found = fast.encode_batch(texts)
    assert found is not None
    slow = backend.encode_batch_fast(texts, add_special_tokens=False)
    assert [ids.tolist() for ids in found] == [encoding.ids for encoding in slow]
    assert all(ids.dtype == np.uint32 for ids in found)


def test_ids_are_those_of_tokenizers(backend: BackendTokenizer) -> None:
    fast = fast_bpe(backend)
    assert fast is not None
    texts = [path.read_text() for path in sorted(STDLIB.glob("[a-e]*.py"))]
    assert sum(map(len, texts)) > 300_000
    same(fast, backend, texts)
    same(fast, backend, ["", " ", "\n\n  x  \n", "<|endoftext|> a", "a" * 5000, " \t" * 3000])
    # A control token of the fast way alone, in text.
    same(fast, backend, ["a\U0010ffffb \U0010ffff", "\U0010ffff" * 3 + "\n\n x", "x  \n \t y \r\n"])
    same(fast, backend, [random_text(50), "\u00e9\u4e2d\u6587\U0001f600\u200d it's IT'S 12\u00b2"])


def test_every_character_is_cut_the_same(backend: BackendTokenizer) -> None:
    fast = fast_bpe(backend)
    assert fast is not None
    points = [i for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    # Of the large blocks of one kind (ideographs, private use, unassigned) a share.
    common = {"Lo", "Cn", "Co"}
    points = [i for i in points if i % 37 == 0 or unicodedata.category(chr(i)) not in common]
    probes = [
        "".join(f"a{chr(i)}a 1{chr(i)}1 {chr(i)}{chr(i)}!{chr(i)} " for i in points[n : n + 500])
        for n in range(0, len(points), 500)
    ]
    same(fast, backend, probes)


def test_tokens_that_no_merges_reach_are_never_made(backend: BackendTokenizer) -> None:
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]  # b joins c first: "abc" cannot come about
    changed = json.loads(backend.to_str())
    alphabet = {t: i for t, i in changed["model"]["vocab"].items() if len(t) == 1}
    tokens = ["".join(pair) for pair in merges]
    vocabulary = {**alphabet, **{t: 1000 - n for n, t in enumerate(tokens)}}
    changed["model"].update(vocab=vocabulary, merges=[list(pair) for pair in merges])
    small = BackendTokenizer.from_str(json.dumps(changed))
    fast = fast_bpe(small)
    assert fast is not None
    same(fast, small, ["abc", "ab", "bc", "abab abcabc", "xabcx"])
    found = fast.encode_batch(["abc"])
    assert found is not None
    assert found[0].tolist() == [vocabulary["a"], vocabulary["bc"]]


def test_empty_prefixes_and_suffixes_as_in_gpt2s_own_file_change_nothing(
    backend: BackendTokenizer,
) -> None:
    changed = json.loads(backend.to_str())
    changed["model"].update(continuing_subword_prefix="", end_of_word_suffix="")
    named = BackendTokenizer.from_str(json.dumps(changed))
    fast = fast_bpe(named)
    assert fast is not None
    texts = [(STDLIB / "heapq.py").read_text(), " it's  \n\n x1234", "\u00e9\u4e2d" * 50]
    same(fast, named, texts)
    same(fast, backend, texts)


def test_other_tokenizers_have_no_fast_way(backend: BackendTokenizer) -> None:
    assert fast_bpe(ByteTokenizer()._ordinary) is None
    for name, value in {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True,
                          "trim_offsets": True},
    }.items():  # fmt: skip
        changed = json.loads(backend.to_str())
        changed[name] = value
        assert fast_bpe(BackendTokenizer.from_str(json.dumps(changed))) is None
    changed = json.loads(backend.to_str())
    changed["model"]["dropout"] = 0.1
    assert fast_bpe(BackendTokenizer.from_str(json.dumps(changed))) is None
    plain = BackendTokenizer.from_str(backend.to_str())
    plain.add_tokens(["something"])
    assert fast_bpe(plain) is None


def test_failures_of_the_library_fall_back(
    backend: BackendTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    def panic(self: FastBPE, text: str) -> np.ndarray:
        raise PanicException

    texts = [random_text(30)]
    tokenizer = train_bpe(texts, 300)
    expected = tokenizer.encode_batch(texts)[0].tolist()
    monkeypatch.setattr(module.FastBPE, "_encode", panic)
    assert tokenizer.encode_batch(texts)[0].tolist() == expected
