"""Configs of parallelism and activation checkpointing."""

from typing import Any, Literal

import msgspec

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive
from toolkit.distributed.engines import EngineName

DType = Literal["float32", "bfloat16"]
LogRanks = Literal["rank0", "local_rank0", "all"]
WrappingStrategy = Literal["blocks", "full", "fine_grained"]

ContextStyle = Literal["allgather", "ulysses", "ring"]
SavedOp = Literal["attention", "matmuls", "every_second_matmul"]
PipelineSchedule = Literal["1F1B", "Interleaved1F1B", "ZBVZeroBubble"]

PARALLEL_FIELDS = ("dp_config", "tp_config", "cp_config", "pp_config", "ep_config")
"""Of the train module's config, and of what a run records of them."""

_FSDP_ONLY = ("reduce_dtype", "reshard_after_forward", "wrapping_strategy", "prefetch_factor")
_FORMER: dict[str, Any] = {"reshard_after_forward": True, "wrapping_strategy": "blocks"}
"""Defaults of release 0.1.0, which the records of its runs have for every engine."""


class DataParallelConfig(Config, kw_only=True):
    """Which engine runs, when the launcher does not say (`torchrun`, or no launcher at all)."""

    name: EngineName
    """`ddp` replicates, `fsdp` shards (FSDP2), `hsdp` shards inside groups and replicates over
    them, `zero1`/`zero2`/`zero3` are DeepSpeed's stages."""
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Compute type: an alias of `train_module.precision` (bfloat16 = bf16, float16 = fp16,
    float32 = fp32)."""
    reduce_dtype: DType = "float32"
    """Type of gradient reductions under `fsdp` and `hsdp`."""
    num_replicas: int | None = None
    """`hsdp` only: number of replica groups; default 2."""
    shard_degree: int | None = None
    """`hsdp` only: ranks per shard group; default: world size / num_replicas."""
    reshard_after_forward: bool | Literal["auto"] = "auto"
    """`fsdp`, `hsdp`: free gathered weights after the forward of each block but the last (less
    memory, two gathers in each microbatch). False: keep them to the last backward of a step, of
    which there is one gather. `auto`: keep them on a GPU of whose memory they take a tenth at most.
    Pipelines always keep them."""
    wrapping_strategy: WrappingStrategy = "full"
    """`fsdp`, `hsdp`: what is gathered, and reduced, at once. `blocks`: a block, and all that is
    outside of blocks; `full`: a head that is not tied by itself too, while blocks are computed;
    `fine_grained`: besides, attention and feed-forward of each block by themselves (less memory,
    more and smaller gathers)."""
    prefetch_factor: int = 0
    """`fsdp`, `hsdp`: gather this many units ahead of the one that is computed, forward and
    backward; 0: FSDP2's own choice, none forward and one backward; with `ep_config`, two."""
    cpu_offload: bool = False
    """Keep the optimizer state in host memory, and the sharded weights too where the engine shards
    them (`fsdp`, `hsdp`, `zero3`)."""
    deepspeed_config: dict[str, Any] = msgspec.field(default_factory=dict)
    """`zero1`, `zero2`, `zero3`: further settings, as in DeepSpeed's own JSON."""

    def __post_init__(self) -> None:
        check_positive(self, "num_replicas", "shard_degree")
        check_not_negative(self, "prefetch_factor")
        if self.name not in ("fsdp", "hsdp"):
            plain = DataParallelConfig(name="fsdp")
            known = {name: (getattr(plain, name), _FORMER.get(name)) for name in _FSDP_ONLY}
            given = [name for name, values in known.items() if getattr(self, name) not in values]
            if given:
                raise ValueError(f"{' and '.join(given)} needs fsdp or hsdp, not {self.name}")
        if self.name != "hsdp" and (self.num_replicas or self.shard_degree):
            raise ValueError("num_replicas and shard_degree need name: hsdp")
        if self.cpu_offload and self.name in ("single", "ddp"):
            raise ValueError(f"cpu_offload needs fsdp, hsdp or a ZeRO stage, not {self.name}")
        if self.deepspeed_config and not self.name.startswith("zero"):
            raise ValueError(f"deepspeed_config needs zero1, zero2 or zero3, not {self.name}")


class TensorParallelConfig(Config, kw_only=True):
    """Share each matrix product, the vocabulary and the positions between blocks (Megatron-LM's
    tensor and sequence parallelism, Korthikanti et al. 2022)."""

    degree: int
    """Ranks of a group: neighbours, best on one machine."""

    def __post_init__(self) -> None:
        check_positive(self, "degree")


class ContextParallelConfig(Config, kw_only=True):
    """Share the positions of each row: for rows that do not fit one rank."""

    degree: int
    """Ranks of a group."""
    style: ContextStyle = "allgather"
    """How queries reach the keys of other ranks. `allgather`: keys and values of all ranks are
    gathered; `ulysses`: heads are exchanged for positions (DeepSpeed-Ulysses, Jacobs et al. 2023);
    `ring`: keys and values travel from rank to rank (Liu et al. 2023)."""
    load_balance: Literal["head_tail", "none"] = "head_tail"
    """Which positions a rank has: a part from the front of the row and its mirror image from the
    back, so that each has as many keys to look at; `none`: one stretch, as `ulysses` always has."""

    def __post_init__(self) -> None:
        check_positive(self, "degree")

    @property
    def stretches(self) -> int:
        """Of a row that each rank has."""
        return 2 if self.load_balance == "head_tail" and self.style != "ulysses" else 1


