"""`PreferenceTrainModule`: DPO, IPO, ORPO, SimPO, KTO and reward models, under any engine.

Loss = sum over the units of the GLOBAL batch / their number, whatever the microbatch size, the
number of ranks or the engine. ORPO's cross entropy and the losses of routers are divided by tokens
of the global batch. All numbers are known before the first forward.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.distributed.engine import Microbatch
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.errors import ConfigError, DataError
from toolkit.models.log_probs import TokenLogProbs, TokenValues
from toolkit.models.lora import adapters_off
from toolkit.models.loss import IGNORE_INDEX
from toolkit.models.router import RouterSums, added_routers
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.eval_sums import Batch, EvalSums
from toolkit.train.module import Metric
from toolkit.train.preference import losses
from toolkit.train.preference.config import (
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
    SimPOConfig,
    WithReference,
)
from toolkit.train.preference.documents import (
    CHOSEN,
    UnitBatch,
    document_sums,
    last_tokens,
    unit_batch,
)
from toolkit.train.preference.losses import Answers, Parts
from toolkit.train.preference.reference import References
from toolkit.train.scores import results_of
from toolkit.train.transformer import TransformerTrainModule

_MEANS_OF_TOKENS = {"nll_loss": "nll_tokens"}
_ADDED = ("nll_loss",)
"""Means over tokens that the loss consists of besides the mean over units."""
_MEANS_OF_SOME = {"desirable_reward": "desirable", "undesirable_reward": "undesirable"}


class PreferenceTrainModule(TransformerTrainModule):
    """A `TransformerTrainModule` whose batches are units of two documents, and whose loss is that
    of `config.objective`."""

    has_perplexity = False
    _counts: ClassVar[tuple[str, ...]] = (
        "units", "targets", "nll_tokens", "desirable", "undesirable",
    )  # fmt: skip
    """What is counted over the global batch before the first forward."""

    def __init__(
        self,
        config: TransformerTrainModuleConfig,
        model: nn.Module,
        *,
        environment: TrainingEnvironment | None = None,
    ) -> None:
        assert config.objective is not None, "build it with train_module.objective"
        self.objective: Any = config.objective
        self.eval_results = results_of(config)
        self.is_scored = isinstance(self.objective, RewardConfig)
        if not self.is_scored:
            head: Any = getattr(model, "head")  # noqa: B009
            head.loss = TokenLogProbs(head.loss)
        super().__init__(config, model, environment=environment)
        self._reference = References(self) if isinstance(self.objective, WithReference) else None
        self._eval_kl: Tensor | None = None

    def train_batch(self, batch: Batch) -> dict[str, Metric]:
        inputs = self._unit_batch(batch, "train")
        inputs = inputs._replace(dropout_keys=self._dropout_keys(inputs.input_ids))
        parts = self._parts(inputs)
        counts = self._count(inputs)
        kl = self._kl(parts, counts) if isinstance(self.objective, KTOConfig) else None
        factor: Any = self.environment.layout.grad_ranks
        if (scaling := self._loss_scale) is not None:
            factor = scaling.scale * factor
        found: dict[str, Tensor] = {}
        routers: list[RouterSums] = []

        def loss_of(part: UnitBatch) -> Tensor:
            values = self._forward(part)
            loss, sums = self._loss_of(part, values, counts, kl)
            for name, value in sums.items():
                found[name] = found[name] + value if name in found else value
            if values.router is not None and values.router_loss is not None:
                routers.append(values.router)
                loss = loss + values.router_loss / counts["targets"]
            return loss

        self.engine.accumulate(parts, loss_of, factor)
        if not self._is_checked:
            self._check_gradients()
        if scaling is not None:
            self.engine.scale_gradients(1 / scaling.scale)
        # Ranks that share the positions of rows have the same sums: they count once.
        place = self.environment.layout.place(self.environment.rank)
        own = 1.0 if place["cp"] == 0 else 0.0
        means = {name: own * value / self._divisor(name, counts) for name, value in found.items()}
        for name in _ADDED:
            if name in means:
                means["loss"] = means["loss"] + means[name]
        self._loss = means["loss"]
        metrics = {name: Metric(value, "sum") for name, value in means.items()}
        if kl is not None:
            metrics["kl"] = Metric(kl)
        if routers:
            metrics |= self._router_metrics(added_routers(routers), counts["targets"])
        return metrics

    @torch.no_grad()
    def begin_evaluation(self, name: str, batches: Any) -> None:
        """KTO's reference point is a mean over all rows of the set, which are read twice."""
        self._eval_name = name
        if not isinstance(self.objective, KTOConfig):
            return
        total = torch.zeros(2, device=self.environment.device)
        for batch in batches:
            part = self._unit_batch(batch, name)
            ratio = self._mismatched_ratio(part, self._no_grad_values(part))
            total += torch.stack((ratio, part.is_unit.sum()))
        self._add_up(total)
        self._eval_kl = (total[0] / total[1].clamp(min=1)).clamp(min=0)

    @torch.no_grad()
    def eval_batch(self, batch: Batch) -> EvalSums:
        part = self._unit_batch(batch, self._eval_name)
        counts = self._count(part, is_global=False)
        ones = dict.fromkeys(self._counts, torch.ones((), device=self.environment.device))
        values = self._no_grad_values(part)
        _, found = self._loss_of(part, values, ones, self._eval_kl)
        own = float(self.environment.layout.owns_rows(self.environment.rank))
        if self._eval_kl is not None:
            found["kl"] = self._eval_kl * counts["units"]
        divisors = {
            name: own * counts[self._divisor_name(name)] for name in found if name != "kl"
        } | {"kl": own * counts["units"]}
        sums = {name: own * value for name, value in found.items()}
        loss = sums.pop("loss")
        means = {name: (value, divisors[name]) for name, value in sums.items()}
        added = tuple(name for name in _ADDED if name in means)
        return EvalSums(loss, own * counts["units"], means, is_language_model=False, added=added)

    def before_training(self, state: Any) -> None:
        if self._reference is not None:
            self._reference.prepare(state)

    def extra_state(self) -> dict[str, Any]:
        kept = {} if self._reference is None else self._reference.state_dict()
        return {**super().extra_state(), **kept}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        if self._reference is not None:
            self._reference.load_state_dict(state)

    def logits(self, input_ids: Tensor) -> Tensor:
        if self.is_scored:
            raise ConfigError("a reward model scores texts and writes none: leave out its samples")
        return super().logits(input_ids)

    def answer_log_probs(self, batch: UnitBatch, model: Any = None) -> Tensor:
        """Log-probabilities of both answers of each unit, `(rows, K, 2)`, without gradients; of
        `model`, or of our own without adapters."""
        if model is not None:
            values = model(batch.input_ids, batch.labels, document_ids=batch.document_ids)
        else:
            with adapters_off(self.engine.module):
                values = self._no_grad_values(batch)
        return document_sums(self._whole(values, batch).values * (batch.kinds > 0), batch)

    def unit_batch_of(self, batch: Batch) -> UnitBatch:
        """A batch of the data loader on the device."""
        if "units" not in batch or "document_ids" not in batch:
            raise DataError(
                f"train_module.objective {type(self.objective).__struct_config__.tag}: the data "
                "has no pairs or marked answers; prepare it with dataset.instructions.kind"
            )
        answers_alone = not self.is_scored and not isinstance(self.objective, ORPOConfig)
        return unit_batch(batch, self.environment.device, with_prompts=not answers_alone)

    def _unit_batch(self, batch: Batch, split: str) -> UnitBatch:
        inputs = self.unit_batch_of(batch)
        if isinstance(self.objective, ORPOConfig):  # of rejected answers no prompt is learned
            is_asked = (inputs.document_ids % 2 == 0) | (inputs.kinds > 0)
            inputs = inputs._replace(labels=inputs.labels.where(is_asked, IGNORE_INDEX))
        if self._reference is not None and inputs.reference is None:
            inputs = inputs._replace(reference=self._reference.of(split, inputs.units))
        return inputs

    _eval_name = ""
    """The set of rows that is evaluated."""

    def _parts(self, inputs: UnitBatch) -> Sequence[UnitBatch]:
        rows = self._rows_at_once(inputs.input_ids)
        return [inputs] if rows is None else inputs.split(rows)

    def _forward(self, part: UnitBatch) -> TokenValues:
        keys = {} if part.dropout_keys is None else {"dropout_keys": part.dropout_keys}
        options = {"document_ids": part.document_ids, **keys}
        return self._whole(self.engine.model(part.input_ids, part.labels, **options), part)

    def _no_grad_values(self, part: UnitBatch) -> TokenValues:
        values: Any = self.engine.forward(
            Microbatch(part.input_ids, part.labels, part.document_ids)
        )
        return self._whole(values, part)

    def _whole(self, values: TokenValues, part: UnitBatch) -> TokenValues:
        """Without the positions by which rows were padded inside."""
        return values._replace(values=values.values[:, : part.labels.shape[1]])

    def _loss_of(
        self, part: UnitBatch, values: TokenValues, counts: Mapping[str, Tensor], kl: Tensor | None
    ) -> tuple[Tensor, Parts]:
        """What is trained, already divided, and sums over units and tokens, without gradients."""
        config, is_unit = self.objective, part.is_unit
        extra: Parts = {}
        if isinstance(config, RewardConfig):
            scores = document_sums(values.values * last_tokens(part), part)
            found = losses.reward(config, scores[..., 0], scores[..., 1])
        else:
            own = self._answers(part, values.values)
            if isinstance(config, DPOConfig):
                found = losses.dpo(config, own, self._reference_answers(part, own))
            elif isinstance(config, SimPOConfig):
                found = losses.simpo(config, own)
            elif isinstance(config, ORPOConfig):
                found = losses.orpo(config, own)
                is_chosen = (part.labels != IGNORE_INDEX) & (part.document_ids % 2 == 0)
                extra["nll_loss"] = -(values.values * is_chosen).sum()
            else:
                assert isinstance(config, KTOConfig)
                assert kl is not None, "before the first loss"
                reference = self._reference_answers(part, own)
                is_desirable = self._is_desirable(part)
                found = losses.kto(config, own, reference, is_desirable, kl)
                rewards = (config.beta * (own.first - reference.first)).detach()
                extra["desirable_reward"] = (rewards * (is_desirable & is_unit)).sum()
                extra["undesirable_reward"] = (rewards * (~is_desirable & is_unit)).sum()
        sums = {name: value.where(is_unit, 0.0).sum() for name, value in found.items()}
        loss = sums["loss"] / counts["units"]
        sums = {name: value.detach() for name, value in (sums | extra).items()}
        if (nll := extra.get("nll_loss")) is not None:
            loss = loss + nll / counts["nll_tokens"]
        return loss, sums

    def _answers(self, part: UnitBatch, values: Tensor) -> Answers:
        is_answer = part.kinds > 0
        sums = document_sums(values * is_answer, part)
        tokens = document_sums(is_answer.to(values.dtype), part).clamp(min=1)
        # Where there is no unit the loss is left out; its gradient must be a number all the same.
        sums = sums.where(part.is_unit[..., None], -1.0)
        return Answers(sums[..., 0], sums[..., 1], tokens[..., 0], tokens[..., 1])

    def _reference_answers(self, part: UnitBatch, own: Answers) -> Answers:
        """`reference_log_probs: base` computes them here, for the loss of this microbatch."""
        sums = part.reference
        if sums is None:
            sums = self.answer_log_probs(part)
        sums = sums.to(own.first.dtype)
        return own._replace(first=sums[..., 0], second=sums[..., 1])

    def _is_desirable(self, part: UnitBatch) -> Tensor:
        return document_sums((part.kinds == CHOSEN).to(torch.float32), part)[..., 0] > 0

    def _kl(self, parts: Sequence[UnitBatch], counts: Mapping[str, Tensor]) -> Tensor:
        """max(0, mean over the global batch of log p(y'|x) / p_ref(y'|x)), where y' belongs to
        another prompt; no gradient flows through it."""
        total = torch.zeros((), device=self.environment.device)
        for part in parts:
            total += self._mismatched_ratio(part, self._no_grad_values(part))
        self._add_up(total)
        return (total / counts["units"]).clamp(min=0)

    def _mismatched_ratio(self, part: UnitBatch, values: TokenValues) -> Tensor:
        own = self._answers(part, values.values)
        ratio = own.second - self._reference_answers(part, own).second
        return ratio.where(part.is_unit, 0.0).sum().float()

    def _count(self, inputs: UnitBatch, *, is_global: bool = True) -> dict[str, Tensor]:
        """Of the global batch, or of this rank's rows alone; at least 1 where something is divided
        by them."""
        is_label = inputs.labels != IGNORE_INDEX
        desirable = torch.zeros((), dtype=torch.int64, device=is_label.device)
        if isinstance(self.objective, KTOConfig):
            desirable = (self._is_desirable(inputs) & inputs.is_unit).sum()
        units = inputs.is_unit.sum()
        counts = torch.stack(
            (
                units,
                is_label.sum(),
                (is_label & (inputs.document_ids % 2 == 0)).sum(),
                desirable,
                units - desirable,
            )
        )
        if is_global:
            self._add_up(counts)
            counts = counts.clamp(min=1)
        return dict(zip(self._counts, counts.unbind(), strict=True))

    def _divisor_name(self, name: str) -> str:
        return (_MEANS_OF_TOKENS | _MEANS_OF_SOME).get(name, "units")

    def _divisor(self, name: str, counts: Mapping[str, Tensor]) -> Tensor:
        return counts[self._divisor_name(name)]
