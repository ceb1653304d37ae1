"""What the configs of optimizers share. No torch: settings and names are checked before there is a
model."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive, matching
from toolkit.config.check import convert
from toolkit.errors import ConfigError, ErrorList
from toolkit.optim.scaling import (
    BLOCK_NAMES,
    UNDECAYED,
    MuPConfig,
    count_layers,
    layer_factor,
    mup_factor,
)

OPTIM_KEY = "train_module.optim"
_NOT_SETTINGS = {
    "group_overrides",
    "layer_lr_decay",
    "mup",
    "rolling_interval_length",
    "state_dtype",
    "sigma_factor",
}
"""What an optimizer's class is not built with."""

# torchao's optimizers quantise blocks of values, which a cut would shift.
_NEED_WHOLE_PARAMETERS = {"torch.optim:Adafactor", "torchao.optim.adam:_AdamBase"}

_LONGEST_WINDOW = 1_000_000
"""Steps: the window of skip-step optimizers lies on the device."""


class OptimizerTraits(NamedTuple):
    """What an engine must know of an optimizer. Its class says so by attributes of these names;
    one that says nothing has none of them.

    Example: `class Lion(torch.optim.Optimizer): takes_found_inf = True`.
    """

    takes_found_inf: bool = False
    """`step` reads the tensors `optimizer.found_inf` and `optimizer.grad_scale`, as torch's fused
    kernels do: it divides gradients by the one, and changes nothing where the other is 1. For all
    other optimizers the engine scales gradients itself, and skips the call of `step`. State of
    these begins as a step of rate zero on zero gradients leaves it, with `step` at zero."""
    needs_whole_matrices: bool = False
    """The update mixes the rows or columns of a parameter (Muon, Shampoo), so that a rank which
    holds a part of the parameter cannot compute it alone."""
    takes_whole_matrices: bool = False
    """Of such an optimizer: it computes with matrices through `optimizer.whole_matrices`, which the
    engine sets; see `toolkit.distributed.whole_matrices`. Any other is refused where ranks hold
    parts."""
    needs_whole_parameters: bool = False
    """The update reads all of a parameter, vectors too (a norm, factored moments), or the state has
    another shape than the parameter."""
    keeps_average: bool = False
    """Training changes other weights than those to use: see `ScheduleFreeAdamW`, which shows what
    such a class has: the latter as `state[parameter]["x"]`, and `show`."""


def traits_of(optimizer: object) -> OptimizerTraits:
    """What `optimizer` (an object, or its class) declares. Those of torch and torchao are known."""
    declared = {name: bool(getattr(optimizer, name, False)) for name in OptimizerTraits._fields}
    # torch sets this on an optimizer with fused=True, for its own GradScaler.
    declared["takes_found_inf"] |= bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    known = {f"{base.__module__}:{base.__name__}" for base in kind.__mro__}
    declared["needs_whole_matrices"] |= "torch.optim:Muon" in known
    declared["needs_whole_parameters"] |= not known.isdisjoint(_NEED_WHOLE_PARAMETERS)
    return OptimizerTraits(**declared)


class SkipStep(NamedTuple):
    """Which steps a skip-step optimizer leaves out: fields of its config."""

    rolling_interval_length: int
    """Accepted steps that are looked back on."""
    sigma_factor: float
    """A loss or a gradient norm so many standard deviations above their mean is a spike."""


class Group(NamedTuple):
    """Parameters that have the same settings."""

    names: list[str]
    settings: dict[str, Any]
    override: int | None
    """Which entry of `group_overrides` they are from; None: no entry matches."""


class GroupOverride(Config, kw_only=True):
    """Other optimizer settings for the parameters whose names match a pattern."""

    params: list[str]
    """Shell-style patterns (`*`, `?`, `[...]`) over fully qualified parameter names. A pattern that
    matches nothing is an error."""

    opts: dict[str, float | bool | list[float]]
    """Settings to replace for these parameters, for example `{"weight_decay": 0.0}`."""


