"""Which of SDPA's kernels is tried first, on which hardware, and what is refused."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from toolkit.errors import ConfigError
from toolkit.models import sdpa
from toolkit.models.config import TransformerConfig
from toolkit.models.kernels import Hardware, kernel_record
from toolkit.models.layer_inputs import layer_inputs, row_masks
from toolkit.models.sdpa import attention_order, choose_attention, masked_backend, takes_measured

BF16, FP32 = torch.bfloat16, torch.float32
A100, H100, B200 = (Hardware("cuda", capability) for capability in ((8, 0), (9, 0), (10, 0)))
MI300X, CPU = Hardware("cuda", (9, 4), is_rocm=True), Hardware("cpu")
TORCHS = ("flash", "efficient", "math", "cudnn")


@pytest.fixture(autouse=True)
def torchs_order() -> Iterator[None]:
    before = torch._C._get_sdp_priority_order()
    yield
    torch._C._set_sdp_priority_order(before)


def order(asked="auto", hardware=H100, dtype=BF16, head_dim=128, cudnn=91_500, **others):
    others = {"is_deterministic": False, **others}
    return attention_order(asked, hardware, dtype=dtype, head_dim=head_dim, cudnn=cudnn, **others)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "cudnn"),
        ({"hardware": B200}, "cudnn"),
        ({"hardware": A100}, "flash"),
        ({"hardware": MI300X}, "flash"),
        ({"hardware": CPU}, "flash"),
        ({"dtype": FP32}, "flash"),
        ({"head_dim": 256}, "flash"),
        ({"head_dim": 100}, "flash"),
        ({"cudnn": 90_100}, "flash"),
        ({"cudnn": None}, "flash"),
        ({"is_deterministic": True}, "flash"),
        ({"measured": "flash"}, "flash"),
        ({"measured": "cudnn", "is_deterministic": True}, "flash"),
        ({"measured": "cudnn", "dtype": FP32}, "flash"),
        ({"asked": "efficient", "dtype": FP32}, "efficient"),
        ({"asked": "math"}, "math"),
        ({"asked": "flash"}, "flash"),
        ({"asked": "cudnn", "hardware": A100}, "cudnn"),
    ],
    ids=str,
)
def test_what_comes_first(changes, expected):
    found = order(**changes)
    assert found[0] == expected
    assert sorted(found) == sorted(TORCHS)
    heeds = [order(**changes | {"measured": name})[0] for name in ("flash", "cudnn")]
    facts = {"asked": "auto", "hardware": H100, "dtype": BF16, "head_dim": 128, "cudnn": 91_500}
    facts = facts | {"is_deterministic": False} | changes
    facts.pop("measured", None)
    assert takes_measured(**facts) == (heeds == ["flash", "cudnn"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"asked": "cudnn", "hardware": CPU}, "a run on cpu"),
        ({"asked": "cudnn", "dtype": FP32}, "not float32, heads of 128"),
        ({"asked": "flash", "head_dim": 100}, "heads of a multiple of 8"),
        ({"asked": "cudnn", "is_deterministic": True}, "not deterministic"),
        ({"asked": "cudnn", "cudnn": None}, "no cuDNN here"),
        ({"asked": "flash3", "hardware": A100}, "sm_90"),
        ({"asked": "flash3"}, "not installed here"),
    ],
    ids=str,
)
def test_what_is_asked_for_and_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=f"attention_backend: .*{said}.*; use auto"):
        order(**changes)


@pytest.mark.parametrize(
    ("asked", "changes", "device", "said"),
    [
        ("auto", {}, "cpu", None),
        ("auto", {"attention_sinks": True}, "cpu", None),
        ("sdpa", {}, "cpu", "sdpa"),
        ("sdpa", {"attention_sinks": True}, "cpu", "sdpa does not know model.attention_sinks"),
        ("flash", {"attention_soft_cap": 2.0}, "cpu", "flash does not know model.attention_soft"),
        ("flex", {}, "cpu", "not on this cpu, float32, heads of 16; use auto"),
        ("flex", {"attention_sinks": True}, "cuda", "flex"),
    ],
)
def test_what_computes_masked_attention(asked, changes, device, said, monkeypatch):
    if device == "cuda":
        monkeypatch.setattr(sdpa, "attention_backend", lambda *_: "flex")
    config = TransformerConfig(
        vocab_size=100, d_model=64, num_layers=1, num_heads=4, intermediate_size=8, **changes
    )
    given = asked, config, torch.device(device), FP32
    if said is None or said == asked:
        assert masked_backend(*given) == said
        return
    with pytest.raises(ConfigError, match=f"train_module.attention_backend: .*{said}"):
        masked_backend(*given)


def test_flex_is_asked_for_by_all_layers_and_sdpa_takes_no_other_way(monkeypatch):
    config = TransformerConfig(
        vocab_size=100, d_model=64, num_layers=2, num_heads=4, intermediate_size=8
    )
    x, asked = torch.zeros(1, 8, 64), {"layers": range(2)}
    masks = partial(row_masks, backend="flex")
    for inputs in layer_inputs(config, x, None, None, masks=masks, **asked):
        assert inputs.mask.blocks is not None
    assert layer_inputs(config, x, None, None)[0].mask is None
    record = kernel_record(
        config, torch.device("cpu"), FP32,
        is_compiled=True, has_z_loss=False, masked_backend="sdpa",
    )  # fmt: skip
    assert record["attention"] == record["attention inside documents and windows"] == "sdpa"


def test_flash_attention_3_comes_before_all_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(sdpa, "find_spec", lambda name: name)
    assert order("flash3") == ("flash3", *TORCHS)


def test_the_process_tries_kernels_in_that_order(monkeypatch):
    taken: list[str] = []
    chosen: list[str] = []
    implementations = torch.nn.attention
    monkeypatch.setattr(implementations, "activate_flash_attention_impl", chosen.append)
    monkeypatch.setattr(
        implementations, "current_flash_attention_impl", lambda: chosen[-1] if chosen else None
    )
    monkeypatch.setattr(implementations, "restore_flash_attention_impl", chosen.clear)
    for own in (("cudnn", *TORCHS[:3]), ("flash3", *TORCHS), TORCHS):
        sdpa.set_order(own)
        taken.append(" ".join(chosen) + str(torch._C._get_sdp_priority_order()[:4]))
    assert taken == ["[3, 1, 2, 0]", "FA3[1, 2, 0, 3]", "[1, 2, 0, 3]"]


def test_a_model_on_a_cpu_brings_back_torchs_order():
    sdpa.set_order(("cudnn", *TORCHS[:3]))
    assert choose_attention("auto", torch.device("cpu"), dtype=BF16, head_dim=64) == TORCHS
    assert torch._C._get_sdp_priority_order()[:4] == [1, 2, 0, 3]
