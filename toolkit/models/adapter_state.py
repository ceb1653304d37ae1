"""What all adapters of a model share: whether they are on, whose rows of tokens are trained, and
the randomness of dropout.

Dropout draws nothing from a generator. Whether a number is set to zero is a hash of
(seed, step, row of the global batch, position, layer, channel), so it is the same for every number
of ranks and size of microbatch, in a forward that is computed again, and after a resume.
"""

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import pad


class AdapterState:
    """Of one model; its forwards write it, its adapters read it."""

    def __init__(self, tokens: tuple[int, ...] = ()) -> None:
        self.is_off = False
        """Layers compute as if they had no adapters."""
        self.keys: Tensor | None = None
        """`(batch, seq)` int32, see `dropout_keys`; None: no dropout."""
        self.tokens = tokens
        """Ids whose rows are trained."""


def dropout_keys(
    seed: int, step: int, rows: range, length: int, device: torch.device | str = "cpu"
) -> Tensor:
    """`(rows, length)` int32: the hash of (seed, step, row of the global batch, position) of each
    token."""
    row = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
    position = torch.arange(length, dtype=torch.int32, device=device)
    return _mixed(_mixed(row ^ _number(f"{seed}/{step}"))[:, None] ^ position)


class TokenDropout:
    """Dropout of the input of one adapter."""

    def __init__(self, share: float, name: str, state: AdapterState) -> None:
        """`share` of the numbers are set to zero; `name`: of the layer."""
        self.share, self.state = share, state
        self.first_channel = 0
        """Of all of the layer's, the first that this rank has."""
        self._layer = _number(name)
        self._least = min(round(share * 2**32), 2**32 - 1) - 2**31

    def __call__(self, x: Tensor) -> Tensor:
        """`x` `(batch, seq, channels)`, or of it zeros and 1 / (1 - share) times the rest."""
        keys = self.state.keys
        if keys is None:
            return x
        if x.shape[1] > keys.shape[1]:  # padding, whose tokens nobody sees
            keys = pad(keys, (0, x.shape[1] - keys.shape[1]))
        channels = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        channels = _mixed(channels + (self.first_channel + 1))
        is_kept = _mixed(_mixed(keys ^ self._layer)[..., None] ^ channels) >= self._least
        return torch.where(is_kept, x * (1.0 / (1.0 - self.share)), 0.0)


def _mixed(x: Tensor) -> Tensor:
    """A permutation of the int32 in which each bit depends on all bits of `x`: "lowbias32" with
    the constants of https://github.com/skeeto/hash-prospector/issues/19. Products wrap around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF)) * 0x735A2D97
    return x ^ ((x >> 15) & 0x1FFFF)


def _number(text: str) -> int:
    """An int32 that depends on `text`."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)
