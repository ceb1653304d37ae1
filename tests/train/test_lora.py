"""Adapters under every engine, and runs whose checkpoints hold nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.tiny import ROWS, build, global_batch, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.checkpoint.folder import METADATA_FILE, encode_metadata, read_metadata
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.commands.dry_run import summarize
from toolkit.commands.explain import explain_resume
from toolkit.commands.verify import verify_checkpoints
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.errors import CheckpointError, ToolkitError
from toolkit.experiment.load import load_experiment
from toolkit.models.lora_config import LoRAConfig
from toolkit.optim.base import GroupOverride
from toolkit.optim.config import AdamWConfig
from toolkit.train.adapter_base import find_base

STEPS = 4
LORA = LoRAConfig(rank=4, target_modules=("*.attention.*", "*.down"), train_also=("head.norm.*",))
FROZEN = ("embeddings.*", "*.attention.key.*", "blocks.0.feed_forward.*")
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("ddp", 2, {}),
    ("fsdp", 2, {}),
    ("zero1", 2, {}),
    ("zero2", 2, {}),
    ("zero3", 2, {}),
]


def trained_under(engine: str, settings: dict[str, Any], precision: str = "fp32") -> Any:
    """Losses and norms of a few steps, and which parameters they changed on this rank."""
    config = module_config(engine, precision=precision, max_grad_norm=0.1, **settings)
    env = open_environment(config)
    try:
        module = build(config, env)
        before = {name: t.clone() for name, t in module.engine.weight_shards().items()}
        history = train_steps(module, 0, STEPS)
        rows = ROWS // env.world_size
        own = slice(env.rank * rows, (env.rank + 1) * rows)
        module.train_batch({"input_ids": global_batch(STEPS)[own]})
        norms = {key: float(value) for key, value in module.network_norms().items()}
        after = module.engine.weight_shards()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        saved = {key for key in module.state_tensors() if key.startswith("model.")}
        return history, norms, changed, saved
    finally:
        env.close()


def kinds() -> dict[str, dict[str, Any]]:
    rates = (GroupOverride(params=["embeddings.*", "head.*"], opts={"lr": 0.0}),)
    return {
        "lora": {"lora": LORA},
        "freeze": {"freeze": FROZEN, "optim": AdamWConfig(lr=1e-3, group_overrides=rates)},
    }


@pytest.fixture(scope="module")
def reference(workers: WorkerPool) -> dict[str, Any]:
    found = {k: workers.run(1, trained_under, "single", s)[0] for k, s in kinds().items()}
    return found | {"bf16": workers.run(1, trained_under, "single", kinds()["lora"], "bf16")[0]}


def test_only_adapters_and_what_is_named_besides_change(reference: dict[str, Any]) -> None:
    history, _, changed, saved = reference["lora"]
    assert len(changed) == 2 * 2 * 5 + 1
    assert all(".lora_" in name or name == "head.norm.weight" for name in changed)
    assert saved == {f"model.{name}" for name in changed}
    assert min(step["grad_norm"] for step in history) > 0.1  # so that clipping does something


def test_frozen_parameters_and_rates_of_zero_stay(reference: dict[str, Any]) -> None:
    _, _, changed, saved = reference["freeze"]
    assert len(saved) == 21
    assert not [
        n for n in changed if n.startswith(("embeddings", "head", "blocks.0.feed_forward."))
    ]
    assert not [n for n in changed if "attention.key." in n]
    assert "blocks.0.feed_forward_norm.weight" in changed
    assert "blocks.1.feed_forward.up.weight" in changed


@pytest.mark.parametrize("kind", ["lora", "freeze"])
@pytest.mark.parametrize(("engine", "ranks", "dp"), CASES)
def test_engines_train_adapters_alike(
    workers: WorkerPool,
    reference: dict[str, Any],
    engine: str,
    ranks: int,
    dp: dict[str, Any],
    kind: str,
) -> None:
    history, norms, changed, saved = reference[kind]
    results = workers.run(ranks, trained_under, engine, kinds()[kind] | {"dp": dp})
    for theirs, their_norms, _, _ in results:
        for got, want in zip(theirs, history, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert their_norms == pytest.approx(norms, rel=1e-4)
    assert set.union(*(result[2] for result in results)) == changed
    assert set.union(*(result[3] for result in results)) == saved


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_engines_compute_adapters_in_bf16_alike(
    workers: WorkerPool, reference: dict[str, Any], engine: str
) -> None:
    history = reference["bf16"][0]
    for theirs, *_ in workers.run(2, bf16_recomputed, engine):
        for got, want in zip(theirs, history, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-3)


def bf16_recomputed(engine: str) -> Any:
    from toolkit.distributed.config import ActivationCheckpointingConfig

    recompute = {"ac_config": ActivationCheckpointingConfig(mode="full")}
    return trained_under(engine, kinds()["lora"] | recompute, "bf16")


def run(root: str, name: str, flags: list[str]) -> tuple[int, str]:
    """`toolkit train smoke` with these flags, or the resume of the run `name`; the exit code, or
    the error."""
    from toolkit.commands.train import resume, train

    folder = Path(root) / "runs" / name
    try:
        if folder.exists():
            return resume(folder, flags), ""
        common = [
            f"--run.save_folder={folder}",
            f"--dataset.root={root}/data",
            "--train_module.precision=fp32",
            "--trainer.max_duration.value=6",
            "--trainer.callbacks.lm_evaluator.enabled=false",
            "--trainer.callbacks.checkpointer={interval: 3, keep_last: null}",
            "--trainer.callbacks.console_logger.enabled=false",
            "--trainer.callbacks.system_monitor.enabled=false",
        ]
        return train(load_experiment("smoke", [*common, *flags]).config), ""
    except ToolkitError as error:
        return error.exit_code, str(error)


def adapts(base: Path, **lora: Any) -> list[str]:
    return [f"--trainer.load_path={base}", f"--train_module.lora={json.dumps({'rank': 4} | lora)}"]


def losses(folder: Path) -> list[float]:
    return [
        json.loads(x)["loss"] for x in (folder / "metrics/train.jsonl").read_text().split("\n")[:-1]
    ]


def tensors_of(checkpoint: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    return dict(iterate_tensors(checkpoint / "model_and_optim", prefix))


@pytest.fixture(scope="module")
def place(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 3 steps, and an adapter's run of 6 on it."""
    root = tmp_path_factory.mktemp("lora")
    short = ["--trainer.max_duration.value=3"]
    assert workers.run(1, run, str(root), "base", short)[0] == (0, "")
    flags = [*adapts(root / "runs/base"), "--train_module.freeze=['*.down.lora_A.*']"]
    assert workers.run(1, run, str(root), "whole", flags)[0] == (0, "")
    return root / "runs"


