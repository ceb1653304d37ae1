"""nGPT, against its formulas written out, and its weights on the sphere."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from tests.models.test_config import SMALL
from toolkit.models.config import TransformerConfig
from toolkit.models.normalized import lengthen_, squared_lengths, unit_dimension
from toolkit.models.rope import rotary_table, rotate

CONFIG = TransformerConfig(**{**SMALL, "num_key_value_heads": 2, "norm_placement": "normalized"})
SEQ, WIDTH, HEADS = 10, 32, 4
ROOT = WIDTH**0.5


def reference(model, ids: Tensor) -> Tensor:
    """Loshchilov et al. 2024, table 1 and section 2."""
    x = model.embeddings.tokens.weight[ids]
    table = rotary_table(SEQ, WIDTH // HEADS, CONFIG.rope_theta, ids.device)
    for block in model.blocks:
        part = block.attention
        query, key, value = (
            layer(x).unflatten(-1, (-1, WIDTH // HEADS))
            for layer in (part.query, part.key, part.value)
        )
        query = normalize(rotate(query, table), dim=-1)
        key = normalize(rotate(key, table), dim=-1)
        query = query * (part.query_scale * ROOT).view(query.shape[2:])
        key = key * (part.key_scale * ROOT).view(key.shape[2:])
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        key, value = (t.repeat_interleave(2, 1) for t in (key, value))
        scores = query @ key.mT * (WIDTH // HEADS) ** 0.5
        scores = scores.masked_fill(~torch.ones(SEQ, SEQ).tril().bool(), float("-inf"))
        out = part.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        share = (block.attention_step.alpha * 0.05 * ROOT).abs()
        x = normalize(x + share * (normalize(out, dim=-1) - x), dim=-1)
        part = block.feed_forward
        gate = silu(part.gate(x) * part.gate_scale * ROOT)
        out = part.down(gate * part.up(x) * part.up_scale)
        share = (block.feed_forward_step.alpha * 0.05 * ROOT).abs()
        x = normalize(x + share * (normalize(out, dim=-1) - x), dim=-1)
    return (x @ model.head.weight.T * model.head.scale * ROOT)[..., : CONFIG.vocab_size]


def test_logits_and_gradients_are_those_of_the_paper() -> None:
    model = CONFIG.build(seed=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # scales and rates that differ, and of both signs
        for name, parameter in model.named_parameters():
            if not name.endswith(".weight"):
                parameter.mul_(torch.randn(parameter.shape, generator=generator).double())
    ids = torch.randint(CONFIG.vocab_size, (2, SEQ), generator=generator)
    got = model(ids)
    got.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = reference(model, ids)
    expected.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-9)


def test_every_vector_of_a_fresh_model_has_length_one_and_scales_begin_as_in_the_paper() -> None:
    for name, parameter in CONFIG.build(seed=2).named_parameters():
        dim = unit_dimension(name)
        if dim is not None:
            assert parameter.shape[dim] == WIDTH
            assert (parameter.norm(dim=dim) - 1).abs().max() < 1e-6, name
        else:
            first = 1.0 if "feed_forward." in name else WIDTH**-0.5
            assert torch.equal(parameter, torch.full_like(parameter, first)), name


def test_what_has_length_one_stays_bit_equal() -> None:
    matrix = torch.randn(300, 70, generator=torch.Generator().manual_seed(4))
    for dim in (0, 1):
        once = matrix.clone()
        lengthen_(once, squared_lengths(once, dim), dim)
        again = once.clone()
        lengthen_(again, squared_lengths(again, dim), dim)
        assert torch.equal(once, again)
        assert not torch.equal(once, matrix)
    nothing = torch.zeros(2, 3)
    lengthen_(nothing, squared_lengths(nothing, 1), 1)
    assert torch.equal(nothing, torch.zeros(2, 3))
