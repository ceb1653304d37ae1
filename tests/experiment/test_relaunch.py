"""The command that a resumed run of several processes starts."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed.launcher.api as launcher

from toolkit.errors import ConfigError
from toolkit.experiment.relaunch import SECONDS_TO_SAVE, launcher_seconds, relaunch


@pytest.mark.parametrize("debug", [False, True])
def test_flags_and_debug_reach_the_processes(
    debug: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        launcher, "elastic_launch", lambda config, _: lambda *words: started.append((config, words))
    )
    assert relaunch(tmp_path, ["--seed=3"], 2, debug=debug) == 0
    (config, words) = started[0]
    assert config.nproc_per_node == 2
    assert "SIGUSR1" in config.signals_to_handle
    assert config.shutdown_timeout == SECONDS_TO_SAVE
    expected = ("-m", "toolkit", "resume", str(tmp_path), "--seed=3")
    assert words[-6 if debug else -5 :] == expected + (("--debug",) if debug else ())


def test_the_time_to_save_can_be_changed() -> None:
    assert launcher_seconds({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"}) == 900
    with pytest.raises(ConfigError, match="'soon' is no number of seconds"):
        launcher_seconds({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "soon"})
