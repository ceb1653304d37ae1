"""The commands of docs/optimizers.md run, its configs are configs, and its tables are complete."""

import json
import re
import typing
from pathlib import Path

from tests.docs.running import ROOT, commands, reader_folder, run_command
from toolkit.config import convert
from toolkit.optim.base import OptimizerTraits
from toolkit.optim.config import OptimConfig
from toolkit.train.config import TransformerTrainModuleConfig

GUIDE = (ROOT / "docs" / "optimizers.md").read_text()


def test_the_commands_run(tmp_path: Path) -> None:
    folder = reader_folder(tmp_path)
    said = [run_command(command, folder) for command in commands(GUIDE)]
    assert len(said) == 2
    assert "lion" in said[0]


def test_its_configs_are_configs() -> None:
    blocks = re.findall(r"```json\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        convert(json.loads(block), TransformerTrainModuleConfig)


def test_its_tables_have_every_optimizer_and_what_engines_do_with_it() -> None:
    kinds = {kind.__struct_config__.tag: kind for kind in typing.get_args(OptimConfig)}
    ours = set(kinds) - {"class"}
    which, engines = GUIDE.split("## Which engine runs it")
    engines = engines.split("##")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| yes \| (\w+) \| \w+ \|$", engines, flags=re.MULTILINE))
    assert set(re.findall(r"^\| `(\w+)` \|", which, flags=re.MULTILINE)) >= ours
    for name in ours:
        traits = kinds[name]().traits()
        is_refused = traits.needs_whole_parameters
        is_refused |= traits.needs_whole_matrices and not traits.takes_whole_matrices
        assert rows[name] == ("refused" if is_refused else "yes"), name
    for trait in OptimizerTraits._fields:
        assert f"`{trait} = True`" in GUIDE
