"""Names of OLMo-core give the same config as ours, and are kept under ours."""

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import ConfigError
from toolkit.experiment.load import load_experiment

AC, SCHEDULER = "train_module.ac_config", "train_module.scheduler"
MOE = "model.moe"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ([f"--{AC}.activation_memory_budget=0.3", "--train_module.compile_model"],
         [f"--{AC}={{mode: budget, budget: 0.3}}", "--train_module.compile_model"]),
        ([f"--{AC}={{mode: budget, activation_memory_budget: 0.3}}",
          "--train_module.compile_model"],
         [f"--{AC}={{mode: budget, budget: 0.3}}", "--train_module.compile_model"]),
        ([f"--{SCHEDULER}={{type: cos_with_warmup, warmup_steps: 7}}"],
         [f"--{SCHEDULER}={{type: cosine, warmup: 7}}"]),
        ([f"--{SCHEDULER}.type=linear_with_warmup", f"--{SCHEDULER}.warmup_steps=7"],
         [f"--{SCHEDULER}.type=linear", f"--{SCHEDULER}.warmup=7"]),
        ([f"--{SCHEDULER}={{type: power_lr, decay_steps: 3}}"],
         [f"--{SCHEDULER}={{type: power, decay: 3}}"]),
        (["--train_module.max_sequence_length=32"], ["--dataset.sequence_length=32"]),
        (["--trainer.save_folder=x", "--trainer.callbacks.checkpointer.save_interval=3"],
         ["--run.save_folder=x", "--trainer.callbacks.checkpointer.interval=3"]),
        (["--init_seed=7"], ["--seed=7"]),
        (["--model.block.attention.gate.granularity=elementwise"],
         ["--model.attention_gate=elementwise"]),
        (["--model.block.name=peri_norm"], ["--model.norm_placement=sandwich"]),
        (["--model.norm_placement=reordered_norm"], ["--model.norm_placement=reordered"]),
        (["--train_module.attention_backend=torch"], ["--train_module.attention_backend=sdpa"]),
        (["--train_module.attention_backend=flash_3"],
         ["--train_module.attention_backend=flash3"]),
        ([f"--{MOE}={{num_experts: 4, intermediate_size: 8, "
          "router: {top_k: 2, gating_function: sigmoid, bias_gamma: 0.01}}"],
         [f"--{MOE}={{num_experts: 4, intermediate_size: 8, "
          "top_k: 2, score_function: sigmoid, bias_update_rate: 0.01}"]),
        (["--train_module.optim.group_overrides=[{params: [embeddings.weight], opts: {}}]"],
         ["--train_module.optim.group_overrides=[{params: [embeddings.tokens.weight], opts: {}}]"]),
        (["--train_module.freeze=[embeddings.weight, lm_head.w_out.weight]"],
         ["--train_module.freeze=[embeddings.tokens.weight, head.weight]"]),
    ],
)  # fmt: skip
def test_flags(theirs: list[str], ours: list[str], tmp_path: Path) -> None:
    expected = load_experiment("smoke", ours).config
    assert load_experiment("smoke", theirs).config == expected
    assert expected != load_experiment("smoke").config


def test_files(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {
            "preset": "quickstart",
            "block": {"name": "peri_norm", "attention": {"gate": {"granularity": "headwise"}}},
        },
        "train_module": {
            "max_sequence_length": 128,
            "compile_model": True,
            "ac_config": {"activation_memory_budget": 0.25},
            "scheduler": {"type": "cos_with_warmup", "warmup_steps": 9},
            "optim": {"group_overrides": [{"params": ["embeddings.weight"], "opts": {}}]},
        },
        "trainer": {"callbacks": {"checkpointer": {"save_async": False}}},
    }
    path = tmp_path / "my.json"
    path.write_text(json.dumps(sections))
    config = load_experiment(str(path)).config
    assert (config.model.norm_placement, config.model.attention_gate) == ("sandwich", "headwise")
    module = config.train_module
    assert config.dataset.sequence_length == 128
    assert module.ac_config is not None
    assert (module.ac_config.mode, module.ac_config.budget) == ("budget", 0.25)
    assert (module.scheduler.to_dict()["type"], module.scheduler.warmup) == ("cosine", 9)
    assert module.optim.group_overrides[0].params == ["embeddings.tokens.weight"]
    assert not config.trainer.callbacks.checkpointer.asynchronous
    stored = config.to_json().decode()
    for name in ('max_sequence_length": 128', "activation_memory", "warmup_steps", "save_async"):
        assert name not in stored


@pytest.mark.parametrize(
    "flags",
    [
        ["--train_module.max_sequence_length=32", "--dataset.sequence_length=64"],
        [f"--{SCHEDULER}.warmup=3", f"--{SCHEDULER}.warmup_steps=4"],
    ],
)
def test_two_names_of_one_value_are_refused_where_they_differ(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="two names of one value; give one"):
        load_experiment("smoke", flags)


def test_in_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    scheduler = {"type": "cosine", "warmup": 3, "warmup_steps": 4}
    path.write_text(
        json.dumps({"model": {"preset": "quickstart"}, "train_module": {"scheduler": scheduler}})
    )
    with pytest.raises(ConfigError) as error:
        load_experiment(str(path))
    assert str(error.value) == (
        "train_module.scheduler.warmup_steps 4 and train_module.scheduler.warmup 3: two names of "
        "one value; give one"
    )
