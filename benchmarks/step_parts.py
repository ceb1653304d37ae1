"""Where the time of a training step goes, and how fast this machine multiplies matrices at all.

    python benchmarks/step_parts.py --precision bf16 --threads 1 --cpu-time

The model and the step are those of `step_speed.py`. Each part is measured alone, forward and
backward, with tensors of the step's shapes; all parts take turns. "norms, rotary, casts,
activations" is what a compiled block takes beyond its products and its attention; "embedding,
adding up, engine, loop" is what the step takes beyond all other rows. Products are shown with their
speed, and below the speed of a square product that fits the caches: the most to hope for.
"""

import argparse
import time
from collections.abc import Callable

import step_speed
import torch
from _report import Figure, write_json
from rich.console import Console
from rich.table import Table

from toolkit.distributed.tuning import keep_freed_memory, take_fast_products
from toolkit.models.attention import attend
from toolkit.models.compile import compile_model
from toolkit.models.layer_inputs import layer_inputs
from toolkit.models.loss import LinearCrossEntropy
from toolkit.models.transformer import Transformer

SQUARE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="count seconds of the CPU")
    parser.add_argument("--json", help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    take_fast_products()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    parts = Parts(arguments.precision)
    measured = best_of(parts.runs(), arguments.rounds, clock)
    report(parts, measured, arguments)


def best_of(
    runs: dict[str, Callable[[], object]], rounds: int, clock: step_speed.Clock
) -> dict[str, float]:
    """Seconds of each, the least of all rounds."""
    best = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 2):
        for name, run in runs.items():
            run()
            started = clock()
            run()
            if number > 1:  # compiled before, and caches filled
                best[name] = min(best[name], clock() - started)
    return best


