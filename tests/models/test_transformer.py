"""The model as a whole: causality, precision, padding, variants, memory of its parts."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_config import SMALL, VARIANTS
from toolkit.models import norms
from toolkit.models.config import GPTConfig, TransformerConfig
from toolkit.models.norms import LayerNorm, RMSNorm
from toolkit.models.rope import rotary_table, rotate

CONFIG = TransformerConfig(**SMALL)


def token_ids(*shape: int, vocab_size: int = 100) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_and_gradients_equal_cross_entropy_of_its_logits(changes):
    config = TransformerConfig(**{**SMALL, **changes, "init_std": 0.1, "loss_chunk_size": 5})
    model = config.build().double()
    ids = token_ids(2, 17)
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[0, :3] = -100
    logits = model(inputs)
    assert logits.shape == (2, 16, 100)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    want = torch.autograd.grad(expected, list(model.parameters()))
    sums = model(inputs, labels)
    got = torch.autograd.grad(sums.loss, list(model.parameters()))
    assert sums.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, a, b in zip(dict(model.named_parameters()), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_token_sees_nothing_after_it(changes):
    model = TransformerConfig(**{**SMALL, **changes, "init_std": 0.2}).build()
    ids = token_ids(1, 16)
    changed = ids.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 100
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-5, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-2


def test_batch_rows_do_not_mix_and_split_batches_sum_up():
    model = CONFIG.build()
    ids = token_ids(4, 17)
    whole = model(ids[:, :-1], ids[:, 1:]).loss
    parts = sum(model(row[None, :-1], row[None, 1:]).loss for row in ids)
    assert whole.item() == pytest.approx(parts.item(), rel=1e-6)


def test_tied_head_is_one_parameter_with_both_gradients():
    model = CONFIG.replace(tie_embeddings=True).build()
    assert "head.weight" not in model.state_dict()
    ids = token_ids(1, 9)
    model(ids[:, :-1], ids[:, 1:]).loss.backward()
    gradient = model.embeddings.tokens.weight.grad
    unseen = sorted(set(range(100)) - set(ids.flatten().tolist()))[0]
    assert gradient[unseen].abs().max() > 0  # from the softmax
    assert gradient[100:].abs().max() == 0.0  # padding ids


def test_more_padding_changes_nothing():
    ids = token_ids(2, 17)
    losses = []
    for multiple in (1, 128):
        model = CONFIG.replace(vocab_multiple=multiple).build()
        losses.append(model(ids[:, :-1], ids[:, 1:], z_loss_multiplier=1e-3).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_residual_stream_is_in_the_compute_type_under_autocast():
    model = GPTConfig(vocab_size=100, n_positions=16, n_embd=32, n_layer=2, n_head=4).build()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda module, args, output: seen.extend([args[0].dtype, output[0].dtype])
        )
    with torch.autocast("cpu", torch.bfloat16):
        sums = model(token_ids(1, 8), token_ids(1, 8))
    assert seen == [torch.bfloat16] * 4
    assert sums.loss.dtype == torch.float32


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_autocast_computes_what_low_precision_weights_compute(changes):
    # FSDP2 hands blocks bf16 copies of the weights; other engines rely on autocast.
    config = TransformerConfig(**{**SMALL, **changes, "init_std": 0.1})
    ids = token_ids(2, 17)
    master, copies = config.build(), config.build().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = master(ids[:, :-1], ids[:, 1:])
    assert copies(ids[:, :-1], ids[:, 1:]).loss.item() == expected.loss.item()


def test_sequence_longer_than_the_config_is_an_error():
    with pytest.raises(ValueError, match=r"17 tokens is longer than model\.max_sequence_length 16"):
        CONFIG.build()(token_ids(1, 17))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    table = rotary_table(32, 8, 10_000.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(8, generator=generator).expand(1, 32, 1, 8)
    key = torch.randn(8, generator=generator).expand(1, 32, 1, 8)
    q, k = rotate(query, table)[0, :, 0], rotate(key, table)[0, :, 0]
    torch.testing.assert_close(q.norm(dim=-1), query[0, :, 0].norm(dim=-1))
    scores = q @ k.t()
    torch.testing.assert_close(scores.diagonal(-5), scores[5, 0].expand(27), rtol=1e-4, atol=1e-5)


def test_rotary_table_first_made_in_inference_mode_serves_training():
    config = CONFIG.replace(rope_theta=12_345.0)
    model = config.build()
    with torch.inference_mode():
        model(token_ids(1, 8))
    model(token_ids(1, 8), token_ids(1, 8)).loss.backward()
    assert model.embeddings.tokens.weight.grad is not None


def test_norms_agree_with_torch_and_widen_low_precision():
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 5
    rms, layer = RMSNorm(16, 1e-6), LayerNorm(16, 1e-5, bias=True)
    with torch.no_grad():
        for parameter in [*rms.parameters(), *layer.parameters()]:
            parameter.copy_(torch.linspace(0.5, 2.0, 16))
    torch.testing.assert_close(rms(x), F.rms_norm(x, (16,), rms.weight, 1e-6))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (16,), layer.weight, layer.bias, 1e-5))
    low = x.bfloat16()
    wide = F.rms_norm(low.float(), (16,), rms.weight.bfloat16().float(), 1e-6)
    assert torch.equal(rms(low), wide.bfloat16())


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_norms_of_a_gpu_in_one_kernel_are_those_of_a_cpu(monkeypatch, norm):
    """torch's own, which round a bf16 result once, against ours; gradients too."""
    config = CONFIG.replace(norm=norm, bias=norm == "layer_norm")
    module = norms.build_norm(config, 64)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.1)
    x = torch.randn(3, 5, 64)
    grad = torch.randn(3, 5, 64)
    found = []
    for fuses in (False, True):
        monkeypatch.setattr(norms, "fuses_norms", lambda _, fuses=fuses: fuses)
        own = x.clone().requires_grad_()
        out = module(own)
        parameters = list(module.parameters())
        found.append([out, *torch.autograd.grad(out, [own, *parameters], grad)])
        assert module(x.bfloat16()).dtype == torch.bfloat16
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_norm_weights_get_their_offset_in_fp32():
    norm = RMSNorm(16, 1e-6, weight_offset=1.0)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.01, 0.01, 16))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    factor = 1.0 + norm.weight.bfloat16().float()
    expected = F.rms_norm(x.float(), (16,), None, 1e-6) * factor
    assert torch.equal(norm(x), expected.bfloat16())
    assert factor.bfloat16().unique().numel() < factor.unique().numel()