def test_checkpoints_hold_the_adapter_and_name_its_base(place: Path) -> None:
    checkpoint, base = place / "whole/checkpoints/step6", place / "base/checkpoints/step3"
    saved = tensors_of(checkpoint)
    weights = {name for name in saved if name.startswith("model.")}
    assert len(weights) == 2 * 2 * 7
    assert all(".lora_" in name for name in saved)
    moments = {name.rpartition(".")[0] for name in saved if name.startswith("optim.")}
    assert len(moments) == 2 * 2 * 7 - 2  # none for what is frozen
    extra = read_metadata(checkpoint).extra
    assert msgspec.convert(extra["adapter"], LoRAConfig) == LoRAConfig(rank=4)
    assert extra["base"] == {
        "path": str(base),
        "step": 3,
        "fingerprint": read_metadata(base).xxh3,
        "source": None,
    }
    assert (checkpoint / "hf/adapter_config.json").is_file()
    settings = json.loads((checkpoint / "hf/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base/checkpoints/step3/hf"
    assert (checkpoint / "hf/tokenizer.json").is_file()
    ends = json.loads((checkpoint / "hf/generation_config.json").read_text())["eos_token_id"]
    assert ends == load_tokenizer(checkpoint / "hf").eos_id
    log = (place / "whole/logs/rank0.log").read_text()
    assert "parameters are trained" in log
    assert losses(place / "whole")[0] < losses(place / "base")[0] - 0.1  # from trained weights
    assert [report.problem for report in verify_checkpoints(place / "whole")] == [None, None]


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(workers: WorkerPool, place: Path) -> None:
    shutil.copytree(place / "whole", place / "again")
    shutil.rmtree(place / "again/checkpoints/step6")
    assert workers.run(1, run, str(place.parent), "again", [])[0] == (0, "")
    assert losses(place / "again") == losses(place / "whole")
    ours, theirs = (tensors_of(place / f"{n}/checkpoints/step6") for n in ("again", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_engines_go_on_with_an_adapter(workers: WorkerPool, place: Path) -> None:
    shutil.copytree(place / "whole", place / "moved")
    shutil.rmtree(place / "moved/checkpoints/step6")
    for engine, last in (("fsdp", 4), ("zero3", 6)):
        flags = [
            f"--train_module.dp_config.name={engine}",
            f"--trainer.hard_stop={{value: {last}}}",
        ]
        for result in workers.run(2, run, str(place.parent), "moved", flags):
            assert result == (0, "")
    assert losses(place / "moved") == pytest.approx(losses(place / "whole"), rel=1e-4)


def test_steps_are_replayed(workers: WorkerPool, place: Path) -> None:
    receipt = workers.run(1, replayed, str(place / "whole"))[0]
    assert (receipt.verdict, receipt.compared, receipt.first_step) == ("equal", 2, 4)


def replayed(folder: str) -> Any:
    from toolkit.commands.replay import replay_steps

    return replay_steps(Path(folder), 2, step=3)


def test_another_base_or_none_is_refused(workers: WorkerPool, place: Path) -> None:
    shutil.copytree(place / "whole", place / "refused")
    shutil.rmtree(place / "refused/checkpoints/step6")
    other = place / "other/checkpoints/step3"
    shutil.copytree(place / "base/checkpoints/step3", other)
    metadata = read_metadata(other)
    (other / METADATA_FILE).write_bytes(
        encode_metadata(msgspec.structs.replace(metadata, tokens=metadata.tokens + 1))
    )
    before = (place / "refused/metadata/config.json").read_bytes()
    code, message = workers.run(
        1, run, str(place.parent), "refused", [f"--trainer.load_path={place / 'other'}"]
    )[0]
    assert code == 2
    assert f"its adapter belongs to step 3 of {place}/base/checkpoints/step3" in message
    assert f"{place}/other holds another checkpoint" in message
    assert "--trainer.load_path=" in message
    code, message = workers.run(
        1, run, str(place.parent), "refused", ['--train_module.lora={"rank": 8}']
    )[0]
    assert code == 2
    assert "another adapter: train_module.lora.rank (was 4, is 8)" in message
    code, message = workers.run(
        1,
        run,
        str(place.parent),
        "refused",
        ["--train_module.lora=null", "--train_module.freeze=[]"],
    )[0]
    assert code == 2
    assert "holds an adapter, not a whole model" in message
    assert (place / "refused/metadata/config.json").read_bytes() == before
    told = explain_resume(place / "refused", [f"--trainer.load_path={place / 'other'}"], {})
    assert len(told.refused) == 1
    assert "holds another checkpoint" in told.refused[0]
    told = explain_resume(place / "refused", [], {})
    assert f"an adapter, on {place}/base/checkpoints/step3" in str(told)
    assert told.refused == []


def test_a_base_that_moved_or_went_on_is_found(place: Path, tmp_path: Path) -> None:
    adapter, base = place / "whole/checkpoints/step6", place / "base/checkpoints/step3"

    def look(path: str) -> Path | None:
        return {str(place / "base"): newer, str(base): base}.get(path)

    newer = place / "whole/checkpoints/step3"
    assert find_base(adapter, str(place / "base"), look) == base
    assert find_base(adapter, "relative", look) == base
    assert find_base(adapter, str(tmp_path), lambda _: base) == base
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds no checkpoint; say where"):
        find_base(adapter, str(tmp_path), lambda _: None)
    with pytest.raises(CheckpointError, match=r"holds a whole model, no adapter: set train_module"):
        find_base(base, None, look)


def test_a_dry_run_says_how_much_is_trained(tmp_path: Path, place: Path) -> None:
    flags = [*adapts(place / "base"), "--run.root=" + str(tmp_path)]
    text = summarize(load_experiment("smoke", [*flags, "--dataset.root=" + str(tmp_path)]), {})
    # Rank 4 times in + out: four of 32 + 32 and three of 32 + 64, in two blocks.
    adapters = 2 * 4 * (4 * 64 + 3 * 96)
    assert f"{adapters:,} of {41_120 + adapters:,} parameters are trained (" in text


@pytest.mark.parametrize(
    ("base", "flags", "message"),
    [
        ("whole", [], "holds an adapter, not a whole model; merge it first: toolkit export-hf"),
        ("nowhere", [], "holds no valid checkpoint"),
        ("base", ["--trainer.load_path=null"], "trains an adapter on a model that exists: name"),
        ("base", ["--model.d_model=64"], "was saved from another model: model.d_model"),
        ("base", ["--train_module.freeze=['*']"], "leaves no parameter to train"),
        ("base", ["--train_module.freeze=['blok.*']"], "'blok.*' matches no parameter"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_begins(
    workers: WorkerPool, place: Path, base: str, flags: list[str], message: str
) -> None:
    asked = [*adapts(place / base), *flags]
    code, error = workers.run(1, run, str(place.parent), "new", asked)[0]
    assert code == 2
    assert message in error
    assert not (place / "new").exists()
