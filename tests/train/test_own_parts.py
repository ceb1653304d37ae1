"""Callbacks and train modules of the user's own: found by name, saved, and one line where wrong."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_remote_runs import run as run_smoke
from tests.workers import WorkerPool
from toolkit import Callback
from toolkit.errors import ConfigError, ToolkitError
from toolkit.experiment.checks import check_experiment
from toolkit.experiment.load import load_experiment

MODULE = """
import torch
from toolkit import Callback, Metric, Transformer, TransformerTrainModule

class Counter(Callback):
    def __init__(self, stop_after=None):
        self.seen, self.stop_after = 0, stop_after

    def post_step(self):
        self.seen += 1
        if self.state.step == self.stop_after:
            self.state.stop("enough")
        return {"seen": Metric(self.seen)}

    def post_record(self):
        self.state.record("network", {"half": self.seen / 2})
        self.state.record_eval("answers", {"accuracy": self.seen / 100})

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

class Doubled(TransformerTrainModule):
    def __init__(self, config, model, *, environment=None, factor=2.0):
        super().__init__(config, model, environment=environment)
        self.factor = factor

    def train_batch(self, batch):
        metrics = super().train_batch(batch)
        return metrics | {"scaled": Metric(metrics["loss"].value * self.factor, "sum")}

class Capped(Transformer):
    # the same parameters, another computation

    def __init__(self, config, *, init_device="cpu", seed=0, scale=2.0):
        super().__init__(config, init_device=init_device, seed=seed)
        self.scale = scale

    def forward(self, input_ids, labels=None, **more):
        sums = super().forward(input_ids, labels, **more)
        return sums._replace(loss=sums.loss * self.scale, ce=sums.ce * self.scale)

class Larger(Transformer):
    def __init__(self, config, **more):
        super().__init__(config, **more)
        self.extra = torch.nn.Linear(3, 3, device="meta")

class NoCallback:
    pass

class Raises(Callback):
    def __init__(self, event):
        self.event = event

    def raise_at(self, event, step=0):
        if self.event == event and self.state.step >= step:
            {}["gone"]

    def pre_train(self):
        self.raise_at("pre_train")

    def post_record(self):
        self.raise_at("post_record", 2)

    def on_metrics(self, stream, records):
        self.raise_at("on_metrics", 5)

class Returns(Callback):
    def __init__(self, value):
        self.value = {"a set": {1}, "a number": 1.0}.get(value, value)

    def post_step(self):
        return eval(self.value) if isinstance(self.value, str) else self.value

class Keeps(Callback):
    def __init__(self, value):
        import numpy
        self.value = eval(value)

    def state_dict(self):
        return {"best": self.value}

    def load_state_dict(self, state):
        open("restored", "w").write(f"{state['best']} {type(state['best']).__name__}")

class Ends(Callback):
    def __init__(self, refuses=False):
        if refuses:
            {}["gone"]

    def pre_step(self):
        if self.state.step == 2:
            raise SystemExit(0)

class Events(Callback):
    def on_failure(self):
        raise ValueError("nothing has failed")
