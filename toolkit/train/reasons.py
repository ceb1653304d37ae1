"""Why a run stops, in the words of its status; no torch, for who only reads them."""

from toolkit.signals import LAUNCHER_GONE as LAUNCHER_GONE

WALL_TIME = "trainer.max_wall_time"
STOP_FILE = "the stop file"
FAILURE = "failure"
