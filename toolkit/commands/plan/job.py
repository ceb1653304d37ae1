"""What is planned: one step of a config on a layout, as one rank sees it."""

import itertools
import re
from typing import Any, NamedTuple

import msgspec

from toolkit.commands.plan.devices import Device
from toolkit.distributed.config import ActivationCheckpointingConfig, PipelineParallelConfig
from toolkit.distributed.launcher import offloads
from toolkit.distributed.layout import Layout
from toolkit.distributed.pipeline import plan_pipeline
from toolkit.models.config import TransformerConfig
from toolkit.models.parameters import (
    QuantisedLayers,
    TrainedParameters,
    flops_per_token,
    is_adapter,
)
from toolkit.models.shapes import Shape, head_flops_per_token, mixing_flops, used_weights
from toolkit.optim.base import Optimizer
from toolkit.optim.config import ClassOptimConfig, SGDConfig
from toolkit.optim.muon_config import MATRICES

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_AHEAD = re.compile(r"mtp\.(\d+)\.(.+)")
FP32 = 4
FACTORED, QUANTISED, BY_ROWS = "adafactor", "adamw_8bit", "normuon"

_PUT_OFF = 0.65
"""What a block holds for gradients of weights that are put off, of its activations: one gradient
for each linear layer and norm (0.6 to 0.7 of Llama's and OLMo 2's blocks)."""
_STATE = {
    "Adadelta": 2, "Adagrad": 1, "Adam": 2, "Adamax": 2, "AdamW": 2, "ASGD": 1, "NAdam": 2,
    "RAdam": 2, "RMSprop": 1, "SGD": 0,
}  # fmt: skip
"""Tensors like the weight that torch's optimizers keep, with their default options."""
_OUR_STATE = {
    "lion": 1,
    "skip_step_lion": 1,
    "schedule_free_adamw": 3,
    "noop": 0,
    FACTORED: 0,
    QUANTISED: 0,
}


class Parameter(NamedTuple):
    """One parameter of a block, or of what is outside of blocks."""

    name: str
    shape: Shape
    is_trained: bool
    by_muon: bool = False
    """Whether it is of matrices that Muon steps."""
    quantised: str | None = None
    """What a frozen base keeps of it, where that is less."""


class Stage(NamedTuple):
    """What one rank of a pipeline computes; the whole model where there is no pipeline."""

    place: int
    """Of its rank along pp."""
    layers: tuple[int, ...]
    has_embeddings: bool
    has_head: bool
    chunks: int = 1
    """Stages of the schedule that lie on this rank."""
    borders: int = 0
    """Stages before and behind them that lie on another rank."""


class Group(NamedTuple):
    """Blocks of a stage that are alike."""

    parameters: tuple[Parameter, ...]
    is_sparse: bool
    """Whether they have experts."""
    number: int
    repeated: int
    """Of `number`, those that activation checkpointing computes again."""

    @property
    def is_linear(self) -> bool:
        """Whether their attention is linear."""
        return any(p.name.endswith("attention.A_log") for p in self.parameters)

    @property
    def is_ahead(self) -> bool:
        """Whether they are for multi-token prediction."""
        return any(p.name == "projection.weight" for p in self.parameters)


