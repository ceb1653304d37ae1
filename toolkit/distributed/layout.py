"""How the ranks of a run share its work: one pure function from launcher and config to `Layout`.

`accelerate launch` speaks through its FSDP and DeepSpeed variables; `train_module.dp_config` speaks
under `torchrun`. If both speak and disagree it is an error that names both. Silence means DDP on
several processes and `single` on one. No torch here: `--dry-run` asks too.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from toolkit.config import Config
from toolkit.distributed.config import (
    PARALLEL_FIELDS,
    ContextParallelConfig,
    DataParallelConfig,
    EngineName,
    ExpertParallelConfig,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.distributed.launcher import (
    Choice,
    check_data_axes,
    check_deepspeed,
    deepspeed_notices,
    is_silent_accelerate,
    launcher_axes,
    launcher_choice,
    launcher_notices,
    world_size_of,
)
from toolkit.distributed.precision import Precision, choose_precision
from toolkit.errors import ConfigError
from toolkit.parents import is_accelerated
from toolkit.wording import count

DP_CONFIG = "train_module.dp_config"
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Of the mesh of all ranks, from the one whose ranks lie farthest apart to neighbours."""
EXPERT_AXES = ("pp", "dp_replicate", "efsdp", "ep")
"""Of the same ranks, as experts see them: dp_shard x cp x tp = efsdp x ep."""


