"""Configs of optimizers, and their union. No torch."""

import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from toolkit.config.base import check_not_negative, check_positive
from toolkit.config.named import named, users_class, users_object
from toolkit.errors import ConfigError
from toolkit.optim.base import OPTIM_KEY, Optimizer, OptimizerTraits, traits_of
from toolkit.optim.muon_config import MuonConfig, NorMuonConfig


class AdamWConfig(Optimizer, kw_only=True, tag_field="type", tag="adamw"):
    """AdamW (Loshchilov & Hutter 2019), torch's fused implementation."""

    scales_like_adam = True

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator for numerical stability."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which both moments are kept. `bf16`: half of the memory, rounded up or down at random
    so that sums stay right on average; not under ZeRO."""

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        groups = self.groups(named_parameters)
        if self.state_dtype == "bf16":
            own = named("toolkit.optim.stochastic:StochasticAdamW")
            return own(groups, named_parameters, **self.settings)
        return named("torch.optim:AdamW")(groups, **self.settings, fused=True)


class SkipStepAdamWConfig(AdamWConfig, kw_only=True, tag_field="type", tag="skip_step_adamw"):
    """AdamW that leaves out steps whose loss or gradient norm is a spike (OLMo 2, Team OLMo 2025),
    decided on the device."""

    rolling_interval_length: int = 128
    """Accepted steps that a step is compared with; half as many must have been."""
    sigma_factor: float = 6.0
    """A loss or a gradient norm so many standard deviations above their mean is a spike."""


class AdamConfig(Optimizer, kw_only=True, tag_field="type", tag="adam"):
    """Adam (Kingma & Ba 2015), torch's fused implementation."""

    scales_like_adam = True

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator for numerical stability."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        return named("torch.optim:Adam")(self.groups(named_parameters), **self.settings, fused=True)


class SGDConfig(Optimizer, kw_only=True, tag_field="type", tag="sgd"):
    """Stochastic gradient descent with optional momentum."""

    lr: float = 1e-2
    """Peak learning rate; the schedule multiplies it."""
    momentum: float = 0.0
    """Momentum factor; 0 keeps no state."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        return named("torch.optim:SGD")(self.groups(named_parameters), **self.settings, fused=True)


class LionConfig(Optimizer, kw_only=True, tag_field="type", tag="lion"):
    """Lion (Chen et al. 2023): the sign of an average of gradients, half the state of AdamW. Take
    a rate 3 to 10 times smaller than for AdamW, and as much more weight decay."""

    scales_like_adam = True

    lr: float = 1e-4
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Share of the average in the direction of a step, and its decay."""
    weight_decay: float = 0.3
    """Decoupled weight decay."""

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        found = named("toolkit.optim.lion:Lion")
        return found(self.groups(named_parameters), **self.settings)


class SkipStepLionConfig(LionConfig, kw_only=True, tag_field="type", tag="skip_step_lion"):
    """Lion that leaves out spikes, as `skip_step_adamw` does."""

    rolling_interval_length: int = 128
    """Accepted steps that a step is compared with; half as many must have been."""
    sigma_factor: float = 6.0
    """A loss or a gradient norm so many standard deviations above their mean is a spike."""


class AdafactorConfig(Optimizer, kw_only=True, tag_field="type", tag="adafactor"):
    """Adafactor (Shazeer & Stern 2018), torch's implementation: of each matrix it keeps an average
    by rows and one by columns. Needs whole parameters on each rank: `single` or `ddp`."""

    lr: float = 1e-2
    """Most that a step is relative to the size of a parameter."""
    beta2_decay: float = -0.8
    """Power of the step with which the average of squares grows longer."""
    eps: tuple[float | None, float] = (None, 1e-3)
    """Least root of an average of squares (null: the accuracy of the type), and least size of a
    parameter that steps are relative to."""
    d: float = 1.0
    """Steps whose root mean square is larger are scaled down to it."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "d")
        if self.beta2_decay > 0:
            raise ValueError(f"beta2_decay must not be positive: {self.beta2_decay}")
        if self.d < 1:
            raise ValueError(f"d must be at least 1: {self.d}")
        if any(eps is not None and not eps >= 0 for eps in self.eps):
            raise ValueError(f"eps must not be negative: {list(self.eps)}")

    def traits(self) -> OptimizerTraits:
        """It needs whole parameters."""
        return OptimizerTraits(needs_whole_parameters=True)

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        return named("torch.optim:Adafactor")(self.groups(named_parameters), **self.settings)


class AdamW8bitConfig(Optimizer, kw_only=True, tag_field="type", tag="adamw_8bit"):
    """AdamW with moments of 8 bits, by blocks (Dettmers et al. 2022), torchao's implementation. It
    is compiled at the first step, once for each shape, and quantises parameters of 4,096 values or
    more of which `block_size` is a divisor. Needs whole parameters on each rank: `single` or `ddp`.
    """

    scales_like_adam = True

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator for numerical stability."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    block_size: int = 256
    """Values that share a scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "block_size")

    @property
    def setting_names(self) -> list[str]:
        """All but `block_size`, which is the optimizer's."""
        return [name for name in self.settings if name != "block_size"]

    def traits(self) -> OptimizerTraits:
        """Its blocks lie in whole parameters."""
        return OptimizerTraits(needs_whole_parameters=True)

    def check_groups(self, names: Iterable[str]) -> None:
        """As `Optimizer.check_groups`, and that torchao is there."""
        if importlib.util.find_spec("torchao") is None:
            problem = 'adamw_8bit is torchao\'s: pip install "toolkit[torchao]"'
            raise ConfigError(problem, key=f"{OPTIM_KEY}.type")
        super().check_groups(names)

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        groups = self.groups(named_parameters)
        for group in groups:
            group.pop("block_size")
        return named("toolkit.optim.adamw_8bit:adamw_8bit")(groups, **self.settings)


