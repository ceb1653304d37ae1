"""What a task's log-likelihoods say, in float64, under the names that OLMo-core gives them.

For each choice, `ll` is the sum of the log-probabilities of its tokens. A document's answer is the
choice with the largest score:

    acc, f1              ll
    len_norm             ll / characters of the continuation

`accuracy` (or `length-normalized accuracy`, `F1 score`) counts answers that are right. Of the right
choice, means over documents: `CE loss` is -ll / characters, `BPB` is -ll / ln 2 / UTF-8 bytes,
`soft loss` its share of the softmax over the scores, `log soft loss` the logarithm of that.
`ce_loss` and `bpb` have one choice a document, and only CE loss or BPB.

"v2" counts the first character of a continuation (the space before a word), as OLMES does; the
names without it do not. Accuracies of both count it, as in `ai2-olmo-eval`. (F1 is of choice 0:
"yes".)
"""

import math
from collections.abc import Sequence

from toolkit.evaluate.tasks.task import Choice, Task

LABELS = {
    "acc": "accuracy",
    "len_norm": "length-normalized accuracy",
    "f1": "F1 score",
    "ce_loss": "CE loss",
    "bpb": "BPB",
}
"""The name of the number that a task is about."""


def task_numbers(task: Task, log_likelihoods: Sequence[float]) -> dict[str, float]:
    """The numbers of a task by name, those of version 1 first; `log_likelihoods` in nats, one for
    each of its choices."""
    documents: dict[int, list[tuple[Choice, float]]] = {}
    for choice, value in zip(task.choices, log_likelihoods, strict=True):
        documents.setdefault(choice.document, []).append((choice, value))
    rows = [sorted(own, key=lambda pair: pair[0].number) for own in documents.values()]
    numbers: dict[str, float] = {}
    for version, suffix in enumerate(("", " v2")):
        found = _version(task, rows, version)
        numbers |= {f"{name}{suffix}": value for name, value in found.items()}
    return numbers


def _version(
    task: Task, rows: Sequence[Sequence[tuple[Choice, float]]], version: int
) -> dict[str, float]:
    right = [next(pair for pair in row if pair[0].number == pair[0].label) for row in rows]
    loss = _mean([_over(-value, choice.characters[version]) for choice, value in right])
    bits = _mean(
        [_over(-value / math.log(2), choice.num_bytes[version]) for choice, value in right]
    )
    if task.metric in ("ce_loss", "bpb"):
        return {"CE loss": loss} if task.metric == "ce_loss" else {"BPB": bits}
    labels = [choice.label for choice, _ in right]
    counted = [_scores(task, row, 1) for row in rows]
    answers = [scores.index(max(scores)) for scores in counted]
    if task.metric == "f1":
        return {LABELS["f1"]: _f1(answers, labels)}
    shares = [
        _log_softmax(_scores(task, row, version))[label]
        for row, label in zip(rows, labels, strict=True)
    ]
    return {
        LABELS[task.metric]: _mean([float(a == b) for a, b in zip(answers, labels, strict=True)]),
        "CE loss": loss,
        "BPB": bits,
        "soft loss": _mean([math.exp(share) for share in shares]),
        "log soft loss": _mean(shares),
    }


def _scores(task: Task, row: Sequence[tuple[Choice, float]], version: int) -> list[float]:
    if task.metric != "len_norm":
        return [value for _, value in row]
    return [_over(value, choice.characters[version]) for choice, value in row]


def _over(value: float, size: int) -> float:
    """A text of no size has an infinite loss each."""
    return value / size if size else math.copysign(math.inf, value)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values)


def _log_softmax(scores: Sequence[float]) -> list[float]:
    largest = max(scores)
    if not math.isfinite(largest):
        return [math.nan] * len(scores)
    total = largest + math.log(math.fsum(math.exp(score - largest) for score in scores))
    return [score - total for score in scores]


def _f1(answers: Sequence[int], labels: Sequence[int]) -> float:
    """Of choice 0 (van Rijsbergen 1979); 0 where it is never right."""
    pairs = list(zip(answers, labels, strict=True))
    hits = sum(answer == label == 0 for answer, label in pairs)
    misses = sum((answer == 0) != (label == 0) for answer, label in pairs)
    return 2 * hits / (2 * hits + misses) if hits else 0.0
