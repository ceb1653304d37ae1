"""What a start loads: each package costs every run of everybody its seconds."""

import subprocess
import sys
from pathlib import Path

from tests.e2e._run import environ

UNUSED = (
    *("deepspeed", "datasets", "transformers", "pandas", "pyarrow", "sklearn", "matplotlib"),
    *("tensorboard", "tensorflow", "wandb", "scipy", "torchao", "torchvision", "peft"),
)
CODE = """
import sys
from toolkit.cli.main import run
code = run(["train", "smoke", "--trainer.hard_stop={value: 1, unit: steps}", "--trainer.no_evals"])
print("code", code, "loaded", sorted(set(sys.argv[1:]) & set(sys.modules)))
"""


def test_a_run_of_one_process_loads_no_package_that_it_does_not_use(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *UNUSED],
        cwd=tmp_path, env=environ(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "code 0 loaded []", done.stdout + done.stderr