class ModelParts:
    """The parameters of a model, block by block, and what they cost; told once for all layouts."""

    def __init__(
        self,
        model: TransformerConfig,
        parameters: TrainedParameters,
        sequence_length: int,
        optim: Optimizer | None = None,
        quantised: QuantisedLayers | None = None,
        *,
        has_dropout: bool = False,
    ) -> None:
        """`optim` says which matrices are Muon's; None: none. `has_dropout`: adapters do."""
        self.parameters, self.quantised, self.has_dropout = parameters, quantised, has_dropout
        self._model = model
        first_ahead = model.num_layers
        num_blocks = model.num_layers + model.num_mtp_layers
        found: dict[int, list[Parameter]] = {n: [] for n in range(num_blocks)}
        outside = []
        for name, info in parameters.infos.items():
            by_muon = optim is not None and info.is_trained and optim.part_of(name) == MATRICES
            if (match := _BLOCK.match(name)) is not None:
                few = None
                if quantised is not None and name.removesuffix(".weight") in quantised.layers:
                    few = quantised.kind
                part = Parameter(match[2], info.shape, info.is_trained, by_muon, few)
                found[int(match[1])].append(part)
            elif (match := _AHEAD.match(name)) is not None:
                part = Parameter(match[2], info.shape, info.is_trained, by_muon)
                found[first_ahead + int(match[1])].append(part)
            else:
                outside.append(Parameter(name, info.shape, info.is_trained, by_muon))
        kinds: dict[tuple[Parameter, ...], tuple[Parameter, ...]] = {}
        self.blocks = {layer: kinds.setdefault(tuple(p), tuple(p)) for layer, p in found.items()}
        """Parameters of each block, without `blocks.N.`; equal blocks are the same object. Those
        for multi-token prediction come after the last layer, with what belongs to them."""
        self.outside = tuple(outside)
        """Parameters of embeddings and head, by their full names."""
        self.adapted_tables = {
            f"{p.name.removesuffix('.weight').rpartition('.')[0]}.weight"
            for p in outside
            if p.is_trained and is_adapter(p.name)
        }
        """Of those, the names of tables to which an adapter adds."""
        self.sparse = frozenset(n for n in range(num_blocks) if model.has_experts(n))
        self.products_of = {
            block: float(sum(2 * used_weights(model, p.shape) for p in block if len(p.shape) > 1))
            for block in kinds
        }
        """FLOPs of one token forward in the matrix products of a block."""
        self.products = [self.products_of[self.blocks[n]] for n in range(num_blocks)]
        """The same of each block in turn."""
        self.scores = [
            mixing_flops(model, n, sequence_length) / 3 / sequence_length for n in range(num_blocks)
        ]
        """The same in attention's products of queries, keys and values."""
        self.head = head_flops_per_token(model) / 3 * (1 + model.num_mtp_layers)
        """The same in the output head, as often as it is used."""
        self.flops_per_token = float(flops_per_token(model, parameters, sequence_length))
        """To train one token, as metrics count them."""
        self._groups: dict[tuple[tuple[int, ...], int], list[Group]] = {}
        self._stages: dict[Any, list[Stage]] = {}
        self._distinct: dict[Any, list[Stage]] = {}

    def groups(self, layers: tuple[int, ...], interval: int) -> list[Group]:
        """The blocks of `layers`, of which every `interval`-th is computed again; 0: none."""
        key = layers, interval
        if key not in self._groups:
            found: dict[tuple[tuple[Parameter, ...], bool], list[int]] = {}
            for layer in layers:
                kind = self.blocks[layer], layer in self.sparse
                numbers = found.setdefault(kind, [0, 0])
                numbers[0] += 1
                numbers[1] += bool(interval) and layer % interval == 0
            self._groups[key] = [Group(*kind, *numbers) for kind, numbers in found.items()]
        return self._groups[key]

    def stages(self, layout: Layout) -> "list[Stage]":
        """What each rank along pp has."""
        key = layout.pp_config
        if key not in self._stages:
            self._stages[key] = _stages(self._model, layout)
        return self._stages[key]

    def distinct_stages(self, layout: Layout, interval: int, passes: int) -> "list[Stage]":
        """Of all stages that cost the same, the first with most microbatches at once."""
        key = layout.pp_config, interval, passes
        if key not in self._distinct:
            found: dict[Any, tuple[float, Stage]] = {}
            for stage in self.stages(layout):
                held = in_flight(layout.pp_config, stage, passes)
                alike = (
                    tuple(self.groups(stage.layers, interval)),
                    sum(self.scores[layer] for layer in stage.layers),
                    stage._replace(place=0, layers=()),
                    passes > held,
                )
                if alike not in found or held > found[alike][0]:
                    found[alike] = held, stage
            self._distinct[key] = [stage for _, stage in found.values()]
        return self._distinct[key]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A step of training, with all that decides what it costs."""

    model: TransformerConfig
    parts: ModelParts
    layout: Layout
    sequence_length: int
    rows: int
    """Rows of a microbatch on one rank."""
    passes: int
    """Microbatches of a step."""
    precision: str
    """`fp32` or `bf16`."""
    ac_config: ActivationCheckpointingConfig | None
    is_compiled: bool
    activation_offload: bool = False
    state_tensors: float
    """fp32 numbers that the optimizer keeps for each weight."""
    device: Device
    machine: int
    """Devices of one machine."""
    optimizer: str = ""
    """Its type; of `FACTORED` and `QUANTISED` the state is something else than such numbers."""
    teacher: int = 0
    """Parameters of a model that is there besides, and not trained; 0: there is none."""
    known: dict[Any, Any] = msgspec.field(default_factory=dict)
    """What has been told already of this layout, whatever the microbatch and the checkpointing."""

    @property
    def compute_bytes(self) -> int:
        """Of a number in the compute type."""
        return 2 if self.precision != "fp32" else FP32

    @property
    def teacher_bytes(self) -> float:
        """Of it on one rank: FSDP shards it in fp32, other engines keep it whole in the compute
        type."""
        if self.layout.is_fsdp:
            return FP32 * self.teacher / self.shard_ranks
        return float(self.compute_bytes * self.teacher)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on this rank: of its share of each row."""
        return self.chunk_tokens * self.layout.tp

    @property
    def chunk_tokens(self) -> int:
        """The same of its share of the residual stream, which tensor parallelism cuts too."""
        known = self.known
        if "length" not in known:
            known["length"] = self.layout.own_length(self.sequence_length)
        return self.rows * known["length"]

    @property
    def batch_tokens(self) -> int:
        """Tokens of the global batch."""
        return self.rows * self.passes * self.sequence_length * self.layout.batch_ranks

    @property
    def shard_ranks(self) -> int:
        """Ranks over which FSDP cuts what is no expert."""
        return self.layout.dp_shard * self.layout.cp

    @property
    def offloads(self) -> bool:
        return offloads(self.layout.dp_config)

    def outside_of(self, stage: Stage) -> tuple[Parameter, ...]:
        """Those outside of blocks that a stage holds: a tied head has a copy of the embeddings."""
        ends = []
        if stage.has_embeddings or (stage.has_head and self.model.tie_embeddings):
            ends.append("embeddings.")
        if stage.has_head:
            ends.append("head.")
        return tuple(p for p in self.parts.outside if ends and p.name.startswith(tuple(ends)))

    @property
    def stages(self) -> list[Stage]:
        """What each rank along pp has."""
        return self.parts.stages(self.layout)

    @property
    def distinct_stages(self) -> list[Stage]:
        """`stages` without those that cost what one before them costs, or less."""
        return self.parts.distinct_stages(self.layout, self._interval, self.passes)

    def groups(self, stage: Stage) -> list[Group]:
        """The blocks of a stage."""
        return self.parts.groups(stage.layers, self._interval)

    @property
    def _interval(self) -> int:
        config = self.ac_config
        if config is None or config.mode == "budget":
            return 0
        return config.block_interval if config.mode == "selected_blocks" else 1


