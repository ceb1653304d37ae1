"""Write what one release leaves on disk, for later releases to read.

`python -m tests.formats.make` runs today's command line in tests/formats/release_{VERSION}/ and
writes expected.json: what later releases must find there. README.md says when to run it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from toolkit import __version__

HERE = Path(__file__).parent
TOOLKIT = (sys.executable, "-m", "toolkit")
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip

SINGLE, FSDP = Path("runs/formats/single"), Path("runs/formats/fsdp")
FIRST_STEP, LAST_STEP = 4, 8

MODEL = {
    "type": "transformer", "vocab_size": 288, "d_model": 8, "num_layers": 1, "num_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 16, "max_sequence_length": 32,
    "tie_embeddings": True,
}  # fmt: skip

SHARED: dict[str, Any] = {
    "run": {"experiment": "formats"},
    "model": MODEL,
    "data_loader": {"global_batch_size": 128, "eval_tokens": 256},
    "train_module": {
        "rank_microbatch_size": 64,
        "precision": "fp32",
        "optim": {"type": "adamw", "lr": 1e-2},
        "scheduler": {"type": "cosine", "warmup": 2},
    },
    "trainer": {
        "max_duration": {"value": LAST_STEP, "unit": "steps"},
        "callbacks": {
            "network_monitor": {"interval": 4},
            "lm_evaluator": {"interval": 4},
            "checkpointer": {"interval": 4, "export_hf": False},
            "system_monitor": {"enabled": False},
        },
    },
    "seed": 7,
}

DATASETS: dict[str, dict[str, Any]] = {
    # Instruction data in packed rows: a loss mask, a packing plan and a trained tokenizer.
    "single": {
        "dataset_name": "answers",
        "source": {"type": "files", "paths": ["texts/answers.jsonl"]},
        "tokenizer": {"type": "bpe", "vocab_size": 288},
        "instructions": {"shape": "prompt_completion"},
        "instances": {"type": "packed"},
        "validation_fraction": 0.1,
        "sequence_length": 32,
        "num_processes": 1,
    },
    # Two corpora in shares, as one stream of tokens each.
    "fsdp": {
        "dataset_name": "two",
        "tokenizer": {"type": "byte"},
        "validation_fraction": 0.1,
        "sequence_length": 32,
        "num_processes": 1,
        "mix": {
            "sources": {
                name: {"ratio": ratio, "source": {"type": "files", "paths": [f"texts/{name}.txt"]}}
                for name, ratio in (("squares", 3.0), ("cubes", 1.0))
            }
        },
    },
}


def main() -> None:
    folder = HERE / f"release_{__version__.replace('.', '_')}"
    folder.mkdir()
    _write_texts(folder / "texts")
    for name, dataset in DATASETS.items():
        config = json.dumps(SHARED | {"dataset": dataset}, indent=1)
        (folder / f"{name}.json").write_text(config + "\n")
    _run(folder, *TOOLKIT, "train", "single.json", "--name", "single")
    _run(
        folder,
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "toolkit"),
        *("train", "fsdp.json", "--name", "fsdp", "--trainer.hard_stop.value=4"),
        "--train_module.dp_config={name: fsdp, param_dtype: float32}",
        "--train_module.optim={type: sgd, lr: 0.1, momentum: 0.9}",
    )
    expected = {
        "version": __version__,
        "torch": torch.__version__,
        "tensors": {
            str(checkpoint): stored_hashes(folder / checkpoint)
            for checkpoint in (
                *(SINGLE / "checkpoints" / f"step{step}" for step in (FIRST_STEP, LAST_STEP)),
                FSDP / "checkpoints" / f"step{FIRST_STEP}",
            )
        },
        "batches": {
            str(run): {
                str(step): json.loads(
                    _run(folder, *TOOLKIT, "batch", str(run), "--step", str(step), "--json")
                )
                for step in (FIRST_STEP + 1, LAST_STEP)
            }
            for run in (SINGLE, FSDP)
        },
        "eval": json.loads(_run(folder, *TOOLKIT, "eval", str(SINGLE), "--json")),
        "continued": _continued(folder),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    _forget_this_machine(folder)


def _continued(folder: Path) -> list[dict[str, Any]]:
    """What the FSDP run records where it goes on to its end on two processes."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "release"
        shutil.copytree(folder, copy)
        _run(copy, *TOOLKIT, "resume", str(FSDP), "--trainer.hard_stop=null")
        text = (copy / FSDP / "metrics" / "train.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()][FIRST_STEP:]


def stored_hashes(checkpoint: Path) -> dict[str, str]:
    """Hash of every tensor of a checkpoint, read by torch alone."""
    reader = dcp.FileSystemReader(checkpoint / "model_and_optim")
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name: tensor_hash(tensor) for name, tensor in sorted(tensors.items())}


def tensor_hash(tensor: torch.Tensor) -> str:
    """Of type, shape and values."""
    described = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    values = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(described + values).hexdigest()[:16]


def _write_texts(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {"prompt": f"What is {n} times {n + 3}? ", "completion": f"{n} * {n + 3} = {n * (n + 3)}é"}
        for n in range(160)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, power in (("squares", 2), ("cubes", 3)):
        text = "".join(f"{n}: {n**power}\n" for n in range(300))
        (folder / f"{name}.txt").write_text(text)


def _run(folder: Path, *command: str) -> str:
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        command, cwd=folder, env=environment, check=True, text=True, stdout=subprocess.PIPE
    )
    return done.stdout


def _forget_this_machine(folder: Path) -> None:
    """Leave out what tells of one machine and what no reader of runs needs."""
    for pattern in ("logs", "tb", "ranks", "lock", ".*.lock"):
        for path in folder.rglob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    places = {str(folder): ".", str(HERE.parents[1]): ".", f'"{socket.gethostname()}"': '"host"'}
    for path in folder.rglob("metadata/*.json"):
        text = path.read_text()
        for place, word in places.items():
            text = text.replace(place, word)
        path.write_text(text)
    with contextlib.closing(sqlite3.connect(folder / "runs" / "registry.sqlite")) as registry:
        registry.execute(
            "UPDATE runs SET folder = replace(folder, ?, '/elsewhere'), host = 'host'",
            [str(folder)],
        )
        registry.commit()
        registry.execute("VACUUM")


if __name__ == "__main__":
    main()
