"""Gates, sinks and layers without rope, against the formulas of their papers written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_config import SMALL
from toolkit.models import masks
from toolkit.models.attention import Attention
from toolkit.models.compile import compile_model
from toolkit.models.config import TransformerConfig
from toolkit.models.masks import AttentionMask

BATCH, SEQ = 2, 12
PARTS = {"attention_gate": "headwise", "attention_sinks": True, "rope_pattern": ("rope", "none")}


def config_of(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{**SMALL, "num_key_value_heads": 2, "init_std": 0.3, **changes})


def drawn(module: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.double()


def written_out(attention: Any, x: Tensor) -> Tensor:
    """Attention without positions: softmax over the scores and the sink, gated heads."""
    heads, head_dim = attention.query.out_features // attention.head_dim, attention.head_dim
    query, key, value = (
        layer(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for layer in (attention.query, attention.key, attention.value)
    )
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * head_dim**-0.5
    scores = scores.masked_fill(~torch.ones(SEQ, SEQ).tril().bool(), float("-inf"))
    if attention.sinks is not None:
        sink = attention.sinks.view(1, -1, 1, 1).expand(BATCH, -1, SEQ, 1)
        scores = torch.cat((scores, sink), -1)
    out = (scores.softmax(-1)[..., :SEQ] @ value).transpose(1, 2)
    if attention.gate is not None:
        out = out * torch.sigmoid(attention.gate(x)).unflatten(-1, (heads, -1))
    return attention.output(out.flatten(2))


def mask(dtype: torch.dtype) -> AttentionMask:
    starts = torch.zeros(1, SEQ, dtype=torch.int64)
    return AttentionMask(starts, dtype=dtype, head_dim=SMALL["d_model"] // SMALL["num_heads"])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
def test_attention_is_what_the_formulas_say(gate: str, sinks: bool) -> None:
    config = config_of(attention_gate=gate, attention_sinks=sinks, bias=True)
    attention = drawn(Attention(config))
    x = torch.randn(BATCH, SEQ, 32, dtype=torch.float64)
    got = attention(x, None, mask(x.dtype) if sinks else None)
    got.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in attention.named_parameters()}
    attention.zero_grad()
    expected = written_out(attention, x)
    expected.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in attention.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_the_share_of_the_sink_off(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(attention_sinks=True, attention_soft_cap=2.0, sliding_window=5)
    model, ids = drawn(config.build()).float(), torch.arange(2 * SEQ).view(2, SEQ)
    with torch.no_grad():
        expected = model(ids)
        monkeypatch.setattr(masks, "attention_backend", lambda *_: "flex")
        monkeypatch.setattr("toolkit.models.attention.compiled_flex_attention", uncompiled)
        torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


def uncompiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def test_without_rope_a_layer_knows_no_order_of_keys() -> None:
    """The last token of one layer sees the same set of tokens, in whatever order."""
    ids = torch.arange(SEQ)[None]
    shuffled = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), 1)
    for pattern, is_alike in ((("none",), True), (("rope",), False)):
        model = drawn(config_of(num_layers=1, rope_pattern=pattern).build())
        one, other = model(ids)[:, -1], model(shuffled)[:, -1]
        assert torch.allclose(one, other, rtol=1e-10) == is_alike


def test_a_pattern_of_layers_with_rope_is_repeated() -> None:
    config = config_of(num_layers=6, rope_pattern=("rope", "rope", "none"))
    rotated = [config.has_rope(layer) for layer in range(6)]
    assert rotated == [True, True, False, True, True, False]


@pytest.mark.parametrize("changes", [PARTS, {"norm_placement": "normalized"}], ids=str)
def test_compiled_blocks_train_like_eager_ones(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    eager, compiled = config.build(), config.build()
    compile_model(compiled, fullgraph=True, backend="aot_eager")
    ids = torch.randint(100, (2, SEQ), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    losses = [model(ids, ids, document_ids=documents).loss for model in (eager, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)


def test_scales_of_residual_and_logits() -> None:
    ids = torch.arange(SEQ)[None]
    plain = drawn(config_of().build())
    scaled = config_of(residual_scale=0.5, logit_scale=0.25).build().double()
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        halved = drawn(config_of().build())
        for block in halved.blocks:
            block.attention.output.weight *= 0.5
            block.feed_forward.down.weight *= 0.5
        torch.testing.assert_close(scaled(ids), 0.25 * halved(ids), rtol=1e-10, atol=1e-10)