def in_flight(config: PipelineParallelConfig | None, stage: Stage, passes: int) -> float:
    """Microbatches of `passes` whose activations of the whole stage a rank holds at once.

    1F1B: as many as there are stages from it to the last. Interleaved (Narayanan et al. 2021): of
    its chunks as many as are computed forward before the first comes back. ZBV: see `_in_v`.
    """
    if config is None:
        return 1.0
    if config.schedule == "1F1B":
        return float(min(passes, config.degree - stage.place))
    if config.schedule == "ZBVZeroBubble":
        return _in_v(config.degree, stage.place, passes)
    ahead = 2 * (config.degree - stage.place - 1) + (stage.chunks - 1) * config.degree + 1
    return min(passes * stage.chunks, ahead) / stage.chunks


def _in_v(degree: int, place: int, passes: int) -> float:
    """`in_flight` of ZBV (Qi et al. 2024) in the order that torch computes it, counted in chunks of
    half a stage. Each holds `_PUT_OFF` more between its backward and the gradients of its weights;
    at the end of a step, ranks put those off."""
    steady = min(passes, 2 * degree - 1 - place) + place + 1 + _PUT_OFF
    missing = max(2 * degree - 1 - passes, 0)  # its order is made for so many at least
    first, second = max(degree - missing, 0), max(place - missing, 0)
    end = first + second + _PUT_OFF * (min(place + 1, first) + second)
    return min(max(steady, end), (1 + _PUT_OFF) * 2 * passes) / 2


def type_of(optim: Any) -> str:
    """What `optim.type` says."""
    return str(type(optim).__struct_config__.tag)


def state_tensors_of(optim: Any) -> float:
    """fp32 numbers for each weight that the optimizer of a config keeps; two for one that is
    unknown."""
    if getattr(optim, "state_dtype", "fp32") == "bf16":
        return 1.0  # two of half the size
    if isinstance(optim, SGDConfig):
        return 1 if optim.momentum else 0
    if isinstance(optim, ClassOptimConfig):
        return _STATE.get(optim.target.rpartition(":")[2], 2)
    return _OUR_STATE.get(type_of(optim), 2)


def _stages(model: TransformerConfig, layout: Layout) -> list[Stage]:
    if layout.pp_config is None:
        blocks = tuple(range(model.num_layers + model.num_mtp_layers))
        return [Stage(0, blocks, has_embeddings=True, has_head=True)]
    pipeline = plan_pipeline(model, layout.pp_config)
    found = []
    for rank in range(layout.pp):
        own = pipeline.stages_of(rank)
        layers = tuple(itertools.chain.from_iterable(pipeline.layers[stage] for stage in own))
        beside = [n for stage in own for n in (stage - 1, stage + 1)]
        others = [n for n in beside if 0 <= n < pipeline.num_stages]
        found.append(
            Stage(
                rank,
                layers,
                has_embeddings=0 in own,
                has_head=rank == pipeline.last_rank,
                chunks=len(own),
                borders=sum(pipeline.rank_of(n) != rank for n in others),
            )
        )
    return found
