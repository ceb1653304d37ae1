"""`toolkit eval SRC --tasks`: the numbers of `downstream_evaluator`, of any model on disk."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from toolkit.commands.evaluate import (
    EvalSettings,
    Loaded,
    find_model,
    row_lengths,
    tokenizer_of,
)
from toolkit.commands.runs.named import folder_of
from toolkit.data.tokens.prepared import require_ids
from toolkit.errors import ConfigError
from toolkit.evaluate.downstream import score_task
from toolkit.evaluate.tasks.names import check_names, load_task
from toolkit.evaluate.tasks.task import check_lengths
from toolkit.train.callbacks.config import DOWNSTREAM, DownstreamEvaluatorConfig

Notify = Callable[[str], None]


class TaskScores(msgspec.Struct, frozen=True, kw_only=True):
    """What `evaluate_tasks` found."""

    source: str
    step: int | None
    """Of the checkpoint; None for a folder of `transformers`."""
    settings: dict[str, Any]
    scores: dict[str, dict[str, float | int]]
    """By task: numbers as in eval.jsonl."""

    def lines(self) -> Iterator[str]:
        """One JSON object for each task."""
        for name, numbers in self.scores.items():
            record: dict[str, Any] = {"name": f"{DOWNSTREAM}/{name}"}
            for key, value in numbers.items():
                record[key] = value if math.isfinite(value) else str(value)
            record |= {"source": self.source, "step": self.step, "settings": self.settings}
            yield msgspec.json.encode(record).decode()


def evaluate_tasks(
    where: str, tasks: Sequence[str], *, notify: Notify = lambda line: None, **asked: Any
) -> TaskScores:
    """Score `tasks` (names or folders), with `asked` as in `EvalSettings`. `notify` is told, in a
    line, what is not as one might expect."""
    check_names(tasks, "--tasks")
    settings = EvalSettings(**asked)
    if settings.stride is not None:
        raise ConfigError("--stride goes with --files; each task has rows of its own")
    found = find_model(str(folder_of(where)), settings)
    tokenizer = tokenizer_of(found)
    loaded: Loaded = found.open(notify)
    require_ids(found.where, tokenizer.vocab_size, loaded.vocab_size)
    dataset = found.run.dataset if found.run is not None else None
    context, _ = row_lengths(settings, dataset, loaded.longest)
    batch_tokens = settings.batch_tokens or DownstreamEvaluatorConfig().batch_tokens
    scores = {}
    for name in tasks:
        task = load_task(name, tokenizer)
        if (note := check_lengths(task, context, "--tasks")) is not None:
            notify(note)
        numbers = score_task(
            task,
            loaded.logits,
            context=context,
            batch_tokens=batch_tokens,
            vocab_size=loaded.vocab_size,
            device=loaded.device,
        )
        assert numbers is not None, "nothing asked to stop"
        scores[task.name] = numbers
    step = found.source.metadata.step if found.source and found.source.metadata else None
    shown = {
        "data": "tasks",
        "sequence_length": context,
        "batch_tokens": batch_tokens,
        "dtype": found.dtype,
        **found.averages,
    }
    return TaskScores(source=found.where, step=step, settings=shown, scores=scores)
