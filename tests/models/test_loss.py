"""The chunked loss equals cross entropy on full logits, in value, gradients and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.models import loss as loss_module
from toolkit.models import weight_gradient
from toolkit.models.config import TransformerConfig
from toolkit.models.loss import LinearCrossEntropy, chunked_linear_cross_entropy

ROWS, WIDTH, VOCAB, PADDED = 37, 24, 50, 64


def make(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64).to(dtype) / 4
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    labels[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(hidden, weight, labels, z_loss_multiplier, soft_cap=None):
    """(loss, ce, z) with the full matrix of logits, by torch's own functions."""
    logits = F.linear(hidden, weight)[:, :VOCAB]
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    ce = F.cross_entropy(logits, labels, reduction="sum")
    z = logits.logsumexp(-1)[labels != -100].square().sum()
    return ce + z_loss_multiplier * z, ce, z


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("z_loss_multiplier", [0.0, 1e-2])
@pytest.mark.parametrize(
    ("chunk_size", "soft_cap"), [(8, None), (37, None), (1000, None), (8, 1.5), (37, 30.0)]
)
def test_equals_full_logits(dtype, rtol, z_loss_multiplier, chunk_size, soft_cap):
    hidden, weight, labels = make(dtype)
    loss, ce, z = reference(hidden, weight, labels, z_loss_multiplier, soft_cap)
    expected = torch.autograd.grad(loss * 0.3, (hidden, weight))
    sums = chunked_linear_cross_entropy(
        hidden,
        weight,
        labels,
        vocab_size=VOCAB,
        z_loss_multiplier=z_loss_multiplier,
        soft_cap=soft_cap,
        chunk_size=chunk_size,
    )
    gradients = torch.autograd.grad(sums.loss * 0.3, (hidden, weight))
    torch.testing.assert_close(sums.loss, loss, rtol=rtol, atol=0)
    torch.testing.assert_close(sums.ce, ce.detach(), rtol=rtol, atol=0)
    expected_z = z.detach() if z_loss_multiplier else torch.zeros_like(z)
    torch.testing.assert_close(sums.z, expected_z, rtol=rtol, atol=0)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    assert gradients[1][VOCAB:].abs().max() == 0.0