class Optimizer(Config, kw_only=True):
    """Base of the optimizers' configs."""

    scales_like_adam: ClassVar[bool] = False
    """Steps have the size of the rate, whatever the size of gradients: what muP's rates are for."""

    lr: float = 3e-4
    """Peak learning rate; the schedule multiplies it."""
    group_overrides: tuple[GroupOverride, ...] = ()
    """Other settings by parameter name; the first matching entry wins."""
    layer_lr_decay: float | None = None
    """Multiplies the rate by this to the power of the layers from the top: of the last block once,
    of the embeddings once more than of the first block, of the head not at all (ELECTRA, Clark et
    al. 2020). Null: one rate for all."""
    mup: MuPConfig | None = None
    """Initial values and rates that keep the best rate of a narrower model; null: off."""

    def __post_init__(self) -> None:
        fields = set(self.__struct_fields__)
        check_positive(self, "layer_lr_decay", *({"sigma_factor"} & fields))
        if self.layer_lr_decay is not None and self.layer_lr_decay > 1:
            raise ValueError(
                f"layer_lr_decay must be at most 1, a factor for each block below the last, not "
                f"{self.layer_lr_decay}"
            )
        window = None if self.skip_step is None else self.skip_step.rolling_interval_length
        if window is not None and not 2 <= window <= _LONGEST_WINDOW:
            raise ValueError(
                f"rolling_interval_length must be 2 to {_LONGEST_WINDOW:,} steps, not {window}"
            )
        if isinstance(getattr(self, "eps", None), float | int):
            check_positive(self, "eps")
        check_not_negative(self, *({"lr", "momentum", "weight_decay"} & fields))
        betas = getattr(self, "betas", ())
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must each be in [0, 1): {list(betas)}")
        if self.mup is not None and not self.scales_like_adam:
            kind = type(self).__struct_config__.tag
            raise ValueError(f"mup: its rates are those of Adam, not of {kind}; leave it out")
        self._check_overrides()

    @property
    def settings(self) -> dict[str, Any]:
        """What the optimizer is built with."""
        return {n: getattr(self, n) for n in self.__struct_fields__ if n not in _NOT_SETTINGS}

    @property
    def skip_step(self) -> SkipStep | None:
        """How spikes are found, where steps that are one are left out; None: no such steps."""
        fields = self.__struct_fields__
        own = [getattr(self, name) for name in SkipStep._fields if name in fields]
        return SkipStep(*own) if own else None

    @property
    def setting_names(self) -> list[str]:
        """What a group may have another value of."""
        return list(self.settings)

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        """The torch optimizer over the trainable ones of `named_parameters`, in groups by
        `group_overrides`."""
        raise NotImplementedError

    def groups(self, named_parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One group per override that applies, and one for the rest, each with all its settings.

        Frozen parameters are in no group, but a pattern may match them.

        Raises:
            ConfigError: see `check_groups`.
        """
        self.check_groups(named_parameters)
        trained = {name: p for name, p in named_parameters.items() if p.requires_grad}
        found = self.grouped(trained, count_layers(named_parameters))
        return [{"params": [trained[n] for n in g.names], **g.settings} for g in found]

    def grouped(self, names: Iterable[str], layers: int) -> list[Group]:
        """The groups of the parameters `names`, all of them trained, in a model of `layers`
        blocks."""
        patterns = [override.params for override in self.group_overrides]
        members: dict[tuple[int, float, str, bool], list[str]] = {}
        for name in names:
            hits = (i for i, p in enumerate(patterns) if is_matched(name, p))
            override = next(hits, len(patterns))
            is_spared = override == len(patterns) and name.endswith(UNDECAYED)
            key = override, self._rate_factor(name, layers), self.part_of(name), is_spared
            members.setdefault(key, []).append(name)
        opts = [override.opts for override in self.group_overrides]
        changes = [{k: tuple(v) if isinstance(v, list) else v for k, v in o.items()} for o in opts]
        found = []
        for key, own in sorted(members.items(), key=lambda item: item[0]):
            index, factor, part, is_spared = key
            settings = {**self.settings_of(part), **[*changes, {}][index]}
            if is_spared and "weight_decay" in settings:
                settings["weight_decay"] = 0.0
            if factor != 1.0:
                settings["lr"] *= factor
            found.append(Group(own, settings, index if index < len(patterns) else None))
        return found

    def part_of(self, name: str) -> str:
        """Which of several algorithms steps the parameter `name`, where there are several."""
        return ""

    def settings_of(self, part: str) -> dict[str, Any]:
        """What a group of `part` has."""
        return self.settings

    def of_model(self, d_model: int) -> Self:
        """The same with what `mup` must know of the model."""
        if self.mup is None:
            return self
        return self.replace(mup=self.mup.replace(width=d_model))

    def traits(self) -> OptimizerTraits:
        """Of what `build` makes, as far as its config tells."""
        return OptimizerTraits()

    def check_model(self, *, has_tied_head: bool, has_adapter: bool) -> None:
        """Raises ConfigError where `mup` does not go with the model."""
        if self.mup is None or not (has_tied_head or has_adapter):
            return
        problem = "trains adapters (train_module.lora), whose width is their rank"
        if has_tied_head:
            problem = "needs a head of its own; set model.tie_embeddings=false"
        raise ConfigError(problem, key=f"{OPTIM_KEY}.mup")

    def check_groups(self, names: Iterable[str]) -> None:
        """Check `group_overrides` against the names of the model's parameters and the settings, and
        that there are layers for `layer_lr_decay`.

        Raises:
            ConfigError: for a pattern that matches no parameter, an unknown setting, or no layers.
        """
        names, known, found = list(names), self.setting_names, ErrorList()
        if self.layer_lr_decay is not None and not count_layers(names):
            problem = f"no parameter is of a block ({BLOCK_NAMES}); leave it out"
            found.add(ConfigError(problem, key=f"{OPTIM_KEY}.layer_lr_decay"))
        for index, override in enumerate(self.group_overrides):
            key = f"{OPTIM_KEY}.group_overrides.{index}"
            for pattern in override.params:
                with found.collecting():
                    matching(f"{key}.params", pattern, names)
            for unknown in sorted(set(override.opts) - set(known)):
                problem = f"no setting {unknown!r}; known: {', '.join(known)}"
                found.add(ConfigError(problem, key=f"{key}.opts"))
        found.raise_any()

    def _rate_factor(self, name: str, layers: int) -> float:
        return layer_factor(name, layers, self.layer_lr_decay) * mup_factor(name, self.mup)

    def _check_overrides(self) -> None:
        """Each override's settings must be ones that `self` could have."""
        for index, override in enumerate(self.group_overrides):
            opts = override.opts
            for name in opts.keys() & set(self.__struct_fields__) - _NOT_SETTINGS:
                changed = {**self.to_dict(), "group_overrides": [], name: opts[name]}
                try:
                    convert(changed, type(self))
                except ConfigError as error:
                    raise ValueError(f"group_overrides.{index}.opts.{error}") from None


def is_matched(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the shell-style `patterns` matches `name`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
