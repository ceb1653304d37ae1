"""A micro-benchmark of a model's own products, in less than a second.

Candidates take turns, and each has the best of its turns: other load on the machine only ever adds
time, and a turn of a few milliseconds often has the cores to itself. Products that would take too
long are measured with fewer rows and columns and counted in proportion. No random number is drawn:
the numbers of a run do not depend on who measured.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from toolkit.autotune.choices import MARGINS, Timings, fastest
from toolkit.autotune.question import AttentionShape, Product, Question, machine_is_busy

SECONDS = 0.7
"""Within which everything is measured, on a machine that nobody else uses."""
_TURNS = 5
_HOPELESS = 3.0
"""Times slower than fp32 at which bf16 is not looked at further: emulated in software."""
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Piece(NamedTuple):
    run: Callable[[], Any]
    scale: float
    """Times `run` in one microbatch."""


def measure(question: Question, device: torch.device) -> Timings:
    """Seconds of the candidates of everything that `question` leaves open and that is measured."""
    if device.type == "cpu":
        return _on_cpu(question)
    if device.type == "cuda" and "attention" in question.asks:
        return _attention_kernels(question.attention, device)
    return Timings()


def _on_cpu(question: Question) -> Timings:
    started, before = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(question.threads)
    try:
        asks, is_busy = question.asks, machine_is_busy()
        if not asks & {"precision", "threads", "compile_model"}:
            return Timings()
        speed, ratio = _pilot()
        kinds = ["fp32", "bf16"] if "precision" in asks else [question.precision]
        is_hopeless = "precision" in asks and ratio * _HOPELESS < 1.0
        if is_hopeless:
            kinds = ["fp32"]
        turns = len(kinds) * (len(question.products) + 2) * (_TURNS + 1)
        budget = 0.4 * SECONDS / turns * speed
        pieces = {kind: list(_pieces(question, _TYPES[kind], budget)) for kind in kinds}
        precision = _compare(pieces, started + 0.7 * SECONDS)
        if is_hopeless:
            precision["bf16"] = precision["fp32"] / ratio
        kind = fastest(precision, "fp32", MARGINS["precision"])
        kind = kind if len(kinds) > 1 else kinds[0]
        threads = {}
        if "threads" in asks and not is_busy:
            threads = _fewer_threads(question.threads, pieces[kind], started + SECONDS)
        return Timings(precision=precision, threads=threads, lasts=not is_busy)
    finally:
        torch.set_num_threads(before)


def _pilot() -> tuple[float, float]:
    """FLOP/s of fp32 products with all threads, and how many times faster bf16 is, from a product
    that is small enough for software."""
    seconds = {}
    for name in ("fp32", "bf16"):
        x = torch.full((256, 256), 0.5, dtype=_TYPES[name])
        run = functools.partial(torch.mm, x, x)
        run()
        seconds[name] = min(_seconds(run) for _ in range(3))
    return 2 * 256**3 / seconds["fp32"], seconds["fp32"] / seconds["bf16"]


def _compare(pieces: dict[str, list[_Piece]], deadline: float) -> dict[str, float]:
    """Seconds of all pieces together, by candidate."""
    best: dict[str, list[float]] = {name: [math.inf] * len(own) for name, own in pieces.items()}
    for turn in range(_TURNS + 1):  # the first makes kernels ready
        if turn > 1 and time.perf_counter() > deadline:
            break
        for place in range(max(map(len, pieces.values()))):
            for name, own in pieces.items():
                seconds = _seconds(own[place].run)
                if turn:
                    best[name][place] = min(best[name][place], seconds)
    return {
        name: sum(seconds * piece.scale for seconds, piece in zip(best[name], own, strict=True))
        for name, own in pieces.items()
    }


def _fewer_threads(share: int, pieces: Sequence[_Piece], deadline: float) -> dict[int, float]:
    """Seconds with this process's share of the cores, and with half as many as long as that is no
    slower: hyperthreads, and limits of containers, make cores that are none."""
    found: dict[int, float] = {}
    threads = share
    while threads > 1 and (not found or time.perf_counter() < deadline):
        numbers = (threads, threads // 2)
        best: dict[int, list[float]] = {number: [math.inf] * len(pieces) for number in numbers}
        for turn in range(_TURNS):
            for number, seconds in best.items():
                torch.set_num_threads(number)
                pieces[0].run()
                for place, piece in enumerate(pieces):
                    seconds[place] = min(seconds[place], _seconds(piece.run))
            if turn and time.perf_counter() > deadline:
                break
        totals = {
            number: sum(s * piece.scale for s, piece in zip(seconds, pieces, strict=True))
            for number, seconds in best.items()
        }
        scale = found[threads] / totals[threads] if threads in found else 1.0
        found |= {number: seconds * scale for number, seconds in totals.items()}
        if totals[threads // 2] > totals[threads]:
            break
        threads //= 2
    return found


def _pieces(question: Question, dtype: torch.dtype, budget: float) -> Iterable[_Piece]:
    """What is timed of the model in `dtype`, each at most `budget` FLOPs."""
    for product in (*question.products, question.head):
        yield _product(product, dtype, budget)
    yield _attention(question.attention, dtype, budget)


def _product(product: Product, dtype: torch.dtype, budget: float) -> _Piece:
    most = max(1, int(budget / 6 / product.inputs))
    rows = min(product.rows, max(128, most // product.outputs))
    outputs = min(product.outputs, max(128, most // rows))
    x = torch.full((rows, product.inputs), 0.5, dtype=dtype)
    weight = torch.full((outputs, product.inputs), 0.5, dtype=dtype)
    grad = torch.full((rows, outputs), 0.5, dtype=dtype)

    def run() -> None:
        x @ weight.t()
        grad @ weight
        grad.t() @ x

    cut = (product.rows / rows) * (product.outputs / outputs)
    return _Piece(run, product.count * cut)


def _attention(shape: AttentionShape, dtype: torch.dtype, budget: float) -> _Piece:
    length = min(shape.length, 512)
    each = 12.0 * length**2 * shape.head_dim / 2  # causal
    heads = min(shape.heads, max(1, int(budget / each)))
    query, key, value = (
        torch.full((1, heads, length, shape.head_dim), 0.5, dtype=dtype, requires_grad=True)
        for _ in range(3)
    )
    grad = torch.full_like(query, 0.5)

    def run() -> None:
        with torch.enable_grad():
            out = scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), grad)

    cut = (shape.length / length) ** 2 * shape.heads / heads * shape.rows
    return _Piece(run, shape.count * cut)


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _attention_kernels(shape: AttentionShape, device: torch.device) -> Timings:
    """Of SDPA's two kernels for bf16, which compute the same; one that does not take the heads, or
    is not there, is left out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = (1, shape.heads, min(shape.length, 4096), shape.head_dim)
    sizes = (size, (1, shape.kv_heads, *size[2:]), (1, shape.kv_heads, *size[2:]))
    query, key, value = (
        torch.full(own, 0.5, dtype=torch.bfloat16, device=device, requires_grad=True)
        for own in sizes
    )
    grad = torch.full(size, 0.5, dtype=torch.bfloat16, device=device)
    is_grouped = shape.heads != shape.kv_heads
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    times: dict[str, list[float]] = {name: [] for name in kernels}
    lasts = True
    for turn in range(_TURNS + 2):
        for name, kernel in kernels.items():
            if name not in times:
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            try:
                begin.record()
                with sdpa_kernel(kernel), torch.enable_grad():
                    out = scaled_dot_product_attention(
                        query, key, value, is_causal=True, enable_gqa=is_grouped
                    )
                    torch.autograd.grad(out, (query, key, value), grad)
                end.record()
                end.synchronize()
            except RuntimeError as error:  # no such kernel for these heads
                lasts &= not isinstance(error, torch.OutOfMemoryError)
                del times[name]
                continue
            if turn > 1:
                times[name].append(begin.elapsed_time(end) / 1000)
    seconds = {name: statistics.median(own) for name, own in times.items()}
    return Timings(attention=seconds, lasts=lasts)