def test_gradients_agree_with_finite_differences():
    hidden, weight, labels = make(torch.float64)

    def loss(hidden, weight):
        return chunked_linear_cross_entropy(
            hidden, weight, labels, vocab_size=VOCAB, z_loss_multiplier=1e-2, chunk_size=10
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_bfloat16_is_close_and_keeps_types():
    hidden, weight, labels = make(torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    loss, _, _ = reference(hidden.double(), master.double(), labels, 0.0)
    expected = torch.autograd.grad(loss, (hidden, master))
    sums = chunked_linear_cross_entropy(hidden, master, labels, vocab_size=VOCAB, chunk_size=8)
    gradients = torch.autograd.grad(sums.loss, (hidden, master))
    assert sums.loss.dtype == torch.float32
    assert sums.loss.item() == pytest.approx(loss.item(), rel=2e-3)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]
    for got, want in zip(gradients, expected, strict=True):
        assert (got.double() - want).norm() / want.norm() < 1e-2


def test_autocast_around_it_changes_nothing():
    hidden, weight, labels = make(torch.float32)
    plain = chunked_linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    with torch.autocast("cpu", torch.bfloat16):
        sums = chunked_linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    assert sums.loss.item() == plain.loss.item()


def test_padding_ids_do_not_change_the_loss():
    hidden, weight, labels = make(torch.float64)
    padded = chunked_linear_cross_entropy(hidden, weight * 9, labels, vocab_size=VOCAB)
    cut = chunked_linear_cross_entropy(hidden, weight[:VOCAB] * 9, labels, vocab_size=VOCAB)
    torch.testing.assert_close(padded.loss, cut.loss, rtol=1e-14, atol=0)


def test_rows_without_targets_have_no_gradient_even_when_extreme():
    hidden, weight, labels = make(torch.float32)
    with torch.no_grad():
        hidden[0] = 1e30
    labels[0] = -100
    sums = chunked_linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    (gradient,) = torch.autograd.grad(sums.loss, hidden)
    assert torch.isfinite(sums.loss)
    assert gradient[0].abs().max() == 0.0


def test_no_target_at_all_is_zero():
    hidden, weight, _ = make(torch.float32)
    labels = torch.full((ROWS,), -100)
    sums = chunked_linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    sums.loss.backward()
    assert sums.loss.item() == 0.0
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0.0


class _Shapes(TorchDispatchMode):
    """Shapes of the results of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.products.add(tuple(out.shape))
        return out


def test_only_needed_gradients_are_made():
    hidden, weight, labels = make(torch.float32)
    with _Shapes() as seen, torch.no_grad():
        chunked_linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    assert seen.products == {(ROWS, PADDED)}
    with _Shapes() as seen:
        sums = chunked_linear_cross_entropy(hidden, weight.detach(), labels, vocab_size=VOCAB)
        sums.loss.backward()
    assert seen.products == {(ROWS, PADDED), (ROWS, WIDTH)}
    with _Shapes() as seen:
        chunked_linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
    assert seen.products == {(ROWS, PADDED), (ROWS, WIDTH), (PADDED, WIDTH)}


class _LargestTensor(TorchDispatchMode):
    """Largest number of elements of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_logits_never_exist_for_more_rows_than_a_chunk():
    rows, vocab, chunk_size = 2048, 512, 64
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(vocab, 16, requires_grad=True)
    labels = torch.randint(vocab, (rows,))
    with _LargestTensor() as largest:
        sums = chunked_linear_cross_entropy(
            hidden, weight, labels, vocab_size=vocab, chunk_size=chunk_size
        )
        sums.loss.backward()
    assert largest.numel == chunk_size * vocab


def test_what_a_gpu_adds_up_for_the_weight_is_what_a_cpu_does(monkeypatch):
    """The product that is written in fp32 takes the place of the rounded ones, chunk by chunk."""
    calls = []

    def product(total, left, right, dtype):
        calls.append((total is None, left.dtype, dtype))
        return (0 if total is None else total) + left.to(dtype) @ right.to(dtype)

    found = {}
    for widens in (False, True):
        monkeypatch.setattr(weight_gradient, "widens_products", lambda _, widens=widens: widens)
        monkeypatch.setattr(weight_gradient, "widened_product", product)
        hidden, weight, labels = make(torch.bfloat16)
        loss = chunked_linear_cross_entropy(
            hidden, weight, labels, vocab_size=VOCAB, chunk_size=8
        ).loss
        found[widens] = torch.autograd.grad(loss, weight)[0]
    assert calls == [(number == 0, torch.bfloat16, torch.float32) for number in range(5)]
    torch.testing.assert_close(found[True], found[False], rtol=2e-2, atol=2e-2)


def test_products_in_fp32_have_shapes_and_types_on_a_gpu():
    """torch's own, without values: it has none for CPUs."""
    left = torch.empty(6, 4, dtype=torch.bfloat16, device="meta")
    total = weight_gradient.add_product(None, left, left.t(), torch.float32)
    assert weight_gradient.add_product(total, left, left.t(), torch.float32) is total
    assert (total.shape, total.dtype) == ((6, 6), torch.float32)


def test_liger_is_given_a_weight_that_was_rounded_once(monkeypatch):
    given = []

    def fused(hidden, weight, labels, **_):
        given.append((hidden.dtype, weight.dtype, tuple(weight.shape)))
        return (hidden @ weight.t()).sum()

    monkeypatch.setattr(loss_module, "loss_kernel", lambda *_, **__: "liger")
    monkeypatch.setattr(loss_module, "liger_function", lambda: fused)
    hidden, weight, labels = make(torch.bfloat16)
    config = TransformerConfig(
        vocab_size=VOCAB, d_model=WIDTH, num_layers=1, num_heads=1, intermediate_size=8,
        max_sequence_length=8,
    )  # fmt: skip
    weight = weight.detach().float().requires_grad_()
    LinearCrossEntropy(config)(hidden, weight, labels).loss.backward()
    assert given == [(torch.bfloat16, torch.bfloat16, (VOCAB, WIDTH))]
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("z_loss_multiplier", [0.0, 1e-2])
def test_a_gpus_softmax_computes_what_is_written_out(monkeypatch, dtype, rtol, z_loss_multiplier):
    found = []
    for has_it in (False, True):
        monkeypatch.setattr(loss_module, "has_one_softmax", lambda _, has_it=has_it: has_it)
        hidden, weight, labels = make(dtype)
        sums = chunked_linear_cross_entropy(
            hidden, weight, labels,
            vocab_size=VOCAB, chunk_size=8, z_loss_multiplier=z_loss_multiplier,
        )  # fmt: skip
        gradients = torch.autograd.grad(sums.loss, (hidden, weight))
        with torch.no_grad():
            alone = chunked_linear_cross_entropy(hidden, weight, labels, vocab_size=VOCAB)
        found.append([*sums[:3], alone.ce, *gradients])
    for got, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)
    assert found[1][5][VOCAB:].abs().sum() == 0, "padding ids have no gradient"
