"""Log-likelihoods of a task's choices by any model, on any number of ranks.

Batches are cut once, whatever the number of ranks: choices that continue the same ids share a row,
rows of like length share a batch. Each share of the ranks computes every n-th batch; all make the
same number of forwards, as sharded models need. A sum over ranks puts the answers together: each is
of one rank, so nothing is rounded, and the answers are those of one process.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from toolkit.evaluate.tasks.task import Choice, Task
from toolkit.models.kernels import widest_float

Logits = Callable[[Tensor], Tensor]
"""Ids `(rows, seq)` to logits `(rows, seq, vocab)`; every rank calls it together."""

LENGTH_MULTIPLE = 64
"""Lengths of batches, so that few are different."""
MOST_LOGITS = 1 << 28
"""Logits of one forward: 1 GiB in fp32."""


class Share(NamedTuple):
    """Which batches a rank computes, and whether its answers count."""

    number: int = 0
    of: int = 1
    counts: bool = True


ALONE = Share()


@torch.no_grad()
def log_likelihoods(
    task: Task,
    logits: Logits,
    *,
    context: int,
    batch_tokens: int,
    vocab_size: int,
    device: torch.device,
    share: Share = ALONE,
    reduce: Callable[[Tensor], object] = lambda values: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[float] | None:
    """The log-likelihood of each choice in nats, in order; None: asked to stop between two batches.
    The device is read once, after the last batch.

    Args:
        context: most tokens of a row; the beginning of longer ones is cut.
        batch_tokens: most tokens of a forward, padding among them, at least one row; fewer where
            the vocabulary is large (`MOST_LOGITS`).
        reduce: adds up, in place, the values of all ranks.
    """
    plans = plan_batches(task.choices, context, min(batch_tokens, MOST_LOGITS // vocab_size))
    own: list[tuple[list[int], Tensor]] = []
    # A model that is compiled would be compiled again for each length.
    with torch.compiler.set_stance("force_eager"):
        for start in range(0, len(plans), share.of):
            if should_stop():
                return None
            batch = plans[min(start + share.number, len(plans) - 1)].make(task.choices)
            sums = _sums(batch, logits(batch.ids.to(device)))
            if share.counts and start + share.number < len(plans):
                own.append((batch.choices, sums))
    values = torch.zeros(len(task.choices), dtype=torch.float64)
    for choices, sums in own:
        values[choices] = sums.cpu()
    reduce(values)
    return values.tolist()


class Batch(NamedTuple):
    """Rows of one forward, and the choices that they answer."""

    ids: Tensor
    """`(rows, seq)`, padded on the right."""
    choices: list[int]
    """Numbers of the choices, of all tokens in order."""
    row: Tensor
    """Row of each token of a choice, `(tokens,)`."""
    position: Tensor
    """Where in its row the token is predicted."""
    token: Tensor
    lengths: list[int]
    """Tokens of each choice."""


class Plan(NamedTuple):
    """A batch before it is made."""

    rows: list[tuple[tuple[int, ...], tuple[int, ...], list[int]]]
    """Context, what follows of it, and numbers of the choices that continue both."""
    length: int
    """Of its rows, padding among them."""
    context: int

    def make(self, choices: Sequence[Choice]) -> Batch:
        """The batch; `choices` are those that it was planned for."""
        ids = torch.zeros(len(self.rows), self.length, dtype=torch.int64)
        numbers: list[int] = []
        row: list[int] = []
        position: list[int] = []
        token: list[int] = []
        lengths: list[int] = []
        for index, (before, following, asked) in enumerate(self.rows):
            own = (before + following)[-self.context :]
            ids[index, : len(own)] = torch.tensor(own)
            for number in asked:
                continuation = choices[number].continuation
                numbers.append(number)
                lengths.append(len(continuation))
                row += [index] * len(continuation)
                position += range(len(own) - len(continuation), len(own))
                token += continuation
        places = torch.tensor([row, position, token])
        return Batch(ids, numbers, places[0], places[1], places[2], lengths)


def plan_batches(choices: Sequence[Choice], context: int, batch_tokens: int) -> list[Plan]:
    """All rows in batches, the longest first."""
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for number, choice in enumerate(choices):
        rows.setdefault((choice.context, choice.continuation[:-1]), []).append(number)
    ordered = sorted(rows.items(), key=lambda row: -len(row[0][0]) - len(row[0][1]))
    plans, first = [], 0
    while first < len(ordered):
        longest = sum(map(len, ordered[first][0]))
        length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, context)
        number = max(1, batch_tokens // length)
        some = [(*ids, numbers) for ids, numbers in ordered[first : first + number]]
        plans.append(Plan(some, length, context))
        first += number
    return plans


def _sums(batch: Batch, logits: Tensor) -> Tensor:
    """Log-likelihoods of the choices of a batch, float64, on the device."""
    device = logits.device
    row, position, token = (t.to(device) for t in (batch.row, batch.position, batch.token))
    asked = logits[row, position]
    asked = asked.double() if asked.dtype == torch.float64 else asked.float()
    values = asked.log_softmax(-1).gather(1, token[:, None])[:, 0].to(widest_float(device))
    # Sums of fixed order: `index_add_` would add up in any.
    longest = max(batch.lengths)
    parts = [pad(part, (0, longest - len(part))) for part in values.split(batch.lengths)]
    return torch.stack(parts).sum(1)
