"""What a config leaves open, and the products that decide it. No torch."""

import contextlib
import os
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from toolkit.models.architecture import Architecture
from toolkit.models.shapes import attended_keys, whole_model

MEASURE = "TOOLKIT_MEASURE"
"""Environment variable: 0 keeps `auto` from measuring."""
_ISA = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
"""Variables that decide which instructions products use."""

_BUSY = 0.5
"""Runnable processes for each core (the load of the last minute) from which on threads are not
compared, and nothing is kept: what is best beside other programs is not what is best without."""

Aspect = Literal["precision", "threads", "attention", "compile_model"]


class Product(msgspec.Struct, frozen=True):
    """`(rows, inputs) @ (inputs, outputs)`, as often as a microbatch computes it."""

    rows: int
    inputs: int
    outputs: int
    count: int


class AttentionShape(msgspec.Struct, frozen=True):
    """Causal attention of whole rows in one microbatch; `count` layers."""

    rows: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    count: int


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be chosen, and all that decides how the candidates do."""

    asks: frozenset[Aspect]
    device: str
    """As in `torch.device.type`."""
    name: str
    """Model of the device."""
    details: str = ""
    """What else tells it from others."""
    torch: str
    """Version."""
    products: tuple[Product, ...]
    attention: AttentionShape
    head: Product
    threads: int
    """This process's share of the cores, or the number that somebody asked for."""
    precision: str
    """`auto`, or what is computed in."""
    steps: int | None = None
    """Optimizer steps of the run; None: not known."""
    passes: int = 1
    """Microbatches of an optimizer step on this rank."""
    estimate: float = 0.0
    """Seconds of an eager step where products are not measured."""

    @property
    def key(self) -> dict[str, Any]:
        """What timings depend on, as plain JSON types: not the length of the run."""
        own = msgspec.to_builtins(self)
        left = {"steps", "passes", "estimate", "asks"}
        measured = sorted(self.asks - {"compile_model"})
        isa = {name: os.environ[name] for name in _ISA if name in os.environ}
        return {
            "format": 2,
            "asks": measured,
            "isa": isa,
            **{name: value for name, value in own.items() if name not in left},
        }


class Work(NamedTuple):
    """What a rank computes in one microbatch."""

    products: tuple[Product, ...]
    """Of one microbatch, without the head."""
    attention: AttentionShape
    head: Product


def work_of(model: Architecture, *, tokens: int, length: int, tp: int = 1) -> Work:
    """The products of a microbatch of `tokens` in rows of `length`. QKV, and gate and up, count as
    one product each; of a mixture's experts each has its share of the tokens; `tp` ranks share the
    columns of each."""
    found: dict[tuple[int, int, int], int] = {}

    def add(rows: int, inputs: int, outputs: int, count: int) -> None:
        shape = rows, inputs, max(1, outputs // tp)
        found[shape] = found.get(shape, 0) + count

    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in whole_model(model):
        if name.startswith("blocks.") and len(shape) > 1 and not name.endswith("_conv"):
            _, layer, rest = name.split(".", 2)
            layers.setdefault(layer, {})[rest.removesuffix(".weight")] = shape
    for matrices in layers.values():
        together: dict[tuple[str, int], int] = {}
        for name, shape in matrices.items():
            if len(shape) == 3:  # stacked experts
                assert model.moe is not None
                share = max(1, tokens * model.moe.top_k // shape[0])
                add(share, shape[2], shape[1], shape[0])
                continue
            part, _, last = name.rpartition(".")
            kind = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "up"}.get(last, last)
            together[f"{part}.{kind}", shape[1]] = (
                together.get((f"{part}.{kind}", shape[1]), 0) + shape[0]
            )
        for (_, inputs), outputs in together.items():
            add(tokens, inputs, outputs, 1)
    keys = sum(attended_keys(model, layer, length) for layer in range(model.num_layers))
    full = length * (length + 1) // 2
    attention = AttentionShape(
        rows=max(1, tokens // length),
        heads=max(1, model.num_heads // tp),
        kv_heads=max(1, model.kv_heads // tp),
        length=length,
        head_dim=model.attention_head_dim,
        # Layers with a window see fewer keys: as many layers as would see all.
        count=max(1, round(keys / full)),
    )
    products = tuple(Product(*shape, count) for shape, count in sorted(found.items()))
    head = Product(tokens, model.d_model, max(1, model.padded_vocab_size // tp), 1)
    return Work(products, attention, head)


def measures(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `auto` may measure: not with TOOLKIT_MEASURE=0."""
    return environ.get(MEASURE, "") != "0"


@contextlib.contextmanager
def not_measuring() -> Iterator[None]:
    """Inside, `auto` does not measure, as with TOOLKIT_MEASURE=0."""
    before = os.environ.get(MEASURE)
    os.environ[MEASURE] = "0"
    try:
        yield
    finally:
        del os.environ[MEASURE]
        if before is not None:
            os.environ[MEASURE] = before


def machine_is_busy() -> bool:
    """Whether other programs use this machine."""
    try:
        return os.getloadavg()[0] > _BUSY * (os.cpu_count() or 1)
    except OSError:
        return False


def can_compile() -> bool:
    """Whether this machine has a C++ compiler and Python's headers, which inductor and Triton
    need."""
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++"))
    return compiler and Path(sysconfig.get_path("include"), "Python.h").is_file()
