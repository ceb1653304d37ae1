"""Linear attention by the gated delta rule: its chunks against its recurrence, documents that never
mix, and what a layer is made of."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, softplus

from tests.models.test_config import SMALL
from toolkit.models import delta_net, kernels
from toolkit.models.compile import compile_model
from toolkit.models.config import TransformerConfig
from toolkit.models.delta_net import RowDocuments, mixed_rows, short_convolution
from toolkit.models.delta_rule import gated_delta_rule
from toolkit.models.init import InitSpec, fill_flat_, init_spec
from toolkit.models.layer_configs import DeltaNetConfig
from toolkit.models.masks import document_starts
from toolkit.optim.base import GroupOverride
from toolkit.optim.config import AdamWConfig

NET = DeltaNetConfig(
    num_key_heads=2,
    num_value_heads=4,
    key_head_dim=8,
    value_head_dim=6,
    allow_negative_eigenvalues=True,
    norm_placement="pre",
)
HYBRID: dict[str, Any] = {
    **SMALL,
    "max_sequence_length": 160,
    "init_std": 0.2,
    "norm_placement": "reordered",
    "qk_norm": "full",
    "attention_pattern": ("linear", "full"),
    "delta_net": NET,
}
CHUNK = 8
LENGTHS = {
    "one document": (21,),
    "ends at chunks": (8, 16, 8),
    "inside of chunks": (3, 9, 20),
    "of one token": (1, 1, 6, 1, 7, 1, 1, 14),
}


def recurrence(
    query: Tensor, key: Tensor, value: Tensor, logs: Tensor, strength: Tensor, starts: Tensor
) -> Tensor:
    """Equation 10 of Yang et al. 2024, token by token."""
    groups = value.shape[2] // key.shape[2]
    query, key = (
        (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(groups, 2)
        for x in (query, key)
    )
    state = value.new_zeros(*value.shape[::2], key.shape[-1], value.shape[-1])
    outputs = []
    for t in range(value.shape[1]):
        begins = (starts[:, t] == t)[:, None, None, None]
        state = torch.where(begins, 0.0, state) * logs[:, t].exp()[..., None, None]
        known = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        change = strength[:, t, :, None] * (value[:, t] - known)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], change)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, 1) * query.shape[-1] ** -0.5


def numbers(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def rule_inputs(seq: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, seq, *shape, generator=generator, dtype=torch.float64)

    inputs = [normal(2, 6), normal(2, 6), normal(4, 5), -softplus(normal(4) - 1)]
    inputs.append(2 * normal(4).sigmoid())
    return [x.to(dtype).requires_grad_() for x in inputs]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_chunks_compute_the_recurrence_and_its_gradients(lengths):
    seq = sum(lengths)
    inputs, ids = rule_inputs(seq), torch.cat([numbers(lengths), numbers((seq,))])
    starts = document_starts(ids)
    expected = recurrence(*inputs, starts)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for given in (starts, None) if len(lengths) == 1 else (starts,):
        got = gated_delta_rule(*inputs, given, chunk_size=CHUNK)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
        for ours, theirs in zip(
            torch.autograd.grad((got * weight).sum(), inputs), gradients, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_long_decays_neither_overflow_nor_lose_other_numbers():
    inputs = [x.detach() for x in rule_inputs(64, torch.float32)]
    inputs[3] = inputs[3] * 200  # sums of hundreds within a chunk, between documents too
    inputs = [x.requires_grad_() for x in inputs]
    starts = document_starts(numbers((20, 44)).expand(2, -1))
    got = gated_delta_rule(*inputs, starts)
    expected = recurrence(*(x.double() for x in inputs), starts)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient in torch.autograd.grad(got.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seq", [2, 12])
def test_the_short_convolution_is_that_of_torch_inside_documents(dtype, seq):
    x = torch.randn(2, seq, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0] * 12, [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3]])[:, :seq]
    got = short_convolution(x, weight, document_starts(ids))
    expected = torch.zeros(2, seq, 6, dtype=torch.float64)
    taps = weight.to(dtype).double()
    for row, document in [(0, 0), *((1, n) for n in ids[1].unique().tolist())]:
        inside = ids[row] == document
        own = x[row, inside].double().T[None]
        mixed = conv1d(own, taps[:, None], padding=3, groups=6)[0, :, : own.shape[2]]
        expected[row, inside] = mixed.T
    rounding = {} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(got, expected.to(dtype), **rounding)
    grad = torch.randn(2, seq, 6, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (x, weight), grad)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, weight), grad.to(dtype)), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, **(rounding and {"rtol": 3e-2, "atol": 6e-2}))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_changing_a_document_leaves_every_other_logit_and_gradient_bit_equal(precision):
    """Over several chunks of 64: documents of one token, that end with a chunk, and inside of
    one."""
    model = TransformerConfig(**HYBRID).build()
    ids = numbers((63, 1, 64, 1, 1, 20, 5))
    tokens = torch.randint(100, ids.shape, generator=torch.Generator().manual_seed(0))

    def numbers_of(tokens: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(tokens, document_ids=ids)
        loss = (logits.float() * weight).sum()
        return logits, list(torch.autograd.grad(loss, list(model.parameters())))

    for number in ids.unique().tolist():
        inside = ids == number
        weight = torch.linspace(-1, 1, 100) * ~inside[..., None]  # what others are judged by
        before, gradients = numbers_of(tokens, weight)
        after, again = numbers_of(torch.where(inside, (tokens + 1) % 100, tokens), weight)
        assert torch.equal(before[~inside], after[~inside]), f"document {number} leaks"
        assert (before[inside] - after[inside]).abs().amax(-1).min() > 1e-3
        for (name, _), one, other in zip(model.named_parameters(), gradients, again, strict=True):
            assert torch.equal(one, other), f"document {number}: {name}"


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_compiled_and_autocast_layers_compute_the_same(backend):
    torch._dynamo.reset()
    eager, compiled = (TransformerConfig(**HYBRID).build() for _ in range(2))
    compile_model(compiled, fullgraph=True, backend=backend)
    tokens = torch.randint(100, (2, 100), generator=torch.Generator().manual_seed(0))
    ids = numbers((30, 1, 69)).expand(2, -1)
    expected = eager(tokens, tokens, document_ids=ids).loss
    got = compiled(tokens, tokens, document_ids=ids).loss
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(expected, list(eager.parameters()))
    for ours, theirs in zip(
        torch.autograd.grad(got, list(compiled.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = eager(tokens, tokens, document_ids=ids).loss
    assert 0 < abs(rounded.item() / expected.item() - 1) < 1e-2
    torch._dynamo.reset()


def test_initial_states_forget_as_the_config_says_whatever_a_rank_holds():
    net = NET.replace(num_key_heads=64, num_value_heads=256, min_decay_rate=2.0)
    model = TransformerConfig(**{**HYBRID, "delta_net": net, "norm_weight_offset": 1.0}).build()
    attention = model.blocks[0].attention
    rates, steps = attention.A_log.exp(), softplus(attention.dt_bias)
    assert 2.0 <= rates.min() < 3.0 < 15.0 < rates.max() <= 16.0
    assert 0.001 <= steps.min() < 0.0012 < 0.08 < steps.max() <= 0.1001
    assert 0.005 < steps.median() < 0.02  # uniform in the logarithm
    assert attention.output_norm.weight.eq(1).all()  # without the offset of other norms
    spec, part = init_spec(model)["blocks.0.attention.A_log"], torch.empty(7)
    fill_flat_(part, name="blocks.0.attention.A_log", numel=256, start=30, spec=spec, seed=0)
    assert isinstance(spec, InitSpec)
    assert torch.equal(part, attention.A_log[30:37])


def test_fused_kernels_are_given_all_rows_as_one_and_where_documents_begin(monkeypatch):
    calls = []

    def fla(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> tuple[Tensor, None]:
        calls.append((query, key, value, rest))
        return value + 1, None

    monkeypatch.setattr(kernels, "fla_function", lambda: fla)
    monkeypatch.setattr(delta_net, "fla_function", lambda: fla)
    chosen = kernels.delta_rule_kernel
    assert chosen("cuda", dtype=torch.bfloat16) == "fla"
    assert chosen("cuda", dtype=torch.float32) == chosen("cpu", dtype=torch.bfloat16) == "chunks"
    monkeypatch.setattr(delta_net, "delta_rule_kernel", lambda *_, **__: "fla")
    inputs = rule_inputs(12, torch.bfloat16)
    ids = torch.tensor([[0] * 12, [0] * 5 + [1] + [2] * 6])
    documents = RowDocuments(document_starts(ids), dtype=torch.bfloat16)
    for given in (documents, None):
        out = mixed_rows(*inputs, given)
        assert torch.equal(out, inputs[2] + 1)
    (query, key, value, rest), (alone, _, _, plain) = calls
    assert query.shape == key.shape == (1, 24, 4, 6)
    assert value.shape == (1, 24, 4, 5)
    assert rest["cu_seqlens"].tolist() == [0, 12, 17, 18, 24]
    assert rest["cu_seqlens"].dtype == torch.int32
    assert rest["use_qk_l2norm_in_kernel"]
    assert rest["g"].shape == rest["beta"].shape == (1, 24, 4)
    assert alone.shape == (2, 12, 4, 6)
    assert plain["cu_seqlens"] is None


def test_the_kernel_is_recorded_and_a_better_one_named():
    config, cuda = TransformerConfig(**HYBRID), torch.device("cuda")
    for device, said in ((torch.device("cpu"), ""), (cuda, "pip install 'toolkit[fla]'")):
        record = kernels.kernel_record(
            config, device, torch.bfloat16, is_compiled=False, has_z_loss=False
        )
        assert record["linear attention"].startswith("chunks of matrix products")
        assert said in record["linear attention"]


def test_weight_decay_leaves_decays_and_convolutions_alone_unless_an_override_names_them():
    names = [name for name, _ in TransformerConfig(**HYBRID).build().named_parameters()]
    optim = AdamWConfig(weight_decay=0.1)
    spared = [g.names for g in optim.grouped(names, 2) if g.settings["weight_decay"] == 0]
    ends = ("query_conv", "key_conv", "value_conv", "A_log", "dt_bias")
    assert spared == [[f"blocks.0.attention.{end}" for end in ends]]
    override = GroupOverride(params=["*_conv"], opts={"weight_decay": 0.3})
    (group,) = (
        g.names
        for g in AdamWConfig(group_overrides=[override]).grouped(names, 2)
        if g.settings["weight_decay"] == 0.3
    )
    assert group == [f"blocks.0.attention.{end}" for end in ends[:3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta_net": None}, "attention_pattern: linear layers need delta_net"),
        ({"attention_pattern": ("full",)}, "delta_net: no layer is linear"),
        ({"parallel_residual": True}, "parallel_residual goes with norm_placement pre only"),
        (
            {
                "parallel_residual": True,
                "norm_placement": "pre",
                "attention_pattern": ("full", "full", "linear"),
                "num_mtp_layers": 1,
                "delta_net": NET.replace(norm_placement="reordered"),
            },
            "parallel_residual goes with norm_placement pre only",
        ),
        ({"norm_placement": "normalized"}, "does not go with norm_placement normalized"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**HYBRID, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_value_heads": 3}, "num_value_heads 3 is not a multiple of num_key_heads 2"),
        ({"min_time_step": 0.2}, "min_time_step 0.2 is more than max_time_step 0.1"),
        ({"conv_kernel_size": 0}, "conv_kernel_size"),
    ],
)
def test_layers_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        NET.replace(**changes)
