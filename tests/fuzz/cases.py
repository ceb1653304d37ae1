"""One crafted input by its kind and seed, and the verbs that it is given to."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import crafted
from tests.fuzz.verbs import canary_of

Words = list[str | Path]
Case = Callable[[random.Random, Path, dict[str, Path]], list[Words]]


class Payload:
    """A pickle of it makes the canary when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


def data_file(rng: random.Random, place: Path, whole: dict[str, Path]) -> list[Words]:
    path, kind, chats = crafted.write_data(rng, place / "in")
    source = f"{{type: files, paths: ['{path}'], encoding_errors: replace}}"
    if kind == "disk":
        source = f"{{type: disk, path: '{path}'}}"
    words: Words = [
        f"--dataset.source={source}", "--data-root", place / "data", "--dataset.num_processes=1",
    ]  # fmt: skip
    if chats:
        template = rng.choice(TEMPLATES)
        words += ["--dataset.instructions={shape: messages}"]
        words += [f"--dataset.instructions.chat_template={template}"]
    verb = rng.choice((["prepare"], ["prepare"], ["data", "show"]))
    return [[*verb, "smoke", *words]]


TEMPLATES = (
    *["{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"] * 8,
    "{% for m in messages %}{{ m.content * 10**9 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages.__class__.__mro__ }}{{ messages[0].content.format.__globals__ }}",
    "{% for m in messages %}{{ '%999999999d' % 1 }}{% endfor %}",
)


def model_folder(rng: random.Random, place: Path, whole: dict[str, Path]) -> list[Words]:
    folder = place / "model"
    crafted.copy_changed(rng, whole["model"], folder, lambda p: True)
    if rng.random() < 0.1:
        (folder / "model.safetensors").unlink(missing_ok=True)
        torch.save({"a": Payload(canary_of(place))}, folder / "pytorch_model.bin")
    verbs: list[list[Words]] = [
        [["convert-hf", folder, place / "out"]],
        [["generate", folder, "--prompt", "a", "--max-new-tokens", "2"]],
    ]
    return rng.choice(verbs)


def checkpoint(rng: random.Random, place: Path, whole: dict[str, Path]) -> list[Words]:
    run = place / "run"
    path = crafted.copy_changed(
        rng, whole["run"], run, lambda p: p.parts[0] == "checkpoints" and p.parts[1] == "step4"
    )
    step = run / "checkpoints" / "step4"
    if rng.random() < 0.15:
        target = rng.choice(("train/rank0.pt", "model_and_optim/.metadata"))
        (step / target).unlink(missing_ok=True)
        (step / target).write_bytes(pickle.dumps(Payload(canary_of(place))))
    if path.name == ".metadata.json":
        crafted.resign(step)
    elif rng.random() < 0.8:
        crafted.mend_manifest(step)
    verbs: list[Words] = [
        ["verify", run],
        ["export-hf", step, place / "out", "--no-check"],
        ["resume", "--explain", run],
        ["generate", step, "--prompt", "a", "--max-new-tokens", "2"],
    ]
    return rng.sample(verbs, 2)


def run_folder(rng: random.Random, place: Path, whole: dict[str, Path]) -> list[Words]:
    run = place / "runs" / "a" / "run"
    crafted.copy_changed(
        rng, whole["run"], run, lambda p: p.parts[0] in ("metadata", "metrics", "tokenizer")
    )
    verbs: list[Words] = [
        ["resume", "--explain", run],
        ["runs", "--root", place / "runs"],
        ["verify", run],
        ["train", "smoke", "--base", run, "--dry-run"],
        ["batch", run, "--step", "1"],
        ["export-hf", run, place / "out", "--no-check"],
        ["eval", run, "--sequence-length", "32"],
    ]
    return rng.sample(verbs, 3)


def prepared_data(rng: random.Random, place: Path, whole: dict[str, Path]) -> list[Words]:
    data = place / "data"
    crafted.copy_changed(rng, whole["data"], data, lambda p: not p.name.startswith("."))
    words: Words = ["--data-root", data, "--dataset.source=null"]
    verbs: list[Words] = [
        ["train", "smoke", *words, "--dry-run"],
        ["data", "inspect", next(iter(sorted(data.glob("*/*")))), "-n", "2"],
        ["data", "show", "smoke", *words],
        ["train", "smoke", *words, "--save-folder", place / "run", "--trainer.hard_stop.value=2",
         "--trainer.hard_stop.unit=steps", "--trainer.no_evals", "--trainer.no_checkpoints"],
    ]  # fmt: skip
    return rng.sample(verbs, 2)


CASES: dict[str, Case] = {
    "data_file": data_file,
    "model_folder": model_folder,
    "checkpoint": checkpoint,
    "run_folder": run_folder,
    "prepared_data": prepared_data,
}
