"""What a language model is trained for, other than the next token: `train_module.objective`."""

from typing import ClassVar, Literal

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive
from toolkit.config.paths import PathOrURL

Unit = Literal["pair", "binary"]

_REWARDS = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")
_LOG_PROBS = ("chosen_log_prob", "rejected_log_prob")


class _Objective(Config, kw_only=True):
    module: ClassVar[str] = "toolkit.train.preference.module:PreferenceTrainModule"
    """The train module."""
    unit: ClassVar[Unit | None] = "pair"
    """What a row of its data must hold; None: tokens, as for any language model."""
    results: ClassVar[tuple[str, ...]] = (*_REWARDS, *_LOG_PROBS)
    """Means over units, in train.jsonl and eval.jsonl beside the loss."""


class WithReference(_Objective, kw_only=True):
    """An objective whose loss compares with the log-probabilities of a reference model."""

    reference: PathOrURL | None = None
    """Run or checkpoint of the reference model, with the same vocabulary; null: the model that
    training starts from."""
    reference_log_probs: Literal["cached", "base"] = "cached"
    """`cached`: of all rows once, before the first step, kept beside the data. `base`: in each
    step, by the model without its adapters (`train_module.lora`)."""


class DPOConfig(WithReference, kw_only=True, tag_field="type", tag="dpo"):
    """Direct preference optimization (Rafailov et al. 2023) on chosen and rejected answers."""

    loss: Literal["sigmoid", "ipo", "length_normalised"] = "sigmoid"
    """`sigmoid`: -log sigmoid(beta * margin); `length_normalised`: the same with log-probabilities
    per token (Tulu 3, Lambert et al. 2024); `ipo`: (margin - 1 / (2 beta))^2 per token (Azar et al.
    2023)."""
    beta: float = 0.1
    """How strongly the model is held to the reference."""
    label_smoothing: float = 0.0
    """Share of pairs that are expected to be the wrong way round (cDPO); not for `ipo`."""

    def __post_init__(self) -> None:
        check_positive(self, "beta")
        _check_smoothing(self.label_smoothing)
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing does not go with loss ipo; leave it out")


class KTOConfig(WithReference, kw_only=True, tag_field="type", tag="kto"):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024) on answers marked good or bad."""

    unit: ClassVar[Unit | None] = "binary"
    results: ClassVar[tuple[str, ...]] = ("kl", "desirable_reward", "undesirable_reward")
    beta: float = 0.1
    """How strongly the model is held to the reference."""
    desirable_weight: float = 1.0
    """Weight of the loss of desirable answers."""
    undesirable_weight: float = 1.0
    """Weight of the loss of undesirable answers."""

    def __post_init__(self) -> None:
        check_positive(self, "beta")
        check_not_negative(self, "desirable_weight", "undesirable_weight")


class ORPOConfig(_Objective, kw_only=True, tag_field="type", tag="orpo"):
    """Odds ratio preference optimization (Hong et al. 2024): cross entropy of the chosen answer
    with its prompt, and the odds ratio of the two answers. No reference model."""

    results: ClassVar[tuple[str, ...]] = (*_REWARDS, *_LOG_PROBS, "nll_loss", "log_odds_ratio")
    beta: float = 0.1
    """Weight of the odds ratio (lambda in the paper)."""

    def __post_init__(self) -> None:
        check_positive(self, "beta")


class SimPOConfig(_Objective, kw_only=True, tag_field="type", tag="simpo"):
    """Simple preference optimization (Meng et al. 2024): -log sigmoid(beta * (difference of the
    log-probabilities per token) - gamma). No reference model."""

    beta: float = 2.0
    """Scale of the rewards."""
    gamma: float = 1.0
    """Margin by which the chosen answer's reward should be larger."""
    label_smoothing: float = 0.0
    """Share of pairs that are expected to be the wrong way round."""

    def __post_init__(self) -> None:
        check_positive(self, "beta")
        check_not_negative(self, "gamma")
        _check_smoothing(self.label_smoothing)


class RewardConfig(_Objective, kw_only=True, tag_field="type", tag="reward"):
    """A reward model: one score for an answer with its prompt, at its last token (Bradley and Terry
    1952; Ouyang et al. 2022)."""

    results: ClassVar[tuple[str, ...]] = _REWARDS
    margin: float = 0.0
    """By how much the chosen score should be larger (Llama 2, Touvron et al. 2023)."""
    centering: float | None = None
    """Adds this times mean((chosen + rejected)^2), which keeps scores around zero (Eisenstein et
    al. 2023); null: off."""

    def __post_init__(self) -> None:
        check_not_negative(self, "margin")
        check_positive(self, "centering")


class DistillConfig(_Objective, kw_only=True, tag_field="type", tag="distill"):
    """The probabilities of a teacher model as targets (Hinton et al. 2015), on any data of language
    models."""

    module: ClassVar[str] = "toolkit.train.preference.distill:DistillTrainModule"
    unit: ClassVar[Unit | None] = None
    results: ClassVar[tuple[str, ...]] = ()
    teacher: PathOrURL
    """Run, checkpoint or folder of `toolkit convert-hf`, with the same vocabulary."""
    divergence: Literal["forward", "reverse"] = "forward"
    """KL(teacher || model), or KL(model || teacher)."""
    temperature: float = 1.0
    """Logits of both are divided by it, and the divergence is multiplied by its square."""
    cross_entropy_weight: float = 0.0
    """Share of ordinary cross entropy in the loss; the rest is the divergence."""

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        if not 0 <= self.cross_entropy_weight < 1:
            raise ValueError(
                f"cross_entropy_weight must be at least 0 and below 1, not "
                f"{self.cross_entropy_weight}"
            )


Objective = DPOConfig | KTOConfig | ORPOConfig | SimPOConfig | RewardConfig | DistillConfig


def _check_smoothing(value: float) -> None:
    if not 0 <= value < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {value}")
