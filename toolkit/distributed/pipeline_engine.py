"""`PipelineEngine`: a model in stages over several ranks, run by torch's pipeline schedules.

A step is one call of a schedule, which sends activations and gradients of microbatches between the
stages. FSDP2 holds each stage's weights and reduces their gradients once, at the end of the step.
Without gradients the stages run in a wavefront: at tick t stage s has microbatch t - s.

Schedules are told all shapes (torch's static mode): what it would infer by running the stages on
uninitialised memory clears gradients. So there is one schedule for each shape of step.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import get_schedule_class

from toolkit.distributed.devices import compute_dtype
from toolkit.distributed.engine import (
    BuildOptimizer,
    Microbatch,
    Refuses,
    StepOutcome,
    added_sums,
)
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.pipeline import check_microbatches
from toolkit.distributed.pipeline_stage import Stage, StepTerms
from toolkit.distributed.shards import ShardSpec, local_tensor
from toolkit.distributed.stages import TIED, Stages
from toolkit.distributed.torch_engine import TorchEngine
from toolkit.models.loss import IGNORE_INDEX, LossSums
from toolkit.models.router import RouterSums, router_loss


class PipelineEngine(TorchEngine):
    module: Stages

    def __init__(
        self,
        environment: TrainingEnvironment,
        module: Stages,
        shards: Mapping[str, ShardSpec],
        build_optimizer: BuildOptimizer,
        *,
        recomputes: bool = False,
    ) -> None:
        """`recomputes`: blocks are checkpointed. Half a backward would then compute them again as
        the other half does, so backwards are whole."""

        def build_own(own: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
            # Patterns of groups may name layers of other stages; what is frozen is in no group.
            frozen = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
            return build_optimizer(dict.fromkeys(shards, frozen) | own)

        super().__init__(environment, module, shards, build_own)
        self._pipeline = module.pipeline
        self._recomputes = recomputes
        # An error comes with the schedule of all ranks, hundreds of lines of it.
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
        group = environment.group("pp")
        assert group is not None, "a pipeline has several ranks"
        self._group: dist.ProcessGroup = group
        self._rank = group.rank()
        self._has_last = self._rank == self._pipeline.last_rank
        self._terms = StepTerms()
        self._schedules: dict[tuple[int, int, int], Any] = {}
        weight = next(iter(self._local.values()))
        self._dtype = compute_dtype(environment.layout.precision) or weight.dtype
        self._sum_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        is_tied = module.config.tie_embeddings and self._pipeline.last_rank > 0
        self._ends = _open_ends(environment, self._pipeline.last_rank) if is_tied else None
        self.state_filled()

    def _prepare(self) -> nn.Module:
        return self.module  # no wrapper: torch's schedules call the stages

    def forward_backward(
        self,
        microbatches: Sequence[Microbatch],
        factor: float | Tensor,
        *,
        z_loss_multiplier: float = 0.0,
    ) -> LossSums:
        """As `Engine.forward_backward`; ranks without the last stage return zeros, but the routers'
        sums of all layers. Raises ConfigError: the schedule does not run with this number of
        microbatches."""
        terms, pipeline = self._terms, self._pipeline
        terms.factor, terms.z_loss_multiplier = factor, z_loss_multiplier
        rows, length = microbatches[0].labels.shape
        total = sum(len(microbatch.labels) for microbatch in microbatches)
        config = pipeline.config
        check_microbatches(config.schedule, config.degree, total, rows, length=length)
        whole = _joined(microbatches, rows)
        given = {"labels": whole.labels}
        if whole.document_ids is not None:
            given["document_ids"] = whole.document_ids
        schedule = self._schedule(rows, length, len(microbatches))
        schedule.step(
            *((whole.input_ids,) if self._rank == 0 else ()),
            target=whole.labels if self._has_last else None,
            return_outputs=False,
            **given,
        )
        self._complete_gradients()
        sums = self._collect_sums()
        terms.losses.clear()
        terms.routers.clear()
        return sums

    @torch.no_grad()
    def forward(self, batch: Microbatch) -> LossSums:
        """As `Engine.forward`; without the routers' sums, and zeros on ranks without the last
        stage."""
        parts = self._run_forward(batch.input_ids, batch.labels, batch.document_ids)
        if not parts:
            zero = torch.zeros((), dtype=self._sum_dtype, device=self.environment.device)
            return LossSums(zero, zero, zero)
        return added_sums([part._replace(router=None) for part in parts])

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        parts = self._run_forward(input_ids, None, None)
        if self._has_last:
            logits = torch.cat(parts)[:, : input_ids.shape[1]].contiguous()
        else:
            shape = (*input_ids.shape, self.module.config.vocab_size)
            logits = torch.empty(shape, dtype=self._dtype, device=self.environment.device)
        dist.broadcast(logits, group=self._group, group_src=self._pipeline.last_rank)
        return logits

    def step(self, max_grad_norm: float | None, refuses: Refuses | None = None) -> StepOutcome:
        outcome = super().step(max_grad_norm, refuses)
        self._copy_twin()
        return outcome

    def state_filled(self) -> None:
        super().state_filled()
        self._copy_twin()

    def _copy_twin(self) -> None:
        if (twins := self.module.twins) is not None:
            first, last = (local_tensor(twin.detach()) for twin in twins)
            last.copy_(first)

    def _complete_gradients(self) -> None:
        if (twins := self.module.twins) is not None:
            first, last = (local_tensor(twin.grad) for twin in twins)  # type: ignore[arg-type]
            first.add_(last)
            twins[1].grad = None
        elif self._ends is not None and TIED in self._local:
            dist.all_reduce(self.gradient_shards()[TIED], group=self._ends)
        super()._complete_gradients()

    def _schedule(self, rows: int, length: int, number: int) -> Any:
        """The schedule for `number` microbatches of `rows` rows of `length` tokens."""
        key = rows, length, number
        if key not in self._schedules:
            pipeline, device = self._pipeline, torch.device("meta")
            ids = torch.empty(rows, length, dtype=torch.int64, device=device)
            stream = self._stream(rows, length, device).requires_grad_()
            loss = torch.empty((), dtype=self._sum_dtype, device=device, requires_grad=True)
            stages = [
                Stage(
                    stage,
                    index,
                    self._terms,
                    has_whole_backward=self._recomputes,
                    num_stages=pipeline.num_stages,
                    device=self.environment.device,
                    input_args=stream if index else ids,
                    output_args=stream if index < pipeline.num_stages - 1 else loss,
                    group=self._group,
                )
                for index, stage in self.module.items()
            ]
            schedule = pipeline.config.schedule
            self._schedules[key] = get_schedule_class(schedule)(
                stages[0] if schedule == "1F1B" else stages,
                n_microbatches=number,
                loss_fn=lambda loss, labels: loss,
                scale_grads=False,
            )
        return self._schedules[key]

    def _collect_sums(self) -> LossSums:
        """The sums of a step; of routers those of all layers, by one all-reduce."""
        terms, moe = self._terms, self.module.config.moe
        zero = torch.zeros((), dtype=self._sum_dtype, device=self.environment.device)
        sums = added_sums(terms.losses) if terms.losses else LossSums(zero, zero, zero)
        if moe is None:
            return sums
        layers = list(self.module.config.moe_layers)
        packed = zero.new_zeros(2 + len(layers) * moe.num_experts)
        load = packed[2:].view(len(layers), moe.num_experts)
        for stage, parts in terms.routers.items():
            balance, z, own = (torch.stack(values).sum(0) for values in zip(*parts, strict=True))
            packed[0] += balance
            packed[1] += z
            first = layers.index(next(n for n in self._pipeline.layers[stage] if n in layers))
            load[first : first + len(own)] = own
        dist.all_reduce(packed, group=self._group)
        router = RouterSums(packed[0], packed[1], load)
        if terms.losses:
            loss = sums.ce + terms.z_loss_multiplier * sums.z + router_loss(router, moe)
            sums = sums._replace(loss=loss)
        return sums._replace(router=router)

    def _run_forward(
        self, input_ids: Tensor, labels: Tensor | None, document_ids: Tensor | None
    ) -> list[Any]:
        """What the last stage returns for each of about as many parts as there are ranks, so that
        all of them work; nothing on ranks that do not have it."""
        pipeline, own = self._pipeline, dict(self.module.items())
        rows = -(-len(input_ids) // pipeline.config.degree)
        parts = input_ids.split(rows)
        given = {"labels": labels, "document_ids": document_ids}
        options = [
            {
                name: tensor.split(rows)[index]
                for name, tensor in given.items()
                if tensor is not None
            }
            for index in range(len(parts))
        ]
        results: list[Any] = []
        streams: dict[int, Tensor] = {}  # by the stage that has just made it
        for tick in range(len(parts) + pipeline.num_stages - 1):
            active = [s for s in range(pipeline.num_stages) if 0 <= tick - s < len(parts)]
            exchanges: list[dist.P2POp] = []
            received: dict[int, Tensor] = {}
            for stage in active[1 if active[0] == 0 else 0 :]:
                source, here = pipeline.rank_of(stage - 1), pipeline.rank_of(stage)
                if source == here == self._rank:
                    received[stage] = streams.pop(stage - 1)
                elif source == self._rank:
                    stream = streams.pop(stage - 1)
                    send = dist.P2POp(dist.isend, stream, group=self._group, group_peer=here)
                    exchanges.append(send)
                elif here == self._rank:
                    stream = received[stage] = self._stream(*parts[tick - stage].shape)
                    receive = dist.P2POp(dist.irecv, stream, group=self._group, group_peer=source)
                    exchanges.append(receive)
            for work in dist.batch_isend_irecv(exchanges) if exchanges else ():
                work.wait()
            for stage in (s for s in active if s in own):
                part = tick - stage
                result = own[stage](received.get(stage, parts[part]), **options[part])
                if stage == pipeline.num_stages - 1:
                    results.append(result)
                else:
                    streams[stage] = result[0].contiguous()
        return results

    def _stream(self, rows: int, length: int, device: torch.device | None = None) -> Tensor:
        """Room for the residual stream between two stages, of a rank's part of the positions."""
        own, width = self.environment.layout.own_length(length), self.module.config.d_model
        return torch.empty(
            rows, own, width, dtype=self._dtype, device=device or self.environment.device
        )


def _joined(microbatches: Sequence[Microbatch], rows: int) -> Microbatch:
    """All rows, and behind them rows without targets where the last microbatch has fewer."""
    missing = rows - len(microbatches[-1].labels)
    joined: list[Any] = []
    fields = zip(*(m[:3] for m in microbatches), strict=True)  # adapters have no pipeline
    for parts, blank in zip(fields, (0, IGNORE_INDEX, 0), strict=True):
        if parts[0] is None:
            joined.append(None)
            continue
        filled = [*parts, parts[0].new_full((missing, parts[0].shape[1]), blank)]
        joined.append(torch.cat(filled if missing else parts))
    return Microbatch(*joined)


def _open_ends(environment: TrainingEnvironment, last: int) -> dist.ProcessGroup | None:
    """The group of the first stage's rank and the last one's in this rank's pipeline; None on other
    ranks. All ranks open the groups of all pipelines."""
    layout = environment.layout
    if layout.pp == 2:
        return environment.group("pp")
    step = layout.world_size // layout.pp  # between the ranks of a pipeline
    ends = [[first, first + last * step] for first in range(step)]
    group, _ = dist.new_subgroups_by_enumeration(ends, timeout=environment.timeout)
    return group