def padded_length(length: int, *, cp: int = 1, tp: int = 1, stretches: int = 1) -> int:
    """Length of a row, made longer so that ranks have equal parts of it: each of `cp` ranks as many
    equal `stretches`, and each of the `tp` ranks that share its part further as many positions."""
    unit = math.lcm(cp * stretches, cp * tp)
    return -(-length // unit) * unit


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What each rank holds and reads. Degrees multiply to the number of ranks, without `ep`."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Copies of the weights that are trained on distinct rows."""
    dp_shard: int = 1
    """Ranks with distinct rows that share one copy of the weights."""
    cp: int = 1
    """Ranks that share the positions of a row."""
    tp: int = 1
    """Ranks that share each matrix product."""
    ep: int = 1
    """Ranks that share the experts of a layer, out of dp_shard x cp x tp; `check_sizes` refuses one
    that does not divide them."""
    backend: Literal["torch", "deepspeed"] = "torch"
    zero_stage: int = 0
    """DeepSpeed's stage; 0 for torch."""
    is_fsdp: bool = False
    """Whether FSDP2 holds the weights, on one rank too."""
    precision: Precision = "auto"
    """`auto` only before the hardware is known (`--dry-run`)."""
    origin: str = "default"
    """Who decided: the launcher, the config, or nobody (default)."""
    dp_config: DataParallelConfig = DataParallelConfig(name="single")
    """The configs that ask for this layout, whatever the launcher; this one and the next four."""
    tp_config: TensorParallelConfig | None = None
    cp_config: ContextParallelConfig | None = None
    pp_config: PipelineParallelConfig | None = None
    ep_config: ExpertParallelConfig | None = None
    notices: tuple[str, ...] = ()
    """Lines to show once at the start."""

    @property
    def name(self) -> EngineName:
        """The data-parallel engine, as configs and receipts spell it."""
        if self.zero_stage:
            return f"zero{self.zero_stage}"  # type: ignore[return-value]
        if self.is_fsdp:
            return "hsdp" if self.dp_replicate > 1 else "fsdp"
        return "ddp" if self.world_size > 1 else "single"

    @property
    def description(self) -> str:
        """The engine and the degrees of all that is not data parallelism: `fsdp, tp 2, cp 2`."""
        axes = {axis: getattr(self, axis) for axis in ("pp", "cp", "tp", "ep")}
        return ", ".join(
            (self.name, *(f"{a} {degree}" for a, degree in axes.items() if degree > 1))
        )

    @property
    def parallel_configs(self) -> dict[str, Any]:
        """`PARALLEL_FIELDS` as plain JSON types: what asks for this layout again."""
        return {name: msgspec.to_builtins(getattr(self, name)) for name in PARALLEL_FIELDS}

    @property
    def shape(self) -> dict[str, int]:
        """Degree of each of `AXES`."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def expert_shape(self) -> dict[str, int]:
        """Degree of each of `EXPERT_AXES`."""
        efsdp = self.dp_shard * self.cp * self.tp // self.ep
        return dict(zip(EXPERT_AXES, (self.pp, self.dp_replicate, efsdp, self.ep), strict=True))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape.values())

    @property
    def batch_ranks(self) -> int:
        """Shares into which the rows of a global batch are cut."""
        return self.dp_replicate * self.dp_shard

    @property
    def sums_gradients(self) -> bool:
        """Whether the engine adds gradients of all ranks up, where it averages them otherwise."""
        return max(self.pp, self.tp, self.ep) > 1

    @property
    def grad_ranks(self) -> int:
        """Ranks over which the engine averages gradients; 1 where it adds them up."""
        return 1 if self.sums_gradients else self.batch_ranks * self.cp

    @property
    def _pipeline(self) -> PipelineParallelConfig:
        return self.pp_config or PipelineParallelConfig(degree=self.pp)

    def role(self, rank: int) -> str:
        """What `rank` has of the model and the rows besides its share of the batch: `stage 2 of 4,
        tp 1 of 2`; empty under data parallelism alone."""
        place, parts = self.place(rank), []
        if self.pp > 1:
            stages = self._pipeline.stages_of(place["pp"])
            numbers = " and ".join(str(stage + 1) for stage in stages)
            parts.append(f"stage{'s' * (len(stages) > 1)} {numbers} of {self._pipeline.stages}")
        parts += [
            f"{axis} {place[axis] + 1} of {size}"
            for axis in ("cp", "tp")
            if (size := self.shape[axis]) > 1
        ]
        return ", ".join(parts)

    def own_length(self, length: int) -> int:
        """Positions of a row of `length` that a rank has between blocks. The row is padded where
        ranks that share its positions would have unequal numbers of them."""
        stretches = 1 if self.cp_config is None else self.cp_config.stretches
        whole = padded_length(length, cp=self.cp, tp=self.tp, stretches=stretches)
        return whole // (self.cp * self.tp)

    def batch_rank(self, rank: int) -> int:
        """Which share of the rows `rank` reads; all ranks of a cp, tp or pp group read the same."""
        place = self.place(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]

    def owns_loss(self, rank: int) -> bool:
        """Whether sums over targets that `rank` reports count: of the last stage, and once for each
        tp group. (Each cp rank has the sum over its own positions.)"""
        place = self.place(rank)
        return place["pp"] == self._pipeline.last_rank and place["tp"] == 0

    def owns_rows(self, rank: int) -> bool:
        """Whether sums over whole rows that `rank` reports count: once for each share of rows."""
        return self.owns_loss(rank) and self.place(rank)["cp"] == 0

    def place(self, rank: int, *, experts: bool = False) -> dict[str, int]:
        """The coordinates of `rank` in the mesh of `AXES`, or of `EXPERT_AXES`."""
        place = {}
        for axis, size in reversed((self.expert_shape if experts else self.shape).items()):
            rank, place[axis] = divmod(rank, size)
        return place

    def ranks_along(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axes` alone, itself among them."""
        experts = not set(axes) <= set(AXES)
        here = self.place(rank, experts=experts)
        others = (self.place(other, experts=experts) for other in range(self.world_size))
        return tuple(
            other
            for other, there in enumerate(others)
            if all(there[axis] == here[axis] for axis in here if axis not in axes)
        )


def fewest_ranks(train_module: Any) -> int:
    """As many as its degrees of tp, cp and pp multiply to."""
    configs = (getattr(train_module, f"{axis}_config", None) for axis in ("tp", "cp", "pp"))
    return math.prod(config.degree for config in configs if config is not None)


def layout_of(train_module: Any, environ: Mapping[str, str]) -> Layout:
    """`resolve_layout` for a config of a train module."""
    configs = {name: getattr(train_module, name, None) for name in PARALLEL_FIELDS}
    return resolve_layout(train_module.precision, configs.pop("dp_config"), environ, **configs)


def resolve_layout(
    precision: Precision,
    dp_config: DataParallelConfig | None,
    environ: Mapping[str, str],
    **axes: Config | None,
) -> Layout:
    """The layout for `train_module.precision`, `train_module.dp_config` and the other `axes`
    (`tp_config`, `cp_config`, `pp_config`, `ep_config`) under this launcher. Raises ConfigError:
    launcher and config disagree, the world size does not fit, or the launcher asks for something we
    do not run (FSDP1, fp16)."""
    world_size = world_size_of(environ)
    launched = launcher_choice(environ)
    configured = _config_choice(dp_config)
    asked = _merged_axes(launcher_axes(environ), axes)
    degrees = {name.removesuffix("_config"): config.degree for name, config in asked.items()}
    cuts = [axis for axis in ("tp", "pp", "ep") if axis in degrees]
    if launched and configured:
        choice = _merge(launched, configured)
    else:
        silence: EngineName = "fsdp" if cuts else "ddp" if world_size > 1 else "single"
        choice = launched or configured or Choice(DataParallelConfig(name=silence), "default")
    config = choice.config
    is_fsdp, is_zero = config.name in ("fsdp", "hsdp"), config.name.startswith("zero")
    if cuts and not is_fsdp:
        raise ConfigError(
            f"{choice.origin} asks for the engine {config.name}, which does not go with "
            f"{' and '.join(f'train_module.{axis}_config' for axis in cuts)}; use fsdp or hsdp"
        )
    ranks = _data_ranks(degrees, world_size)
    if config.name == "ddp" and world_size == 1:
        config = config.replace(name="single")
    if config.name == "single" and world_size > 1:
        raise ConfigError(
            f"{choice.origin} asks for the engine single, which is one process, not {world_size}; "
            "use ddp, or start one process"
        )
    replicas, shards = _mesh(choice, ranks)
    check_data_axes(environ, replicas, shards)
    if config.name == "hsdp" and replicas > 1:
        config = config.replace(num_replicas=replicas, shard_degree=shards)
    elif is_fsdp:
        config = config.replace(name="fsdp", num_replicas=None, shard_degree=None)
    answer, notices = choose_precision(precision, dp_config, choice, environ)
    if cuts and choice.origin == "default" and is_silent_accelerate(environ):
        names = " and ".join(f"train_module.{axis}_config" for axis in cuts)
        notices = (*notices, f"accelerate launch names no engine; with {names} it is fsdp, not ddp")
    configs: dict[str, Any] = asked
    return Layout(
        **degrees,
        dp_replicate=replicas,
        dp_shard=shards,
        backend="deepspeed" if is_zero else "torch",
        zero_stage=int(config.name[4:]) if is_zero else 0,
        is_fsdp=is_fsdp,
        precision=answer,
        origin=choice.origin,
        dp_config=config,
        **configs,
        notices=(*notices, *choice.notices, *launcher_notices(environ)),
    )


def _merged_axes(
    launched: Mapping[str, Config], configured: Mapping[str, Config | None]
) -> dict[str, Any]:
    """What launcher and config ask for besides data parallelism; degree 1 is silence."""
    asked = dict(launched)
    for name, config in configured.items():
        if config is None:
            continue
        degree = {"degree": getattr(config, "degree")}  # noqa: B009 (each of them has one)
        theirs = launched.get(name)
        if theirs is not None and theirs not in (config, type(config)(**degree)):
            raise ConfigError(
                f"accelerate launch says {name} {theirs.to_dict()}, train_module.{name} says "
                f"{config.to_dict()}; keep one of them"
            )
        asked[name] = config
    return {name: config for name, config in asked.items() if getattr(config, "degree") > 1}  # noqa: B009


def _data_ranks(degrees: Mapping[str, int], world_size: int) -> int:
    """Ranks that are left for data parallelism."""
    taken = {axis: degree for axis, degree in degrees.items() if axis != "ep"}
    unit = math.prod(taken.values())
    if world_size % unit:
        product = " x ".join(f"{axis} {degree}" for axis, degree in taken.items())
        below = world_size // unit * unit
        works = f"{below} or {below + unit}" if below else str(unit)
        raise ConfigError(
            f"{product}{f' = {unit} ranks' if len(taken) > 1 else ''} does not divide the "
            f"{count(world_size, 'process')} of this run; start {works} processes "
            "(--processes, or torchrun --nproc-per-node; --world-size of a plan), or set "
            + " and ".join(f"train_module.{axis}_config" for axis in taken)
            + " to null"
        )
    return world_size // unit


def _config_choice(config: DataParallelConfig | None) -> Choice | None:
    if config is None:
        return None
    is_zero = config.name.startswith("zero")
    deepspeed = config.deepspeed_config
    where = f"{DP_CONFIG}.deepspeed_config"
    check_deepspeed(deepspeed, where)
    zero = deepspeed.get("zero_optimization", {})  # an object: checked
    stage = zero.get("stage", "auto")
    if is_zero and str(stage) not in ("auto", config.name.removeprefix("zero")):
        raise ConfigError(
            f"{where} says stage {stage}, {DP_CONFIG}.name says {config.name}; keep one of them"
        )
    if is_zero and config.cpu_offload:
        parts = ("optimizer", "param") if config.name == "zero3" else ("optimizer",)
        # What its JSON says already stays.
        zero = {**{f"offload_{part}": {"device": "cpu"} for part in parts}, **zero}
        deepspeed = {**deepspeed, "zero_optimization": zero}
        config = config.replace(cpu_offload=False, deepspeed_config=deepspeed)
    return Choice(
        config.replace(param_dtype=None), DP_CONFIG, notices=deepspeed_notices(deepspeed, where)
    )


def _merge(launched: Choice, configured: Choice) -> Choice:
    """Both name the same engine: each setting comes from the side that departs from its default
    (launchers always state theirs); two departures that differ are an error."""
    name, asked = launched.config.name, configured.config.name
    if name != asked:
        if launched.origin == "--engine":
            raise ConfigError(
                f"two engines asked for: --engine says {name}, {configured.origin} says {asked}; "
                "keep one of them"
            )
        variable = f"ACCELERATE_USE_{'DEEPSPEED' if name.startswith('zero') else 'FSDP'}"
        left = f"; or `unset {variable}`, which no `accelerate launch` of this process set"
        raise ConfigError(
            f"two engines asked for: {launched.origin} says {name}, {configured.origin} "
            f"says {asked}; remove {DP_CONFIG} or launch with {asked}.yaml (`toolkit recipes copy "
            f"{asked}.yaml`){'' if is_accelerated() else left}"
        )
    default = DataParallelConfig(name=name)
    merged = {}
    for field in DataParallelConfig.__struct_fields__:
        theirs, ours, unset = (
            getattr(config, field) for config in (launched.config, configured.config, default)
        )
        if ours not in (unset, theirs) and theirs != unset:
            raise ConfigError(
                f"{launched.origin} says {field} {theirs}, {DP_CONFIG}.{field} says {ours}; "
                "keep one of them"
            )
        merged[field] = theirs if ours == unset else ours
    notices = tuple(dict.fromkeys((*launched.notices, *configured.notices)))
    return Choice(DataParallelConfig(**merged), launched.origin, notices)


def _mesh(choice: Choice, ranks: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard) for the choice; their product is `ranks`, all with distinct rows."""
    config = choice.config
    if config.name in ("single", "ddp"):
        return ranks, 1
    if config.name != "hsdp":
        return 1, ranks
    replicas = config.num_replicas
    if replicas is None:
        replicas = ranks // config.shard_degree if config.shard_degree else 2
    shards = config.shard_degree or ranks // replicas
    if replicas * shards != ranks:
        works = [n for n in range(1, ranks + 1) if ranks % n == 0]
        replicas_that_work = min(works, key=lambda n: abs(n - replicas))
        raise ConfigError(
            f"{choice.origin}: hsdp mesh num_replicas {replicas} x shard_degree {shards} does not "
            f"fit {count(ranks, 'rank')} of data parallelism; use num_replicas "
            f"{replicas_that_work} and shard_degree {ranks // replicas_that_work}, or fsdp"
        )
    return replicas, shards
