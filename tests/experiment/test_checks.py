"""Sections that do not fit each other are refused, naming both keys and what would fit."""

import re

import pytest

from toolkit.distributed.tuning import threads_asked_for
from toolkit.errors import ConfigError
from toolkit.experiment.checks import check_experiment, gradient_accumulation_steps
from toolkit.experiment.load import load_experiment


def message(world_size: int, *overrides: str) -> str:
    config = load_experiment("quickstart", overrides).config
    with pytest.raises(ConfigError) as error:
        check_experiment(config, world_size)
    return str(error.value)


BATCH = "data_loader.global_batch_size"
MICRO = "train_module.rank_microbatch_size"
SEQUENCE = "dataset.sequence_length"
NGPT = ("--model.norm_placement=normalized", "--train_module.optim.group_overrides=[]")


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (1, [f"--{BATCH}=5000"],
         f"{BATCH} 5000 is not divisible by {SEQUENCE} 256 x 1 rank = 256; "
         "nearest that work: 4864 or 5120"),
        (3, [f"--{BATCH}=4096"],
         f"{BATCH} 4096 is not divisible by {SEQUENCE} 256 x 3 ranks = 768; "
         "nearest that work: 3840 or 4608"),
        (2, [f"--{BATCH}=256"],
         f"{BATCH} 256 is not divisible by {SEQUENCE} 256 x 2 ranks = 512; "
         "nearest that work: 512"),
        (1, [f"--{MICRO}=1000"],
         f"{MICRO} 1000 is not divisible by {SEQUENCE} 256; nearest that work: 768 or 1024"),
        (1, ["--data_loader.eval_batch_size=300"],
         f"data_loader.eval_batch_size 300 is not divisible by {SEQUENCE} 256; "
         "nearest that work: 256 or 512"),
        (2, [f"--{BATCH}=12288", f"--{MICRO}=4096"],
         f"{BATCH} 12288 is not divisible by {MICRO} 4096 x 2 ranks = 8192; nearest that work: "
         f"{BATCH} 8192 or 16384, or {MICRO} 3072 or 6144"),
        (1, [f"--{BATCH}=8192", f"--{MICRO}=4096", "--train_module.compile_model",
             "--train_module.compile_mode=reduce-overhead"],
         "train_module.compile_mode: reduce-overhead records CUDA graphs, for one microbatch a "
         f"step; set {MICRO} to null, or use max-autotune-no-cudagraphs"),
        (1, ["--dataset.sequence_length=2048"],
         f"{SEQUENCE} 2048 is longer than model.max_sequence_length 1024; use 1024 or less, "
         "or raise model.max_sequence_length"),
        (1, ["--model.preset=gpt2_124M", "--dataset.sequence_length=2048"],
         f"{SEQUENCE} 2048 is longer than model.n_positions 1024; use 1024 or less, "
         "or raise model.n_positions"),
        (1, ["--dataset.tokenizer.vocab_size=8192"],
         "model.vocab_size 4096 is too small for dataset.tokenizer, which has 8192 ids; "
         "set model.vocab_size to 8192 or more"),
        (1, ["--model.vocab_size=256", "--dataset.tokenizer={type: byte}"],
         "model.vocab_size 256 is too small for dataset.tokenizer, which has 257 ids; "
         "set model.vocab_size to 257 or more"),
        (1, [*NGPT],
         "train_module.optim.weight_decay: 0.1 does not go with model.norm_placement normalized; "
         "set it to 0"),
        (1, [*NGPT, "--model.tie_embeddings=false",
             "--train_module.optim={type: adamw, weight_decay: 0, mup: {base_width: 64}}"],
         "train_module.optim.mup: muP does not go with model.norm_placement normalized; "
         "leave it out"),
        (1, [*NGPT, "--train_module.optim={type: schedule_free_adamw, weight_decay: 0}"],
         "train_module.optim.type: an average of weights does not go with model.norm_placement "
         "normalized; use adamw, muon or another type"),
        (1, [*NGPT, "--train_module.optim.weight_decay=0", "--trainer.callbacks.ema.enabled"],
         "trainer.callbacks.ema: an average of weights does not go with model.norm_placement "
         "normalized; leave it out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(world_size: int, overrides: list[str], expected: str) -> None:
    assert message(world_size, *overrides) == expected


def test_threads_asked_for_are_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("x", "0", "-1", "1.5"):
        monkeypatch.setenv("TOOLKIT_NUM_THREADS", value)
        assert message(1) == (
            f"environment variable TOOLKIT_NUM_THREADS: expected a number of threads, not '{value}'"
        )


def test_threads_asked_for_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    problem = "9 threads are more than 4 for each core of this machine (2); give 8 or fewer"
    assert threads_asked_for({}, 8) == 8
    assert threads_asked_for({"TOOLKIT_NUM_THREADS": "1"}, 9) == 1
    with pytest.raises(ConfigError, match=re.escape(f"trainer.num_threads: {problem}")):
        threads_asked_for({}, 9)
    monkeypatch.setenv("TOOLKIT_NUM_THREADS", "9")
    assert message(1) == f"environment variable TOOLKIT_NUM_THREADS: {problem}"


@pytest.mark.parametrize(
    ("batch", "microbatch", "world_size"),
    [(8192, 4096, 2), (16384, 4096, 2), (12288, 3072, 2), (12288, 6144, 2), (3840, 256, 3)],
)
def test_what_a_message_suggests_works(batch: int, microbatch: int, world_size: int) -> None:
    overrides = [f"--{BATCH}={batch}", f"--{MICRO}={microbatch}"]
    config = load_experiment("quickstart", overrides).config
    check_experiment(config, world_size)
    passes = gradient_accumulation_steps(config, world_size)
    assert passes * microbatch * world_size == batch
