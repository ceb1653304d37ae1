"""Linear layers that compute in 8 bits, by torchao.

Each stays an `nn.Linear` of the same name with an fp32 weight; input, weight and the gradient of
the output are rounded to 8 bits inside forward and backward, each with scales of its own.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from toolkit.config.named import named
from toolkit.distributed.config import Float8Config
from toolkit.distributed.low_precision import (
    FLOAT8,
    KERNEL_TOKENS,
    check_device,
    float8_layers,
)
from toolkit.errors import ConfigError
from toolkit.models.kernels import hardware_of

_MXFP8 = "torchao.prototype.moe_training.mxfp8_linear"


def apply_float8(
    model: nn.Module, config: Float8Config, *, device: torch.device, precision: str
) -> None:
    """Let the chosen linear layers of a Transformer compute in 8 bits, in place. Raises
    ConfigError where `device` or `precision` cannot."""
    check_float8_on(config, device=device, precision=precision)
    chosen = float8_layers(model.config, config)  # type: ignore[arg-type]
    build = _mxfp8_builder(config) if config.recipe == "mxfp8" else _float8_builder(config)
    for name in chosen:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        linear = owner.get_submodule(last)
        assert type(linear) is nn.Linear, f"{name} is a {type(linear).__name__}"
        setattr(owner, last, build(linear))


def check_float8_on(config: Float8Config, *, device: torch.device, precision: str) -> None:
    """Raises ConfigError where `device` or `precision`, which is not `auto`, cannot."""
    if precision != "bf16":
        problem = f"does not go with precision {precision}; set train_module.precision to bf16"
        raise ConfigError(problem, key=FLOAT8)
    check_device(config, device.type, hardware_of(device.type, device.index).capability)


def gathers_float8(model: nn.Module) -> bool:
    """Whether weights of `model` are gathered in 8 bits."""
    # A DTensor, which parameters are once they are sharded, does not show what it wraps.
    parts = (getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters())
    return any(hasattr(part, "fsdp_pre_all_gather") for part in parts)


def scales_of(model: nn.Module) -> Callable[[], None]:
    """What brings the scales of weights that are gathered in 8 bits in line with the weights, after
    they changed: one exchange for all of them."""
    with _quiet():
        precompute = named("torchao.float8:precompute_float8_dynamic_scale_for_fsdp")
    return lambda: precompute(model)


def _float8_builder(config: Float8Config) -> Callable[[nn.Module], nn.Module]:
    with _quiet():
        kind: Any = named("torchao.float8:Float8LinearConfig")
        base: Any = named("torchao.float8.float8_linear:Float8Linear")
        product: Any = named("torchao.float8.float8_linear:matmul_with_hp_or_float8_args")
    settings = dataclasses.replace(
        kind.from_recipe_name(config.recipe),
        emulate=config.emulate,
        enable_fsdp_float8_all_gather=config.fsdp_all_gather,
    )

    def multiply(linear: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        has_rest = x.numel() // x.shape[-1] % KERNEL_TOKENS
        kernels = linear.padded_mm_config if has_rest else linear.linear_mm_config
        return product.apply(x, weight.t(), kernels, settings)

    own: Any = _computing(base, multiply)

    def build(linear: Any) -> nn.Module:
        built = own.from_float(linear, settings)
        # The gradient of the weight is a sum over tokens, which zeros fill up.
        kernels = built.linear_mm_config
        padded = kernels.grad_weight._replace(pad_inner_dim=True)
        built.padded_mm_config = kernels._replace(grad_weight=padded)
        return built

    return build


def _mxfp8_builder(config: Float8Config) -> Callable[[nn.Module], nn.Module]:
    with _quiet():
        base: Any = named(f"{_MXFP8}:MXFP8Linear")
        preferences: Any = named(f"{_MXFP8}:KernelPreference")
        product = named(f"{_MXFP8}:_to_mxfp8_then_scaled_mm")

    def multiply(linear: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return product(
            x,
            weight,
            kernel_preference=linear.kernel_preference,
            scale_calculation_mode=linear.scale_calculation_mode,
            wgrad_with_hp=linear.wgrad_with_hp,
        )

    own: Any = _computing(base, multiply)

    def build(linear: Any) -> nn.Module:
        preference = preferences.EMULATED if config.emulate else preferences.AUTO
        with torch.device("meta"):
            built = own(
                linear.in_features, linear.out_features, bias=False, kernel_preference=preference
            )
        built.weight, built.bias = linear.weight, linear.bias
        return built

    return build


def _computing(base: type, multiply: Callable[..., torch.Tensor]) -> type:
    """`base`, torchao's, which takes the weight in the type of its input. As it is, it rounds fp32
    weights to 8 bits at once, while FSDP2 gathers copies in bf16: engines would not agree."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = multiply(self, x, self.weight.to(x.dtype))
        return out if self.bias is None else out + self.bias.to(out.dtype)

    return type(base.__name__, (base,), {"forward": forward})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torchao says, when it is imported, of kernels for other machines."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
