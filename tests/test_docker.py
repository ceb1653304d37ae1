"""The Dockerfile, as far as that goes without an engine: its instructions, and its steps run as a
script in an empty folder."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE_ARGUMENTS = ("CUDA", "TORCH", "PYTHON", "EXTRAS")


class Instruction(NamedTuple):
    word: str
    text: str


def instructions() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line)
    return [Instruction(word, text) for word, text in pairs]


STEPS = instructions()


def of(word: str) -> list[str]:
    return [step.text for step in STEPS if step.word == word]


def values(word: str) -> dict[str, str]:
    """Of ARG or ENV: name -> value."""
    pairs = [part.partition("=") for text in of(word) for part in shlex.split(text)]
    return {name: value for name, _, value in pairs}


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a file of the folder into the build; its last fitting line counts,
    and folders count for what is in them."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        if not pattern or pattern.startswith("#"):
            continue
        names = (
            parts
            if line.startswith("**/")
            else ["/".join(parts[: n + 1]) for n in range(len(parts))]
        )
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            sent = line.startswith("!")
    return sent


def test_every_instruction_is_one_that_all_builders_know() -> None:
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "HEALTHCHECK"}
    assert {step.word for step in STEPS} <= known | {"ENTRYPOINT", "CMD"}
    assert [step.word for step in STEPS[:2]] == ["ARG", "FROM"]
    assert re.fullmatch(r"python:\$\{PYTHON\}-slim-[a-z]+", STEPS[1].text)
    assert values("ARG").keys() == set(MAKEFILE_ARGUMENTS)
    used = set(re.findall(r"\$\{?([A-Z]+)\b", " ".join(step.text for step in STEPS)))
    assert used == values("ARG").keys()
    for step in of("RUN"):
        assert subprocess.run(["sh", "-n", "-c", step], check=False).returncode == 0, step
    apt = next(step for step in of("RUN") if "apt-get install" in step)
    assert "--no-install-recommends" in apt
    assert "rm -rf /var/lib/apt/lists" in apt


def test_it_ends_as_a_user_with_a_home_who_may_write_where_runs_go() -> None:
    made = next(step for step in of("RUN") if step.startswith("useradd"))
    number = re.search(r"--uid (\d+)", made)
    assert number is not None
    assert int(number[1]) > 0
    # A number: Kubernetes' runAsNonRoot knows no names.
    assert of("USER") == [number[1]]
    words = [step.word for step in STEPS]
    assert "RUN" not in words[words.index("USER") :]
    assert "COPY" not in words[words.index("USER") :]
    home, folder = values("ENV")["HOME"], of("WORKDIR")[-1]
    assert words.index("USER") < len(words) - 1 - words[::-1].index("WORKDIR")
    writable = made.partition("chmod 1777")[2].split()
    volumes = json.loads(of("VOLUME")[0])
    assert volumes == [f"{folder}/data", f"{folder}/runs"]
    assert {home, folder, *volumes} <= set(writable)


def test_any_command_runs_and_doctor_says_whether_it_is_healthy() -> None:
    assert json.loads(of("ENTRYPOINT")[0]) == ["tini", "--"]
    assert json.loads(of("CMD")[0])[0] == "toolkit"
    assert of("HEALTHCHECK")[0].endswith("CMD ACCELERATE_USE_CPU=true toolkit doctor")


def test_the_build_gets_the_package_and_nothing_private() -> None:
    copied = [word for text in of("COPY") for word in text.split()[:-1]]
    assert set(copied) == {path.name for path in ROOT.iterdir() if is_sent(path.name)}
    assert all((ROOT / name).exists() for name in copied)
    for kept in ("toolkit/cli/main.py", "toolkit/recipes/smoke.json", "toolkit/py.typed"):
        assert is_sent(kept)
    private = [".git/config", ".venv/bin/python", ".env", "runs/a/metadata/config.json"]
    private += ["data/x/train.bin", "tests/tiny.py", "toolkit/cli/__pycache__/main.pyc"]
    assert not any(map(is_sent, private))


def test_make_hands_on_what_its_command_line_says() -> None:
    def said(*words: str, **environ: str) -> list[str]:
        make = subprocess.run(
            ["make", "-n", "docker-image", *words],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")} | environ,
            capture_output=True,
            text=True,
            check=True,
        )
        return make.stdout.split()

    plain = ["docker", "build", "-t", "toolkit", "."]
    assert said() == plain
    assert said(PYTHON="python3.12") == plain  # the interpreter of .venv
    words = said("CUDA=13.0", "TORCH=2.12.1", "PYTHON=python3.12", "IMAGE=me/toolkit:1")
    pairs = ("CUDA=13.0", "TORCH=2.12.1", "PYTHON=3.12")
    args = [word for pair in pairs for word in ("--build-arg", pair)]
    assert words == ["docker", "build", "-t", "me/toolkit:1", *args, "."]


@pytest.mark.parametrize(
    ("cuda", "version", "expected"),
    [
        ("cpu", "", "torch=={}+cpu https://download.pytorch.org/whl/cpu"),
        ("13.0", "", "torch=={}+cu130 https://download.pytorch.org/whl/cu130"),
        ("12.6", "2.12.1", "torch==2.12.1+cu126 https://download.pytorch.org/whl/cu126"),
    ],
)
def test_torch_is_the_build_that_was_asked_for(
    cuda: str, version: str, expected: str, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    step = next(step for step in of("RUN") if "download.pytorch.org" in step)
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    pip.chmod(0o755)
    environ = {"CUDA": cuda, "TORCH": version, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["sh", "-ec", step], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    words = result.stdout.split()
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert pinned is not None
    assert [words[3], words[5]] == expected.format(pinned[1]).split()
    # The constraint says the same version, or pip would find no answer.
    constraint = f"torch=={version or pinned[1]}"
    assert constraint in (tmp_path / "constraints.txt").read_text().splitlines()


@pytest.mark.slow
def test_its_steps_make_an_environment_that_trains(tmp_path: Path) -> None:
    """Every RUN and COPY in the order of the file, with the packages of this environment for those
    of the network, and nothing of the system's."""
    installed = metadata.version("torch")
    local = installed.partition("+")[2] or "cpu"
    cuda = local if local == "cpu" else f"{local[2:-1]}.{local[-1]}"
    python = tmp_path / "python"
    venv.create(python)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(python)}))
    packages = [path for path in sys.path if path.endswith("site-packages")]  # pip too
    (site / "base.pth").write_text("\n".join(packages))
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("apt-get", "useradd"):
        (shims / name).write_text("#!/bin/sh\n")
    (shims / "pip").write_text(f'#!/bin/sh\nexec "{python}/bin/python" -m pip "$@"\n')
    for shim in shims.iterdir():
        shim.chmod(0o755)
    environ = {
        "PATH": f"{shims}:{python}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path / "home"),
        "CUDA": cuda,
        "TORCH": installed.partition("+")[0],
        "EXTRAS": "s3",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it so: no isolation
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    image = tmp_path / "image"
    place = image / "home/toolkit"  # of useradd
    place.mkdir(parents=True)
    for word, text in STEPS:
        if word == "WORKDIR":
            place = image / text.strip("/")
            place.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *names, _ = text.split()
            for name in names:
                _copy(name, place)
        elif word == "RUN":
            step = re.sub(r"(?<=\s)/", f"{image}/", text)  # nothing of this machine
            subprocess.run(["sh", "-ec", step], cwd=place, env=environ, check=True)
    assert not (image / "opt/toolkit/toolkit").exists()
    assert oct(place.stat().st_mode)[-4:] == "1777"

    def runs(*words: str) -> str:
        command = [str(python / "bin" / "toolkit"), *words]
        result = subprocess.run(
            command,
            cwd=place,
            env=environ,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    code = "import toolkit; print(toolkit.__file__)"
    found = subprocess.run(
        [python / "bin/python", "-c", code], cwd=place, env=environ, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(site / "toolkit/__init__.py")
    assert "ready to train" in runs("doctor")
    runs("recipes", "show", "quickstart")
    assert "runs/" in runs("train", "smoke", "--dry-run")
    runs("train", "smoke", "--name", "first", "--trainer.max_duration.value=2",
         "--train_module.scheduler.warmup=1")  # fmt: skip
    assert (place / "runs/smoke/first/checkpoints/step2/.metadata.json").is_file()
    assert sorted(path.name for path in place.iterdir()) == ["data", "runs"]


def _copy(name: str, to: Path) -> None:
    """What .dockerignore lets through, as old as a checkout may be."""
    for path in [ROOT / name, *(ROOT / name).rglob("*")]:
        relative = path.relative_to(ROOT)
        if path.is_file() and is_sent(str(relative)):
            (to / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to / relative)
            os.utime(to / relative, (1e9, 1e9))
