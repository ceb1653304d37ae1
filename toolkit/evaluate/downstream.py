"""`DownstreamEvaluator`: tasks with choices during training."""

import logging
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.errors import ConfigError
from toolkit.evaluate.tasks.metrics import task_numbers
from toolkit.evaluate.tasks.names import KEY, check_names, load_task
from toolkit.evaluate.tasks.scoring import Logits, Share, log_likelihoods
from toolkit.evaluate.tasks.task import Task, check_lengths
from toolkit.train.callbacks.config import DOWNSTREAM, DownstreamEvaluatorConfig
from toolkit.train.callbacks.evaluator import Evaluator
from toolkit.train.scores import check_result

log = logging.getLogger(__name__)


def score_task(
    task: Task, logits: Logits, *, stop: Callable[[], bool] = lambda: False, **how: object
) -> dict[str, float | int] | None:
    """The numbers of a task as eval.jsonl has them; `how` as for `log_likelihoods`; None: asked to
    stop."""
    started = time.perf_counter()
    values = log_likelihoods(task, logits, should_stop=stop, **how)  # type: ignore[arg-type]
    if values is None:
        return None
    return {
        **task_numbers(task, values),
        "num_documents": len({choice.document for choice in task.choices}),
        "seconds": time.perf_counter() - started,
    }


class DownstreamEvaluator(Evaluator):
    """Every choice on one rank, the same numbers on all; on any layout, through the logits of the
    train module."""

    _config: DownstreamEvaluatorConfig

    def __init__(self, config: DownstreamEvaluatorConfig) -> None:
        super().__init__(config)
        self._tasks: list[Task] = []

    def pre_train(self) -> None:
        """Raises ConfigError or DataError where a task cannot be scored: before the first step."""
        state, names = self.state, self._config.tasks
        check_names(names)
        if not state.config.no_evals:
            folder = state.train_loader.tokenizer_folder
            if folder is None:
                raise ConfigError(
                    "the training data came without a tokenizer, so tasks cannot be read; leave "
                    "them out, or name the tokens' tokenizer in dataset.tokenizer",
                    key=KEY,
                )
            tokenizer = load_tokenizer(folder)
            self._tasks = [load_task(name, tokenizer) for name in names]
            for task in self._tasks:
                note = check_lengths(task, state.train_loader.sequence_length, KEY)
                if note is not None and state.is_main:
                    log.warning("%s", note)
                results = task_numbers(task, [0.0] * len(task.choices))
                for suffix in state.evaluated_weights:
                    check_result(state.config, f"{DOWNSTREAM}/{task.name}{suffix}", results)
        super().pre_train()

    def find_results(self) -> dict[str, dict[str, float | int]] | None:
        state, environment = self.state, self.state.environment
        group, layout, rank = environment.cpu_group, environment.layout, environment.rank

        def reduce(values: torch.Tensor) -> None:
            if group is not None:
                dist.all_reduce(values, group=group)

        results = {}
        for task in self._tasks:
            numbers = score_task(
                task,
                state.train_module.logits,
                stop=state.should_stop,
                context=state.train_loader.sequence_length,
                batch_tokens=self._config.batch_tokens,
                vocab_size=state.train_module.model_config.vocab_size,
                device=environment.device,
                share=Share(layout.batch_rank(rank), layout.batch_ranks, layout.owns_rows(rank)),
                reduce=reduce,
            )
            if numbers is None:
                return None
            results[f"{DOWNSTREAM}/{task.name}"] = numbers
        return results