def test_embeddings_are_scaled_by_what_the_compute_type_can_hold():
    scale = 3072**0.5  # 55.4256, in bf16 55.5
    model = CONFIG.replace(embedding_scale=scale).build()
    ids = token_ids(1, 8)
    rows = model.embeddings.tokens(ids)
    torch.testing.assert_close(model.embeddings(ids), rows * scale)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.embeddings(ids)
    assert torch.equal(low, rows.bfloat16() * 55.5)


def test_parallel_residual_adds_both_to_the_same_stream():
    block = CONFIG.replace(parallel_residual=True).build().blocks[0]
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    table = rotary_table(8, 8, 10_000.0, torch.device("cpu"))
    got, _ = block(x, table)
    attended = block.attention(block.attention_norm(x), table)
    fed = block.feed_forward(block.feed_forward_norm(x))
    torch.testing.assert_close(got, x + attended + fed)


def test_capped_logits_stay_below_the_cap_and_keep_their_type():
    model = CONFIG.replace(logit_soft_cap=0.5, init_std=1.0).build().bfloat16()
    logits = model(token_ids(1, 8))
    assert logits.dtype == torch.bfloat16
    assert 0.49 < logits.abs().max() <= 0.5


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5, 3, 8)])
def test_rms_norm_has_the_gradients_of_its_formula(shape: tuple[int, ...], offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(8, 1e-3, weight_offset=offset).double()
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8, generator=generator))
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    formula = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (offset + norm.weight)
    ours = torch.autograd.grad((norm(x) * direction).sum(), (x, norm.weight))
    expected = torch.autograd.grad((formula * direction).sum(), (x, norm.weight))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
