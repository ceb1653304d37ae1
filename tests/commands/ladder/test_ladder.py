"""Runs of several sizes and durations made from one config, and the law of their losses."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from toolkit.cli.main import run as toolkit
from toolkit.commands.ladder import (
    Law,
    Rung,
    fit_law,
    parse_numbers,
    plan_ladder,
    train_rungs,
)
from toolkit.commands.ladder.sizes import multiplied_weights, scaled_model
from toolkit.config.check import convert
from toolkit.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, ConfigError, RunError
from toolkit.experiment.load import load_experiment
from toolkit.models.config import TransformerConfig
from toolkit.models.presets import PRESETS

TRUE = Law(floor=1.69, a=406.4, alpha=0.34, b=410.7, beta=0.28)
"""Of Hoffmann et al. 2022, equation 10."""
SIZES, RATIOS = (10**6, 4 * 10**6, 10**7), (10, 40)


def model(preset: str) -> TransformerConfig:
    fields = {key: value for key, value in PRESETS[preset].items() if key != "type"}
    return convert(fields, TransformerConfig)


def test_n_counts_blocks_and_head_but_no_lookup() -> None:
    tied, own = model("quickstart"), model("olmo2_1B")
    assert multiplied_weights(tied) == tied.num_parameters
    assert multiplied_weights(own) == own.num_non_embedding_parameters
    experts = model("olmoe_1B_7B")
    lookup = experts.padded_vocab_size * experts.d_model
    assert multiplied_weights(experts) == experts.num_active_parameters - lookup


@pytest.mark.parametrize("preset", ["olmo2_1B", "llama3_8B", "smollm2_135M", "olmoe_1B_7B"])
def test_a_config_at_its_own_size_is_itself(preset: str) -> None:
    own = model(preset)
    assert scaled_model(own, multiplied_weights(own)) == own


@pytest.mark.parametrize("preset", ["quickstart", "olmo2_1B", "llama3_8B", "qwen3_30B_A3B"])
@pytest.mark.parametrize("growth", [0.01, 0.1, 3.0])
def test_a_size_is_met_with_the_shape_of_the_config(preset: str, growth: float) -> None:
    own = model(preset)
    size = round(multiplied_weights(own) * growth)
    if preset == "quickstart" and growth == 0.01:
        size = 100_000
    found = scaled_model(own, size)
    assert multiplied_weights(found) == pytest.approx(size, rel=0.2)
    assert found.num_heads % found.kv_heads == 0
    assert found.attention_head_dim <= own.attention_head_dim
    if growth > 1:
        shape = found.d_model / found.num_layers
        assert shape == pytest.approx(own.d_model / own.num_layers, rel=0.5)
        assert found.attention_head_dim == own.attention_head_dim
        assert found.intermediate_size / found.d_model == pytest.approx(
            own.intermediate_size / own.d_model, rel=0.1
        )


def test_a_vocabulary_that_is_larger_than_the_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no model of 100,278 tokens .* has 1,60\d,\d+ weights"):
        scaled_model(model("olmo2_1B"), 10_000)


def rungs(*flags: str, sizes: Sequence[int] = (10**6, 8 * 10**6), ranks: int = 1) -> list[Rung]:
    return plan_ladder(load_experiment("quickstart", flags), sizes, [20, 40], ranks=ranks).rungs


def test_batch_rate_and_lengths_follow_the_size() -> None:
    base = load_experiment("quickstart").config
    before = multiplied_weights(base.model.to_transformer())
    small, long, large, _ = rungs()
    assert [rung.name for rung in (small, long, large)] == ["1M-20", "1M-40", "8M-20"]
    for rung in (small, long, large):
        growth, batch = rung.size / before, rung.config.data_loader.global_batch_size
        optim, module = rung.config.train_module.optim, rung.config.train_module
        assert optim.lr == pytest.approx(base.train_module.optim.lr * growth ** (-1 / 3), rel=1e-3)
        off = math.log2(batch / (base.data_loader.global_batch_size * growth ** (2 / 3)))
        assert abs(off) <= 0.5
        assert batch % (module.rank_microbatch_size or 1) == 0
        assert rung.steps * batch == rung.tokens
        model = rung.config.model.to_transformer()
        assert rung.size == multiplied_weights(model)
        length = rung.config.dataset.sequence_length
        assert rung.flops == model.flops_per_token(length) * rung.tokens
        share = base.train_module.scheduler.warmup / base.trainer.max_duration.value
        assert module.scheduler.warmup_fraction == pytest.approx(share)
        assert rung.config.trainer.max_duration.value == rung.steps
        assert rung.config.run.name == rung.name
    assert small.tokens == pytest.approx(20 * small.size, rel=0.01)
    assert long.tokens == pytest.approx(40 * small.size, rel=0.01)


def test_mup_keeps_the_rate_and_decays_keep_their_share() -> None:
    flags = [
        "--model.tie_embeddings=false",
        "--train_module.optim.type=adamw",
        "--train_module.optim.mup.base_width=192",
        "--train_module.scheduler.type=wsd",
        "--train_module.scheduler.decay_fraction=null",
        "--train_module.scheduler.decay=50",
        "--data_loader.global_batch_size=65536",
    ]
    base = load_experiment("quickstart", flags).config
    for rung in rungs(*flags, ranks=4):
        assert rung.config.train_module.optim == base.train_module.optim
        scheduler: Any = rung.config.train_module.scheduler
        assert scheduler.decay_fraction == pytest.approx(50 / base.trainer.max_duration.value)
        assert rung.config.data_loader.global_batch_size % (4 * 256) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_module.scheduler.decay_from=100"], r"scheduler\.decay_from: does not scale"),
        (
            ["--trainer.max_duration={value: 2, unit: epochs}"],
            r"trainer\.max_duration: the ladder keeps the shares",
        ),
        (
            ["--data_loader.batch_size_schedule=[{tokens: 4096, global_batch_size: 8192}]"],
            r"data_loader\.batch_size_schedule: does not scale",
        ),
    ],
)
def test_what_does_not_scale_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rungs(*flags)


def test_two_sizes_of_one_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="1M-20: there is such a run already"):
        rungs(sizes=(1_000_000, 1_000_001))


@pytest.mark.parametrize("text", ["1x", "0", "", "1M,1M", "-1", "1M,,2M"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--sizes"):
        parse_numbers(text, "--sizes")
    assert parse_numbers("4M, 1.5B,300k", "--sizes") == [300_000, 4_000_000, 1_500_000_000]


def runs_of_the_law(sizes: Sequence[float] = SIZES, ratios: Sequence[float] = RATIOS) -> Any:
    points = [(n, n * ratio) for n in sizes for ratio in ratios]
    return [n for n, _ in points], [d for _, d in points], [TRUE.loss(n, d) for n, d in points]


def test_the_fit_finds_the_law_that_made_the_losses() -> None:
    found = fit_law(*runs_of_the_law())
    assert tuple(found) == pytest.approx(tuple(TRUE), rel=1e-6)
    assert found.loss(1e9, 2e10) == pytest.approx(TRUE.loss(1e9, 2e10), rel=1e-9)


def test_one_bad_run_hardly_moves_the_law() -> None:
    sizes, tokens, losses = runs_of_the_law((10**6, 4 * 10**6, 10**7, 4 * 10**7), (10, 20, 40))
    losses[5] *= 1.2
    found = fit_law(sizes, tokens, losses)
    assert tuple(found) == pytest.approx(tuple(TRUE), rel=0.05)
    assert found.loss(1e9, 2e10) == pytest.approx(TRUE.loss(1e9, 2e10), rel=3e-3)


def test_the_best_split_of_compute_is_the_best() -> None:
    size, tokens = TRUE.best_split(1e21)
    assert 6 * size * tokens == pytest.approx(1e21)
    for factor in (0.9, 1.1):
        assert TRUE.loss(size * factor, tokens / factor) > TRUE.loss(size, tokens)


def test_too_few_runs_and_losses_that_rise_make_no_law() -> None:
    with pytest.raises(ConfigError, match="there are 6 runs of 2 sizes and 3 ratios"):
        fit_law(*runs_of_the_law((10**6, 10**7), (10, 20, 40)))
    with pytest.raises(ConfigError, match="there are 6 runs of 6 sizes and 1 ratio "):
        fit_law(*runs_of_the_law(tuple(k * 10**6 for k in range(1, 7)), (20,)))
    sizes, tokens, losses = runs_of_the_law()
    with pytest.raises(ConfigError, match="do not fall"):
        fit_law(sizes, tokens, losses[::-1])


def finish(rung: Rung, folder: Path, loss: float | None = None) -> None:
    """What a run leaves behind that is done, as far as the ladder reads it."""
    status = {
        "state": "finished", "experiment": "e", "name": rung.name, "attempt": 1, "created": "",
        "started": "", "updated": "", "host": "", "pid": 1,
    }  # fmt: skip
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "status.json").write_text(json.dumps(status))
    (folder / "metrics").mkdir()
    loss = TRUE.loss(rung.size, rung.tokens) if loss is None else loss
    lines = [{"step": 1, "name": "val", "loss": 9.0}, {"step": rung.steps, "name": "x", "loss": 8}]
    lines.append({"step": rung.steps, "name": "val", "loss": loss})
    (folder / "metrics" / "eval.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_runs_that_are_done_are_left_alone_and_a_failure_ends_it(tmp_path: Path) -> None:
    own, started = rungs(), []

    def start(rung: Rung, config: Path, folder: Path) -> int:
        assert load_experiment(str(config)).config == rung.config
        started.append(rung.name)
        if len(started) == 3:
            return EXIT_FAILED
        finish(rung, folder)
        return EXIT_DONE

    said: list[str] = []
    assert train_rungs(own, tmp_path, start, notify=said.append) == EXIT_FAILED
    assert started == ["1M-20", "1M-40", "8M-20"]
    assert train_rungs(own, tmp_path, start, notify=said.append) == EXIT_DONE
    assert started[3:] == ["8M-20", "8M-40"]
    assert any(line.startswith("[2/4] 1M-40: done, val loss ") for line in said)
    changed = rungs("--train_module.optim.lr=1e-3")
    with pytest.raises(ConfigError, match="made from another config"):
        train_rungs(changed, tmp_path, start, notify=said.append)
    with pytest.raises(RunError, match="without a loss on held-out documents"):
        train_rungs(own, tmp_path / "new", lambda *_: EXIT_DONE, notify=said.append)


def test_the_verb_plans_fits_predicts_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "ladder", "quickstart", "--sizes", "1M,4M,10M", "--tokens-per-parameter", "10,40",
        "--out", "runs/mine",
    ]  # fmt: skip
    assert toolkit([*words, "--dry-run"]) == EXIT_DONE
    table, about, total = capsys.readouterr().out.split("\n\n")
    header, *rows = table.splitlines()
    folder, each, sizes = about.splitlines()  # and no note: they suffice for a law
    assert folder.split(maxsplit=1) == ["folder", "runs/mine: 0 of 6 runs done"]
    assert each.split(maxsplit=2)[2].endswith(", 1 process")
    assert sizes.startswith("sizes  ")
    assert "warmup" in header
    assert header.split()[:3] == ["run", "weights", "parameters"]
    names = ["1M-10", "1M-40", "4M-10", "4M-40", "10M-10", "10M-40"]
    assert [row.split()[0] for row in rows] == names
    assert total.endswith("FLOPs in all. Nothing was written.\n")
    assert not Path("runs").exists()
    assert toolkit([*words, "--fit"]) == EXIT_BAD_INPUT
    assert "runs/mine: 0 of 6 runs done; a law needs at least 6 runs, " in capsys.readouterr().err
    own = plan_ladder(load_experiment("quickstart"), [10**6, 4 * 10**6, 10**7], [10, 40]).rungs
    for rung in own:
        finish(rung, Path("runs/mine") / rung.name)
    assert toolkit(["ladder", "--help"]) == EXIT_DONE
    example = next(x for x in capsys.readouterr().out.splitlines() if x.endswith("--dry-run"))
    assert toolkit(example.split()[1:]) == EXIT_DONE
    assert "note" not in capsys.readouterr().out
    few = [*words[:3], "1M,4M", *words[4:], "--processes", "2", "--engine", "fsdp", "--dry-run"]
    assert toolkit(few) == EXIT_DONE
    text = " ".join(capsys.readouterr().out.split())
    assert "runs/mine: 4 of 4 runs done (1M-10, 1M-40, 4M-10, 4M-40) each run fsdp, 2" in text
    assert "note no law will come of these: a law needs at least 6 runs, of 3 or more" in text
    assert "there are 4 runs of 2 sizes and 2 ratios of tokens to size" in text
    assert toolkit([*few, "--json"]) == EXIT_DONE
    plan = json.loads(capsys.readouterr().out)
    assert (plan["folder"], plan["engine"], plan["processes"]) == ("runs/mine", "fsdp", 2)
    assert all(run["done"] and 0 < run["warmup"] < run["steps"] for run in plan["runs"])
    asked = [*words, "--fit", "--predict", "1B:20B"]
    assert toolkit([*asked, "--json"]) == EXIT_DONE
    told = json.loads(capsys.readouterr().out)
    assert told["law"]["alpha"] == pytest.approx(0.34, rel=1e-4)
    assert told["predicted"][0]["loss"] == pytest.approx(TRUE.loss(1e9, 2e10), rel=1e-5)
    assert [run["run"] for run in told["runs"]] == names
    assert toolkit([*asked, "--plot", "law.png"]) == EXIT_DONE
    text = capsys.readouterr().out
    assert "L(N, D) = 1.6900 + 406.4 / N^0.3400 + 410.7 / D^0.2800" in text
    assert "1,000,000,000 weights after 20,000,000,000 tokens: loss 2.5800" in text
    assert Path("law.png").read_bytes().startswith(b"\x89PNG")
    assert toolkit([*words, "--predict", "1B"]) == EXIT_BAD_INPUT
    assert "give weights:tokens, as in 1B:20B" in capsys.readouterr().err


@pytest.mark.slow
def test_a_ladder_trains_goes_on_after_a_stop_and_tells_its_losses(tmp_path: Path) -> None:
    """Two sizes in processes of their own; the first stop comes while the first one trains."""
    import signal
    import subprocess
    import time

    from tests.e2e._run import environ
    from toolkit.launch.workers import toolkit_command

    words = ["ladder", "smoke", "--sizes", "20k,40k", "--tokens-per-parameter", "30"]
    command = toolkit_command([*words, "--out", "mine"])
    first = subprocess.Popen(
        command, cwd=tmp_path, env=environ(), stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "mine" / "20k-30" / "metrics" / "train.jsonl"
    while first.poll() is None and not metrics.exists():
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 75
    again = subprocess.run(
        command,
        cwd=tmp_path,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "[2/2] 40k-30: val loss " in again.stdout
    third = subprocess.run(
        command,
        cwd=tmp_path,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert third.stdout.count(": done, val loss ") == 2
