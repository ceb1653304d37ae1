"""`toolkit ladder`: a config at several sizes and durations, trained as runs, and a law fitted to
their losses.

1. `sizes.py` makes the model of a size; `rungs.py` makes the whole config of each run.
2. `running.py` trains them one after the other, each in a process of its own.
3. `law.py` fits E + A / N^alpha + B / D^beta to the validation losses; `picture.py` draws it.
"""

from toolkit.commands.ladder.law import FEWEST, Law, fit_law, lacking
from toolkit.commands.ladder.picture import draw, write_png
from toolkit.commands.ladder.rungs import Ladder, Rung, parse_number, parse_numbers, plan_ladder
from toolkit.commands.ladder.running import (
    Finished,
    finished_runs,
    layout_of_runs,
    start_training,
    train_rungs,
    write_configs,
)

__all__ = [
    "FEWEST",
    "Finished",
    "Ladder",
    "Law",
    "Rung",
    "draw",
    "finished_runs",
    "fit_law",
    "lacking",
    "layout_of_runs",
    "parse_number",
    "parse_numbers",
    "plan_ladder",
    "start_training",
    "train_rungs",
    "write_configs",
    "write_png",
]  # fmt: skip
