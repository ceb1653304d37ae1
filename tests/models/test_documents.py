"""Rows of several documents: nothing leaks between them, and each is computed as if alone."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tests.models.test_config import SMALL
from toolkit.models import kernels, masks
from toolkit.models.config import GPTConfig, TransformerConfig
from toolkit.models.layer_configs import DeltaNetConfig
from toolkit.models.masks import attention_backend, document_positions, document_starts

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

LENGTHS = (7, 1, 9, 5, 10)
SEQ = sum(LENGTHS)
GPT = GPTConfig(
    vocab_size=100, n_positions=SEQ, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
)
VARIANTS = [
    {},
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 1, "qk_norm": "per_head"},
    {"qk_norm": "full", "norm_placement": "reordered"},
    {"attention_gate": "elementwise", "attention_sinks": True, "rope_pattern": ("rope", "none")},
    {"norm_placement": "normalized", "num_key_value_heads": 2},
    {
        "attention_pattern": ("linear", "full"),
        "delta_net": DeltaNetConfig(
            num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=8
        ),
    },
    {"positions": "learned", "num_key_value_heads": 2, "norm_placement": "reordered"},
    "gpt",
]


def build(changes, seq=SEQ):
    if changes == "gpt":
        return GPT.build()
    settings = {**SMALL, "max_sequence_length": seq, "init_std": 0.2, **changes}
    return TransformerConfig(**settings).build()


def numbers(*lengths):
    """Document ids `(1, sum of lengths)`."""
    return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[
        None
    ]


def token_ids(rows, seq, seed=0):
    return torch.randint(100, (rows, seq), generator=torch.Generator().manual_seed(seed))


def assert_documents_are_separate(model, document_ids, ids):
    """Change one document after the other."""
    before = model(ids, document_ids=document_ids)
    assert before.shape == (*ids.shape, 100)
    for number in document_ids.unique().tolist():
        inside = document_ids == number
        changed = torch.where(inside, (ids + 1) % 100, ids)
        after = model(changed, document_ids=document_ids)
        assert torch.equal(before[~inside], after[~inside]), f"document {number} leaks"
        assert (before[inside] - after[inside]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_changing_a_document_leaves_every_other_logit_bit_equal(changes, precision):
    document_ids = torch.cat([numbers(*LENGTHS), numbers(*reversed(LENGTHS)), numbers(SEQ)])
    autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    with torch.no_grad(), autocast:
        assert_documents_are_separate(build(changes), document_ids, token_ids(3, SEQ))


def test_nothing_leaks_across_the_blocks_of_keys_that_kernels_work_in():
    lengths = (500, 12, 300, 700, 88)
    model = build({"num_key_value_heads": 2}, seq=1600)
    with torch.no_grad():
        assert_documents_are_separate(model, numbers(*lengths), token_ids(1, 1600))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_document_is_computed_as_if_it_were_alone(changes):
    model, ids = build(changes), token_ids(1, SEQ)
    with torch.no_grad():
        packed = model(ids, document_ids=numbers(*LENGTHS)).split(LENGTHS, dim=1)
        alone = [model(piece) for piece in ids.split(LENGTHS, dim=1)]
    for got, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_loss_of_a_document_has_no_gradient_in_any_other(changes):
    model, ids, document_ids = build(changes), token_ids(1, SEQ), numbers(*LENGTHS)
    embedded = []
    model.embeddings.register_forward_hook(lambda module, args, output: embedded.append(output))
    labels = torch.where(document_ids == 2, ids.roll(-1, 1), -100)
    model(ids, labels, document_ids=document_ids).loss.backward(inputs=embedded)
    gradient = embedded[0].grad[0].abs().amax(-1)
    assert gradient[document_ids[0] != 2].max() == 0.0
    assert gradient[document_ids[0] == 2].min() > 0.0


def test_one_document_a_row_is_plain_causal_attention():
    model, ids = build({}), token_ids(2, SEQ)
    got = model(ids, document_ids=torch.zeros_like(ids))
    torch.testing.assert_close(got, model(ids), rtol=1e-5, atol=1e-5)


def test_positions_start_over_even_where_a_number_comes_again():
    document_ids = torch.tensor([[0, 0, 3, 3, 3, 0], [1, 1, 1, 1, 1, 1]])
    starts = document_starts(document_ids)
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
    assert document_positions(starts).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_document_ids_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match=r"shape \(1, 6\), input_ids \(1, 7\); give one document"):
        build({})(token_ids(1, 7), document_ids=numbers(3, 3))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cpu", torch.float32, 64, "sdpa"),
        ("mps", torch.float32, 64, "sdpa"),
        ("cuda", torch.bfloat16, 64, "flex"),
        ("cuda", torch.float32, 16, "flex"),
        ("cuda", torch.float32, 8, "sdpa"),
        ("cuda", torch.float64, 64, "sdpa"),
    ],
)
def test_the_kernel_follows_device_type_and_width(monkeypatch, device, dtype, head_dim, expected):
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    assert attention_backend(torch.device(device), dtype, head_dim) == expected


def test_without_triton_scores_are_masked(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert attention_backend(torch.device("cuda"), torch.bfloat16, 64) == "sdpa"


@pytest.mark.parametrize("seq", [1, 127, 128, 129, 640, 700])
def test_blocks_are_those_of_create_block_mask(seq):
    generator = torch.Generator().manual_seed(seq)
    document_ids = torch.randint(0, 6, (5, seq), generator=generator).sort(dim=1).values
    document_ids[0] = 0
    document_ids[1] = torch.arange(seq) // 128

    def sees(batch, head, query, key):
        return (query >= key) & (document_ids[batch, query] == document_ids[batch, key])

    expected = create_block_mask(sees, 5, None, seq, seq, device="cpu")
    got = masks.block_mask(document_starts(document_ids))
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
        name = name.replace("kv", "q")
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.shape == expected.shape == (5, 1, seq, seq)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, "gpt"], ids=str)
def test_flex_attention_gives_the_numbers_of_masked_scores(monkeypatch, changes):
    model, ids, document_ids = build(changes), token_ids(2, SEQ), numbers(*LENGTHS).repeat(2, 1)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(ids, document_ids=document_ids)
        monkeypatch.setattr(masks, "attention_backend", lambda *_: "flex")
        got = model(ids, document_ids=document_ids)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
        assert not torch.equal(got, expected), "another kernel rounds otherwise"
        assert_documents_are_separate(model, document_ids, ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_flex_attention_on_a_gpu_trains_like_the_cpu(precision, compiled):
    from toolkit.models.compile import compile_model

    changes = {"d_model": 64, "num_key_value_heads": 2}
    lengths = (200, 56, 144, 300)
    here, there = build(changes, seq=700), build(changes, seq=700).cuda()
    if compiled:
        compile_model(there)
    ids, document_ids = token_ids(2, 700), numbers(*lengths).repeat(2, 1)
    assert attention_backend(torch.device("cuda"), precision, 16) == "flex"
    losses = []
    for model, device in ((here, "cpu"), (there, "cuda")):
        a, b = ids.to(device), document_ids.to(device)
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            sums = model(a, a.roll(-1, 1), document_ids=b)
        sums.loss.backward()
        losses.append(sums.ce.item())
    tolerance = 1e-4 if precision == torch.float32 else 2e-2
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    norms = [
        torch.stack([p.grad.norm().cpu() for p in model.parameters()]).norm().item()
        for model in (here, there)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=10 * tolerance)
    with torch.no_grad():
        assert_documents_are_separate(there, document_ids.cuda(), ids.cuda())
