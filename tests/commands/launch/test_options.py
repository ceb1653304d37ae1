"""The words of `toolkit launch`, and targets of one's own."""

import json
import shlex
import sys
from pathlib import Path

import msgspec
import pytest

from tests.commands.launch.fakes import run
from toolkit.commands.launch import TARGETS
from toolkit.commands.launch.target import Target, target_class
from toolkit.config.schema import field_docs
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import SHORTHANDS


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_every_option_is_documented_and_no_name_of_something_else(name: str) -> None:
    kind = target_class(name)
    fields = {field.name for field in msgspec.structs.fields(kind)}
    assert fields == field_docs(kind).keys() - {"is_elsewhere", "follows", "mount_example"}
    taken = {*ExperimentConfig.__struct_fields__, *SHORTHANDS, "base", "to", "dry_run", "follow"}
    assert fields.isdisjoint(taken)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--to slrum", "--to: no such target: 'slrum'; did you mean slurm?"),
        ("--to my.target:Own", "--to: my.target:Own: No module named 'my'"),
        ("--to toolkit.errors:ConfigError", "--to: toolkit.errors:ConfigError: derive it from"),
        ("", "--to: say where: --to slurm, kubernetes, beaker, ssh, local"),
        ("--to slurm --partitoin gpu", "no such option: --partitoin; did you mean --partition?"),
        ("--to slurm --image x", "--image is an option of --to kubernetes and beaker alone"),
        ("--to slurm --launch.num_ndoes=2", "no such option: --launch.num_ndoes; did you mean"),
        ("--to slurm --partition", "--partition: needs a value; one with dashes at its start goes"),
        ("--to slurm --cpus many", "--cpus: expected a whole number or null, not 'many'"),
        ("--to slurm --nodes 0", "--nodes: must be 1 or more, not 0"),
        ("--to slurm --time '1 day'", "--time: expected one word, not '1 day'"),
        ("--to slurm --time 25x", "--time: no time limit of Slurm: '25x'; write M, M:S, H:M:S, D-"),
        ("--to slurm --time 1:2:3:4", "--time: no time limit of Slurm: '1:2:3:4'; write M, M:S, H"),
        ("--to slurm --time 5", "--time: 5 leaves no time before --stop-before 300"),
        ("--to slurm --array='--seed=\"1'", "--array: '--seed=\"1': no closing quotation"),
        ("--to slurm --port 65535 --seeds 1,2", "--port: each run of the array has its own port"),
        ("--to slurm --python ''", "--python: is empty; name a Python, or leave it out"),
        ("--to ssh --hosts a --ssh-option \\'", '--ssh-option: "\'": no closing quotation'),
        (
            "--to beaker --image x --weka b --save-folder /weka/b/../etc",
            "--save-folder: /weka/b/../etc: write it without `..`",
        ),
        ("--to slurm --seeds 1,1", "--seeds: a seed stands there twice: [1, 1]"),
        ("--to slurm --nodes %s", "--nodes: "),
        ("--to slurm --secret 'a b'", "after --secret, write the NAME of a variable"),
        (
            "--to slurm --secret NO_SUCH",
            "NO_SUCH of --secret is not set here; export it first",
        ),
        (
            "--to slurm --env HF_TOKEN=abcdefgh",
            "--env: 'HF_TOKEN' looks like a secret; leave",
        ),
        (
            "--to slurm --setup 'export A_KEY=s3cr3tt'",
            "--setup: name secrets by --secret, not in a line of shell: export A_KEY=***",
        ),
        ("--to local --nodes 2", "--nodes: --to local is one machine, not 2; use --to ssh"),
        ("--to ssh", "--hosts: name the machines: --hosts A,B"),
        ("--to ssh --hosts a,a", "--hosts: a machine stands there twice: a,a"),
        ("--to ssh --hosts a --secret X", "ssh carries no secrets; leave out --secret, and keep"),
        ("--to kubernetes", "--image: name an image that has the toolkit"),
        ("--to kubernetes --image x", "--save-folder: say where the containers write the run"),
        (
            "--to kubernetes --image x --save-folder /data/a",
            "--save-folder: /data/a: would be lost with its container (nothing is mounted); choose",
        ),
        (
            "--to beaker --image x --weka b --save-folder /weka/other",
            "--save-folder: /weka/other: would be lost with its container (mounted are /weka/b)",
        ),
        ("--to kubernetes --image x --kind pod", "--kind: 'pod' is not one of"),
        (
            "--to kubernetes --image x --secret A=b",
            "after --secret, write NAME=SECRET/KEY, not 'A",
        ),
        ("--to local --model.d_modle=3", "model.d_modle: no such field"),
        ("--to local --data_loader.global_batch_size=1000", "data_loader.global_batch_size 1000"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    words: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    assert run("launch", "smoke", *shlex.split(words)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_time_limit_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("launch", "smoke", "--to", "slurm", "--time", "0", "--dry-run") == 0
    assert "#SBATCH --time=0\n" in capsys.readouterr().out


def test_jobs_of_other_folders_are_listed_by_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("jobs") == 0
    assert "list those of --save-folder TOP/GROUP/NAME with --root TOP" in capsys.readouterr().out
    (tmp_path / "own_target.py").write_text(OWN)
    assert run("launch", "smoke", "--to", "own_target:Own", "--save-folder", "x/y/z") == 0
    capsys.readouterr()
    assert run("jobs", "--root", "x") == 0
    assert "y/z" in capsys.readouterr().out


OWN_RUN = """
import toolkit


class Quiet(toolkit.Callback):
    pass


def build_config():
    config = toolkit.load_experiment("smoke").config.to_dict()
    config["trainer"]["callbacks"]["own"] = {"type": "launched_run:Quiet"}
    return config


def plain():
    return "smoke"
"""


def test_a_job_finds_the_modules_beside_the_file_of_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("toolkit.config.named._folders", [])
    monkeypatch.delitem(sys.modules, "launched_run", raising=False)
    (tmp_path / "sub dir").mkdir()
    file = tmp_path / "sub dir" / "launched_run.py"
    file.write_text(OWN_RUN)
    added = "${PYTHONPATH:+:$PYTHONPATH}"

    def said(source: str, *words: str, code: int = 0) -> str:
        assert run("launch", source, *words, "--dry-run") == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    for source in ("sub dir/launched_run.py", f"{file}:plain"):
        line = f"export PYTHONPATH='{tmp_path}/sub dir'{added}\n"
        assert line in said(source, "--to", "slurm")
        assert line in said(source, "--to", "local")
    there = ("--to", "beaker", "--image=x", "--weka=b", "--save-folder=/weka/b/a")
    assert "PYTHONPATH" not in said(f"{file}:plain", *there)
    lacking = f"names classes of {tmp_path}/sub dir/launched_run, which the containers do not have"
    assert lacking in said(str(file), *there, code=2)
    monkeypatch.setattr(
        "toolkit.commands.launch.containers.find_commit", lambda allow_dirty: ("https://x/y", "1")
    )
    submit = "toolkit.commands.launch.submit.describe_git"
    monkeypatch.setattr(submit, lambda: {"repository": None})
    assert lacking in said(str(file), *there, "--git", code=2)
    monkeypatch.setattr(submit, lambda: {"repository": str(tmp_path)})
    line = f"""export PYTHONPATH="$PWD"/'sub dir'{added}\n"""
    assert line in said(str(file), *there, "--git")
    del sys.modules["launched_run"]


def test_verbs_of_jobs_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("launch", "status", "a", "--to", "local") == 2
    assert capsys.readouterr().err == "error: 'status' is no config; type: toolkit jobs status a\n"
    assert run("jobs", "status", "a") == 2
    assert "a: no such run here; `toolkit jobs` lists those" in capsys.readouterr().err
    assert run("jobs", "status", "file:///b/a") == 2
    assert "a: jobs are found by the folder or name of the run here" in capsys.readouterr().err


def test_a_variable_that_is_secret_is_named_and_not_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    assert run("launch", "smoke", "--to", "slurm", "--secret", "HF_TOKEN", "--dry-run") == 0
    assert "hf_abc" not in capsys.readouterr().out
    lines = ("--save-folder", "s3://${BUCKET}/a")
    assert run("launch", "smoke", "--to", "slurm", "--dry-run", *lines) == 2


@pytest.mark.parametrize(("name", "option"), [("kubernetes", "--volume"), ("beaker", "--weka")])
def test_a_client_that_is_not_installed_is_needed_to_submit_alone(
    name: str,
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    words = ("launch", "smoke", "--to", name, "--image=x", option, "a:/a", "--save-folder=/a/b")
    assert run(*words, "--dry-run") == 0
    assert run(*words) == 2
    assert f'pip install "toolkit[{name}]" (--dry-run works without it)' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_options_of_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("launch", "--to", "beaker", "--help") == 0
    said = capsys.readouterr().out
    assert "--weka" in said
    assert "--stop-before" not in said


OWN = '''
from toolkit.commands.launch.target import JobStatus, Submission, Target


class Own(Target, kw_only=True):
    """A target of one's own."""

    desk: int = 0
    """Number of the desk."""

    def render(self, job):
        return f"desk {self.desk}: {job.start} train {job.run.config_file} {job.flags()}\\n"

    def submit(self, job):
        return Submission(("7",), {"desk": self.desk})

    def status(self, record):
        return JobStatus("running", f"desk {record.details['desk']}")

    def logs(self, record, *, follow):
        yield "a line"

    def stop(self, record, *, now):
        return "asked"
'''


def test_a_target_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own_target.py").write_text(OWN)
    words = ("launch", "smoke", "--to", "own_target:Own", "--desk", "3", "--name", "a")
    assert run(*words, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("desk 3: ")
    assert run(*words) == 0
    record = json.loads((tmp_path / "runs/smoke/a/metadata/launch.json").read_text())
    assert (record["target"], record["id"], record["options"]["desk"]) == ("own_target:Own", "7", 3)
    assert issubclass(target_class("own_target:Own"), Target)
    capsys.readouterr()
    assert run("jobs", "status", "a") == 0
    assert "job    own_target:Own 7: running (desk 3)" in capsys.readouterr().out
    assert run("jobs", "logs", "a") == 0
    assert run("jobs", "stop", "a") == 0
