"""What differs between engines inside one optimizer step, behind one interface.

`prepare_engine` makes one per run: a `TorchEngine`, or a `DeepSpeedEngine` for ZeRO. Per step the
train module calls `forward_backward` with all microbatches and then `step`; checkpointing reads and
fills `state_tensors`.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.shards import ShardSpec
from toolkit.distributed.whole_matrices import Held, WholeMatrices
from toolkit.errors import ConfigError
from toolkit.metrics.norms import layer_norms, layer_of
from toolkit.models.init import canonical_parameters
from toolkit.models.loss import LossSums, MTPSums
from toolkit.models.router import added_routers
from toolkit.optim.base import traits_of

Part = TypeVar("Part")
BuildOptimizer = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]

Refuses = Callable[[torch.Tensor], torch.Tensor]
"""Whether a step with this gradient norm is left out: 0-d to 0-d bool, the same on every rank."""


class Microbatch(NamedTuple):
    """What one forward is given, on the device, each (rows, seq)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor | None = None
    dropout_keys: torch.Tensor | None = None

    def split(self, rows: int) -> "list[Microbatch]":
        """Microbatches of `rows` rows, the last of what is left."""
        given = {k: t.split(rows) for k, t in self._asdict().items() if t is not None}
        parts = zip(*given.values(), strict=True)
        return [Microbatch(**dict(zip(given, part, strict=True))) for part in parts]

    @property
    def options(self) -> dict[str, torch.Tensor]:
        """What of it only some models take."""
        return {} if self.dropout_keys is None else {"dropout_keys": self.dropout_keys}


class StepOutcome(NamedTuple):
    grad_norm: torch.Tensor
    """Global L2 norm before clipping, 0-d."""
    skipped: torch.Tensor
    """1.0 when the step was not applied: the norm was not finite, or `refuses` said so; 0-d."""


