"""Sliding windows and soft caps: who sees what, the same numbers by every path, one mask a kind."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tests.models.test_config import SMALL
from toolkit.models import attention, masks
from toolkit.models import layer_inputs as inputs_of_layers
from toolkit.models.attention import attend
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_inputs import layer_inputs
from toolkit.models.masks import AttentionMask, document_starts, first_keys

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SEQ, WINDOW = 24, 5
KINDS = [{}, {"attention_soft_cap": 2.0}]


def build(**changes):
    settings = {**SMALL, "max_sequence_length": 1024, "init_std": 0.2, "sliding_window": WINDOW}
    return TransformerConfig(**{**settings, **changes}).build()


def token_ids(rows, seq):
    return torch.randint(100, (rows, seq), generator=torch.Generator().manual_seed(0))


def numbers(*lengths):
    """Document ids `(1, sum of lengths)`."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


@pytest.mark.parametrize("document_ids", [None, numbers(9, 2, 13)], ids=["row", "documents"])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_layer_sees_its_window_and_nothing_before(changes, document_ids):
    model, ids = build(num_layers=1, **changes), token_ids(1, SEQ)
    starts = torch.zeros(1, SEQ, dtype=torch.int64)
    if document_ids is not None:
        starts = document_starts(document_ids)
    with torch.no_grad():
        before = model(ids, document_ids=document_ids)
        for place in range(SEQ):
            changed = ids.clone()
            changed[0, place] = (ids[0, place] + 1) % 100
            after = model(changed, document_ids=document_ids)
            differs = (before != after).any(-1)[0]
            query = torch.arange(SEQ)
            sees = (query >= place) & (query - WINDOW < place) & (starts[0] <= place)
            assert differs.tolist() == sees.tolist(), f"place {place}"


def random_heads(batch=2, heads=9, kv_heads=3, seq=SEQ, dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, n, seq, dim, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    ]


def by_definition(query, key, value, seen, scale, soft_cap):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 7, SEQ + 1])
def test_attention_and_its_gradients_are_those_of_the_definition(monkeypatch, window, soft_cap):
    monkeypatch.setattr(attention, "PIECE_SIZE", 2)  # three queries at a time
    starts = document_starts(numbers(9, 2, 13)).repeat(2, 1)
    starts[1] = 0
    place = torch.arange(SEQ)
    seen = (place <= place[:, None]) & (place >= starts[:, :, None])
    seen &= place > place[:, None] - (window or SEQ)
    heads = [x.requires_grad_() for x in random_heads()]
    expected = by_definition(*heads, seen[:, None], 0.3, soft_cap)
    mask = AttentionMask(starts, window=window, dtype=torch.float64, head_dim=6)
    got = attend(*heads, mask, scale=0.3, soft_cap=soft_cap)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), heads)
    for ours, theirs in zip(torch.autograd.grad((got * weight).sum(), heads), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_flex_attention_gives_the_same_numbers(monkeypatch, changes):
    settings = {"d_model": 36, "num_heads": 9, "num_key_value_heads": 3, "num_layers": 3}
    model = build(attention_pattern=("sliding", "full"), attention_scale=0.4, **settings, **changes)
    ids = token_ids(2, SEQ)
    for document_ids in (None, numbers(9, 2, 13).repeat(2, 1)):
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            expected = model(ids, document_ids=document_ids)
            with monkeypatch.context() as patched:
                patched.setattr(masks, "attention_backend", lambda *_: "flex")
                patched.setattr(masks, "score_bias", None)
                got = model(ids, document_ids=document_ids)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("window", [1, 100, 128, 129, 300, 640])
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_are_those_of_create_block_mask(rows, window):
    seq = 650
    generator = torch.Generator().manual_seed(window)
    document_ids = torch.randint(0, 3, (rows, seq), generator=generator).sort(dim=1).values

    def sees(batch, head, query, key):
        same = document_ids[batch, query] == document_ids[batch, key]
        return (query >= key) & (query - key < window) & same

    expected = create_block_mask(sees, rows, None, seq, seq, device="cpu")
    got = masks.block_mask(first_keys(document_starts(document_ids), window))
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_blocks_outside_the_window_are_skipped():
    blocks = masks.block_mask(first_keys(torch.zeros(1, 4096, dtype=torch.int64), 256))
    # 32 blocks of queries; each sees its own and the two before it.
    assert (blocks.kv_num_blocks + blocks.full_kv_num_blocks).sum() == 32 * 3 - 3


def test_layers_of_a_kind_share_what_they_are_given():
    model = build(num_layers=6, attention_pattern=("sliding", "sliding", "full"))
    config = model.config.replace(sliding_rope_theta=500.0)
    x = torch.zeros(2, SEQ, 32)
    inputs = layer_inputs(config, x, None, None)
    local, full = inputs[0], inputs[2]
    assert [kind is local.mask for _, kind in inputs] == [True, True, False] * 2
    assert full.mask is None, "plain causal attention"
    assert [table is local.rotary for table, _ in inputs] == [True, True, False] * 2
    assert inputs[5].rotary is full.rotary
    assert local.mask.bias.shape == (1, 1, SEQ, SEQ)
    short = layer_inputs(config, x[:, :WINDOW], None, None)
    assert [mask for _, mask in short] == [None] * 6, "the window holds the whole row"


def test_masks_are_made_once_per_forward_and_kind(monkeypatch):
    made = []
    original = inputs_of_layers.AttentionMask

    def counted(*args, **settings):
        made.append(settings["window"])
        return original(*args, **settings)

    monkeypatch.setattr(inputs_of_layers, "AttentionMask", counted)
    model = build(num_layers=4, attention_pattern=("sliding", "full"))
    model(token_ids(1, SEQ))
    assert made == [WINDOW]
    model(token_ids(1, SEQ), document_ids=numbers(9, 2, 13))
    assert made == [WINDOW, WINDOW, None]


def test_a_window_as_long_as_the_row_changes_nothing():
    wide, plain = build(sliding_window=SEQ), build(sliding_window=None)
    assert torch.equal(wide(token_ids(2, SEQ)), plain(token_ids(2, SEQ)))
    document_ids = numbers(9, 2, 13).repeat(2, 1)
    ids = token_ids(2, SEQ)
    assert torch.equal(wide(ids, document_ids=document_ids), plain(ids, document_ids=document_ids))


def test_a_very_high_cap_is_none():
    capped, plain = build(attention_soft_cap=1e5, logit_soft_cap=1e5), build()
    ids = token_ids(2, SEQ)
    torch.testing.assert_close(capped(ids), plain(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_on_a_gpu_windows_and_caps_train_like_on_the_cpu(changes, packed, compiled):
    from toolkit.models.compile import compile_model

    changes = {**changes, "d_model": 144, "num_heads": 9, "num_key_value_heads": 3}
    changes |= {"sliding_window": 200, "attention_pattern": ("sliding", "full")}
    ids = token_ids(2, 700)
    document_ids = numbers(200, 56, 144, 300).repeat(2, 1) if packed else None
    here, there = build(**changes), build(**changes).cuda()
    if compiled:
        compile_model(there)
    norms, losses = [], []
    for model, device in ((here, "cpu"), (there, "cuda")):
        document = None if document_ids is None else document_ids.to(device)
        sums = model(ids.to(device), ids.roll(-1, 1).to(device), document_ids=document)
        sums.loss.backward()
        losses.append(sums.ce.item())
        gradients = torch.stack([p.grad.norm().cpu() for p in model.parameters()])
        norms.append(gradients.norm().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
