"""Linear layers in 8 bits: emulated on CPUs, where only the speed of a GPU's kernels is missing."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import SEQ, build, module_config, open_environment, tiny_model, train_steps
from tests.workers import WorkerPool
from toolkit.distributed.config import DataParallelConfig, Float8Config
from toolkit.distributed.float8 import _float8_builder, apply_float8
from toolkit.distributed.layout import Layout
from toolkit.distributed.low_precision import check_device, check_float8, float8_layers
from toolkit.errors import ConfigError

MODEL = {"intermediate_size": 64, "head_dim": 16, "num_heads": 2, "max_sequence_length": 32}
EMULATED = Float8Config(filter=(), emulate=True)
ROWWISE, MXFP8 = EMULATED.replace(recipe="rowwise"), EMULATED.replace(recipe="mxfp8")
LONG = 32


def trained(engine: str, float8: Float8Config | None, dp: dict[str, Any], compiled: bool) -> Any:
    """Losses of six steps, the state after them, and the losses of the last two once more after
    loading the state after four."""
    config = module_config(
        engine, precision="bf16", float8_config=float8, dp=dp, compile_model=compiled,
        rank_microbatch_size=4 * SEQ,
    )  # fmt: skip
    env = open_environment(config)
    try:
        module = build(config, env, **MODEL)
        history = train_steps(module, 0, 4)
        state = {k: t.detach().clone() for k, t in whole(module.state_tensors()).items()}
        own = {k: local(t).clone() for k, t in module.state_tensors().items()}
        history += train_steps(module, 4, 6)
        for key, tensor in module.state_tensors().items():
            local(tensor).copy_(own[key])
        module.state_filled()
        again = train_steps(module, 4, 6)
        return [r["loss"] for r in history], state, [r["loss"] for r in again], module.kernels
    finally:
        env.close()


def local(tensor: Any) -> torch.Tensor:
    from toolkit.distributed.shards import local_tensor

    return local_tensor(tensor.detach())


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        k: t.full_tensor() if hasattr(t, "full_tensor") else t
        for k, t in tensors.items()
        if k.startswith("model.")
    }


@pytest.fixture(scope="module")
def bf16(workers: WorkerPool) -> Any:
    return workers.run(1, trained, "single", None, {}, False)[0]


@pytest.mark.parametrize(
    ("engine", "ranks", "float8", "dp"),
    [
        ("single", 1, EMULATED, {}),
        ("single", 1, ROWWISE, {}),
        ("single", 1, MXFP8, {}),
        ("ddp", 2, EMULATED, {}),
        ("fsdp", 2, EMULATED, {}),
        ("fsdp", 2, EMULATED.replace(fsdp_all_gather=True), {}),
        ("fsdp", 2, MXFP8, {}),
    ],
)
def test_training_in_8_bits_follows_bf16_and_resumes_bit_equal(
    workers: WorkerPool, bf16: Any, engine: str, ranks: int, float8: Any, dp: dict[str, Any]
) -> None:
    losses, state, again, kernels = workers.run(ranks, trained, engine, float8, dp, False)[0]
    assert losses == pytest.approx(bf16[0], rel=0.01)
    assert losses != bf16[0]
    assert again == losses[4:]
    assert state.keys() == bf16[1].keys()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert {type(t) for t in state.values()} <= {torch.Tensor, torch.nn.Parameter}
    for name, tensor in state.items():
        assert not torch.equal(tensor, torch.zeros_like(tensor)), name
        assert (tensor - bf16[1][name]).abs().max() < 0.02
    gathered = ", gathered in 8 bits" if float8.fsdp_all_gather else ""
    told = f"float8 {float8.recipe}, 14 of 14 layers{gathered}, emulated"
    assert kernels["linear layers"] == told


def first_step(engine: str, recipe: Float8Config) -> tuple[float, float]:
    config = module_config(
        engine, precision="bf16", float8_config=recipe, rank_microbatch_size=4 * SEQ
    )
    env = open_environment(config)
    try:
        found = train_steps(build(config, env, **MODEL), 0, 1)[0]
        return found["loss"], found["grad_norm"]
    finally:
        env.close()


@pytest.mark.parametrize("float8", [EMULATED, ROWWISE, MXFP8])
def test_engines_round_the_same_numbers(workers: WorkerPool, float8: Float8Config) -> None:
    """A copy of the weight in bf16, whoever made it."""
    loss, norm = workers.run(1, first_step, "single", float8)[0]
    for engine in ("ddp", "fsdp"):
        other = workers.run(2, first_step, engine, float8)[0]
        assert other[0] == pytest.approx(loss, rel=1e-6), engine
        assert other[1] == pytest.approx(norm, rel=3e-4), engine


def losses_with_and_without_a_swap() -> tuple[list[float], list[float]]:
    """Of three steps; the second time other weights are evaluated before the last."""
    config = module_config(
        "fsdp",
        precision="bf16",
        float8_config=EMULATED.replace(fsdp_all_gather=True),
        dp={"reshard_after_forward": False},
    )
    env = open_environment(config)
    try:
        module = build(config, env, **MODEL)

        def put(values: dict[str, torch.Tensor]) -> None:
            for key, tensor in module.state_tensors().items():
                local(tensor).copy_(values[key])
            module.state_filled()

        def now() -> dict[str, torch.Tensor]:
            return {key: local(tensor).clone() for key, tensor in module.state_tensors().items()}

        first = now()
        plain = train_steps(module, 0, 3)
        put(first)
        swapped = train_steps(module, 0, 2)
        trained = now()
        put({k: 3 * t if k.startswith("model.") else t for k, t in trained.items()})
        module.eval_batch({"input_ids": torch.arange(2 * SEQ).view(2, SEQ)})
        put(trained)
        swapped += train_steps(module, 2, 3)
        return [r["loss"] for r in plain], [r["loss"] for r in swapped]
    finally:
        env.close()


def test_weights_that_were_only_evaluated_leave_no_scale_behind(workers: WorkerPool) -> None:
    plain, swapped = workers.run(2, losses_with_and_without_a_swap)[0]
    assert plain == swapped


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("tokens", [1000, 1024])
def test_kernels_take_any_number_of_tokens(recipe: Any, tokens: int) -> None:
    """Of tensors without storage torch checks what the kernels of a GPU take, and no more."""
    with torch.device("meta"):
        own: Any = _float8_builder(Float8Config(recipe=recipe))(nn.Linear(32, 64, bias=False))
        x = torch.empty(1, tokens, 32, dtype=torch.bfloat16, requires_grad=True)
        own(x).sum().backward()
        assert own.weight.grad.shape == (64, 32)
        odd = torch.empty(64, 24).to(torch.float8_e4m3fn)
        with pytest.raises(RuntimeError, match="divisible by 16"):
            torch._scaled_mm(odd, odd.t(), torch.empty(()), torch.empty(()))


FSDP = DataParallelConfig(name="fsdp")
FSDP_2 = Layout(dp_shard=2, is_fsdp=True, dp_config=FSDP, precision="bf16")
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"tp": 2}, r"float8_config: does not go with train_module.tp_config; use ddp, fsdp"),
    ({}, {"zero_stage": 2, "is_fsdp": False}, "does not go with zero2; use ddp, fsdp or hsdp"),
    ({}, {"precision": "fp16"}, "does not go with precision fp16; set train_module.precision to"),
    ({"fsdp_all_gather": True}, {"is_fsdp": False}, "fsdp_all_gather needs fsdp or hsdp without"),
    ({"fsdp_all_gather": True}, {"dp_shard": 9}, "without rows of blocks.0.attention.query, which"),
    ({"recipe": "mxfp8"}, {}, "mxfp8 takes rows of a multiple of 32 tokens, not 48"),
    ({"filter": None}, {}, r"no linear layer of this model is faster in tensorwise float8"),
    ({"filter": ("*.quary",)}, {}, r"float8_config.filter: '\*.quary' matches no"),
    ({"filter": ("*",)}, {}, "leaves no linear layer in float8"),
]


@pytest.mark.parametrize(("changes", "layout", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_a_line(
    changes: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    import msgspec

    config = EMULATED.replace(**changes)
    asked = msgspec.structs.replace(FSDP_2, **layout)
    with pytest.raises(ConfigError, match=message) as found:
        check_float8(config, asked, tiny_model(**MODEL), sequence_length=48, has_adapter=False)
    assert "\n" not in str(found.value)


def test_widths_that_kernels_do_not_take_are_named() -> None:
    with pytest.raises(ConfigError, match=r"blocks.0.feed_forward.gate is \(50, 32\), and tensor"):
        float8_layers(tiny_model(), EMULATED)
    left = float8_layers(tiny_model(), EMULATED.replace(filter=("*.feed_forward.*",)))
    assert left == [f"blocks.{n}.attention.{k}" for n in (0, 1) for k in KEYS]
    large = tiny_model(d_model=2048, num_heads=16, num_layers=1, intermediate_size=8192)
    assert float8_layers(large, Float8Config(recipe="rowwise")) == [
        f"blocks.0.feed_forward.{name}" for name in ("gate", "up")
    ]
    assert len(float8_layers(large, Float8Config())) == 5  # not the narrow key and value


KEYS = ("query", "key", "value", "output")


@pytest.mark.parametrize(
    ("recipe", "kind", "capability", "message"),
    [
        ("tensorwise", "cpu", None, "NVIDIA sm_89 or newer, and a CPU has none; leave"),
        ("tensorwise", "cuda", (8, 0), "this GPU is sm_80"),
        ("rowwise", "cuda", (8, 9), "NVIDIA sm_90 or newer, and this GPU is sm_89"),
        ("mxfp8", "cuda", (9, 0), "NVIDIA sm_100 or newer"),
        ("tensorwise", "cuda", (8, 9), None),
        ("rowwise", "cuda", (9, 0), None),
        ("mxfp8", "cuda", (10, 0), None),
    ],
)
def test_devices_without_kernels_are_refused(
    recipe: Any, kind: str, capability: Any, message: str | None
) -> None:
    config = Float8Config(recipe=recipe)
    check_device(config.replace(emulate=True), kind, capability)
    if message is None:
        check_device(config, kind, capability)
        return
    with pytest.raises(ConfigError, match=message):
        check_device(config, kind, capability)


def test_a_cpu_does_not_emulate_unasked() -> None:
    model = tiny_model(**MODEL).build(init_device="meta")
    with pytest.raises(ConfigError, match=r"float8_config.emulate=true"):
        apply_float8(model, Float8Config(filter=()), device=torch.device("cpu"), precision="bf16")
