"""Why a run stops, in the words of its status; no torch, for who only reads them."""

LAUNCHER_GONE = "the launcher is gone"
WALL_TIME = "trainer.max_wall_time"
STOP_FILE = "the stop file"
FAILURE = "failure"
