"""Runs of adapters on a base in 4 or 8 bits: loaded part by part, resumed, replicated, exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import build, module_config, open_environment
from tests.train.test_lora import adapts, losses, run, tensors_of, trained_under
from tests.workers import WorkerPool
from toolkit.checkpoint.folder import MODEL_PREFIX
from toolkit.commands.dry_run import summarize
from toolkit.commands.evaluate import evaluate
from toolkit.commands.plan.counting import Counter
from toolkit.experiment.load import load_experiment
from toolkit.hf.source import find_source, source_tensors
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import is_adapter, quantised_bytes
from toolkit.models.quantised import quantised_linears
from toolkit.train import transformer

NF4 = {"quantize_base": "nf4", "quantize_all": True}


@pytest.fixture(scope="module")
def place(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 3 steps, and two runs of 6 on it: on a base in fp32, and on one in 4 bits."""
    root = tmp_path_factory.mktemp("quantised")
    short = ["--trainer.max_duration.value=3"]
    assert workers.run(1, run, str(root), "base", short)[0] == (0, "")
    for name, lora in (("exact", {}), ("nf4", NF4)):
        asked = adapts(root / "runs/base", target_modules=["*.attention.*"], **lora)
        assert workers.run(1, run, str(root), name, asked)[0] == (0, "")
    return root / "runs"


def test_its_losses_are_near_those_of_an_exact_base(place: Path) -> None:
    ours, exact = losses(place / "nf4"), losses(place / "exact")
    assert ours == pytest.approx(exact, abs=0.01)
    assert ours != exact
    assert ours[0] < losses(place / "base")[0] - 0.1  # which training has moved further
    kernels = json.loads((place / "nf4/metadata/engine.json").read_text())["kernels"]
    assert kernels["linear layers"].startswith("base in nf4, 14 of 14 layers, ")


def test_checkpoints_and_exports_are_of_the_exact_base(place: Path) -> None:
    base = tensors_of(place / "base/checkpoints/step3", MODEL_PREFIX)
    ours, exact = (tensors_of(place / f"{n}/checkpoints/step6") for n in ("nf4", "exact"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in exact.items()}
    merged = dict(source_tensors(find_source(place / "nf4/checkpoints/step6")))
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        layer = name.removesuffix(".weight")
        down = ours.get(f"model.{layer}.lora_A.weight")
        if down is None:
            assert torch.equal(tensor, base[name])
        else:
            change = 8.0 * ours[f"model.{layer}.lora_B.weight"] @ down
            torch.testing.assert_close(tensor, base[name] + change)


def test_eval_says_that_the_base_is_exact_there(place: Path) -> None:
    said: list[str] = []
    evaluate(str(place / "nf4"), notify=said.append)
    (line,) = [line for line in said if "exact" in line]
    assert line.startswith("the weights are exact here; training, and its metrics/eval.jsonl, has ")
    assert "the base in nf4" in line
    evaluate(str(place / "exact"), notify=said.append)
    assert len([line for line in said if "exact" in line]) == 1


def test_a_resumed_run_is_bit_equal_and_ddp_goes_on_alike(workers: WorkerPool, place: Path) -> None:
    # Patterns that change no name of what is in fp32; together they change nothing.
    mapping = {r"attention\.query\.": "attention.asked.", r"attention\.asked\.": "attention.query."}
    for name, ranks, flags in (
        ("again", 1, [f"--trainer.load_key_mapping={json.dumps(mapping)}"]),
        ("replicas", 2, ["--train_module.dp_config.name=ddp"]),
    ):
        shutil.copytree(place / "nf4", place / name)
        shutil.rmtree(place / name / "checkpoints/step6")
        for result in workers.run(ranks, run, str(place.parent), name, flags):
            assert result == (0, "")
    assert losses(place / "again") == losses(place / "nf4")
    ours, theirs = (tensors_of(place / f"{n}/checkpoints/step6") for n in ("again", "nf4"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert losses(place / "replicas") == pytest.approx(losses(place / "nf4"), rel=1e-5)


def test_what_cannot_be_is_refused_before_it_begins(workers: WorkerPool, place: Path) -> None:
    asked = adapts(place / "base", **NF4)
    flags = [*asked, "--train_module.dp_config.name=fsdp"]
    code, message = workers.run(1, run, str(place.parent), "new", flags)[0]
    assert code == 2
    assert "train_module.lora.quantize_base: nf4 does not go with fsdp, which would" in message
    assert not (place / "new").exists()
    changed = adapts(place / "base", target_modules=["*.attention.*"], quantize_base="int8")
    code, message = workers.run(1, run, str(place.parent), "nf4", changed)[0]
    assert code == 2
    assert 'train_module.lora.quantize_base (was "nf4", is "int8")' in message
    text = summarize(load_experiment("smoke", [*asked, f"--dataset.root={place.parent}"]), {})
    assert "base in nf4, 14 of 14 layers, 11.6 kB in the place of 81.9 kB" in text


def test_ddp_trains_as_one_process_does_in_int8(workers: WorkerPool) -> None:
    lora = LoRAConfig(rank=4, quantize_base="int8")
    settings: dict[str, Any] = {"lora": lora}
    history = workers.run(1, trained_under, "single", settings)[0][0]
    for theirs, *_ in workers.run(2, trained_under, "ddp", settings):
        for got, want in zip(theirs, history, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_is_loaded_part_by_part(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    lora = LoRAConfig(rank=4, quantize_base=kind)  # type: ignore[arg-type]
    config = module_config(lora=lora)
    environment = open_environment(config)
    module = build(config, environment, d_model=64, intermediate_size=128, num_layers=8)
    layers = quantised_linears(module.engine.module)
    whole = 4 * sum(rows * columns for rows, columns in (x.shape for x in layers.values()))
    most = 2 * 4 * 64 * 128
    monkeypatch.setattr(transformer, "PART_BYTES", most)
    with Counter() as counter:
        counter.see(*(part for layer in layers.values() for part in layer.parts))
        kept = counter.live
        names = {key.removeprefix(MODEL_PREFIX) for key in module.base_tensors()}
        assert names == {n for n in module.parameter_names if not is_adapter(n)}
        parts = module.base_parts()
        next(parts)  # what is no linear layer
        counter.restart()
        before = counter.live
        for number, part in enumerate(parts):
            assert sum(tensor.nbytes for tensor in part.values()) <= most
            for tensor in part.values():
                tensor.fill_(number + 1)
    environment.close()
    assert counter.peak - before < whole / 4  # a part, and what is needed while codes are made
    assert kept == sum(quantised_bytes(layer.shape, kind) for layer in layers.values())
    assert kept < (0.15 if kind == "nf4" else 0.27) * whole
    found = [layer.weight_in(torch.float32).unique().item() for layer in layers.values()]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (1.0, pytest.approx(number + 1))
