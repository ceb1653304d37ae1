"""`from toolkit import NAME` is the whole Python API, and what README and docs show of it."""

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest

import toolkit
from tests.docs.running import ROOT

PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.name != "LOG.md"  # what was true when it was written
]


_MODULES = ("toolkit.testing", "toolkit.commands.launch.target")
"""Public too: what tests and targets of users are made of."""


def test_every_name_is_there() -> None:
    for name in toolkit.__all__:
        assert getattr(toolkit, name) is not None
    assert set(toolkit.__all__) <= set(dir(toolkit))
    with pytest.raises(AttributeError, match="no attribute 'GPTModle'"):
        _ = toolkit.GPTModle
    model = toolkit.GPTModel(
        toolkit.GPTConfig(vocab_size=100, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    )
    assert model.embeddings.positions.weight.shape == (16, 32)


def test_neither_the_package_nor_its_configs_import_torch() -> None:
    code = (
        "import sys, toolkit, toolkit.models.config, toolkit.models.presets;"
        "toolkit.GPTConfig().num_parameters; toolkit.TrainerConfig(); toolkit.ExperimentConfig;"
        "toolkit.start_run; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_torch_reads_when_it_is_loaded_is_set_before() -> None:
    code = (
        "import os, sys, toolkit; assert 'GOMP_SPINCOUNT' not in os.environ; toolkit.GPTConfig;"
        "print(os.environ['GOMP_SPINCOUNT'], os.environ['PYTORCH_ALLOC_CONF'],"
        "'torch' in sys.modules)"
    )
    environ = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT" and "ALLOC" not in k}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1000 expandable_segments:True False\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_import_from_the_package_alone(page) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("toolkit.") for alias in node.names), code
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("toolkit"):
                names = {alias.name for alias in node.names}
                if node.module in _MODULES:
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, name) for name in names), code
                    continue
                assert node.module == "toolkit", code
                assert names <= set(toolkit.__all__), code