class PipelineParallelConfig(Config, kw_only=True):
    """Share the layers: each rank has a stage, and microbatches pass through all of them."""

    degree: int
    """Ranks of a pipeline."""
    schedule: PipelineSchedule = "1F1B"
    """Order of forward and backward of the microbatches. `1F1B`: one stage a rank (Narayanan et
    al. 2019); `Interleaved1F1B`: two a rank, and a smaller bubble (Narayanan et al. 2021);
    `ZBVZeroBubble`: two a rank, in a V, and next to no bubble (Qi et al. 2023)."""
    split_points: tuple[int, ...] | None = None
    """First layer of each stage but the first; null: stages of equal cost, embeddings and head
    counted."""

    def __post_init__(self) -> None:
        check_positive(self, "degree")
        points = self.split_points
        if points is not None and list(points) != sorted({p for p in points if p > 0}):
            raise ValueError(f"split_points must rise and be positive, not {list(points)}")
        if points is not None and self.degree > 1 and len(points) != self.stages - 1:
            raise ValueError(
                f"{self.schedule} on {self.degree} ranks has {self.stages} stages and so "
                f"{self.stages - 1} split_points, not {len(points)}"
            )

    @property
    def stages(self) -> int:
        """Of all ranks together."""
        return self.degree * (1 if self.schedule == "1F1B" else 2)

    def rank_of(self, stage: int) -> int:
        """The rank of the pipeline that has this stage."""
        turn, place = divmod(stage, self.degree)
        return self.degree - 1 - place if self.schedule == "ZBVZeroBubble" and turn else place

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that this rank of the pipeline has, in order."""
        return tuple(stage for stage in range(self.stages) if self.rank_of(stage) == rank)

    @property
    def last_rank(self) -> int:
        """The rank that has the head, and so the loss."""
        return self.rank_of(self.stages - 1)


class ExpertParallelConfig(Config, kw_only=True):
    """Share the experts of each layer: tokens are sent to the ranks of their experts."""

    degree: int
    """Ranks of a group; they are taken from those that share rows and weights, not added."""

    def __post_init__(self) -> None:
        check_positive(self, "degree")


class ActivationCheckpointingConfig(Config, kw_only=True):
    """Recompute activations in backward instead of keeping them."""

    mode: Literal["full", "selected_blocks", "selected_ops", "budget"] = "full"
    """`full`: every block; `selected_blocks`: every `block_interval`-th; `selected_ops`: all but
    the results of `saved_ops`; `budget`: torch.compile's partitioner keeps what fits `budget`
    (needs `compile_model`)."""
    block_interval: int = 2
    """`selected_blocks`: checkpoint block 0, then every this many."""
    saved_ops: tuple[SavedOp, ...] = ("attention", "every_second_matmul")
    """`selected_ops`: what is kept, not computed again. `attention`: its output; `matmuls`: the
    output of each matrix product; `every_second_matmul`: of the first, third, fifth of a block."""
    budget: float = 0.5
    """`budget`: fraction of activation memory to keep, 0 (recompute all) to 1 (keep all)."""

    def __post_init__(self) -> None:
        check_positive(self, "block_interval")
        for name, mode, default in (
            ("block_interval", "selected_blocks", 2),
            ("budget", "budget", 0.5),
            ("saved_ops", "selected_ops", ("attention", "every_second_matmul")),
        ):
            if self.mode != mode and getattr(self, name) != default:
                raise ValueError(f"{name} goes with mode: {mode}, not {self.mode}")
        if not self.saved_ops:
            raise ValueError("saved_ops: empty; use mode: full")
        if {"matmuls", "every_second_matmul"} <= set(self.saved_ops):
            raise ValueError("saved_ops: matmuls and every_second_matmul exclude each other")
        if not 0.0 <= self.budget <= 1.0:
            raise ValueError(f"budget must lie between 0 and 1, not {self.budget}")


class Float8Config(Config, kw_only=True):
    """Matrix products of linear layers in 8 bits, through torchao; weights stay fp32."""

    recipe: Literal["tensorwise", "rowwise", "mxfp8"] = "tensorwise"
    """What numbers share a scale. `tensorwise`: a tensor (fastest; NVIDIA sm_89 and newer);
    `rowwise`: a row (sm_90 and newer); `mxfp8`: 32 numbers of a row (sm_100 and newer)."""
    filter: tuple[str, ...] | None = None
    """Shell-style patterns over names of linear layers (`blocks.0.attention.query`) that are left
    out. Null: those that are not faster in 8 bits, too small or of widths that the kernels do not
    take; `[]`: none. The head, routers and stacked experts are never in 8 bits."""
    fsdp_all_gather: bool = False
    """`fsdp`, `tensorwise`: ranks gather weights in 8 bits too."""
    emulate: bool = False
    """Round to 8 bits and multiply in fp32: the same numbers, slowly, on any device."""

    def __post_init__(self) -> None:
        if self.fsdp_all_gather and self.recipe != "tensorwise":
            raise ValueError(f"fsdp_all_gather needs recipe: tensorwise, not {self.recipe}")
