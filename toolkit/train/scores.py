"""The results of evaluations, by the names that `checkpointer.best_metric` uses ("val/loss")."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from toolkit.data.corpus_info import VAL
from toolkit.errors import ConfigError
from toolkit.train.config import TrainerConfig

_WHERE = "trainer.callbacks.checkpointer"
_NOT_SCORES = ("step", "tokens", "time", "seconds", "num_targets")


def scores_of(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The results that are numbers, as a checkpoint of the same step keeps them."""
    return {
        f"{evaluation['name']}/{key}": float(value)
        for evaluation in evaluations
        for key, value in evaluation.items()
        if isinstance(value, int | float) and math.isfinite(value) and key not in _NOT_SCORES
    }


def check_best_metric(config: TrainerConfig, loaders: Mapping[str, Any]) -> None:
    """Raise ConfigError where no evaluation on `loaders` gives what `best_metric` names."""
    known = {name: bool(loader.bytes_per_token) for name, loader in loaders.items()}
    others = [name for name, loader in loaders.items() if not loader.is_held_out]
    check_best_metric_in(known, config, others)


def check_best_metric_in(
    knows_bytes: Mapping[str, bool], config: TrainerConfig, others: Collection[str] = ()
) -> None:
    """The same by the names of the sets, and whether the bytes of their text are known; `others`
    were not held out of the training data."""
    checkpointer = config.callbacks.checkpointer
    is_asked = checkpointer.best_metric != type(checkpointer)().best_metric
    if config.no_checkpoints or not checkpointer.enabled:
        return
    if checkpointer.keep_best and (config.no_evals or not config.callbacks.lm_evaluator.enabled):
        raise ConfigError(
            "no evaluation runs (trainer.no_evals, or trainer.callbacks.lm_evaluator.enabled), so "
            "none is best; leave one of the two out",
            key=f"{_WHERE}.keep_best",
        )
    held_out = [known for name, known in knows_bytes.items() if name not in others]
    if len(held_out) > 1:
        knows_bytes = {**knows_bytes, VAL: all(held_out)}
    ema = config.callbacks.ema
    suffixes = ["", *(ema.suffixes if ema.enabled and ema.evaluate == "also" else [])]
    names = [
        f"{name}{suffix}/{key}"
        for suffix in suffixes
        for name, has_bytes in knows_bytes.items()
        for key in ("loss", "ppl", *(["bits_per_byte"] if has_bytes else []))
    ]
    if (checkpointer.keep_best or is_asked) and checkpointer.best_metric not in names:
        there = f"there are {', '.join(names)}" if names else "there are no validation rows"
        problem = f"no evaluation gives {checkpointer.best_metric!r}; {there}"
        raise ConfigError(problem, key=f"{_WHERE}.best_metric")