"""


@pytest.fixture(autouse=True)
def _own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(os.fspath(tmp_path))


def run(place: str, *flags: str) -> tuple[int, str]:
    os.chdir(place)  # where a user's modules are found
    return run_smoke(f"{place}/run", f"{place}/data", "--trainer.no_evals", *flags)


def records(place: Path, stream: str = "train") -> list[dict[str, Any]]:
    lines = (place / f"run/metrics/{stream}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def counter(**options: Any) -> str:
    part = {"type": "own_parts:Counter", **options}
    return f"--trainer.callbacks.counter={json.dumps(part)}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_callback_by_name_records_stops_and_is_restored(
    workers: WorkerPool, tmp_path: Path, ranks: int
) -> None:
    stopped = workers.run(ranks, run, str(tmp_path), counter(stop_after=4))
    assert stopped == [(75, "")] * ranks
    done = len(records(tmp_path))
    assert done < 12
    assert workers.run(ranks, run, str(tmp_path), counter()) == [(0, "")] * ranks
    assert [record["seen"] for record in records(tmp_path)] == list(range(1, 13))
    halves = [r["half"] for r in records(tmp_path, "network") if "half" in r]
    assert halves == [n / 2 for n in range(1, 13)]
    answers = [(r["name"], r["step"], r["accuracy"]) for r in records(tmp_path, "eval")]
    assert answers == [("answers", n, n / 100) for n in range(1, 13)]
    config = json.loads((tmp_path / "run/metadata/config.json").read_text())
    assert config["trainer"]["callbacks"]["custom"]["counter"]["target"] == "own_parts:Counter"


def test_checkpoints_are_kept_by_an_evaluation_of_ones_own(
    workers: WorkerPool, tmp_path: Path
) -> None:
    keep = ["keep_last=1", "keep_best=1", "best_metric=answers/accuracy"]
    flags = [counter(), *(f"--trainer.callbacks.checkpointer.{flag}" for flag in keep)]
    assert workers.run(1, run, str(tmp_path), *flags) == [(0, "")]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step12", "step3"]


def test_a_train_module_by_name_takes_the_place_of_ours(
    workers: WorkerPool, tmp_path: Path
) -> None:
    flags = ("--train_module.target=own_parts:Doubled", "--train_module.options={factor: 4}")
    assert workers.run(1, run, str(tmp_path), *flags) == [(0, "")]
    assert all(r["scaled"] == pytest.approx(4 * r["loss"]) for r in records(tmp_path))


def test_a_model_by_name_is_trained_stored_and_not_exported(
    workers: WorkerPool, tmp_path: Path
) -> None:
    short = "--trainer.max_duration.value=3"
    assert workers.run(1, run, str(tmp_path), short) == [(0, "")]
    first = records(tmp_path)[0]["loss"]
    (tmp_path / "run").rename(tmp_path / "ours")
    flags = ("--model.type=own_parts:Capped", "--model.options={scale: 3.0}")
    export = "--trainer.callbacks.checkpointer.export_hf=true"
    assert workers.run(1, run, str(tmp_path), short, *flags, export) == [(0, "")]
    assert records(tmp_path)[0]["loss"] == pytest.approx(3 * first)
    assert not (tmp_path / "run/checkpoints/step3/hf").exists()
    assert "no transformers class has these parts" in (tmp_path / "run/logs/rank0.log").read_text()
    longer = "--trainer.max_duration.value=5"
    assert workers.run(1, run, str(tmp_path), longer, *flags) == [(0, "")]
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]


MINE = "trainer.callbacks.mine"
CUSTOM = "trainer.callbacks.custom.mine"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (f"--{MINE}={{type: own_parts}}", f"{MINE}.type: write it as module:Class, not"),
        (f"--{CUSTOM}={{target: own_parts}}", f"{MINE}.type: write it as module:Class, not"),
        (f"--{CUSTOM}={{target: 'own_parts:Gone'}}", "own_parts' has no attribute 'Gone'"),
        (f"--{CUSTOM}={{target: 'nowhere:Gone'}}", "No module named 'nowhere'"),
        (
            f"--{CUSTOM}={{target: 'own_parts:NoCallback'}}",
            f"{MINE}.type: own_parts:NoCallback: derive it from toolkit.Callback",
        ),
        (
            f"--{CUSTOM}={{target: 'own_parts:Counter', options: {{stop: 3}}}}",
            f"{MINE}.options: own_parts:Counter: got an unexpected keyword argument 'stop'",
        ),
        ("--model.type=own_parts:Counter", "model.type: own_parts:Counter: derive it from toolkit"),
        (
            "--train_module.target=own_parts:Counter",
            "train_module.target: own_parts:Counter: derive it from toolkit.TransformerTrainModule",
        ),
    ],
)
def test_a_bad_one_is_one_line_before_anything_is_prepared(flag: str, message: str) -> None:
    config = load_experiment("smoke", [flag]).config
    with pytest.raises(ConfigError) as error:
        check_experiment(config, 1)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_keeps_the_parameters_of_its_parts() -> None:
    config = load_experiment("smoke", ["--model.type=own_parts:Larger"]).config
    with pytest.raises(ConfigError, match=r"own_parts:Larger has .* parameters, its parts"):
        config.model.build(init_device="meta")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--trainer.callbacks.custom.checkpointer={target: 'own_parts:Counter'}"],
            "custom: checkpointer is a callback already",
        ),
        (
            ["--trainer.callbacks={a: {type: 'm:C'}, custom: {a: {target: 'm:D'}}}"],
            "trainer.callbacks.a: given twice, here and in custom",
        ),
        (
            [f"--{MINE}.stop_after=3"],
            r'mine: no such field; known: .*; one of your own is {"type": "module:Class"}',
        ),
        (["--trainer.callbacks.chekpointer.interval=3"], "did you mean 'checkpointer'"),
    ],
)
def test_a_name_that_is_taken_or_unknown_is_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ToolkitError, match=message) as error:
        load_experiment("smoke", flags)
    assert "\n" not in str(error.value)


def test_a_callback_of_a_file_is_changed_by_flags_and_kept_as_one_of_custom(
    tmp_path: Path,
) -> None:
    file = tmp_path / "config.json"
    config = load_experiment("smoke").stored.to_dict()
    config["trainer"]["callbacks"]["mine"] = {"type": "own_parts:Counter", "stop_after": 4}
    file.write_text(json.dumps(config))
    flags = [f"--{MINE}.stop_after=5", f"--{MINE}.enabled=false", "--train_module.type=a:B"]
    loaded = load_experiment(str(file), flags)
    mine = loaded.config.trainer.callbacks.custom["mine"]
    assert (mine.target, mine.options, mine.enabled) == (
        "own_parts:Counter",
        {"stop_after": 5},
        False,
    )
    assert loaded.origins[f"{CUSTOM}.target"] == str(file)
    assert loaded.origins[f"{CUSTOM}.options.stop_after"] == flags[0]
    assert loaded.config.train_module.target == "a:B"


@pytest.mark.parametrize(
    ("event", "step"), [("pre_train", 0), ("post_record", 2), ("on_metrics", 5)]
)
def test_an_exception_says_whose_it_is(
    workers: WorkerPool, tmp_path: Path, event: str, step: int
) -> None:
    flag = f"--trainer.callbacks.mine={{type: 'own_parts:Raises', event: {event}}}"
    ((code, message),) = workers.run(1, run, str(tmp_path), flag)
    assert code == 1
    start = f"callback mine: {event} at step "
    assert message.startswith(start)
    assert message.endswith(": KeyError: 'gone'")
    # The metrics thread tells of it some steps later.
    assert int(message.removeprefix(start).split(":")[0]) >= step
    status = json.loads((tmp_path / "run/metadata/status.json").read_text())
    assert (status["state"], status["message"]) == ("failed", message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("3", "returns int 3; return {"),
        ("{'x': 1.0}", "'x' is float 1.0; return {"),
        ("{'x': Metric(torch.ones(3))}", "'x' is Metric Metric(value=tensor([1., 1., 1.])"),
        ("{5: Metric(1.0)}", "a metric is called int 5"),
        ("{'loss': Metric(0.0)}", "there is a metric 'loss' already; choose another name"),
        ("{'tokens': Metric(0.0)}", "there is a metric 'tokens' already; choose another name"),
        ("{'x': Metric(10**400)}", "'x' is Metric Metric(value=1000"),
    ],
)
def test_what_post_step_may_not_return_names_the_callback(
    workers: WorkerPool, tmp_path: Path, value: str, message: str
) -> None:
    part = json.dumps({"type": "own_parts:Returns", "value": value})
    ((code, found),) = workers.run(1, run, str(tmp_path), f"--trainer.callbacks.mine={part}")
    assert code == 1
    assert found.startswith(f"callback mine: post_step at step 1: {message}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{1}", "TypeError: ['best'] is a set, which no checkpoint can hold"),
        ("torch.ones(2) * 1j", "['best'] is a torch.complex64 tensor, which no checkpoint"),
        ("Keeps", "['best'] is a type, which no checkpoint can hold"),
    ],
)
def test_a_state_that_could_never_be_read_back_is_not_written(
    workers: WorkerPool, tmp_path: Path, value: str, message: str
) -> None:
    part = json.dumps({"type": "own_parts:Keeps", "value": value})
    short = "--trainer.max_duration.value=4"
    ((code, found),) = workers.run(1, run, str(tmp_path), f"--trainer.callbacks.mine={part}", short)
    assert (code, message in found) == (1, True), found
    assert not list((tmp_path / "run/checkpoints").glob("step*/.metadata.json"))


def test_scalars_of_numpy_are_kept_as_numbers(workers: WorkerPool, tmp_path: Path) -> None:
    part = json.dumps({"type": "own_parts:Keeps", "value": "numpy.float64(1.5)"})
    for steps in (3, 4):
        flags = (f"--trainer.callbacks.mine={part}", f"--trainer.max_duration.value={steps}")
        assert workers.run(1, run, str(tmp_path), *flags) == [(0, "")]
    assert (tmp_path / "restored").read_text() == "1.5 float"


def test_a_callback_ends_no_process_and_hears_of_failures_alone(
    workers: WorkerPool, tmp_path: Path
) -> None:
    mine = "--trainer.callbacks.mine={{type: 'own_parts:{}'}}"
    assert workers.run(1, run, str(tmp_path), mine.format("Events")) == [(0, "")]
    (tmp_path / "run").rename(tmp_path / "good")
    ended = workers.run(1, run, str(tmp_path), mine.format("Ends"))
    assert ended == [(1, "callback mine: pre_step at step 2: SystemExit: 0")]
    (tmp_path / "run").rename(tmp_path / "bad")
    refuses = "--trainer.callbacks.mine={type: 'own_parts:Ends', refuses: true}"
    ((code, message),) = workers.run(1, run, str(tmp_path), refuses)
    assert (code, "own_parts:Ends cannot be made: KeyError: 'gone'" in message) == (2, True)


class Seen(Callback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.restored: dict[str, Any] = {}

    def pre_train(self) -> None:
        self.events.append(f"begins at {self.state.step}")

    def post_train(self) -> None:
        self.events.append(f"ends at {self.state.step} of {self.state.stop_step}")

    def state_dict(self) -> dict[str, Any]:
        return {"events": self.events}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state


def in_python(place: str) -> list[Any]:
    from toolkit import (
        GPTConfig,
        GPTModel,
        Trainer,
        get_dataloaders,
        prepare_training_environment,
        start_run,
    )
    from toolkit.train.hooks import by_name

    found = []
    for steps in (3, 5):
        flags = [f"--dataset.root={place}/data", f"--trainer.max_duration.value={steps}"]
        config = load_experiment("smoke", flags).config
        environment = prepare_training_environment(config)
        run = start_run("own", "python", root=f"{place}/runs", resume=steps > 3)
        loader, _ = get_dataloaders(config.data)
        given, added, listed = Seen(), Seen(), []
        for callbacks in ([Seen()], [Seen(), Seen()]):
            try:
                listed += by_name(callbacks)
            except ConfigError as error:
                listed.append(str(error))
        sizes = {"vocab_size": 300, "n_positions": loader.sequence_length, "n_embd": 32}
        model = GPTModel(GPTConfig(**sizes, n_layer=1, n_head=4), init_device="meta")
        trainer = Trainer(
            config.trainer,
            model,
            loader,
            run=run,
            environment=environment,
            callbacks={"given": given},
        )
        trainer.restore()
        trainer.add_callback("added", added)
        errors = []
        for name, callback in (("given", Seen()), ("other", object()), ("checkpointer", Seen())):
            try:
                trainer.add_callback(name, callback)  # type: ignore[arg-type]
            except ConfigError as error:
                errors.append(str(error))
        trainer.fit()
        try:
            trainer.add_callback("late", Seen())
        except ConfigError as error:
            errors.append(str(error))
        found.append((given.events, given.restored, added.restored, listed + errors))
        log = run.path("logs/rank0.log").read_text()
        assert (
            log.count(" parameters on 1 process, ") == log.count(f"): {run.folder}\n") == len(found)
        )
        (group,) = json.loads(run.path("metadata/optimizer_groups.json").read_text())
        assert group["num_parameters"] == trainer.state.train_module.num_parameters
        assert group["override"] is None
        assert f"done at step {steps}; everything is in {run.folder}" in log
        assert f"checkpoint: {run.folder}/checkpoints/step{steps}" in log
        names = list(trainer.callbacks)
        assert names.index("lm_evaluator") < names.index("given") < names.index("added")
        assert names.index("added") < names.index("checkpointer")
        environment.close()
    return found


def test_callbacks_given_in_python_are_called_and_restored(
    workers: WorkerPool, tmp_path: Path
) -> None:
    ((first, second),) = workers.run(1, in_python, str(tmp_path))
    events, restored, added, errors = first
    assert events == ["begins at 0", "ends at 3 of 3"]
    assert (restored, added) == ({}, {})
    assert errors[0] == "seen"
    assert errors[1].startswith("callback seen: the list has two of this class; give a mapping")
    errors = errors[2:]
    assert errors[0] == "callback given: there is one of this name; choose another name"
    assert errors[1].startswith("callback other: derive its class from toolkit.Callback, and give")
    assert errors[2] == "callback checkpointer: there is one of this name; choose another name"
    assert errors[3] == "callback late: training has begun; add it before `fit`"
    events, restored, added, _ = second
    assert events == ["begins at 3", "ends at 5 of 5"]
    assert restored == added == {"events": ["begins at 0", "ends at 3 of 3"]}
