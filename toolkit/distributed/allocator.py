"""How torch's CUDA allocator works. No torch here: it reads its variable once."""

import os
from collections.abc import MutableMapping

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The name since torch 2.9, and the older ones, which it still prefers."""


def set_allocator_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let the allocator grow the blocks that it has instead of adding others, which fragment;
    unless somebody has said how it works. Call it before CUDA is first used."""
    if not any(name in environ for name in _VARIABLES):
        environ[_VARIABLES[0]] = "expandable_segments:True"
