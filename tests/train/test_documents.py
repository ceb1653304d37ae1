"""Rows of several documents train as the same documents in rows of their own."""

from typing import Any

import pytest
import torch

from tests.tiny import VOCAB, build, module_config
from toolkit.distributed.environment import single_environment
from toolkit.errors import ConfigError
from toolkit.models.config import GPTConfig
from toolkit.models.loss import shift_labels
from toolkit.train.transformer import TransformerTrainModule

PACKED = [[7, 5, 4], [16], [3, 9, 1, 2], [2, 2, 2, 2, 2]]  # lengths; the rest of a row is padding
LENGTHS = [length for row in PACKED for length in row]
TARGETS = sum(LENGTHS) - len(LENGTHS)
SEQ = 16


def documents(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]


def rows_of(plan: list[list[torch.Tensor]], pad: int) -> dict[str, torch.Tensor]:
    """One row per list of documents; padding is a last document that the loss does not ask for."""
    shape = (len(plan), SEQ)
    batch = {
        "input_ids": torch.full(shape, pad),
        "label_mask": torch.zeros(shape, dtype=torch.bool),
        "document_ids": torch.zeros(shape, dtype=torch.int32),
    }
    for row, pieces in enumerate(plan):
        start = 0
        for number, piece in enumerate(pieces):
            place = slice(start, start + len(piece))
            batch["input_ids"][row, place] = piece
            batch["label_mask"][row, place] = True
            batch["document_ids"][row, place] = number
            start = place.stop
        batch["document_ids"][row, start:] = len(pieces)
    return batch


def packed(pad: int = 0) -> dict[str, torch.Tensor]:
    own = iter(documents())
    return rows_of([[next(own) for _ in row] for row in PACKED], pad)


def one_per_row() -> dict[str, torch.Tensor]:
    return rows_of([[piece] for piece in documents()], 0)


def module_of(microbatch_rows: int, **changes: Any) -> TransformerTrainModule:
    config = module_config(rank_microbatch_size=microbatch_rows * SEQ, max_grad_norm=None)
    environment = single_environment(precision="fp32", device="cpu")
    if changes.pop("gpt", False):
        gpt = GPTConfig(vocab_size=VOCAB, n_positions=SEQ, n_embd=32, n_layer=2, n_head=4)
        return config.build(gpt.build(init_device="meta"), environment=environment)
    return build(config, environment, init_std=0.1, **changes)


def loss_and_gradients(
    module: TransformerTrainModule, batch: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    loss = module.train_batch(batch)["loss"].value
    assert isinstance(loss, torch.Tensor)
    return loss.item(), {name: g.clone() for name, g in module.engine.gradient_shards().items()}


@pytest.mark.parametrize("microbatch_rows", [1, 2, 4])
@pytest.mark.parametrize(
    "model", [{}, {"positions": "learned"}, {"qk_norm": "full", "norm_placement": "reordered"},
              {"gpt": True}], ids=str,
)  # fmt: skip
def test_packed_loss_and_gradients_equal_those_of_one_document_per_row(
    model: dict[str, Any], microbatch_rows: int
) -> None:
    expected, wanted = loss_and_gradients(module_of(len(LENGTHS), **model), one_per_row())
    loss, gradients = loss_and_gradients(module_of(microbatch_rows, **model), packed())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_what_stands_in_the_padding_changes_nothing() -> None:
    first = loss_and_gradients(module_of(2), packed(pad=0))
    second = loss_and_gradients(module_of(2), packed(pad=7))
    assert first[0] == second[0]
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


def test_evaluation_counts_targets_inside_documents_only() -> None:
    together = module_of(4).eval_batch(packed())
    alone = module_of(4).eval_batch(one_per_row())
    assert together.num_targets.item() == alone.num_targets.item() == TARGETS
    assert together.loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)


def test_no_label_crosses_into_another_document() -> None:
    ids = torch.tensor([[10, 11, 12, 13, 14, 15]])
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32)
    assert shift_labels(ids, None, document_ids).tolist() == [[11, 12, -100, 14, -100, -100]]
    mask = torch.tensor([[True, False, True, True, True, False]])
    assert shift_labels(ids, mask, document_ids).tolist() == [[-100, 12, -100, 14, -100, -100]]


def test_batches_of_other_lengths_follow_each_other() -> None:
    """A curriculum: as many tokens in every batch, in shorter and more rows at first."""
    module = module_of(2)
    ids = torch.arange(4 * SEQ).reshape(4, SEQ) % VOCAB
    for rows in (16, 8, 4):
        batch = {"input_ids": ids.reshape(rows, -1)}
        whole = module_of(4)
        expected, _ = loss_and_gradients(whole, batch)
        loss, _ = loss_and_gradients(module, batch)
        assert loss == pytest.approx(expected, rel=1e-6)


def test_a_row_longer_than_a_microbatch_is_an_error() -> None:
    module = module_of(1)
    with pytest.raises(
        ConfigError, match=r"rank_microbatch_size 16 is smaller .* dataset\.sequence_length 32"
    ):
        module.train_batch({"input_ids": torch.zeros(2, 32, dtype=torch.int64)})
