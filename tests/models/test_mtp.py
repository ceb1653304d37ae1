"""Multi-token prediction: its targets, its loss, its costs, and transformers' modules."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig
from transformers.modeling_layers import MtpLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import DeltaNetConfig
from toolkit.models.layer_inputs import row_masks
from toolkit.models.loss import IGNORE_INDEX, shift_labels
from toolkit.models.masks import document_starts
from toolkit.models.mtp import ahead
from toolkit.models.shapes import flops_per_token, num_parameters
from toolkit.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=50,
    d_model=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=24,
    max_sequence_length=32,
    init_std=0.3,
    num_mtp_layers=2,
    mtp_loss_multiplier=0.5,
)


def batch() -> dict[str, torch.Tensor]:
    """Packed rows, of which some targets are masked."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (2, 12), generator=generator)
    mask = torch.rand(2, 12, generator=generator) > 0.2
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] + [2] * 2])
    labels = shift_labels(ids, mask, documents)
    return {"input_ids": ids, "labels": labels, "document_ids": documents, "mask": mask}


def model(**changes: Any) -> Transformer:
    return CONFIG.replace(**changes).build(seed=1).double()


def test_targets_stay_in_their_documents_and_are_unmasked() -> None:
    given = batch()
    ids, documents, mask = given["input_ids"], given["document_ids"], given["mask"]
    for distance in (1, 2):
        found = ahead(ids, given["labels"], document_starts(documents), distance)
        for row in range(2):
            for at in range(12):
                label, last = IGNORE_INDEX, at + distance + 1
                if last < 12 and documents[row, at] == documents[row, last] and mask[row, last]:
                    label = int(ids[row, last])
                assert int(found.labels[row, at]) == label
                if label != IGNORE_INDEX:
                    assert found.input_ids[row, at] == ids[row, at + distance]


def test_loss_is_the_mean_of_the_modules_losses_over_the_models_targets() -> None:
    given = batch()
    ids, labels, documents = (given[k] for k in ("input_ids", "labels", "document_ids"))
    made, seen = model(), []
    for layer in made.mtp:
        layer.register_forward_hook(lambda *a: seen.append(a[2][0]))
    sums = made(ids, labels, document_ids=documents)
    assert made.head is not None
    losses, number = [], 0
    for distance, hidden in enumerate(seen, start=1):
        found = ahead(ids, labels, document_starts(documents), distance).labels.flatten()
        logits = (hidden @ made.head.weight.t())[..., :50].flatten(0, 1)
        losses.append(cross_entropy(logits, found, reduction="sum"))
        number += int((found != IGNORE_INDEX).sum())
    assert sums.mtp.num_targets == number
    assert number < 2 * int((labels != IGNORE_INDEX).sum())
    torch.testing.assert_close(sums.mtp.ce, sum(losses).detach(), rtol=1e-12, atol=0)
    expected = sums.ce + 0.5 * sum(losses) / 2
    torch.testing.assert_close(sums.loss, expected, rtol=1e-12, atol=0)
    parameters = list(made.parameters())
    got = torch.autograd.grad(sums.loss, parameters, retain_graph=True)
    ce = model(num_mtp_layers=0)
    assert torch.equal(ce(ids, labels, document_ids=documents).ce, sums.ce)
    assert all(gradient.abs().sum() > 0 for gradient in got)


def test_without_gradients_and_for_logits_they_are_not_computed() -> None:
    given, made = batch(), model()
    for layer in made.mtp:
        layer.register_forward_hook(lambda *_: pytest.fail("computed"))
    with torch.no_grad():
        sums = made(given["input_ids"], given["labels"])
        assert sums.mtp is None
        assert torch.equal(sums.loss, sums.ce)
    assert torch.equal(made(given["input_ids"]), model(num_mtp_layers=0)(given["input_ids"]))


LINEAR = {
    "attention_pattern": ("full", "full", "linear"),
    "delta_net": DeltaNetConfig(
        num_key_heads=2, num_value_heads=2, key_head_dim=4, value_head_dim=4
    ),
}
"""Of which the first module for multi-token prediction has the only linear layer."""


