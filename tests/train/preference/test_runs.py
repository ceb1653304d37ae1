"""Whole runs: the reference's table, resuming, adapters, reward models, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workers import WorkerPool
from toolkit.checkpoint.find import find_checkpoint
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.errors import ToolkitError
from toolkit.experiment.load import load_experiment
from toolkit.hf.read_config import read_hf_config
from toolkit.train.preference.documents import document_sums

MODEL = {
    "type": "transformer", "vocab_size": 257, "d_model": 32, "num_layers": 1, "num_heads": 2,
    "intermediate_size": 48, "max_sequence_length": 128,
}  # fmt: skip

SAVER = "trainer.callbacks.checkpointer"
BEST = "best_metric=val/reward_accuracy"


def write_rows(root: Path) -> None:
    words = ["red", "blue", "green", "one", "two", "three"]
    pairs, marked = [], []
    for n in range(60):
        prompt = f"{words[n % 6]} {words[n % 5]}? "
        good, bad = f"{words[(n + 1) % 6]} yes", f"{words[(n * 2) % 6]} no way"
        pairs.append({"prompt": prompt, "chosen": good, "rejected": bad})
        marked.append({"prompt": prompt, "completion": good if n % 3 else bad, "label": n % 3 > 0})
    for name, rows in (("pairs", pairs), ("marked", marked)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(root: Path, objective: dict[str, Any], **module: Any) -> Path:
    kind, file = ("binary", "marked") if objective["type"] == "kto" else ("preference", "pairs")
    config = {
        "model": MODEL,
        "dataset": {
            "source": {"type": "files", "paths": [f"{root}/{file}.jsonl"]},
            "instructions": {"kind": kind}, "tokenizer": {"type": "byte"},
            "root": f"{root}/data", "dataset_name": kind,
            "sequence_length": 128, "validation_fraction": 0.2, "instances": {"type": "packed"},
        },
        "data_loader": {"global_batch_size": 512, "eval_tokens": 512},
        "train_module": {
            "precision": "fp32", "rank_microbatch_size": 256, "objective": objective,
            "optim": {"type": "adamw", "lr": 1e-2}, "scheduler": {"type": "constant"},
        } | module,
        "trainer": {
            "max_duration": {"value": 4, "unit": "steps"}, "metrics_collect_interval": 1,
            "load_path": f"{root}/base", "load_weights_only": True,
            "callbacks": {
                "lm_evaluator": {"interval": 4}, "checkpointer": {"interval": 2},
                "tensorboard": {"enabled": False},
            },
        },
    }  # fmt: skip
    path = root / f"{objective['type']}.json"
    own = path.with_suffix(f".{os.getpid()}")  # every rank writes it
    own.write_text(json.dumps(config))
    return own.replace(path)


def start(root: str, objective: dict[str, Any], name: str, flags: list[str]) -> int | str:
    """A run, or the resume of one that is there; its exit code, or the error."""
    from toolkit.commands.train import resume, train

    folder = Path(root) / name
    module: dict[str, Any] = {}
    if "lora" in name:
        module["lora"] = {"rank": 2, "target_modules": ["*.attention.*"]}
    try:
        if folder.exists():
            return resume(folder, flags)
        config = config_of(Path(root), objective, **module)
        loaded = load_experiment(str(config), [f"--run.save_folder={folder}", *flags])
        return train(loaded.config, origins=loaded.origins, stored=loaded.stored)
    except ToolkitError as error:
        return str(error)


def make_base(root: str) -> None:
    """A model that has forgotten how it began."""
    config = {
        "model": MODEL,
        "dataset": {
            "source": {"type": "python_stdlib", "max_bytes": 20_000}, "root": f"{root}/data",
            "tokenizer": {"type": "byte"}, "dataset_name": "text", "sequence_length": 128,
        },
        "data_loader": {"global_batch_size": 256},
        "train_module": {"precision": "fp32", "rank_microbatch_size": 256},
        "trainer": {"max_duration": {"value": 2, "unit": "steps"}},
    }  # fmt: skip
    from toolkit.commands.train import train

    path = Path(root) / "text.json"
    path.write_text(json.dumps(config))
    loaded = load_experiment(str(path), [f"--run.save_folder={root}/base"])
    assert train(loaded.config, origins=loaded.origins, stored=loaded.stored) == 0


@pytest.fixture(scope="module")
def root(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preferences")
    write_rows(root)
    workers.run(1, make_base, str(root))
    return root


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics" / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_dpo_resumes_to_the_bit_with_its_table_and_without(workers: WorkerPool, root: Path) -> None:
    dpo = {"type": "dpo"}
    best = "--trainer.callbacks.checkpointer.best_metric=val/reward_margin"
    assert workers.run(1, start, str(root), dpo, "whole", [best])[0] == 0
    expected = losses(root / "whole")
    assert expected[0] == pytest.approx(0.6931472, abs=1e-6)
    assert expected[-1] < expected[0]
    (table,) = {path.parent for path in root.glob("data/preference/*/reference/*.npy")}
    kept = {path.name: path.read_bytes() for path in table.iterdir()}
    assert len(kept) == 2  # of training and of validation rows
    stop = ["--trainer.hard_stop.unit=steps", "--trainer.hard_stop.value="]
    assert workers.run(1, start, str(root), dpo, "parts", [stop[0], f"{stop[1]}2"])[0] == 0
    (root / "base").rename(root / "elsewhere")
    assert workers.run(1, start, str(root), dpo, "parts", [stop[0], f"{stop[1]}3"])[0] == 0
    (root / "elsewhere").rename(root / "base")
    missing, short = sorted(table.iterdir())
    missing.unlink()
    np.save(short, np.load(short)[:3])
    assert workers.run(1, start, str(root), dpo, "parts", ["--trainer.hard_stop=null"])[0] == 0
    assert losses(root / "parts") == expected
    assert {path.name: path.read_bytes() for path in table.iterdir()} == kept
    result = json.loads((root / "whole/metrics/eval.jsonl").read_text().splitlines()[-1])
    assert {"loss", "reward_accuracy", "chosen_log_prob", "num_units"} <= result.keys()
    assert "ppl" not in result


@pytest.mark.slow
def test_the_base_of_an_adapter_is_the_reference_either_way(
    workers: WorkerPool, root: Path
) -> None:
    found = []
    for mode in ("cached", "base"):
        dpo = {"type": "dpo", "reference_log_probs": mode}
        assert workers.run(2, start, str(root), dpo, f"lora_{mode}", [])[0] == 0
        found.append(losses(root / f"lora_{mode}"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] < 0.693


def test_kto_runs_on_marked_answers(workers: WorkerPool, root: Path) -> None:
    assert workers.run(2, start, str(root), {"type": "kto"}, "kto", [])[0] == 0
    line = json.loads((root / "kto/metrics/train.jsonl").read_text().splitlines()[-1])
    assert line["loss"] < 0.5
    assert line["kl"] >= 0.0


def test_a_reward_model_is_saved_resumed_and_exported(workers: WorkerPool, root: Path) -> None:
    reward = {"type": "reward"}
    stop = ["--trainer.hard_stop.value=2", "--trainer.hard_stop.unit=steps"]
    assert workers.run(1, start, str(root), reward, "scored", stop)[0] == 0
    assert workers.run(1, start, str(root), reward, "scored", ["--trainer.hard_stop=null"])[0] == 0
    assert len(losses(root / "scored")) == 4
    dpo = {"type": "dpo", "reference": f"{root}/scored"}
    said = workers.run(1, start, str(root), dpo, "other", [])[0]
    assert "is a reward model, which has no probabilities of tokens" in said
    checkpoint = find_checkpoint(root / "scored").checkpoint
    assert checkpoint is not None
    assert read_hf_config(checkpoint / "hf").config.num_scores == 1
    names = {name for name, _ in iterate_tensors(checkpoint / "model_and_optim", "model.")}
    assert "head.score.weight" in names
    assert "head.weight" not in names
    # Its head is not new: an adapter alone goes on from it.
    stopping = "trainer.callbacks.early_stopping"
    flags = [f"--trainer.load_path={checkpoint}", f"--{stopping}.enabled=true"]
    flags += [f"--{stopping}.metric=val/reward_accuracy", f"--{stopping}.mode=max"]
    assert workers.run(1, start, str(root), reward, "lora_of_scores", flags)[0] == 0
    assert (root / "lora_of_scores/checkpoints/step4/hf/adapter_config.json").is_file()


def test_a_plan_counts_the_teacher(root: Path) -> None:
    from toolkit.commands.plan import plan_experiment

    text = {"--dataset.instructions=null", f"--trainer.load_path={root}/base"}
    path = config_of(root, {"type": "distill", "teacher": f"{root}/base"})
    loaded = load_experiment(str(path), [*text])
    alone = load_experiment(str(path), [*text, "--train_module.objective=null"])
    found, without = (plan_experiment(one, {}).data["memory"] for one in (loaded, alone))
    own = 4 * loaded.config.model.num_parameters
    assert found["weights"] - without["weights"] == pytest.approx(own)


@pytest.mark.parametrize(
    ("objective", "flags", "said"),
    [
        ({"type": "dpo"}, ["--trainer.load_path=null", "--trainer.load_weights_only=false"],
         "dpo starts from a model, which is its reference"),
        ({"type": "dpo", "reference_log_probs": "base"}, [], "and there are none; use cached"),
        ({"type": "dpo", "reference": "{root}/base"}, ["--model.vocab_size=300"],
         "has a vocabulary of 257 tokens, model.vocab_size is 300"),
        ({"type": "distill", "teacher": "{root}/none"}, ["--dataset.instructions=null"],
         "no checkpoint there"),
        ({"type": "kto"}, ["--dataset.instructions.kind=preference"], "kto needs"),
        ({"type": "orpo"}, ["--model.num_scores=1"], "is of reward models"),
        ({"type": "reward"}, ["--train_module.lora.rank=2"], "add head.score.weight"),
        ({"type": "reward"}, [f"--{SAVER}.best_metric=val/ppl"], "val/loss, val/reward_accuracy"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_training(
    root: Path, objective: dict[str, Any], flags: list[str], said: str
) -> None:
    from toolkit.commands.dry_run import summarize

    filled = {k: v.format(root=root) if isinstance(v, str) else v for k, v in objective.items()}
    path = config_of(root, filled)
    given = [flag.format(root=root) for flag in flags]
    with pytest.raises(ToolkitError) as caught:
        summarize(load_experiment(str(path), given), {})
    assert said in str(caught.value)


def break_reference(root: str) -> int | str:
    """Train against a reference model that gives NaN."""
    from unittest.mock import patch

    def broken(values: Any, batch: Any) -> Any:
        return document_sums(values, batch) * float("nan")

    with patch("toolkit.train.preference.module.document_sums", broken):
        return start(root, {"type": "dpo"}, "broken", ["--train_module.precision=bf16"])


def test_a_reference_that_is_broken_is_said(workers: WorkerPool, root: Path) -> None:
    said = workers.run(1, break_reference, str(root))[0]
    assert "45 units of train log-probabilities that are not finite" in said
