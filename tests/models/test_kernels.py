"""Which kernel is chosen on which hardware, and that every form of it computes the same."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, linear

from toolkit.models import attention, feed_forward, grouped, kernels, loss, masks
from toolkit.models.config import TransformerConfig
from toolkit.models.kernels import Hardware, SdpaForm, hardware_of, kernel_record, sdpa_form
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.loss import IGNORE_INDEX, chunked_linear_cross_entropy

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CUDA = torch.device("cuda", 0)


def gpu(capability: tuple[int, int], shared: int | None, **changes) -> Hardware:
    return Hardware("cuda", capability, shared, **({"has_triton": True} | changes))


T4 = gpu((7, 5), 65_536)
A100, A10, L40S = gpu((8, 0), 166_912), gpu((8, 6), 101_376), gpu((8, 9), 101_376)
H100, B200, RTX_5090 = gpu((9, 0), 232_448), gpu((10, 0), 232_448), gpu((12, 0), 101_376)
MI300X = gpu((9, 4), 65_536, is_rocm=True)
CPU = Hardware("cpu", has_triton=True)


def mock_device(monkeypatch, capability, shared=None, name="a GPU") -> None:
    """A CUDA device that the driver describes like this."""
    properties = SimpleNamespace(name=name)
    if shared is not None:
        properties.shared_memory_per_block_optin = shared
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("hardware", "dtype", "head_dim", "expected"),
    [
        # 99 KB: backward fits up to 128 in bf16, up to 64 in fp32; widths round up to 2^n.
        *((card, BF16, 128, "flex") for card in (A10, L40S, RTX_5090)),
        *((card, BF16, 129, "sdpa") for card in (A10, L40S, RTX_5090)),
        *((card, BF16, 256, "sdpa") for card in (A10, L40S, RTX_5090)),
        (L40S, FP32, 64, "flex"),
        (L40S, FP32, 65, "sdpa"),
        # 163 and 227 KB.
        (A100, BF16, 256, "flex"),
        (H100, BF16, 160, "flex"),
        (H100, FP32, 256, "flex"),
        (A100, FP32, 192, "sdpa"),
        (A100, BF16, 512, "sdpa"),
        (H100, BF16, 512, "flex"),
        (B200, BF16, 256, "flex"),
        # No Triton there, or none that supports it.
        (T4, FP32, 64, "sdpa"),
        (H100._replace(has_triton=False), BF16, 64, "sdpa"),
        # Other tiles, other memory.
        (MI300X, BF16, 256, "flex"),
        (CPU, BF16, 64, "sdpa"),
        (H100, FP64, 64, "sdpa"),
        (H100, BF16, 8, "sdpa"),
    ],
    ids=str,
)
def test_masked_attention(hardware, dtype, head_dim, expected):
    assert kernels.attention_kernel(hardware, dtype=dtype, head_dim=head_dim) == expected


def test_the_mask_takes_the_form_that_the_device_can_use(monkeypatch):
    mock_device(monkeypatch, (8, 9), 101_376)
    assert masks.attention_backend(CUDA, BF16, 256) == "sdpa"
    assert masks.attention_backend(CUDA, BF16, 128) == "flex"
    mock_device(monkeypatch, (9, 0), 232_448)
    assert masks.attention_backend(CUDA, BF16, 256) == "flex"


@pytest.mark.parametrize(
    ("capability", "shared"),
    [
        ((8, 0), 166_912),
        ((8, 6), 101_376),
        ((8, 9), 101_376),
        ((9, 0), 232_448),
        ((12, 0), 101_376),
    ],
)
def test_shared_memory_is_known_where_the_driver_does_not_tell_it(monkeypatch, capability, shared):
    mock_device(monkeypatch, capability)
    assert hardware_of("cuda", 0) == Hardware("cuda", capability, shared)
    mock_device(monkeypatch, capability, 77_000)
    assert hardware_of("cuda", 0).shared_memory == 77_000


@pytest.mark.parametrize(
    ("dtype", "head_dim", "is_grouped", "has_bias", "expected"),
    [
        (FP32, 64, True, False, SdpaForm(repeats_heads=True)),
        (FP32, 64, False, False, SdpaForm()),
        (FP32, 64, True, True, SdpaForm(repeats_heads=True)),
        (BF16, 64, True, False, SdpaForm()),
        (BF16, 64, True, True, SdpaForm(repeats_heads=True)),
        (BF16, 256, True, False, SdpaForm(repeats_heads=True)),
        (FP32, 100, True, False, SdpaForm(repeats_heads=True, padding=4)),
        (BF16, 100, False, True, SdpaForm(padding=4)),
        (BF16, 100, False, False, SdpaForm()),  # flash attention pads by itself
        (FP64, 100, True, True, SdpaForm()),
    ],
    ids=str,
)
def test_sdpa_never_falls_to_all_scores_on_cuda(dtype, head_dim, is_grouped, has_bias, expected):
    asked = {
        "dtype": dtype, "head_dim": head_dim, "is_grouped": is_grouped, "has_bias": has_bias
    }  # fmt: skip
    assert sdpa_form("cuda", **asked) == expected
    assert sdpa_form("cpu", **asked) == SdpaForm()


def heads(head_dim: int, device: str, dtype=FP32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sizes = ((2, 6, 9, head_dim), (2, 2, 9, head_dim), (2, 2, 9, head_dim))
    return [torch.randn(size, dtype=dtype, device=device) for size in sizes]


@pytest.mark.parametrize("window", [None, 4])
def test_fp32_with_grouped_queries_reaches_sdpa_without_groups_on_cuda(monkeypatch, window):
    seen = []

    def record(query, key, value, **options):
        seen.append((query.shape, key.shape, value.shape, options["enable_gqa"]))
        return torch.empty_like(query)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", record)
    starts = torch.zeros(2, 9, dtype=torch.int64)
    mask = masks.AttentionMask(starts, window=window, dtype=FP32, head_dim=16)
    with FakeTensorMode():
        query, key, value = heads(16, "cuda")
        assert attention.attend(query, key, value, None).shape == query.shape
        mask.bias = torch.empty(mask.bias.shape, device="cuda")
        assert attention.attend(query, key, value, mask).shape == query.shape
    assert seen == [(query.shape, query.shape, query.shape, False)] * 2


@pytest.mark.parametrize("form", [SdpaForm(True, 0), SdpaForm(False, 4), SdpaForm(True, 4)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("is_masked", [False, True])
def test_every_form_gives_the_same_numbers_and_gradients(monkeypatch, form, scale, is_masked):
    own = [part.requires_grad_() for part in heads(12, "cpu", FP64)]
    mask = None
    if is_masked:
        starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 7], [0] * 9])
        mask = masks.AttentionMask(starts, dtype=FP64, head_dim=12)
    results = []
    for _ in range(2):
        out = attention.attend(*own, mask, scale=scale)
        results.append([out, *torch.autograd.grad(out.square().sum(), own)])
        monkeypatch.setattr(attention, "sdpa_form", lambda *_, **__: form)
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("hardware", "dtype", "widths", "expected"),
    [
        (H100, BF16, (64, 128), "grouped_mm"),
        (B200, BF16, (64, 128), "grouped_mm"),
        (B200._replace(capability=(10, 3)), BF16, (64, 128), "grouped_mm"),
        (H100, BF16, (64, 100), "loop"),
        (H100, FP32, (64, 128), "loop"),
        *((card, BF16, (64, 128), "loop") for card in (A100, L40S, RTX_5090, T4, MI300X, CPU)),
    ],
    ids=str,
)
def test_products_of_experts(hardware, dtype, widths, expected):
    assert kernels.grouped_kernel(hardware, dtype=dtype, widths=widths) == expected


class _LikeSm100(torch.autograd.Function):
    """The grouped product; the weight gradient of empty groups is what memory held before."""

    @staticmethod
    def forward(ctx, x, weight, offs):
        ctx.save_for_backward(x, weight, offs)
        return grouped._loop(x, weight.transpose(1, 2), offs)

    @staticmethod
    def backward(ctx, grad):
        x, weight, offs = ctx.saved_tensors
        grad_x, grad_weight = grouped._loop_backward(grad, x, weight.transpose(1, 2), offs)
        sizes = offs.diff(prepend=offs.new_zeros(1))
        grad_weight[sizes == 0] = float("nan")
        return grad_x, grad_weight.transpose(1, 2), None


@pytest.mark.parametrize("compiled", [False, True])
def test_empty_groups_have_zero_gradients_whatever_the_kernel_leaves(monkeypatch, compiled):
    monkeypatch.setattr(grouped, "_hardware", lambda x: B200)
    monkeypatch.setattr(grouped, "grouped_mm", lambda x, w, offs: _LikeSm100.apply(x, w, offs))
    x = torch.randn(7, 8, dtype=BF16, requires_grad=True)
    weight = torch.randn(5, 16, 8, dtype=BF16, requires_grad=True)
    ends = torch.tensor([0, 3, 3, 7, 7], dtype=torch.int32)
    product = grouped.grouped_linear
    if compiled:
        product = torch.compile(product, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(product(x, weight, ends).float().square().sum(), [x, weight])
    monkeypatch.setattr(grouped, "_hardware", lambda x: CPU)
    out = grouped.grouped_linear(x, weight, ends)
    expected = torch.autograd.grad(out.float().square().sum(), [x, weight])
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert got[1][[0, 2, 4]].abs().sum() == 0


@pytest.mark.parametrize(("capability", "copies"), [((8, 9), 1), ((9, 0), 0)])
def test_a_layer_of_experts_waits_for_the_sizes_of_groups_once(monkeypatch, capability, copies):
    mock_device(monkeypatch, capability)
    x, weight = torch.zeros(4, 8, dtype=BF16), torch.zeros(2, 8, 8, dtype=BF16)
    hardware = hardware_of("cuda", 0)
    monkeypatch.setattr(grouped, "_hardware", lambda x: hardware)
    with FakeTensorMode() as mode:
        ends = torch.zeros(2, dtype=torch.int32, device="cuda")
        placed = grouped.ends_for(mode.from_tensor(x), mode.from_tensor(weight), ends)
        assert placed.device.type == ("cpu" if copies else "cuda")
        # Products over groups that are known ask no device.
        assert grouped.ends_for(x, weight, placed) is placed


def subsets(count: int) -> list[tuple[bool, ...]]:
    return [needs for needs in itertools.product([False, True], repeat=count) if any(needs)]


def check_gradients(function, reference, tensors, needs) -> None:
    """Gradients for those tensors that need one, when the others need none."""
    results = []
    for kind in (function, reference):
        own = [t.detach().clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        wanted = [t for t in own if t.requires_grad]
        results.append(torch.autograd.grad(kind(*own), wanted))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().sum() > 0


@pytest.mark.parametrize("needs", subsets(2))
def test_the_loss_gives_each_gradient_that_is_wanted(needs):
    hidden, weight = torch.randn(6, 4, dtype=FP64), torch.randn(8, 4, dtype=FP64)
    labels = torch.tensor([1, 7, IGNORE_INDEX, 0, 3, 3])

    def ours(h, w):
        return chunked_linear_cross_entropy(h, w, labels, vocab_size=8, chunk_size=4).loss

    def theirs(h, w):
        return cross_entropy(linear(h, w), labels, reduction="sum", ignore_index=IGNORE_INDEX)

    check_gradients(ours, theirs, [hidden, weight], needs)


@pytest.mark.parametrize("needs", subsets(2))
def test_grouped_products_give_each_gradient_that_is_wanted(needs):
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)

    def theirs(x, weight):
        pieces = zip(x.split([2, 0, 3]), weight, strict=True)
        return torch.cat([piece @ w.t() for piece, w in pieces]).square().sum()

    check_gradients(
        lambda x, weight: grouped.grouped_linear(x, weight, ends).square().sum(),
        theirs,
        [torch.randn(5, 4, dtype=FP64), torch.randn(3, 6, 4, dtype=FP64)],
        needs,
    )


@pytest.mark.parametrize("needs", subsets(2))
def test_adding_up_experts_gives_each_gradient_that_is_wanted(needs):
    order = torch.tensor([3, 0, 2, 1, 5, 4])
    place = order.argsort()

    def theirs(results, weights):
        return (weights[..., None] * results[place].unflatten(0, (3, 2))).sum(1).square().sum()

    check_gradients(
        lambda *own: feed_forward._Combined.apply(*own, order, place).square().sum(),
        theirs,
        [torch.randn(6, 4, dtype=FP64), torch.randn(3, 2, dtype=FP64)],
        needs,
    )


class _LikeLiger(torch.autograd.Function):
    """As Liger 0.8.5: no weight gradient where the hidden state needs none."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in (hidden, weight)]
            loss = cross_entropy(own[0] @ own[1].t(), labels, reduction="sum")
            grads = torch.autograd.grad(loss, own)
        ctx.grads = grads if ctx.needs_input_grad[0] else (grads[0], None)
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        return *(None if g is None else g * grad for g in ctx.grads), None


