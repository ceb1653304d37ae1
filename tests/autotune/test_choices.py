"""What follows from timings, and which products a microbatch has."""

from typing import Any, get_args

import msgspec
import pytest

from tests.tiny import tiny_model
from toolkit.autotune import choose as choosing
from toolkit.autotune.choices import Choices, Timings, fastest, pays_to_compile
from toolkit.autotune.choose import choose, decide, describe, recorded_for, unmeasured
from toolkit.autotune.question import Aspect, Product, Question, work_of
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.shapes import flops_per_token

BF16 = Timings(precision={"fp32": 0.2, "bf16": 0.1}, threads={4: 1.0, 2: 0.5})
FP32 = Timings(precision={"fp32": 0.1, "bf16": 0.3})


def question(**changes: Any) -> Question:
    work = work_of(tiny_model(), tokens=64, length=16)
    settings: dict[str, Any] = {
        "asks": frozenset(get_args(Aspect)) - {"attention"},
        "device": "cpu",
        "name": "a CPU",
        "torch": "2",
        "threads": 4,
        "precision": "auto",
        **work._asdict(),
    }
    return Question(**(settings | changes))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"fp32": 1.0, "bf16": 0.5}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.95}, "fp32"),  # less than the margin
        ({"fp32": 1.0, "bf16": 2.0}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_the_default_stays_without_a_clear_margin(seconds: dict[str, float], expected: str) -> None:
    assert fastest(seconds, "fp32", 1.1) == expected


def test_choices_follow_from_timings_alone() -> None:
    assert decide(question(), BF16, "fp32") == Choices(
        precision="bf16", threads=2, compile_model=False
    )
    assert decide(question(), FP32, "fp32") == Choices(precision="fp32", compile_model=False)
    pinned = question(asks=frozenset({"threads"}), precision="fp32")
    assert decide(pinned, BF16, "fp32") == Choices(threads=2)
    gpu = question(device="cuda", asks=frozenset({"precision", "attention"}))
    attention = Timings(attention={"flash": 2.0, "cudnn": 1.0})
    assert decide(gpu, attention, "bf16") == Choices(precision="bf16", attention="cudnn")
    # Which kernel comes first then is for `attention_order` to say.
    assert unmeasured(gpu, "bf16") == Choices(precision="bf16")
    assert decide(gpu, Timings(attention={"cudnn": 1.0}), "bf16").attention is None


def test_compiling_has_to_win_back_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pays_to_compile(0.5, 10_000, device="cpu", precision="fp32")
    assert not pays_to_compile(0.5, 100, device="cpu", precision="fp32")
    assert not pays_to_compile(0.5, None, device="cpu", precision="fp32")
    assert not pays_to_compile(0.5, 10_000, device="mps", precision="fp32")
    long = question(steps=100_000, passes=4)
    monkeypatch.setattr(choosing, "can_compile", lambda: True)
    assert decide(long, BF16, "fp32").compile_model is True
    assert decide(question(steps=10), BF16, "fp32").compile_model is False
    monkeypatch.setattr(choosing, "can_compile", lambda: False)
    assert decide(long, BF16, "fp32").compile_model is False


def test_one_line_says_what_was_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "can_compile", lambda: True)
    assert describe(question(), decide(question(), BF16, "fp32"), BF16) == [
        "precision bf16 (measured 2.0x of fp32 on this CPU)",
        "2 of 4 threads (measured 2.0x)",
        "not compiled (for a length in epochs)",
    ]
    short = question(steps=20)
    assert describe(short, decide(short, FP32, "fp32"), FP32) == [
        "precision fp32 (measured on this CPU: bf16 is 0.3x of it)",
        "4 threads",
        "not compiled (20 steps)",
    ]
    monkeypatch.setattr(choosing, "can_compile", lambda: False)
    assert describe(short, decide(short, FP32, "fp32"), FP32)[-1] == (
        "not compiled (no C++ compiler and headers of Python)"
    )


def test_other_programs_on_the_machine_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    beside = msgspec.structs.replace(BF16, threads={}, lasts=False)
    assert choose(question(), lambda part: beside, fixed="fp32").notices[1:] == (
        "other programs use this machine: threads not compared, and the measurement is not kept",
    )
    assert len(choose(question(), lambda part: BF16, fixed="fp32").notices) == 1


def test_recorded_choices_stay_and_open_ones_are_as_without_measuring() -> None:
    recorded = Choices(precision="bf16", threads=2)
    kept = recorded_for(question(), recorded, "fp32")
    assert kept == Choices(precision="bf16", threads=2, compile_model=False)
    # A resume has filled it in: still the choice of `auto`.
    filled = question(asks=frozenset({"threads"}), precision="bf16")
    assert recorded_for(filled, recorded, "fp32").precision == "bf16"
    asked = msgspec.structs.replace(filled, precision="fp32")
    assert recorded_for(asked, recorded, "fp32").precision is None


def test_what_is_asked_anew_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recorded = Choices(precision="fp32", threads=2)
    answer = choose(
        question(),
        lambda part: BF16,
        fixed="fp32",
        recorded=recorded,
        anew=frozenset({"precision"}),
    )
    assert (answer.choices.precision, answer.choices.threads) == ("bf16", 2)
    assert answer.notices == ("precision bf16 (measured 2.0x of fp32 on this CPU)",)


def test_compiling_is_decided_anew_by_the_precision_that_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choosing, "can_compile", lambda: True)
    measured: list[Question] = []

    def measure(part: Question) -> Timings:
        measured.append(part)
        return Timings(precision={part.precision: 0.1})

    answer = choose(
        question(steps=100_000, passes=4),
        measure,
        fixed="fp32",
        recorded=Choices(precision="bf16", compile_model=True),
        anew=frozenset({"compile_model"}),
    )
    assert answer.choices == Choices(precision="bf16", compile_model=True)
    assert [(part.asks, part.precision) for part in measured] == [({"compile_model"}, "bf16")]


@pytest.mark.parametrize("sparse", [False, True])
def test_products_are_those_of_the_model(sparse: bool) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=32) if sparse else None
    model = tiny_model(moe=moe, vocab_size=128, vocab_multiple=1)
    work = work_of(model, tokens=64, length=16)
    products = [*work.products, work.head]
    computed = sum(6 * p.rows * p.inputs * p.outputs * p.count for p in products)
    attention = 12 * model.num_heads * model.attention_head_dim * 17 / 2 * model.num_layers
    assert computed == 64 * (flops_per_token(model, 16) - attention)
    width = model.d_model
    qkv = width + 2 * model.kv_heads * model.attention_head_dim
    assert Product(64, width, qkv, model.num_layers) in products
