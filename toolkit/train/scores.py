"""The results of evaluations by the names that settings use ("val/loss"): what
`checkpointer.best_metric` compares and `early_stopping.metric` watches."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from toolkit.data.corpus_info import VAL
from toolkit.errors import ConfigError
from toolkit.train.config import TrainerConfig, TransformerTrainModuleConfig

_CALLBACKS = "trainer.callbacks"
_NOT_SCORES = (
    "step", "tokens", "time", "seconds", "num_targets", "num_units", "num_documents",
)  # fmt: skip


class Asked(NamedTuple):
    """A result that a setting names."""

    metric: str
    key: str
    """The setting."""
    needed_by: str | None
    """The setting that does nothing without any evaluation; None: it only names one."""

    @property
    def evaluation(self) -> str:
        return self.metric.rpartition("/")[0]

    @property
    def of(self) -> str:
        """Name of the result within the evaluation."""
        return self.metric.rpartition("/")[2]


def scores_of(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The results that are numbers, as a checkpoint of the same step keeps them."""
    return {
        f"{evaluation['name']}/{key}": float(value)
        for evaluation in evaluations
        for key, value in evaluation.items()
        if _is_score(key, value) and math.isfinite(value)
    }


def asked_results(config: TrainerConfig) -> Iterator[Asked]:
    """What settings name of evaluations."""
    saver, stopping = config.callbacks.checkpointer, config.callbacks.early_stopping
    if saver.enabled and not config.no_checkpoints:
        needed_by = f"{_CALLBACKS}.checkpointer.keep_best" if saver.keep_best else None
        if needed_by or saver.best_metric != type(saver)().best_metric:
            yield Asked(saver.best_metric, f"{_CALLBACKS}.checkpointer.best_metric", needed_by)
    if stopping.enabled and stopping.of_training is None:
        key = f"{_CALLBACKS}.early_stopping.metric"
        yield Asked(stopping.metric, key, key)


def results_of(module: TransformerTrainModuleConfig) -> Sequence[str] | None:
    """What an evaluation of preference data gives; None: of a language model."""
    objective = module.objective
    return None if objective is None or objective.unit is None else ("loss", *objective.results)


def check_metrics(
    config: TrainerConfig,
    loaders: Mapping[str, Any],
    *,
    has_own_parts: bool = False,
    results: Sequence[str] | None = None,
) -> None:
    """Raise ConfigError where no evaluation gives what a setting names, with `loaders` for
    `lm_evaluator`. `has_own_parts`: there are callbacks that `config` does not know of."""
    known = {name: bool(loader.bytes_per_token) for name, loader in loaders.items()}
    others = [name for name, loader in loaders.items() if not loader.is_held_out]
    check_metrics_in(known, config, others, has_own_parts=has_own_parts, results=results)


def check_metrics_in(
    knows_bytes: Mapping[str, bool],
    config: TrainerConfig,
    others: Collection[str] = (),
    *,
    has_own_parts: bool = False,
    results: Sequence[str] | None = None,
) -> None:
    """The same by the names of the sets, and whether the bytes of their text are known; `others`
    were not held out of the training data. `results`: see `results_of`. What callbacks of the user
    record is not known before: with one of them any name may come."""
    callbacks = config.callbacks
    has_own = has_own_parts or any(own.enabled for own in callbacks.custom.values())
    tasks: list[str] = []
    sets: list[tuple[str, str]] = []
    if not config.no_evals and callbacks.downstream_evaluator.is_wanted:
        tasks = callbacks.downstream_evaluator.evaluations
    if not config.no_evals and callbacks.lm_evaluator.enabled:
        sets = _results_of_sets(knows_bytes, others, results)
    ema = callbacks.ema
    suffixes = ["", *(ema.suffixes if ema.enabled and ema.evaluate == "also" else [])]
    names = [f"{name}{suffix}/{key}" for suffix in suffixes for name, key in sets]
    tasks = [f"{task}{suffix}" for suffix in suffixes for task in tasks]
    for asked in asked_results(config):
        if asked.of in _NOT_SCORES:
            problem = f"{asked.metric} does not tell how good the model is; name a result like loss"
            raise ConfigError(problem, key=asked.key)
        if has_own or asked.metric in names or asked.evaluation in tasks:
            continue
        if config.no_evals or not (callbacks.lm_evaluator.enabled or tasks):
            if asked.needed_by is not None:
                problem = (
                    f"no evaluation runs (trainer.no_evals, or {_CALLBACKS}.lm_evaluator.enabled), "
                    f"so none gives {asked.metric}; leave one of the two out"
                )
                raise ConfigError(problem, key=asked.needed_by)
            continue
        there = ", ".join([*names, *(f"{task}/..." for task in tasks)])
        there = f"there are {there}" if there else "there are no validation rows"
        raise ConfigError(f"no evaluation gives {asked.metric!r}; {there}", key=asked.key)


def check_result(config: TrainerConfig, name: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError where a setting names a result of the evaluation `name` that is not a
    number of `values`, which are its results."""
    for asked in asked_results(config):
        if asked.evaluation == name and not _is_score(asked.of, values.get(asked.of)):
            there = ", ".join(f"{name}/{key}" for key, v in values.items() if _is_score(key, v))
            problem = f"there is no {asked.metric!r}; there are {there or 'no numbers'}"
            raise ConfigError(problem, key=asked.key)


def _results_of_sets(
    knows_bytes: Mapping[str, bool], others: Collection[str], results: Sequence[str] | None
) -> list[tuple[str, str]]:
    """Name and result, of each that `lm_evaluator` gives."""
    held_out = [known for name, known in knows_bytes.items() if name not in others]
    if len(held_out) > 1:
        knows_bytes = {**knows_bytes, VAL: all(held_out)}
    return [
        (name, key)
        for name, has_bytes in knows_bytes.items()
        for key in results or ("loss", "ppl", *(["bits_per_byte"] if has_bytes else []))
    ]


def _is_score(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and key not in _NOT_SCORES