@pytest.mark.parametrize("hidden_trains", [True, False])
def test_a_head_that_is_trained_alone_learns_beside_liger(monkeypatch, hidden_trains):
    calls = []

    def fused(hidden, weight, labels, **options):
        calls.append(options["reduction"])
        return _LikeLiger.apply(hidden, weight, labels)

    monkeypatch.setattr(loss, "liger_function", lambda: fused)
    chosen = loss.loss_kernel
    monkeypatch.setattr(loss, "loss_kernel", lambda _, **asked: chosen("cuda", **asked))
    model = TransformerConfig(
        vocab_size=48, d_model=16, num_layers=1, num_heads=2, intermediate_size=16,
        max_sequence_length=8,
    ).build()  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(hidden_trains or name == "head.weight")
    ids = torch.arange(16).view(2, 8)
    model(ids, ids).loss.backward()
    assert calls == (["sum"] if hidden_trains else [])
    hidden = model.head.norm(model.blocks[0](model.embeddings(ids), *_rotary(model, ids))[0])
    expected = torch.autograd.grad(
        cross_entropy((hidden @ model.head.weight.t())[..., :48].flatten(0, 1), ids.flatten(),
                      reduction="sum"),
        model.head.weight,
    )[0]  # fmt: skip
    torch.testing.assert_close(model.head.weight.grad, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model(ids, ids)
    assert len(calls) == (2 if hidden_trains else 1), "evaluation needs no gradient"


def _rotary(model, ids):
    from toolkit.models.layer_inputs import layer_inputs

    return layer_inputs(model.config, model.embeddings(ids), None, None)[0]


CONFIG = TransformerConfig(
    vocab_size=1000,
    d_model=256,
    num_layers=1,
    num_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_sequence_length=64,
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=64),
)
MASKED = "attention inside documents and windows"


