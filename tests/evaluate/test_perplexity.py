"""Streams of tokens are scored as a naive loop would: rows, tails, windows, documents, bytes."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.data.corpus import random_text
from toolkit.commands import evaluate
from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer, train_bpe
from toolkit.errors import DataError
from toolkit.evaluate.perplexity import evaluate_stream, transformer_loss
from toolkit.evaluate.stream import Chunk, check_vocabulary, read_documents, windows
from toolkit.experiment.load import load_experiment
from toolkit.models.config import TransformerConfig
from toolkit.train.eval_sums import TokenSums, total_sums

LENGTH = 12
CONFIG = TransformerConfig(
    vocab_size=50, d_model=16, num_layers=2, num_heads=2, intermediate_size=24,
    max_sequence_length=LENGTH, init_std=0.3,
)  # fmt: skip
MODEL = CONFIG.build()
IDS = np.random.default_rng(0).integers(0, 50, 100).astype(np.uint32)
STARTS = np.isin(np.arange(100), [0, 7, 8, 40, 71])
BYTES_OF = np.arange(50, dtype=np.int32)


def chunks(*sizes: int) -> Iterator[Chunk]:
    """The 100 tokens in pieces; their text has as many bytes as `BYTES_OF` says."""
    for start, end in zip(np.cumsum([0, *sizes]), np.cumsum([*sizes, 100]), strict=False):
        ids = IDS[start:end]
        yield Chunk(ids, STARTS[start:end], int(BYTES_OF[ids].sum()))


def score(*sizes: int, **settings: Any) -> TokenSums:
    loss_of = transformer_loss(MODEL, torch.device("cpu"))
    how: dict[str, Any] = {"sequence_length": LENGTH, "batch_tokens": 48} | settings
    return evaluate_stream(chunks(*sizes), loss_of, bytes_of=BYTES_OF, **how)


@torch.no_grad()
def naive(*, stride: int, masked: bool = False) -> tuple[float, list[int]]:
    """Loss and places of the scored tokens, one forward for each."""
    documents = np.cumsum(STARTS)
    total, scored, reached = 0.0, [], 0
    for begin in range(0, 100, stride):
        end = min(begin + LENGTH, 100)
        for place in range(max(reached, begin + 1), end):
            first = begin
            if masked:
                first = max(begin, int(np.flatnonzero(STARTS[: place + 1])[-1]))
                if documents[place] != documents[place - 1]:
                    continue
            context = torch.from_numpy(IDS[first:place].astype(np.int64))[None]
            target = torch.tensor([int(IDS[place])])
            total += cross_entropy(MODEL(context)[0, -1:], target).item()
            scored.append(place)
        reached = end
        if end == 100:
            break
    return total, scored


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stride", [LENGTH, 5, 1])
def test_scores_are_those_of_a_naive_loop(stride: int, masked: bool) -> None:
    loss, scored = naive(stride=stride, masked=masked)
    found = score(stride=stride, mask_documents=masked)
    assert found.num_targets == len(scored) == len(set(scored))
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.num_bytes == int(BYTES_OF[IDS[scored]].sum())
    if stride < LENGTH and not masked:
        assert scored == list(range(1, 100))


def test_the_tail_counts_and_first_tokens_of_rows_do_not() -> None:
    assert score().num_targets == 100 - 9  # 8 rows of 12 and one of 4


@pytest.mark.parametrize("stride", [LENGTH, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_numbers_depend_neither_on_batches_nor_on_chunks(stride: int, masked: bool) -> None:
    settings: dict[str, Any] = {"stride": stride, "mask_documents": masked}
    one, many = score(batch_tokens=1, **settings), score(batch_tokens=10**6, **settings)
    cut = score(1, 2, 30, 0, 7, batch_tokens=60, **settings)
    assert one.num_targets == many.num_targets == cut.num_targets
    assert one.num_bytes == many.num_bytes == cut.num_bytes
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert cut.loss == pytest.approx(one.loss, rel=1e-6)


def test_a_stream_no_longer_than_a_row_is_one_window() -> None:
    stream = [Chunk(IDS[:LENGTH], STARTS[:LENGTH], 0)]
    (window,) = windows(stream, sequence_length=LENGTH, stride=3)
    assert window.num_context == 0
    assert window.ids.tolist() == IDS[:LENGTH].tolist()


def test_one_token_is_refused() -> None:
    loss_of = transformer_loss(MODEL, torch.device("cpu"))
    stream = [Chunk(IDS[:1], STARTS[:1], 1)]
    with pytest.raises(DataError, match="1 token and none that another predicts"):
        evaluate_stream(stream, loss_of, bytes_of=BYTES_OF, sequence_length=4, batch_tokens=8)


def test_numbers_of_sums() -> None:
    sums = total_sums([TokenSums(10.0, 4, 8, 1.0), TokenSums(2.0, 2, 4, 0.5)])
    assert sums.numbers() == {
        "loss": 2.0, "ppl": math.exp(2.0), "num_targets": 6, "seconds": 1.5,
        "bits_per_byte": 12.0 / math.log(2) / 12,
    }  # fmt: skip
    unknown = total_sums([TokenSums(10.0, 4, 8, 1.0), TokenSums(2.0, 2, 0, 0.5)])
    assert "bits_per_byte" not in unknown.numbers()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_documents_are_encoded_as_preparation_does(kind: str, tmp_path) -> None:
    texts = [f"{random_text(1, seed=n)} übergrößer 語 {n}" for n in range(3)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe(texts, 400)
    source = FilesSourceConfig(paths=[str(tmp_path)])
    found = list(read_documents(source, tokenizer, prepend_bos=False, append_eos=True))
    ids = np.concatenate([chunk.ids for chunk in found])
    expected = [[*part.tolist(), tokenizer.eos_id] for part in tokenizer.encode_batch(texts)]
    assert ids.tolist() == [*itertools.chain.from_iterable(expected)]
    starts = np.flatnonzero(np.concatenate([chunk.is_start for chunk in found]))
    assert starts.tolist() == [0, len(expected[0]), len(expected[0]) + len(expected[1])]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert sum(chunk.num_bytes for chunk in found) == num_bytes
    # Each token's bytes are known, so those of any part of the text are exact.
    assert int(tokenizer.token_bytes[ids].sum()) == num_bytes
    with pytest.raises(DataError, match=rf"a: its tokens go up to id {ids.max()}, but the model"):
        list(check_vocabulary(iter(found), int(ids.max()), "a"))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", None)]
)
def test_a_run_is_evaluated_in_the_precision_that_it_trained_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str, dtype: torch.dtype | None
) -> None:
    metadata = SimpleNamespace(world_size=1)
    source = SimpleNamespace(run=tmp_path, metadata=metadata, kind="own", config=CONFIG)
    status = SimpleNamespace(other={"precision": precision})
    run = load_experiment("smoke", []).config
    for name, value in {"find_source": source, "read_status": status, "found_config": run}.items():
        monkeypatch.setattr(evaluate, name, lambda _, value=value: value)
    monkeypatch.setattr(evaluate, "load_model", lambda *_, **__: MODEL)
    loaded = evaluate.find_model(str(tmp_path), evaluate.EvalSettings(device="cpu")).open(print)
    assert loaded.computed_in == dtype
    logits = loaded.logits(torch.zeros(1, 4, dtype=torch.int64))
    assert logits.dtype == (dtype or torch.float32)
