"""Names of data-parallel engines. Imports nothing: `toolkit train --help` asks too."""

from typing import Literal

EngineName = Literal["single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]
