"""Configs of Muon and NorMuon. No torch."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from toolkit.config.base import check_positive, matching
from toolkit.config.named import named
from toolkit.errors import ConfigError, ErrorList
from toolkit.optim.base import OPTIM_KEY, Optimizer, OptimizerTraits, is_matched

MATRICES, OTHERS = "matrices", "others"
_MOST_NS_STEPS = 100
_EXPERTS = ("*.experts.gate", "*.experts.up", "*.experts.down")


class MuonConfig(Optimizer, kw_only=True, tag_field="type", tag="muon"):
    """Muon (Jordan et al. 2024) for the matrices of blocks, AdamW for all else. With
    `match_rms_adamw` rates and weight decays are those of AdamW."""

    momentum: float = 0.95
    """Decay of the average of gradients."""
    nesterov: bool = True
    """Take the average as it will be after another such gradient."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """What updates of a matrix are scaled by: 0.2 * sqrt(max(rows, columns)), or
    sqrt(max(1, rows / columns)) as at first, for which rates are about 0.02."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Of their polynomial: x, x^3, x^5."""
    ns_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type they are computed in. `auto`: bf16 on accelerators; on CPUs, and for float64 weights,
    that of the weights."""
    matrices: tuple[str, ...] = ()
    """Shell-style patterns over names of parameters of two dimensions, or three (stacked matrices).
    None: every weight in `blocks.*` and `mtp.*` that is no norm and no router of experts."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW: decay of the first and second moment."""
    eps: float = 1e-8
    """Of AdamW: added to the denominator for numerical stability."""
    adamw_lr: float | None = None
    """Peak learning rate of AdamW; null: `lr`. The schedule multiplies both."""
    adamw_weight_decay: float | None = None
    """Weight decay of AdamW; null: `weight_decay`."""

    def __post_init__(self) -> None:
        check_positive(self, "ns_steps")
        if self.ns_steps > _MOST_NS_STEPS:
            raise ValueError(f"ns_steps must be at most {_MOST_NS_STEPS}, not {self.ns_steps}")
        if not 0.0 < self.momentum < 1.0:
            raise ValueError(f"momentum must be in (0, 1): {self.momentum}")
        for name in ("adamw_lr", "adamw_weight_decay"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative: {value}")
        if self.adjust_lr == "original" and self.adamw_lr is None:
            raise ValueError("adjust_lr original: its rates are not AdamW's; give adamw_lr too")
        super().__post_init__()  # last: what is wrong above is not wrong of an override

    @property
    def settings(self) -> dict[str, Any]:
        """Of both optimizers; where they have one of the same name, Muon's."""
        found = self.settings_of(OTHERS) | self.settings_of(MATRICES)
        return {name: value for name, value in found.items() if name != "is_matrix"}

    def settings_of(self, part: str) -> dict[str, Any]:
        """Of a group of matrices, or of others."""
        if part == MATRICES:
            names = ["lr", "weight_decay", "momentum", "nesterov", "ns_steps", "ns_coefficients"]
            own = {n: getattr(self, n) for n in (*names, "ns_dtype", "adjust_lr")}
            return own | {"is_matrix": True}
        lr = self.lr if self.adamw_lr is None else self.adamw_lr
        decay = self.weight_decay if self.adamw_weight_decay is None else self.adamw_weight_decay
        own = {"lr": lr, "weight_decay": decay, "betas": self.betas, "eps": self.eps}
        return own | {"is_matrix": False}

    def part_of(self, name: str) -> str:
        """`MATRICES` for a parameter that Muon steps, else `OTHERS`."""
        if self.matrices:
            is_matrix = is_matched(name, self.matrices)
        else:
            is_weight = name.endswith(".weight") and not name.endswith(
                ("norm.weight", ".router.weight")
            )
            is_matrix = name.startswith(("blocks.", "mtp.")) and (
                is_weight or is_matched(name, _EXPERTS)
            )
        return MATRICES if is_matrix else OTHERS

    def traits(self) -> OptimizerTraits:
        """It takes whole matrices, and `found_inf`."""
        return OptimizerTraits(
            takes_found_inf=True, needs_whole_matrices=True, takes_whole_matrices=True
        )

    def check_groups(self, names: Iterable[str]) -> None:
        """As `Optimizer.check_groups`, and the matrices: there must be some. Of names with shapes
        (a mapping) each must have two or three dimensions.

        Raises:
            ConfigError: otherwise, or where an override has a setting of AdamW for a matrix, or of
                Muon for another parameter.
        """
        shapes: Mapping[str, Any] = names if isinstance(names, Mapping) else {}
        names, found = list(names), ErrorList()
        key = f"{OPTIM_KEY}.matrices"
        for pattern in self.matrices:
            with found.collecting():
                matching(key, pattern, names)
        chosen = [name for name in names if self.part_of(name) == MATRICES]
        if not chosen and not found.errors:
            problem = "the model has no weights in blocks.*; give patterns of its matrices"
            found.add(ConfigError(problem, key=key))
        for name in chosen:
            shape = shapes.get(name)
            if isinstance(shape, tuple) and len(shape) not in (2, 3):
                problem = f"{name} has the shape {shape}, and is no matrix; leave it to AdamW"
                found.add(ConfigError(problem, key=key))
        with found.collecting():
            super().check_groups(names)
        for index, override in enumerate(self.group_overrides):
            parts = {self.part_of(name) for name in names if is_matched(name, override.params)}
            for setting in override.opts.keys() & self.settings.keys():
                if parts and not any(setting in self.settings_of(part) for part in parts):
                    whose = "AdamW" if setting in self.settings_of(OTHERS) else "Muon"
                    problem = f"{setting} is a setting of {whose}, which steps none of these"
                    found.add(ConfigError(problem, key=f"{OPTIM_KEY}.group_overrides.{index}.opts"))
        found.raise_any()

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        return named("toolkit.optim.muon:Muon")(self.groups(named_parameters))


class NorMuonConfig(MuonConfig, kw_only=True, tag_field="type", tag="normuon"):
    """NorMuon (Li et al. 2025): Muon whose updates have rows of about one size."""

    beta2: float = 0.95
    """Decay of the average of each row's mean square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta2 < 1.0:
            raise ValueError(f"beta2 must be in [0, 1): {self.beta2}")

    def settings_of(self, part: str) -> dict[str, Any]:
        """As Muon's, and `beta2`."""
        own = {"beta2": self.beta2} if part == MATRICES else {}
        return super().settings_of(part) | own

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        return named("toolkit.optim.muon:NorMuon")(self.groups(named_parameters))