class Parts:
    """The parts of one step, each as a function to call."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model: Transformer = step_speed.new_model("cpu")
        compile_model(self.model)
        config = self.config = self.model.config
        tokens, width, hidden = step_speed.TOKENS, config.d_model, config.intermediate_size
        heads = config.num_heads * config.attention_head_dim
        kv = config.kv_heads * config.attention_head_dim
        layers, vocabulary = config.num_layers, config.padded_vocab_size
        # (inputs, outputs) of a linear layer -> how many there are
        self.shapes: dict[tuple[int, int], int] = {}
        for shape in (
            (width, heads + 2 * kv),
            (heads, width),
            (width, 2 * hidden if config.is_gated else hidden),
            (hidden, width),
        ):
            self.shapes[shape] = self.shapes.get(shape, 0) + layers
        self.head_shape = (width, vocabulary)
        self.tokens = tokens

    def runs(self) -> dict[str, Callable[[], object]]:
        how = {"precision": self.precision, "compiled": True}
        step = step_speed.toolkit_turn(**how, clock=time.perf_counter)  # type: ignore[arg-type]
        products = {shape: self._products(*shape) for shape in self.shapes}
        square = torch.randn(SQUARE, SQUARE).to(self.dtype)
        return {
            "step": lambda: step(1),
            "block": self._block(),
            "attention": self._attention(),
            **{f"products {shape}": run for shape, run in products.items()},
            "products of head": self._products(*self.head_shape),
            "head": self._head(),
            "optimizer": self._optimizer(),
            "square": lambda: square @ square,
        }

    def _products(self, inputs: int, outputs: int) -> Callable[[], object]:
        """The three of a linear layer: forward, gradient of its input, of its weight."""
        x = torch.randn(self.tokens, inputs).to(self.dtype)
        weight = torch.randn(outputs, inputs).to(self.dtype)
        grad = torch.randn(self.tokens, outputs).to(self.dtype)
        return lambda: (x @ weight.t(), grad @ weight, grad.t() @ x)

    def _block(self) -> Callable[[], object]:
        block = self.model.blocks[0]
        shape = (step_speed.BATCH, step_speed.SEQUENCE, self.config.d_model)
        x = torch.randn(shape).to(self.dtype).requires_grad_()
        rotary, mask = layer_inputs(self.config, x, None, None)[0]
        grad = torch.randn(shape).to(self.dtype)
        trained = [x, *block.parameters()]

        def run() -> object:
            with self._autocast():
                out = block(x, rotary, mask, None)[0]
            return torch.autograd.grad(out, trained, grad)

        return run

    def _attention(self) -> Callable[[], object]:
        config, heads = self.config, (self.config.num_heads, *[self.config.kv_heads] * 2)
        query, key, value = (
            torch.randn(step_speed.BATCH, n, step_speed.SEQUENCE, config.attention_head_dim)
            .to(self.dtype)
            .requires_grad_()
            for n in heads
        )
        grad = torch.randn(query.shape).to(self.dtype)
        compiled = torch.compile(attend, dynamic=False)

        def run() -> object:
            out = compiled(query, key, value, None)
            return torch.autograd.grad(out, (query, key, value), grad)

        return run

    def _head(self) -> Callable[[], object]:
        """Logits and loss, without the norm before."""
        config = self.config
        assert self.model.head is not None
        loss: LinearCrossEntropy = self.model.head.loss
        hidden = torch.randn(self.tokens, config.d_model).to(self.dtype).requires_grad_()
        weight = torch.randn(config.padded_vocab_size, config.d_model).mul_(0.02).requires_grad_()
        labels = torch.randint(0, config.vocab_size, (self.tokens,))
        return lambda: torch.autograd.grad(loss(hidden, weight, labels).loss, (hidden, weight))

    def _optimizer(self) -> Callable[[], object]:
        """Global norm and the fused step that also clips, as `TorchEngine` calls them."""
        parameters = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
        optimizer: object = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)

        def run() -> None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            optimizer.grad_scale = (norm + 1e-6).clamp(min=1.0)  # type: ignore[attr-defined]
            optimizer.found_inf = (norm - norm).isnan().float()  # type: ignore[attr-defined]
            optimizer.step()  # type: ignore[attr-defined]

        return run

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


def report(parts: Parts, measured: dict[str, float], arguments: argparse.Namespace) -> None:
    layers = parts.config.num_layers
    products = sum(measured[f"products {shape}"] * n for shape, n in parts.shapes.items())
    flops = 6 * parts.tokens
    of_blocks = flops * sum(a * b * n for (a, b), n in parts.shapes.items())
    of_head = flops * parts.head_shape[0] * parts.head_shape[1]
    block, attention = measured["block"] * layers, measured["attention"] * layers
    head, optimizer, step = measured["head"], measured["optimizer"], measured["step"]
    rows: list[tuple[str, float, float | None]] = [
        ("products of blocks", products, of_blocks / products),
        ("attention", attention, None),
        ("norms, rotary, casts, activations", block - products - attention, None),
        (
            "products of the head",
            measured["products of head"],
            of_head / measured["products of head"],
        ),
        ("loss, and adding up its gradients", head - measured["products of head"], None),
        ("clipping and optimizer", optimizer, None),
        ("embedding, adding up, engine, loop", step - block - head - optimizer, None),
        ("step", step, (of_blocks + of_head) / step),
    ]
    table = Table(
        title=f"{parts.precision}, {parts.tokens:,} tokens a step, {arguments.threads} thread(s), "
        f"best of {arguments.rounds}, {'CPU' if arguments.cpu_time else 'clock'} time"
    )
    for column in ("", "ms", "% of step", "GFLOP/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds, speed in rows:
        shown = "" if speed is None else f"{speed / 1e9:.0f}"
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{100 * seconds / step:.0f}", shown)
    square = 2 * SQUARE**3 / measured["square"]
    table.add_row(f"a product of {SQUARE} x {SQUARE}", "", "", f"{square / 1e9:.0f}")
    Console(width=100).print(table)
    figures: list[Figure] = [
        {"name": f"{parts.precision}: {name}", "value": 1e3 * s, "unit": "ms", "better": "lower"}
        for name, s, _ in rows
    ]
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
