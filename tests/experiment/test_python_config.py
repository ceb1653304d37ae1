"""A Python file as CONFIG: what its function may return, and one line for everything else."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import toolkit.config.named as named
from toolkit.errors import ConfigError
from toolkit.experiment.load import load_experiment
from toolkit.experiment.python_config import is_being_imported, is_python_config


@pytest.fixture(autouse=True)
def _imports_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(named, "_folders", [])
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(folder: Path, code: str, name: str = "my_config.py") -> str:
    (folder / name).write_text(code)
    return str(folder / name)


@pytest.mark.parametrize(
    "body",
    [
        "return 'smoke'",
        "return toolkit.load_experiment('smoke').config",
        "return toolkit.load_experiment('smoke').config.to_dict()",
        # Parts that are structs, paths and tuples.
        "c = toolkit.load_experiment('smoke').config; d = c.to_dict(); d['model'] = c.model; "
        "d['run']['root'] = Path(d['run']['root']); return d",
    ],
    ids=["recipe", "config", "mapping", "mixed"],
)
def test_all_that_it_may_return_is_the_same_config(body: str, tmp_path: Path) -> None:
    code = f"import toolkit\nfrom pathlib import Path\ndef build_config():\n    {body}\n"
    loaded = load_experiment(write(tmp_path, code), ["--seed=7"])
    assert loaded.config == load_experiment("smoke", ["--seed=7"]).config
    assert loaded.origins["seed"] == "--seed=7"


def test_another_function_modules_beside_and_origins(tmp_path: Path) -> None:
    write(tmp_path, "LAYERS = 3\n", "my_sizes.py")
    code = (
        "import my_sizes\n"
        "def large():\n"
        "    model = {'preset': 'llama_271M', 'num_layers': my_sizes.LAYERS}\n"
        "    return {'model': model, 'dataset': {}}\n"
    )
    source = write(tmp_path, code) + ":large"
    loaded = load_experiment(source)
    assert loaded.config.model.num_layers == 3
    assert loaded.origins["model.num_layers"] == source
    assert loaded.origins["model.d_model"] == "preset llama_271M"


def test_a_json_file_that_it_names_is_read(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('{"model": {"preset": "llama_271M"}}')
    code = f"def build_config():\n    return {str(tmp_path / 'my.json')!r}\n"
    loaded = load_experiment(write(tmp_path, code))
    assert loaded.config.model.d_model == 1024


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("my_config.py", "x = 1\n", "has no function build_config; define it, or name another"),
        ("my_config.py", "build_config = 3\n", "has no function build_config"),
        ("my_config.py", "import nothing_like_it\n",
         "my_config.py, line 1: importing it fails: ModuleNotFoundError: No module named"),
        ("my_config.py", "\ndef f(:\n", "importing it fails: SyntaxError: "),
        ("my_config.py", "import sys\nsys.exit(3)\n", "line 2: importing it fails: SystemExit: 3"),
        ("my_config.py", "def build_config():\n    return 1 / 0\n",
         "line 2: build_config() fails: ZeroDivisionError: division by zero"),
        ("my_config.py", "def build_config(size):\n    pass\n",
         "build_config() fails: TypeError: build_config() missing 1 required positional"),
        ("my_config.py", "def build_config():\n    pass\n",
         "build_config() returns None; return a toolkit.ExperimentConfig, a mapping, or"),
        ("my_config.py", "def build_config():\n    return 'my_config.py'\n",
         "build_config() returns 'my_config.py'; return"),
        ("my_config.py", "def build_config():\n    return {'seed': {1, 2}}\n",
         "build_config() returns what JSON cannot hold: set is no value of a config"),
        ("my_config.py", "def build_config():\n    d = {}\n    d['seed'] = d\n    return d\n",
         "build_config() returns what JSON cannot hold: Circular reference"),
        ("my_config.py",
         "def build_config():\n    return {'model': {'preset': 'quickstart'}, 'modle': {}}\n",
         "modle: no such field; did you mean 'model'?"),
        ("my_config.py", "def build_config():\n    return 'smok'\n", "did you mean 'smoke'"),
        # The import that wins is another one.
        ("json.py", "x = 1\n", "json.py: rename it, `import json`"),
        ("my-config.py", "x = 1\n", "rename it to what Python can import: letters, digits and _"),
    ],
)  # fmt: skip
def test_everything_else_is_a_line(name: str, code: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(write(tmp_path, code, name))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not is_being_imported()


def test_a_file_that_is_not_there_and_one_of_a_name_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.py: no such file"):
        load_experiment(str(tmp_path / "gone.py"))
    code = "def build_config():\n    return 'smoke'\n"
    load_experiment(write(tmp_path, code))
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"rename it, `import my_config` gives .*my_config\.py"):
        load_experiment(write(tmp_path / "other", code))


def test_what_names_a_python_file() -> None:
    assert all(map(is_python_config, ("a.py", "b/a.py", "/c/a.py:make", "~/a.py")))
    assert not any(
        map(is_python_config, ("a.json", "smoke", "a.py:", "a.py:1", "a.pyc", ".py:x y"))
    )


def test_what_the_code_prints_and_where_it_goes_is_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import os\nprint('imported')\ndef build_config():\n"
        "    print('built'); os.mkdir('gone'); os.chdir('gone'); os.rmdir(os.getcwd())\n"
        "    return 'smoke'\n"
    )
    load_experiment(write(tmp_path, code))
    assert Path.cwd() == tmp_path
    assert capsys.readouterr() == ("", "imported\nbuilt\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise GeneratorExit('out')", "GeneratorExit: out"),
        ("raise Rude()", "Rude: it cannot say what"),
        ("return Rude()", "returns an object of <class 'my_config.Rude'>; return a toolkit"),
        ("d = {}; e = d\n    for n in range(100000): e['a'] = {}; e = e['a']\n    return d",
         "build_config() returns what JSON cannot hold"),
    ],
)  # fmt: skip
def test_rude_code_is_a_line(tmp_path: Path, body: str, message: str) -> None:
    rude = (
        "class Rude(Exception):\n    def __str__(self): raise ValueError\n    __repr__ = __str__\n"
    )
    source = write(tmp_path, f"{rude}def build_config():\n    {body}\n")
    with pytest.raises(ConfigError) as error:
        load_experiment(source)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
def test_an_async_function_is_a_line_and_no_warning(tmp_path: Path) -> None:
    source = write(tmp_path, "async def build_config():\n    return 'smoke'\n")
    with pytest.raises(ConfigError, match="is async; define it without `async`"):
        load_experiment(source)