@pytest.mark.parametrize("changes", [{}, LINEAR], ids=["full", "linear"])
def test_nothing_of_another_document_reaches_a_modules_targets(changes: Any) -> None:
    given, made = batch(), model(**changes)
    ids, labels, documents = (given[k] for k in ("input_ids", "labels", "document_ids"))
    changed = torch.where(documents == 1, (ids + 7) % 50, ids)
    kept: list[torch.Tensor] = []
    made.mtp[1].register_forward_hook(lambda *a: kept.append(a[2][0]))
    for own in (ids, changed):
        made(own, labels, document_ids=documents)
    assert torch.equal(kept[0][documents != 1], kept[1][documents != 1])
    assert not torch.equal(kept[0], kept[1])


def test_hidden_states_are_those_of_transformers() -> None:
    made = model(num_mtp_layers=1)
    theirs = LlamaConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, rms_norm_eps=CONFIG.norm_eps,
        num_hidden_layers=1, attn_implementation="eager",
    )  # fmt: skip
    layer = MtpLayer(theirs, LlamaDecoderLayer, LlamaRMSNorm, 0).double()
    names = {
        "enorm": "embedding_norm", "hnorm": "hidden_norm", "eh_proj": "projection",
        "post_norm": "norm", "mtp_block.input_layernorm": "block.attention_norm",
        "mtp_block.post_attention_layernorm": "block.feed_forward_norm",
        **{f"mtp_block.self_attn.{k[0]}_proj": f"block.attention.{k}"
           for k in ("query", "key", "value", "output")},
        **{f"mtp_block.mlp.{k}_proj": f"block.feed_forward.{k}" for k in ("gate", "up", "down")},
    }  # fmt: skip
    ours = made.mtp[0].state_dict()
    layer.load_state_dict({f"{n}.weight": ours[f"{o}.weight"] for n, o in names.items()})
    given, seen = batch(), []
    ids, hidden = given["input_ids"], []
    made.mtp[0].register_forward_hook(lambda *a: seen.append(a[2][0]))
    made.head.norm.register_forward_hook(lambda *a: hidden.append(a[2]))
    made(ids, shift_labels(ids))
    frequencies = CONFIG.rope_theta ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.outer(torch.arange(12, dtype=torch.float64), frequencies).repeat(1, 2)[None]
    mask = torch.full((12, 12), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    assert made.embeddings is not None
    embedded = made.embeddings(ids[:, 1:])
    out = layer(
        embedded, hidden[0][:, :11], (angles.cos()[:, :11], angles.sin()[:, :11]),
        mask[..., :11, :11], None, None,
    )  # fmt: skip
    torch.testing.assert_close(seen[0][:, :11], out, rtol=1e-6, atol=1e-6)


def test_their_masks_are_for_the_backend_that_is_asked_for() -> None:
    given, made, asked = batch(), model(), []

    def masks(*args: Any, backend: Any = None) -> Any:
        asked.append(backend)
        return row_masks(*args, backend=backend)

    made.masks, made.masked_backend = masks, "sdpa"
    made(given["input_ids"], given["labels"], document_ids=given["document_ids"])
    assert asked == ["sdpa", "sdpa"]


@pytest.mark.parametrize("number", [1, 3])
def test_parameters_and_flops_are_counted(number: int) -> None:
    config, plain = CONFIG.replace(num_mtp_layers=number), CONFIG.replace(num_mtp_layers=0)
    built = sum(p.numel() for p in config.build(init_device="meta").parameters())
    assert num_parameters(config) == built
    block = 4 * 16 * 16 + 3 * 16 * 24
    norms = 5 * 16
    assert num_parameters(config) - num_parameters(plain) == number * (block + 2 * 16 * 16 + norms)
    attention = 12 * 16 * sum(range(1, 9)) // 8
    more = 6 * (block + 2 * 16 * 16 + 50 * 16) + attention
    assert flops_per_token(config, 8) - flops_per_token(plain, 8) == number * more