class ScheduleFreeAdamWConfig(Optimizer, kw_only=True, tag_field="type", tag="schedule_free_adamw"):
    """Schedule-free AdamW (Defazio et al. 2024): evaluations, checkpoints and exports hold an
    average of the weights, and the rate need not decay (`scheduler: {"type": "constant", "warmup":
    ...}`)."""

    scales_like_adam = True

    lr: float = 2.5e-3
    """Learning rate: 1 to 10 times that of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Share of the average in the weights that gradients are taken at, and the decay of the second
    moment."""
    eps: float = 1e-8
    """Added to the denominator for numerical stability."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of the weights that gradients are taken at."""
    r: float = 0.0
    """Later steps weigh more in the average: by their number to this power."""
    weight_lr_power: float = 2.0
    """Steps of the warm-up weigh less: by the largest rate so far to this power."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "r", "weight_lr_power")

    def traits(self) -> OptimizerTraits:
        """It keeps an average, and takes `found_inf`."""
        return OptimizerTraits(takes_found_inf=True, keeps_average=True)

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        found = named("toolkit.optim.schedule_free:ScheduleFreeAdamW")
        return found(self.groups(named_parameters), **self.settings)


class NoopConfig(Optimizer, kw_only=True, tag_field="type", tag="noop"):
    """Changes nothing: for trying out and timing all the rest."""

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        return named("toolkit.optim.noop:Noop")(self.groups(named_parameters), **self.settings)


class ClassOptimConfig(Optimizer, kw_only=True, tag_field="type", tag="class"):
    """An optimizer of torch or your own: `type: "torch.optim:NAdam"` names its class, which is made
    as `NAdam(groups, lr=lr, **options)`. See `OptimizerTraits` for what the class may declare."""

    scales_like_adam = True  # for all that we know

    target: str
    """The class, as `module:Class`. Modules in the current folder are found too."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Further arguments of the class."""

    @property
    def settings(self) -> dict[str, Any]:
        """The rate and the options."""
        return {"lr": self.lr, **self.options}

    @property
    def setting_names(self) -> list[str]:
        """All arguments of the class but the first, which is the groups."""
        found = users_class(self.target, key=f"{OPTIM_KEY}.type")
        return list(inspect.signature(found).parameters)[1:]

    def traits(self) -> OptimizerTraits:
        """What the class declares."""
        return traits_of(users_class(self.target, key=f"{OPTIM_KEY}.type"))

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        groups = self.groups(named_parameters)
        return users_object(self.target, groups, key=f"{OPTIM_KEY}.type", **self.settings)

    def check_groups(self, names: Iterable[str]) -> None:
        """Check that there is such a class, that it takes the options, and `group_overrides`.

        Raises:
            ConfigError: otherwise.
        """
        found = users_class(self.target, key=f"{OPTIM_KEY}.type")
        try:
            inspect.signature(found).bind([], **self.settings)
        except TypeError as error:
            raise ConfigError(f"{self.target}: {error}", key=f"{OPTIM_KEY}.options") from None
        super().check_groups(names)


OptimConfig = (
    AdamWConfig
    | SkipStepAdamWConfig
    | AdamConfig
    | SGDConfig
    | LionConfig
    | SkipStepLionConfig
    | AdafactorConfig
    | AdamW8bitConfig
    | ScheduleFreeAdamWConfig
    | NoopConfig
    | MuonConfig
    | NorMuonConfig
    | ClassOptimConfig
)
