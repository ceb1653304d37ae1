"""The dry run tells what a run would do."""

from pathlib import Path

import pytest

from toolkit.commands import dry_run
from toolkit.commands.dry_run import summarize
from toolkit.data.config import HubSourceConfig
from toolkit.data.prepare.corpus import prepare_corpus
from toolkit.errors import ConfigError, DataError, RunError
from toolkit.experiment.load import load_experiment
from toolkit.launch.capacity import Capacity

TWO_RANKS = {"WORLD_SIZE": "2", "RANK": "0"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(*overrides: str, environ: dict[str, str] | None = None, **shorthands: str) -> list[str]:
    loaded = load_experiment("quickstart", overrides, shorthands)
    text = summarize(loaded, environ or {})
    return [" ".join(line.split()) for line in text.splitlines()]


def test_it_shows_values_origins_and_consequences(tmp_path: Path) -> None:
    shown = lines("--train_module.optim.lr=6e-3", "--trainer.hard_stop={value: 20}", name="run1")
    assert "train_module.optim.lr 0.006 < --train_module.optim.lr" in shown
    assert "model.d_model 192 < recipe quickstart" in shown
    assert "run.name run1 < --name" in shown
    assert "model 2,557,632 parameters (1,771,200 without embeddings)" in shown
    assert "hard stop after 20 steps, 40,960 tokens" in shown
    assert "engine single, 1 process" in shown
    assert f"writes {tmp_path}/runs/quickstart/run1" in shown
    assert f"{tmp_path}/data/python_stdlib/bpe4096" in shown
    assert not any(tmp_path.iterdir())


def test_defaults_and_callbacks_that_are_off_are_left_out() -> None:
    def paths(*flags: str, every: bool = False) -> list[str]:
        text = summarize(load_experiment("quickstart", flags), {}, every=every)
        return [line.split()[0] for line in text.splitlines() if line.startswith("  ")]

    short, every = paths(), paths(every=True)
    assert len(short) < len(every) / 3
    assert {"model.d_model", "train_module.optim.lr", "trainer.max_duration.value"} <= set(short)
    assert "model.bias" not in short  # given by the recipe, and the default
    assert {"model.bias", "trainer.callbacks.profiler.enabled", "trainer.hard_stop"} <= set(every)
    assert not any(path.startswith("trainer.callbacks.profiler") for path in short)
    off = ["--trainer.callbacks.sample_writer.enabled=false", "--model.bias=false"]
    shown = paths(*off)
    assert "model.bias" in shown  # by a flag
    writer = [path for path in shown if path.startswith("trainer.callbacks.sample_writer")]
    assert writer == ["trainer.callbacks.sample_writer.enabled"]


def test_it_counts_the_ranks_of_the_launcher() -> None:
    sizes = ["--data_loader.global_batch_size=8192", "--train_module.rank_microbatch_size=1024"]
    shown = lines(*sizes, environ=TWO_RANKS)
    batch = "batch 8,192 tokens a step = 2 ranks x 1,024 tokens x 4 gradient accumulation"
    assert batch in shown
    assert "engine ddp, 2 processes" in shown


def test_ranks_that_share_rows_are_no_shares_of_the_batch() -> None:
    four = TWO_RANKS | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    axes = ["--train_module.cp_config.degree=2", "--train_module.pp_config.degree=2"]
    sizes = ["--model.num_layers=2", "--train_module.rank_microbatch_size=1024"]
    shown = lines(*sizes, *axes, environ=four)
    assert any("tokens a step = 1 share of 4 ranks x" in line for line in shown)
    assert any("stage 1 of 2 (layer 0)" in line for line in shown)


def test_it_tells_the_batches_and_rows_of_a_schedule() -> None:
    sizes = ["--data_loader.global_batch_size=8192", "--train_module.rank_microbatch_size=1024"]
    sizes += ["--data_loader.batch_size_schedule=[{tokens: 100000}]"]
    sizes += ["--dataset.sequence_length=128"]
    sizes += ["--data_loader.sequence_length_schedule=[{tokens: 0, sequence_length: 64}, "]
    sizes[-1] += "{tokens: 50000}]"
    shown = lines(*sizes, "--trainer.max_duration={value: 30}", environ=TWO_RANKS)
    start = shown.index(
        "batch 8,192 tokens a step = 2 ranks x 1,024 tokens x 4 gradient accumulation"
    )
    assert shown[start + 1 : start + 5] == [
        "16,384 tokens a step = 2 ranks x 1,024 tokens x 8 gradient accumulation, from 100,000 "
        "tokens on",
        "sequences of 64 tokens",
        "sequences of 128 tokens, from 50,000 tokens on",
        "duration 30 steps, 385,024 tokens",
    ]
    with pytest.raises(ConfigError, match=r"decay_from: the run .* ends after 30 steps, so this"):
        lines("--trainer.max_duration={value: 30}", "--train_module.scheduler.decay_from=31")


def test_it_names_the_engine_that_the_config_asks_for() -> None:
    flag = "--train_module.dp_config={name: fsdp, param_dtype: bfloat16}"
    shown = lines(flag, environ=TWO_RANKS)
    assert "engine fsdp, 2 processes, from train_module.dp_config" in shown
    assert "precision bf16" in shown


def test_two_engines_asked_for_are_an_error() -> None:
    environ = TWO_RANKS | {"ACCELERATE_USE_DEEPSPEED": "true"}
    with pytest.raises(ConfigError, match="two engines asked for"):
        lines("--train_module.dp_config.name=fsdp", environ=environ)


def test_steps_follow_from_tokens() -> None:
    shown = lines(
        "--trainer.max_duration={value: 10_000, unit: tokens}",
        "--data_loader.global_batch_size=4096",
    )
    assert "duration 3 steps, 12,288 tokens" in shown


def test_epochs_wait_for_prepared_data() -> None:
    shown = lines("--trainer.max_duration={value: 2, unit: epochs}")
    assert "duration 2 epochs; steps are known once the data is prepared" in shown


def test_epochs_count_whole_batches_of_prepared_data(tmp_path: Path) -> None:
    from toolkit.data.prepare.build.prepare import prepare_dataset

    (tmp_path / "a.txt").write_text("hello world\n" * 1000)
    flags = [
        "--dataset.source={type: files, paths: [a.txt]}",
        "--dataset.tokenizer={type: byte}",
        "--dataset.validation_fraction=0",
        "--dataset.dataset_name=tiny",
        "--trainer.max_duration={value: 3, unit: epochs}",
        "--data_loader.global_batch_size=4096",
    ]
    config = load_experiment("quickstart", flags).config
    tokens = prepare_dataset(config.dataset, progress=False).num_tokens("train")
    assert tokens == 12_001
    shown = lines(*flags)
    assert "data data/tiny/bpe4096: 12,001 training tokens, 0 validation tokens" in shown
    steps = 3 * (12_001 // 256 // 16)
    assert f"duration {steps} steps, {steps * 4096:,} tokens, 3.00 epochs" in shown


def test_less_data_than_one_batch_is_an_error(tmp_path: Path) -> None:
    from toolkit.data.prepare.build.prepare import prepare_dataset

    (tmp_path / "a.txt").write_text("hello world\n" * 100)
    flags = [
        "--dataset.source={type: files, paths: [a.txt]}",
        "--dataset.tokenizer={type: byte}",
        "--dataset.validation_fraction=0",
    ]
    prepare_dataset(load_experiment("quickstart", flags).config.dataset, progress=False)
    with pytest.raises(DataError, match="not enough data for one batch: 4 instances of 256 tokens"):
        lines(*flags)
    for environ in ({}, TWO_RANKS, TWO_RANKS | {"WORLD_SIZE": "8"}):
        for more in ([], ["--train_module.rank_microbatch_size=768"]):
            given = [*flags, *more]
            if more:
                given.append("--data_loader.global_batch_size=6144")
            with pytest.raises(DataError) as error:
                lines(*given, environ=environ)
            advice = str(error.value).partition("these fit: ")[2].partition(", or give")[0]
            text = "\n".join(lines(*given, *advice.split(), environ=environ))
            assert "Nothing was written" in text


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    from toolkit.runs.registry import start_run

    start_run("quickstart", "run1", root=tmp_path / "runs").close("finished")
    with pytest.raises(RunError, match="this run exists; continue it with"):
        lines(name="run1")


def test_it_shows_who_is_trained_how() -> None:
    shown = lines("--train_module.optim.type=muon", "--train_module.optim.lr=0.02")
    start = next(n for n, line in enumerate(shown) if line.startswith("optimizer "))
    assert shown[start : start + 2] == [
        "optimizer 788,160 parameters in 10 tensors: lr 0.02, weight_decay 0, by AdamW "
        "(group_overrides.0)",
        "1,769,472 parameters in 28 tensors: lr 0.02, weight_decay 0.1, matrices",
    ]
    layers = ["--train_module.optim.layer_lr_decay=0.5", "--model.num_layers=12"]
    assert "18 groups more (metadata/optimizer_groups.json of the run)" in lines(*layers)


@pytest.mark.parametrize(
    ("precision", "said"),
    [("fp32", None), ("auto", "does not go with precision fp32"), ("bf16", "and a CPU has none")],
)
def test_it_says_what_this_machine_cannot_do(
    precision: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.distributed.environment.is_fast_at_bf16", lambda device: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    flags = ["--train_module.float8_config.filter=[]", f"--train_module.precision={precision}"]
    if said is None:  # whatever the machine: refused
        with pytest.raises(ConfigError, match="precision fp32"):
            lines(*flags)
        return
    (line,) = [line for line in lines(*flags) if "refused on this machine" in line]
    assert line.startswith("here refused on this machine: train_module.float8_config: ")
    assert said in line


@pytest.mark.parametrize("kernel", ["flash", "flash3"])
def test_attention_kernels_of_gpus_are_refused_on_cpus(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (line,) = [
        line
        for line in lines(f"--train_module.attention_backend={kernel}")
        if "refused on this machine" in line
    ]
    assert "train_module.attention_backend: chooses between CUDA's kernels" in line


def test_more_threads_than_can_be_started_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer.num_threads: 100000 threads are more than 4"):
        lines("--trainer.num_threads=100000")


@pytest.mark.parametrize(("ranks", "needed"), [("1", "18.6 GiB; "), ("2", "37.3 GiB; ")])
def test_it_tells_of_a_model_that_this_machine_cannot_hold(
    ranks: str, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "capacity_here", lambda *_: Capacity(1, "one core"))
    own = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": "0"}
    size = "--data_loader.global_batch_size=8192"
    for free, is_told in ((2**33, True), (2**40, False)):
        monkeypatch.setattr(dry_run, "free_memory", lambda free=free: free)
        shown = lines("--model={preset: olmo2_1B}", size, environ=own)
        told = [line for line in shown if "; this machine has 8.0 GiB free" in line]
        assert bool(told) is is_told, told
        assert all(line.startswith(f"here needs at least {needed}") for line in told)


def test_it_refuses_prepared_data_of_other_text_as_a_start_does(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("once upon a time " * 500)
    flags = [
        f"--dataset.source={{type: files, paths: [{text}]}}",
        "--dataset.tokenizer={type: byte}",
    ]
    flags += ["--dataset.dataset_name=mine", "--dataset.sequence_length=64"]
    flags += ["--data_loader.global_batch_size=64", "--train_module.rank_microbatch_size=64"]
    config = load_experiment("quickstart", flags).config
    corpus = prepare_corpus(config.data, progress=False)
    assert any("data/mine/bpe4096: " in line for line in lines(*flags))
    assert len(dry_run._data(config, corpus)) == 1
    (one, prepared) = corpus.parts[""]
    far = one.replace(source=HubSourceConfig(name="a/b"))
    said = dry_run._data(config, corpus._replace(parts={"": (far, prepared)}))
    assert said[1].startswith("not checked: whether the text on the hub")
    text.write_text("another tale " * 500)
    with pytest.raises(DataError, match=r"mine/bpe4096: to build its token files anew, remove"):
        lines(*flags)
