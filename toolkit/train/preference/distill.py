"""`DistillTrainModule`: a language model learns the probabilities of a teacher.

Loss = sum over the targets of the GLOBAL batch / their number, of the divergence and of cross
entropy by their weights. Evaluations are of cross entropy alone, as of any language model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.checkpoint.folder import read_metadata
from toolkit.distributed.engine import Microbatch
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.errors import CheckpointError
from toolkit.models.distillation import DistillationLoss, GiveRows
from toolkit.models.router import RouterSums, added_routers
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.eval_sums import Batch
from toolkit.train.module import Metric
from toolkit.train.preference.config import DistillConfig
from toolkit.train.preference.frozen import FrozenModel, load_frozen, newest_checkpoint
from toolkit.train.preference.vocabulary import check_same_vocabulary
from toolkit.train.transformer import TransformerTrainModule

KEY = "train_module.objective.teacher"


class DistillTrainModule(TransformerTrainModule):
    """A `TransformerTrainModule` with the teacher of `config.objective`, which `before_training`
    loads."""

    has_perplexity = False

    def __init__(
        self,
        config: TransformerTrainModuleConfig,
        model: nn.Module,
        *,
        environment: TrainingEnvironment | None = None,
    ) -> None:
        objective = config.objective
        assert isinstance(objective, DistillConfig), "build it with train_module.objective"
        self.objective = objective
        head: Any = getattr(model, "head")  # noqa: B009
        self.distillation = head.loss = DistillationLoss(
            head.loss,
            is_reverse=objective.divergence == "reverse",
            temperature=objective.temperature,
            cross_entropy_weight=objective.cross_entropy_weight,
        )
        super().__init__(config, model, environment=environment)
        self._teacher: FrozenModel | None = None
        self._fingerprint: str | None = None

    def before_training(self, state: Any) -> None:
        """Raises CheckpointError: there is no teacher, or it is another than this run had."""
        checkpoint = newest_checkpoint(self.objective.teacher, self.environment, key=KEY)
        metadata = read_metadata(checkpoint)
        check_same_vocabulary(checkpoint, metadata.extra, self.model_config.vocab_size, key=KEY)
        if self._fingerprint not in (None, metadata.xxh3):
            raise CheckpointError(
                f"{KEY}: {checkpoint} is not the teacher that this run began with; name that one, "
                "or start a new run"
            )
        self._fingerprint = metadata.xxh3
        self.give_teacher(load_frozen(checkpoint, self.environment, prepare=_give_rows))

    def give_teacher(self, teacher: FrozenModel) -> None:
        """Learn from `teacher`, whose head gives what its logits are made of."""
        self._teacher = teacher
        self.distillation.teacher_soft_cap = teacher.model.config.logit_soft_cap

    def extra_state(self) -> dict[str, Any]:
        kept = {} if self._fingerprint is None else {"teacher": self._fingerprint}
        return {**super().extra_state(), **kept}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self._fingerprint = state.get("teacher")

    def train_batch(self, batch: Batch) -> dict[str, Metric]:
        assert self._teacher is not None, "before_training loads it"
        teacher, loss, inputs = self._teacher, self.distillation, self._inputs(batch)
        inputs = inputs._replace(dropout_keys=self._dropout_keys(inputs.input_ids))
        count = self._num_targets(batch, inputs.labels)
        num_targets = max(count, 1) if isinstance(count, int) else count.clamp(min=1)
        factor = self.environment.layout.grad_ranks / num_targets
        if (scaling := self._loss_scale) is not None:
            factor = scaling.scale * factor
        found: list[Tensor] = []
        routers: list[RouterSums] = []

        def loss_of(part: Microbatch) -> Tensor:
            given = part.input_ids, part.labels
            loss.teacher = teacher(*given, document_ids=part.document_ids)
            sums = self.engine.model(*given, document_ids=part.document_ids, **part.options)
            loss.teacher = None
            teacher.free()
            found.append(torch.stack((sums.ce, sums.divergence)))
            if sums.router is not None:
                routers.append(sums.router)
            result: Tensor = sums.loss
            return result

        self.engine.accumulate(self._microbatches(inputs), loss_of, factor)
        if not self._is_checked:
            self._check_gradients()
        if scaling is not None:
            self.engine.scale_gradients(1 / scaling.scale)
        ce, divergence = (torch.stack(found).sum(0) / count).unbind()
        share = self.objective.cross_entropy_weight
        self._loss = share * ce + (1.0 - share) * divergence
        metrics = {
            "loss": Metric(self._loss, "sum"),
            "ce_loss": Metric(ce, "sum"),
            "divergence": Metric(divergence, "sum"),
        }
        if routers:
            metrics |= self._router_metrics(added_routers(routers), count)
        return metrics


def _give_rows(model: Any) -> None:
    model.head.loss = GiveRows()
