"""Mixture of experts: against one token at a time, its losses, splits, compile, checkpointing."""

import pytest
import torch
import torch.nn.functional as F

from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.distributed.materialize import apply_activation_checkpointing
from toolkit.models.compile import compile_model
from toolkit.models.config import TransformerConfig
from toolkit.models.feed_forward import ACTIVATIONS, MoE
from toolkit.models.grouped import grouped_backend, grouped_linear
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.loss import IGNORE_INDEX
from toolkit.models.transformer import Transformer

EXPERTS = {
    "num_experts": 5, "top_k": 2, "intermediate_size": 12, "load_balancing_multiplier": 0.05,
    "router_z_loss_multiplier": 0.02,
}  # fmt: skip
VOCAB = 40


def moe_config(feed_forward: str = "swiglu", **changes) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=3,
        num_heads=2,
        intermediate_size=20,
        max_sequence_length=32,
        feed_forward=feed_forward,
        init_std=0.3,
        moe=MoEConfig(**{**EXPERTS, "dense_layers": (1,), **changes}),
    )


def layer(config: TransformerConfig) -> MoE:
    """The experts of a whole model's first layer, so that they have initial values."""
    return config.build(seed=1).double().blocks[0].feed_forward


def batch(rows: int = 4, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and labels of which each row has another number."""
    ids = torch.randint(VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(2))
    labels = ids[:, 1:].clone()
    for row in range(rows):
        labels[row, : 2 * row + 1] = IGNORE_INDEX
    return ids[:, :-1], labels


def one_token(part: MoE, token: torch.Tensor, *, normalize: bool, activation) -> torch.Tensor:
    """The definition, written down for one token."""
    probability = (part.router.weight @ token).softmax(0)
    chosen = probability.argsort(descending=True)[: part.router.top_k].tolist()
    weights = {e: probability[e] for e in chosen}
    if normalize:
        total = sum(weights.values())
        weights = {e: weight / total for e, weight in weights.items()}
    out = torch.zeros_like(token)
    for e, weight in weights.items():
        gate, up, down = (w[e] for w in (part.experts.gate, part.experts.up, part.experts.down))
        out = out + weight * (down @ (activation(gate @ token) * (up @ token)))
    return out if part.shared is None else out + part.shared(token)


@pytest.mark.parametrize(
    ("feed_forward", "changes"),
    [
        ("swiglu", {}),
        ("geglu", {"normalize_top_k": False}),
        ("swiglu", {"shared_expert_intermediate_size": 8}),
        ("swiglu", {"top_k": 5, "normalize_top_k": False}),
        ("swiglu", {"top_k": 1}),
        ("swiglu", {"num_experts": 30, "top_k": 3}),  # some without any token
    ],
    ids=str,
)
def test_outputs_and_gradients_equal_one_token_at_a_time(feed_forward, changes):
    config = moe_config(feed_forward, **changes)
    part = layer(config)
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    kind = {
        "normalize": config.moe.normalize_top_k,
        "activation": ACTIVATIONS[feed_forward],
    }
    expected = torch.stack([one_token(part, token, **kind) for token in x.view(-1, 16)])
    expected = expected.view_as(x)
    out, sums = part(x)
    assert sums is None
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    wanted = [x, *part.parameters()]
    direction = torch.randn_like(out)
    got = torch.autograd.grad((out * direction).sum(), wanted)
    want = torch.autograd.grad((expected * direction).sum(), wanted)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_experts_without_tokens_have_zero_gradients():
    part = layer(moe_config(top_k=1))
    with torch.no_grad():
        part.router.weight[3] = -part.router.weight[:3].sum(0)  # some tokens for some experts
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    part(x)[0].sum().backward()
    used = part.router(x.flatten(0, 1)).experts.item()
    for weight in part.experts.parameters():
        norms = weight.grad.flatten(1).norm(dim=1)
        assert norms[used] > 0
        assert norms.sum() == norms[used]


def test_grouped_product_takes_no_rows_at_all():
    weight = torch.randn(3, 4, 5, requires_grad=True)
    out = grouped_linear(torch.zeros(0, 5), weight, torch.zeros(3, dtype=torch.int32))
    assert out.shape == (0, 4)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loop_equals_the_grouped_product_of_torch(dtype):
    x = torch.randn(10, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 16, 8, dtype=dtype, requires_grad=True)
    ends = torch.tensor([4, 4, 9, 10], dtype=torch.int32)
    assert grouped_backend(x, weight) == "loop"
    loop = grouped_linear(x, weight, ends)
    theirs = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    assert torch.equal(loop, theirs)
    got = torch.autograd.grad(loop.square().sum(), [x, weight])
    want = torch.autograd.grad(theirs.square().sum(), [x, weight])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_router_losses_follow_their_formula():
    config = moe_config().replace(num_layers=2)
    model = config.build().double()
    seen = []
    for block in model.blocks:
        if block.has_experts:
            block.feed_forward.router.register_forward_hook(lambda *a: seen.append(a[2].logits))
    ids, labels = batch()
    sums = model(ids, labels)
    (logits,) = seen
    balance = z = 0.0
    load = torch.zeros(5, dtype=torch.float64)
    for row, row_logits in enumerate(logits.view(4, 12, 5)):
        mine = row_logits[labels[row] != IGNORE_INDEX]
        chosen = F.one_hot(mine.topk(2).indices, 5).sum(1).double()
        share = chosen.sum(0) / (2 * len(mine))
        balance += len(mine) * 5 * (share * mine.softmax(-1).mean(0)).sum()
        z += mine.logsumexp(-1).square().sum()
        load += chosen.sum(0)
    assert sums.router.balance.item() == pytest.approx(balance.item(), rel=1e-12)
    assert sums.router.z.item() == pytest.approx(z.item(), rel=1e-12)
    assert torch.equal(sums.router.load, load[None])
    loss = sums.ce + 0.05 * balance + 0.02 * z
    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert not sums.router.balance.requires_grad


def test_router_losses_are_means_over_layers_with_experts():
    model = moe_config().build()
    ids, labels = batch()
    _, first = model.blocks[0](model.embeddings(ids), None, None, labels != IGNORE_INDEX)
    whole = model(ids, labels).router
    assert whole.load.shape == (2, 5)
    assert whole.load.sum(1).tolist() == [2.0 * (labels != IGNORE_INDEX).sum()] * 2
    assert first.balance > 0


def test_loss_and_gradients_do_not_depend_on_the_split_of_a_batch():
    model = moe_config().build().double()
    ids, labels = batch()
    model(ids, labels).loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0.0
    for row in range(4):
        loss = model(ids[row : row + 1], labels[row : row + 1]).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(model(ids, labels).loss.item(), rel=1e-12)
    for a, b in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(a.grad, b, rtol=1e-9, atol=1e-12)


def test_a_row_without_targets_adds_nothing():
    model = moe_config().build()
    ids, labels = batch()
    before = model(ids[:2], labels[:2]).loss
    labels[2:] = IGNORE_INDEX
    assert model(ids, labels).loss.item() == pytest.approx(before.item(), rel=1e-6)
    assert model(ids[2:], labels[2:]).loss.item() == 0.0


def test_compiled_model_equals_eager_in_mixed_precision(monkeypatch):
    # Attention by the same kernel in both: others round otherwise, and choose other experts.
    monkeypatch.setattr("toolkit.models.blockwise.prefers_blocks", lambda *_: False)
    groups = {"num_experts": 6, "num_groups": 3, "top_k_groups": 2, "score_function": "sigmoid"}
    config = moe_config(
        shared_expert_intermediate_size=8, dense_layers=(), bias_update_rate=0.01, **groups
    ).replace(num_layers=1, num_mtp_layers=1)
    eager, compiled = config.build(), config.build()
    # No code is generated: what is new here is what becomes part of the graph, and whole.
    compile_model(compiled, fullgraph=True, backend="aot_eager")
    ids, labels = batch()
    results = []
    for model in (eager, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            sums = model(ids, labels)
        sums.loss.backward()
        results.append((sums.loss, [p.grad for p in model.parameters()]))
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=1e-5)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing():
    plain, recomputed = moe_config().build(), moe_config().build()
    apply_activation_checkpointing(recomputed.blocks, ActivationCheckpointingConfig(mode="full"))
    ids, labels = batch()
    losses = [model(ids, labels).loss for model in (plain, recomputed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_without_labels_there_are_only_logits():
    model = moe_config().build()
    ids, labels = batch()
    logits = model(ids)
    assert logits.shape == (4, 12, VOCAB)
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert model(ids, labels).ce.item() == pytest.approx(ce.item(), rel=1e-6)


def test_counts_equal_the_built_model():
    config = moe_config(shared_expert_intermediate_size=8)
    model = Transformer(config, init_device="meta")
    assert config.num_parameters == sum(p.numel() for p in model.parameters())
    unused = 2 * (5 - 2) * 3 * 16 * 12  # layers * experts * matrices
    assert config.num_active_parameters == config.num_parameters - unused
    # Shared: 3 * 16 * 8; router: 16 * 5; two experts.
    experts = 2 * (3 * 16 * (2 * 12 + 8) + 16 * 5)
    matrices = 3 * 4 * 16 * 16 + 3 * 16 * 20 + experts + VOCAB * 16
    attention = 12 * 16 * 3 * sum(range(1, 9)) // 8
    assert config.flops_per_token(8) == 6 * matrices + attention


def test_outputs_into_the_residual_stream_start_smaller():
    model = moe_config(shared_expert_intermediate_size=40).replace(init_scale_residual=True).build()
    part = model.blocks[0].feed_forward
    expected = pytest.approx(0.3 / 6**0.5, rel=0.1)
    assert part.experts.down.std().item() == expected
    assert part.shared.down.weight.std().item() == expected
    assert part.experts.up.std().item() == pytest.approx(0.3, rel=0.1)


def test_it_learns_and_its_experts_stay_in_use():
    torch.manual_seed(0)
    model = moe_config().build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, labels = batch()
    history = []
    for _ in range(30):
        sums = model(ids, labels)
        targets = (labels != IGNORE_INDEX).sum()
        (sums.loss / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(((sums.ce / targets).item(), (sums.router.balance / targets).item()))
    assert history[-1][0] < 0.5 * history[0][0]
    assert history[-1][1] < 1.5
