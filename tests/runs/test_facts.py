"""`run_facts`: everything about a run, from its folder."""

import json
import subprocess
import sys

import pytest

from tests.runs.made import make_run
from toolkit.errors import RunError
from toolkit.runs.facts import run_facts
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import start_run
from toolkit.runs.status import read_status, record_of


def test_facts_of_a_run_of_several_attempts(tmp_path):
    folder = make_run(
        tmp_path, "one", losses=[4.0, 3.0, 2.0, 1.5], val={2: 3.1, 4: 3.2}, attempts=2
    )
    step = folder / "checkpoints" / "step4"
    step.mkdir()
    extra = {"data": {"fingerprint": "f", "seed": 3}}
    (step / ".metadata.json").write_text(json.dumps({"step": 4, "tokens": 400, "extra": extra}))
    (folder / "checkpoints" / "step5.tmp").mkdir()
    (folder / RUN_FILES.origins).write_text('{"seed": "--seed=0"}')
    (folder / RUN_FILES.git).write_text("torn {")
    facts = run_facts(folder)
    assert facts.title == "exp/one"
    assert (facts.record.state, facts.record.step, facts.record.loss) == ("finished", 4, 1.5)
    assert (facts.progress.val_name, facts.progress.val_loss) == ("val", 3.2)
    assert (facts.progress.best_val_loss, facts.progress.best_val_step) == (3.1, 2)
    spans = [(a.number, a.state, a.reason, a.first_step, a.last_step) for a in facts.attempts]
    assert spans == [(1, "stopped", "SIGINT", 1, 2), (2, "finished", "SIGINT", 3, 4)]
    assert facts.seconds == facts.record.seconds == sum(a.seconds for a in facts.attempts)
    assert [(c.step, c.tokens) for c in facts.checkpoints] == [(4, 400)]
    assert (facts.data["fingerprint"], facts.config["seed"], facts.git) == ("f", 0, {})
    assert facts.origins == {"seed": "--seed=0"}
    assert facts.age < 60


def test_a_run_of_a_release_that_kept_no_attempts_is_told_by_its_metrics(tmp_path):
    folder = make_run(tmp_path, "one", losses=[4.0, 3.0], attempts=2)
    status = json.loads((folder / RUN_FILES.status).read_text())
    own_id = status.pop("id")
    del status["attempts"]
    (folder / RUN_FILES.status).write_text(json.dumps(status))
    assert record_of(folder).seconds is None
    assert record_of(folder).id == own_id
    first, second = run_facts(folder).attempts
    assert (first.state, first.last_step, second.state) == ("unknown", 1, "finished")
    assert first.ended == "2023-11-14T22:13:21Z"


def test_the_command_is_that_of_the_start_whatever_resumed_it(tmp_path, monkeypatch):
    for number, verb in enumerate(("train", "train", "resume", "resume")):
        monkeypatch.setattr(sys, "argv", ["toolkit", verb, str(number)])
        start_run("exp", "one", root=tmp_path, resume=number > 1).close("stopped")
    facts = run_facts(tmp_path / "exp" / "one")
    assert facts.command["argv"] == ["toolkit", "train", "1"]
    assert [(r["attempt"], r["argv"][2]) for r in facts.resumes] == [(3, "2"), (4, "3")]


def test_an_attempt_that_vanished_ended_with_its_last_line(tmp_path):
    code = (
        "import sys, os; from toolkit.runs.registry import start_run;"
        "run = start_run('exp', 'one', root=sys.argv[1]);"
        'run.path("metrics/train.jsonl").write_text('
        '\'{"step": 7, "time": 4e9, "attempt": 1, "loss": 1}\\n\'); os._exit(9)'
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    folder = tmp_path / "exp" / "one"
    (only,) = run_facts(folder).attempts
    assert (only.state, only.ended, only.last_step) == ("dead", "2096-10-02T07:06:40Z", 7)
    start_run("exp", "one", root=tmp_path, resume=True).close("finished")
    (before,) = read_status(folder).attempts
    assert run_facts(folder).attempts[0].done_again == 0
    (folder / RUN_FILES.train_metrics).write_text('{"step": 4, "attempt": 1}\n')
    assert run_facts(folder).attempts[0].done_again == 3
    assert (before.state, before.ended, before.step) == ("dead", "2096-10-02T07:06:40Z", 7)


def test_what_is_no_run_is_refused_and_damaged_metrics_tell_nothing(tmp_path):
    with pytest.raises(RunError, match="no such run folder"):
        run_facts(tmp_path / "none")
    folder = make_run(tmp_path, "one", losses=["nan"], val={1: float("inf")})
    (folder / RUN_FILES.train_metrics).write_bytes(b'{"step": 1, "loss": "nan"}\n\xff\xfe{\n{"st')
    (folder / RUN_FILES.eval_metrics).write_text('{"step": 1, "name": "val", "loss": "inf"}\n{"')
    facts = run_facts(folder)
    assert facts.record.loss != facts.record.loss
    assert (facts.progress.val_loss, facts.progress.best_val_loss) == (float("inf"), None)
