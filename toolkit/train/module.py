"""`TrainModule`: what the trainer can train."""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from toolkit.distributed.environment import TrainingEnvironment
from toolkit.models.lora_config import LoRAConfig
from toolkit.optim.groups import GroupRecord
from toolkit.train.adapter_base import BaseCheckpoint
from toolkit.train.eval_sums import Batch, EvalSums
from toolkit.train.timeline import Progress


class Metric(NamedTuple):
    """One value of one step and how the values of all ranks become one."""

    value: torch.Tensor | float
    reduction: str = "none"
    """"sum", "mean" or "max" over ranks; "none": the same on every rank."""


class TrainModule(ABC):
    """Model, optimizer and loss behind the few calls that the loop makes."""

    environment: TrainingEnvironment
    is_language_model = True
    """Whether checkpoints can be exported for transformers, where it has such a class."""
    has_perplexity = True
    """Whether the exponential of the loss is a perplexity."""
    eval_results: Sequence[str] | None = None
    """Names of what an evaluation gives; None: what one of a language model does."""
    progress: Progress | None = None
    """Where training stands; the trainer sets it before `train_batch`. None: outside of it."""
    model_config: Any
    """The model's own config, stored with its checkpoints; like the optimizer's."""
    optim_config: Any
    num_parameters: int
    """Of the whole model, adapters among them."""
    trained_names: frozenset[str] | None = None
    """Canonical names of the parameters that the optimizer trains; None: not told."""
    optimizer_groups: Sequence[GroupRecord] = ()
    """Which parameters have which settings of the optimizer; recorded with the run."""
    adapter_config: LoRAConfig | None = None
    """The adapter that is trained in the place of the model, stored with its checkpoints."""
    base: BaseCheckpoint | None = None
    """Where `base_tensors` were loaded from; stored with checkpoints."""
    origin: dict[str, Any] | None = None
    """The model of `transformers` that the weights came from before training, as the checkpoint
    that was loaded tells it (`extra["source"]`); goes on into checkpoints."""
    blocks: Mapping[str, torch.nn.Module | None] = {}
    """Modules whose outputs are worth watching, by name; None: another rank has it. The same names
    on every rank."""
    kernels: Mapping[str, str] = {}
    """Part of the model -> the kernel that computes it here; recorded with the engine."""
    max_consecutive_skipped_steps: int
    """Non-finite steps in a row that end training."""
    _is_evaluating = False

    @abstractmethod
    def train_batch(self, batch: Batch) -> dict[str, Metric]:
        """Forward and backward of this rank's part of one global batch. The metrics include "loss":
        of the whole global batch once reduced over ranks."""

    @abstractmethod
    def optim_step(self, progress: Progress) -> dict[str, Metric]:
        """Update the weights from the gradients and clear them. The metrics include "lr",
        "grad_norm" and "skipped" (1.0: not finite, weights untouched)."""

    def before_training(self, state: Any) -> None:  # noqa: B027 (most prepare nothing)
        """Called once when the weights are those that training starts with; `state` is the
        `TrainState`. Every rank calls it. It may end early where `state.should_stop()`."""

    def begin_evaluation(self, name: str, batches: Iterable[Batch]) -> None:  # noqa: B027
        """Called before the batches of the evaluation set `name` come to `eval_batch`. Every rank
        calls it."""

    @abstractmethod
    def eval_batch(self, batch: Batch) -> EvalSums:
        """Loss of one evaluation batch, without gradients."""

    @abstractmethod
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, seq, vocab) without gradients; every rank must call it together."""

    @abstractmethod
    def network_norms(self) -> dict[str, torch.Tensor]:
        """Gradient and weight norms (`grad_norm/<layer>`, `weight_norm/<layer>`, "total" for all),
        on the device; valid between `train_batch` and `optim_step`."""

    def shards(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """This rank's parts of gradients and of weights, by canonical name; valid between
        `train_batch` and `optim_step`."""
        return {}, {}

    @property
    def parameter_names(self) -> list[str]:
        """Canonical names of all parameters, those of other ranks among them."""
        return []

    @abstractmethod
    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs of forward and backward per token."""

    @abstractmethod
    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Live weights (`model.*`) and optimizer state (`optim.*`) under canonical names: plain,
        distributed or flat-sharded tensors that a checkpoint reads and fills in place."""

    @abstractmethod
    def state_filled(self) -> None:
        """Called after the contents of `state_tensors` changed: a checkpoint was loaded, or weights
        were swapped. What the engine has derived of them follows."""

    def extra_state(self) -> dict[str, Any]:
        """What else a run needs to continue, besides `state_tensors`: tensors on the host and plain
        values, the same on every rank."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (most keep nothing)
        """Counterpart of `extra_state`; parts that the checkpoint lacks begin anew."""

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """Weights (`model.*`) that come from `trainer.load_path` on every start, where
        `state_tensors` does not hold the whole model; what it holds of them is loaded after.
        Empty: it does."""
        return {}

    def base_parts(self) -> Iterator[dict[str, torch.Tensor]]:
        """`base_tensors` in parts, of which each is filled before the next is asked for. Where the
        model keeps weights in another form than they are loaded in, these are new tensors, and
        `base_tensors` has their like on the meta device."""
        yield self.base_tensors()

    def fill_from_base(self, read: Callable[[dict[str, torch.Tensor]], None]) -> None:  # noqa: B027
        """Called once `base_tensors` are loaded for a run that begins: fill what begins as a part
        of them. `read` fills whole tensors (`model.*`); every rank calls it alike."""

    @functools.cached_property
    def averages(self) -> list[Callable[[], AbstractContextManager[Any]]]:
        """Where averaged weights come from: functions whose context managers put them into the
        model and take them out again. Optimizers and callbacks add theirs. One may swap the
        contents of `state_tensors` (`model.*`) and call `state_filled`, at both ends."""
        return []

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model holds the weights that evaluations and samples use: those of
        `averages`, of which the last added wins; without any, the weights in training. Every rank
        enters it; nothing is trained or saved inside."""
        if self._is_evaluating:  # an evaluation inside of another
            yield
            return
        with contextlib.ExitStack() as stack:
            self._is_evaluating = True
            stack.callback(setattr, self, "_is_evaluating", False)
            for average in self.averages:
                stack.enter_context(average())
            yield