def test_the_record_names_the_kernel_of_each_part(monkeypatch):
    options = {"is_compiled": False, "has_z_loss": False}
    assert kernel_record(CONFIG, torch.device("cpu"), FP32, **options) == {
        "attention": "sdpa", MASKED: "sdpa", "experts": "loop", "loss": "chunked",
    }  # fmt: skip
    monkeypatch.setattr(kernels, "liger_function", lambda: object())
    mock_device(monkeypatch, (9, 0), 232_448)
    first = kernel_record(CONFIG, CUDA, BF16, **options, attention_order=("cudnn", "flash", "math"))
    assert first == {
        "matrix products": "bfloat16, sums in float32", "attention": "sdpa (cudnn, else flash)",
        MASKED: "flex", "experts": "grouped_mm", "loss": "liger",
    }  # fmt: skip
    cut = kernel_record(CONFIG, CUDA, BF16, **options, vocabulary_is_cut=True)
    assert cut["loss"] == "chunked"
    mock_device(monkeypatch, (8, 9), 101_376)
    wide = CONFIG.replace(head_dim=256)
    options["is_compiled"] = True
    assert kernel_record(wide, CUDA, FP32, **options) == {
        "matrix products": "float32, exact",
        "attention": "sdpa, keys and values repeated",
        MASKED: "sdpa, keys and values repeated",
        "experts": "loop",
        "loss": "chunked, compiled",
    }
    capped = wide.replace(attention_soft_cap=30.0)
    record = kernel_record(capped, CUDA, BF16, **options)
    assert record[MASKED] == "scores written out"
    assert "attention" not in record