class Engine(ABC):
    """One engine at work on one model."""

    model: nn.Module
    """What to call for a forward: the engine's wrapper, or the module itself."""
    module: nn.Module
    """The bare module, with canonical parameter names."""
    optimizer: torch.optim.Optimizer
    """Its `param_groups` carry the learning rates."""
    is_first_step = False
    """Set before the first step of a run, not of one that continues."""
    _shows_average = False

    def __init__(
        self, environment: TrainingEnvironment, module: nn.Module, shards: Mapping[str, ShardSpec]
    ) -> None:
        self.environment = environment
        self.module = self.model = module
        self.shards = shards
        self._named: dict[str, Any] = canonical_parameters(module)
        self._stand_ins: list[torch.Tensor] = []
        """Whose state is there for checkpoints to fill; no step of training has made it."""

    def forward_backward(
        self,
        microbatches: Sequence[Microbatch],
        factor: float | torch.Tensor,
        *,
        z_loss_multiplier: float = 0.0,
    ) -> LossSums:
        """Add the gradients of `factor` times the loss of all `microbatches`, averaged over
        `grad_ranks`; the sums over their targets, detached.

        A non-finite loss makes every gradient NaN, so that all ranks see it in the global norm and
        skip together.
        """
        parts: list[LossSums] = []
        for index, microbatch in enumerate(microbatches):
            with self._exchanging(is_last=index == len(microbatches) - 1):
                with self._autocast():
                    sums = self.model(
                        microbatch.input_ids,
                        microbatch.labels,
                        document_ids=microbatch.document_ids,
                        z_loss_multiplier=z_loss_multiplier,
                        **microbatch.options,
                    )
                self._backward(sums.loss, factor)
            parts.append(sums._replace(loss=sums.loss.detach()))
        self._complete_gradients()
        return added_sums(parts)

    def accumulate(
        self,
        parts: Sequence[Part],
        loss_of: Callable[[Part], torch.Tensor],
        factor: float | torch.Tensor,
    ) -> torch.Tensor:
        """`forward_backward` for any model: `loss_of` a part of the batch calls `self.model` and
        gives a 0-d sum; the sum of all, detached."""
        total = torch.zeros((), device=self.environment.device)
        for index, part in enumerate(parts):
            with self._exchanging(is_last=index == len(parts) - 1):
                with self._autocast():
                    loss = loss_of(part)
                self._backward(loss, factor)
            total += loss.detach()
        self._complete_gradients()
        return total

    @torch.no_grad()
    def evaluate(self, loss_of: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `loss_of` gives without gradients, of `self.model` in evaluation mode. Ranks may
        call it unequally often."""
        model, self.model = self.model, self.module
        self.module.eval()
        try:
            with self._autocast():
                return loss_of()
        finally:
            self.model = model
            self.module.train()

    @torch.no_grad()
    def forward(self, batch: Microbatch) -> LossSums:
        """The sums over the targets of `batch`; every rank calls it."""
        with self._autocast():
            return self.model(batch.input_ids, batch.labels, document_ids=batch.document_ids)

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, seq, vocab); every rank calls it."""
        with self._autocast():
            return self.model(input_ids)

    @abstractmethod
    def step(self, max_grad_norm: float | None, refuses: Refuses | None = None) -> StepOutcome:
        """Clip, update unless the norm is not finite or refused, and clear the gradients."""

    @abstractmethod
    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiply all gradients by a 0-d tensor, between `forward_backward` and `step`."""

    def grad_squares(self) -> dict[str, torch.Tensor]:
        """Sum of the squares of each layer's gradients, between `forward_backward` and `step`."""
        return self._squares(self.gradient_shards())

    def weight_squares(self) -> dict[str, torch.Tensor]:
        return self._squares(self.weight_shards())

    @abstractmethod
    def gradient_shards(self) -> dict[str, torch.Tensor]:
        """This rank's part of each gradient. Over `weight_group` the parts cover each gradient as
        often as the table of shards says (`copies`), without it once."""

    @abstractmethod
    def weight_shards(self) -> dict[str, torch.Tensor]:
        """This rank's part of each fp32 weight, covered like gradients."""

    @abstractmethod
    def state_tensors(self) -> dict[str, torch.Tensor]:
        """`model.<name>` and `optim.<name>.<key>`: views into live state, canonical names, global
        shapes; saving reads them, loading fills them in place."""

    def state_filled(self) -> None:
        """Called after the contents of `state_tensors` changed: bring what is derived of them in
        line."""
        if self.keeps_average:
            optimizer: Any = self.optimizer
            optimizer.show(average=self._shows_average)

    @abstractmethod
    def _held(self) -> Mapping[torch.Tensor, Sequence[Held]]:
        """What each of the optimizer's tensors is made of; see `WholeMatrices`."""

    def _give_whole_matrices(self) -> None:
        """Let an optimizer that asks for them compute with whole matrices."""
        optimizer: Any = self.optimizer
        if traits_of(optimizer).takes_whole_matrices:
            group = self.environment.group("dp_replicate", "dp_shard", "cp", "tp")
            optimizer.whole_matrices = WholeMatrices(group, self.environment.device, self._held())

    def _kept_of_rows(self) -> dict[str, torch.Tensor]:
        """Of `state_tensors`, what an optimizer keeps for the rows of whole matrices."""
        matrices: WholeMatrices | None = getattr(self.optimizer, "whole_matrices", None)
        kept = {} if matrices is None else matrices.kept
        return {f"optim.{n}.{key}": t for n, own in kept.items() for key, t in own.items()}

    def _give_up_stand_ins(self, stepped: Sequence[torch.Tensor]) -> None:
        """Before the first step that is taken, of those that have gradients: let the optimizer make
        its state by itself, at the rate of that step, as it does without us."""
        for tensor in stepped if self.is_first_step else ():
            self.optimizer.state.pop(tensor, None)
        self.is_first_step = False

    @property
    def keeps_average(self) -> bool:
        """Whether the optimizer keeps the weights to use apart from those in training."""
        return traits_of(self.optimizer).keeps_average

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds what its optimizer keeps as the weights to use. All ranks enter
        it; not left in order after an error, which ends training."""
        self._shows_average = True
        self.state_filled()
        yield
        self._shows_average = False
        self.state_filled()

    def weights_changed(self) -> None:  # noqa: B027
        """Called after each step and whenever weights were filled; what is derived of weights
        alone is brought in line by who puts another in its place."""

    @abstractmethod
    def _exchanging(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one microbatch: gradients are exchanged on the last."""

    @abstractmethod
    def _backward(self, loss: torch.Tensor, factor: float | torch.Tensor) -> None: ...

    def _complete_gradients(self) -> None:  # noqa: B027 (most parallelism leaves no summands)
        """Add up the gradients of which each rank has a summand (`ShardSpec.partial_over`)."""

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Compute precision of a forward over fp32 weights."""
        return contextlib.nullcontext()

    def _squares(self, shards: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copies = {name: spec.copies for name, spec in self.shards.items() if spec.copies > 1}
        sums, device = layer_norms(shards, copies), self.environment.device
        layers = list(dict.fromkeys(map(layer_of, self.shards)))  # the same on every rank
        packed = torch.stack(
            [sums.get(layer, torch.zeros(())).to(device, torch.float32) for layer in layers]
        )
        if (group := self.environment.weight_group) is not None:
            dist.all_reduce(packed, group=group)
        return dict(zip(layers, packed.unbind(), strict=True))


def added_sums(parts: Sequence[LossSums]) -> LossSums:
    """The sums over the targets of all parts."""
    loss, ce, z = parts[0][:3]
    for part in parts[1:]:
        loss, ce, z = loss + part.loss, ce + part.ce, z + part.z
    routers = [part.router for part in parts if part.router is not None]
    further = [part.mtp for part in parts if part.mtp is not None]
    mtp = MTPSums(*(sum(values) for values in zip(*further, strict=True))) if further else None
    return LossSums(loss, ce, z, added_routers(routers) if routers else None, mtp)


def check_whole_parameters(optimizer: torch.optim.Optimizer, *, are_cut: bool, engine: str) -> None:
    """Refuse an optimizer that needs all of a matrix, or of any parameter, or keeps state of
    another shape, where ranks hold a part of each. Raises ConfigError: says where it works."""
    if not are_cut:
        return
    name, traits = type(optimizer).__name__, traits_of(optimizer)
    shapes = [
        (key, value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape
    ]
    needs_matrices = traits.needs_whole_matrices and not traits.takes_whole_matrices
    if needs_matrices or traits.needs_whole_parameters or shapes:
        what = "matrices" if needs_matrices else "parameters"
        if shapes:
            key, value = shapes[0]
            what = f"parameters for its {key!r} of shape {tuple(value.shape)}"
        raise ConfigError(
            f"train_module.optim: {name} needs whole {what}, and {engine} cuts them over ranks; "
            "use ddp, or another optimizer"
        )


def state_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that `optimizer` keeps for `parameter`; of a quantised one those that it consists
    of, but for its table."""
    found: dict[str, torch.Tensor] = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if is_traceable_wrapper_subclass(value):
            names = [n for n in value.__tensor_flatten__()[0] if n != "qmap"]
            found |= {f"{key}_{name}": getattr(value, name) for name in names}
        elif isinstance(value, torch.Tensor):
            found[key] = value
    return found


def create_state(
    optimizer: torch.optim.Optimizer, members: Sequence[Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """Make the state of `members` (tensors of each group) exist before a first step, by a step of
    rate zero on zero gradients, after which `step` counts from zero again; those that had none.

    It has the right shapes, and the right values where state begins at zero. Raises ConfigError:
    the optimizer keeps numbers, which checkpoints would not hold.
    """
    groups, before = optimizer.param_groups, [dict(group) for group in optimizer.param_groups]
    tensors = [tensor for own in members for tensor in own]
    without = [tensor for tensor in tensors if not optimizer.state.get(tensor)]
    gradients = [tensor.grad for tensor in tensors]
    for group, own in zip(groups, members, strict=True):
        group |= {"params": list(own), "lr": group["lr"] * 0.0}
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    for group, old in zip(groups, before, strict=True):
        group.update(old)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
        for key, value in optimizer.state.get(tensor, {}).items():
            if key == "step" and isinstance(value, torch.Tensor):
                value.zero_()
            elif value is not None and not isinstance(value, torch.Tensor):
                raise ConfigError(
                    f"train_module.optim: {type(optimizer).__name__} keeps {key!r} as "
                    f"{type(value).__name__}; make it a tensor, so that checkpoints hold it"
                )
    return [tensor for tensor in without if optimizer.state.get(tensor)]
