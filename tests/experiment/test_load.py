"""Experiments are loaded from recipes and files, with the origin of each value."""

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.commands.schema import describe_path
from toolkit.errors import ConfigError, RunError, SeveralErrors
from toolkit.experiment.load import load_experiment, load_run_config
from toolkit.experiment.other_trainers import THEIR_NAMES
from toolkit.experiment.recorded import kept_origins
from toolkit.models.presets import PRESETS
from toolkit.runs.files import RUN_FILES


def write(path: Path, data: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return str(path)


def message(*args: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_experiment(*args)
    return str(error.value)


def test_a_preset_lies_under_the_other_model_values(tmp_path: Path) -> None:
    path = write(tmp_path / "my.json", {"model": {"preset": "llama_271M", "num_layers": 3}})
    loaded = load_experiment(path)
    assert loaded.config.model.num_layers == 3
    assert loaded.config.model.d_model == 1024
    assert loaded.origins["model.num_layers"] == path
    assert loaded.origins["model.d_model"] == "preset llama_271M"
    assert loaded.origins["model.loss_chunk_size"] == "default"


def test_a_preset_flag_replaces_the_model_but_not_other_model_flags() -> None:
    flags = ["--model.num_layers=3", "--model.preset=llama_271M"]
    loaded = load_experiment("quickstart", flags)
    assert loaded.config.model.to_dict() == {
        **PRESETS["llama_271M"],
        "num_layers": 3,
        "loss_chunk_size": None,
        "num_scores": None,
    }
    assert loaded.origins["model.num_layers"] == "--model.num_layers=3"
    assert loaded.origins["model.d_model"] == "--model.preset=llama_271M"


def test_a_preset_may_stand_in_a_whole_model_flag() -> None:
    loaded = load_experiment("quickstart", ["--model={preset: llama_271M, num_layers: 3}"])
    assert (loaded.config.model.num_layers, loaded.config.model.d_model) == (3, 1024)


def test_short_options_set_their_config_values() -> None:
    shorthands = {
        "name": "run1",
        "sequence_length": 512,
        "data_root": "D",
        "save_folder": "F",
        "work_dir": None,
    }
    loaded = load_experiment("quickstart", [], shorthands)
    assert loaded.config.run.name == "run1"
    assert loaded.config.dataset.sequence_length == 512
    assert loaded.config.dataset.root == "D"
    assert loaded.config.run.save_folder == "F"
    assert loaded.config.run.work_dir is None
    assert loaded.origins["dataset.sequence_length"] == "--sequence-length=512"
    assert loaded.origins["run.work_dir"] == "default"
    assert loaded.origins["seed"] == "recipe quickstart"


def test_a_value_is_not_given_twice_under_two_names() -> None:
    said = message("smoke", ["--run.name=b"], {"name": "a"})
    assert said == "--name=a and --run.name=b: two names of one value; give one"
    assert load_experiment("smoke", ["--run.name=a"], {"name": "a"}).config.run.name == "a"


def test_a_file_hides_a_recipe_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    assert load_experiment("smoke").config.run.experiment == "smoke"
    write(tmp_path / "quickstart", {"model": {"preset": "bench_7M"}, "seed": 5})
    assert load_experiment("quickstart").config.seed == 5


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["quickstrt"], "quickstrt: no such recipe or file; did you mean 'quickstart'?"),
        (["quickstart.json"], "quickstart.json: no such file; did you mean 'quickstart'?"),
        (["zzz"], "zzz: no such recipe or file; recipes: continue_pretraining, distill, dpo, "),
        (["quickstart", ["--model.preset=llama_271m"]], "model.preset: 'llama_271m': no such"),
        (["quickstart", ["--seed=-1"]], "seed: must lie between 0 and 2^64 - 1, not -1"),
        (["quickstart", ["--sed=1"]], "no such option: --sed; did you mean --seed?"),
        (["quickstart", ["--train_module.dp_config={name: foo}"]],
         "train_module.dp_config.name: 'foo' is not one of ddp, fsdp, hsdp, single, zero1, "),
    ],
)  # fmt: skip
def test_mistakes_are_named(args: list[Any], expected: str) -> None:
    assert message(*args).startswith(expected)


def test_variables_stand_in_fields_of_every_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"LR": "1e-3", "N": "3", "ON": "true", "KIND": "bf16", "BETAS": "[0.8, 0.9]", "D": "/d"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "my.yaml"
    file.write_text(
        "dataset: {root: '${D}'}\ntrain_module: {optim: {lr: '${LR}'}}\nseed: '1${N}'\n"
    )
    model = ["--model.preset=quickstart", "--train_module.precision=${KIND}"]
    more = ["--train_module.compile_model=${ON}", "--train_module.optim.betas=${BETAS}"]
    loaded = load_experiment(str(file), [*model, *more])
    module = loaded.stored.train_module
    assert (module.optim.lr, module.precision, module.compile_model) == (1e-3, "bf16", True)
    assert module.optim.betas == (0.8, 0.9)
    assert (loaded.stored.seed, loaded.stored.dataset.root) == (13, "${D}")
    assert (loaded.config.dataset.root, loaded.origins["seed"]) == ("/d", str(file))
    monkeypatch.setenv("LR", "hidden")
    assert "train_module.optim.lr: expected a number, not what ${LR} stands for (in " in message(
        str(file), model
    )
    assert "${LX}: the environment variable LX is not set" in message(
        "quickstart", ["--train_module.optim.lr=${LX}"]
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train_module.optim.type=adamw_torch"], "; did you mean 'adamw'?"),
        (["--train_module.scheduler.type=warmup_stable_decay"], "; did you mean 'wsd'?"),
        (
            ["--learning-rate=1e-4"],
            "no such option: --learning-rate; did you mean --train_module.",
        ),
        (["--micro_batch_size=2"], "did you mean --train_module.rank_microbatch_size?"),
        (["--training.seq_len=8"], "no such field; did you mean 'dataset.sequence_length'?"),
        (["--trainer.num_train_epochs=8"], "no such field; did you mean 'trainer.max_duration'?"),
    ],
)
def test_names_of_other_trainers_lead_to_ours(words: list[str], expected: str) -> None:
    assert expected in message("quickstart", words)


@pytest.mark.parametrize(
    ("data", "page"),
    [
        (
            {"base_model": "m", "datasets": [], "lora_r": 8},
            "axolotl; docs/migrate/axolotl.md",
        ),
        ({"training": {"steps": 1}, "optimizer": {"lr": 1}}, "docs/migrate/torchtitan.md says"),
        ({"output_dir": "o", "num_train_epochs": 1}, "docs/migrate/hf_trainer.md says"),
        ({"architectures": ["X"], "model_type": "x"}, "`toolkit convert-hf FOLDER OUT`"),
    ],
)
def test_a_config_of_another_trainer_is_one_error(
    tmp_path: Path, data: dict[str, Any], page: str
) -> None:
    text = message(write(tmp_path / "theirs.json", data))
    assert page in text
    assert "\n" not in text


def test_what_is_suggested_for_their_names_is_there_and_in_the_guides() -> None:
    guides = "".join(path.read_text() for path in Path("docs/migrate").glob("*.md"))
    for theirs, ours in THEIR_NAMES.items():
        assert describe_path(ours)
        assert f"`{theirs}`" in guides or f"`{theirs.rpartition('.')[2]}`" in guides, theirs


def test_a_run_is_loaded_from_its_folder_with_overrides(tmp_path: Path) -> None:
    config = load_experiment("smoke").config
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "config.json").write_bytes(config.to_json())
    loaded = load_run_config(tmp_path, ["--train_module.optim.lr=0.5"])
    assert loaded.config.train_module.optim.lr == 0.5
    assert loaded.config.model == config.model
    assert loaded.origins["model.d_model"] == "run"
    assert loaded.origins["train_module.optim.lr"] == "--train_module.optim.lr=0.5"


def test_a_resume_keeps_where_values_came_from(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    before = {"train_module.optim": "my.yaml", "seed": "--seed=3", "trainer.x": "recipe a"}
    (tmp_path / RUN_FILES.origins).write_text(json.dumps(before))
    now = {"train_module.optim.lr": "run", "train_module.optim.betas": "--b=1", "seed": "run"}
    now |= {"model.d_model": "run", "trainer.start_anew": "--trainer.start_anew=seed"}
    kept = {"train_module.optim.lr": "my.yaml", "train_module.optim.betas": "--b=1"}
    assert kept_origins(now, tmp_path) == kept | {"seed": "--seed=3"}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        load_run_config(tmp_path)


def test_an_error_across_sections_stands_beside_those_of_single_values() -> None:
    flags = ["--trainer.hard_stop={value: 0}", "--sed=1", "--dataset.sequence_length=4096"]
    with pytest.raises(SeveralErrors) as error:
        load_experiment("smoke", flags)
    assert [str(one).partition(";")[0] for one in error.value.errors] == [
        "no such option: --sed",
        "trainer.hard_stop: value must be greater than 0, not 0",
        "dataset.sequence_length 4096 is longer than model.max_sequence_length 128",
        "data_loader.global_batch_size 1024 is not divisible by dataset.sequence_length 4096 x 1 "
        "rank = 4096",
        "train_module.rank_microbatch_size 256 is not divisible by dataset.sequence_length 4096",
    ]


def test_nothing_is_said_of_the_default_that_stands_for_a_wrong_value() -> None:
    flags = ["--dataset.sequence_length=x", "--data_loader.global_batch_size=1000"]
    assert message("smoke", flags) == "dataset.sequence_length: expected a whole number, not 'x'"


def test_what_is_said_of_other_values_stays_whatever_words_it_has() -> None:
    flags = ["--trainer.callbacks.checkpointer.interval=x", "--data_loader.global_batch_size=1000"]
    with pytest.raises(SeveralErrors) as error:
        load_experiment("smoke", flags)
    assert [str(one).partition(":")[0].partition(" ")[0] for one in error.value.errors] == [
        "trainer.callbacks.checkpointer.interval",
        "data_loader.global_batch_size",
    ]


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("meta-llama/Llama-3.2-1B",
         "--base meta-llama/Llama-3.2-1B: no such folder; if it is a model of the hub, fetch and "
         "convert it first: `toolkit convert-hf meta-llama/Llama-3.2-1B "
         "models/Llama-3.2-1B`, then give --base models/Llama-3.2-1B"),
        ("theirs", "--base theirs: a model of transformers, not converted yet; convert it first: "
         "`toolkit convert-hf theirs models/theirs`, then give --base models/theirs"),
        ("theirs/step3", "--base theirs/step3: a checkpoint; give its run folder, or train with "
         "--trainer.load_path=theirs/step3"),
        ("nope", "--base nope: no such folder; `toolkit convert-hf SRC OUT` makes one"),
        ("s3://b/x", "--base: 's3://b/x' is a URL, and this must be on this machine; "),
    ],
)  # fmt: skip
def test_a_base_that_is_none_is_answered_with_what_makes_one(
    base: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "theirs" / "config.json", {"model_type": "llama"})
    write(tmp_path / "theirs" / "step3" / ".metadata.json", {})
    with pytest.raises(ConfigError) as error:
        load_experiment("finetune", base=base)
    assert str(error.value).startswith(expected)
    assert not isinstance(error.value, SeveralErrors)


def test_a_config_without_a_model_says_how_to_give_one(tmp_path: Path) -> None:
    path = write(tmp_path / "my.json", {"seed": 1})
    said = message(path)
    assert said.startswith(f'{path}: model: required, and not given; write "model": {{"preset": ')
    assert load_experiment(path, ["--model.preset=quickstart"]).config.seed == 1
    theirs = write(tmp_path / "config.json", {"model_type": "llama", "hidden_size": 64})
    with pytest.raises(SeveralErrors) as error:
        load_experiment(theirs)
    assert str(error.value).startswith(
        f"{theirs}: a model's config of transformers, not of an experiment; convert the model with "
        f"`toolkit convert-hf {tmp_path} OUT`, then `toolkit train finetune --base OUT`"
    )


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--model=llama_271M", "model: expected a mapping, not 'llama_271M'; for a preset give "
         "--model.preset=llama_271M"),
        ("--model=x", "model: expected a mapping, not 'x'; for a preset give --model.preset=NAME"),
        ("--lr=3", "no such option: --lr; did you mean --train_module.optim.lr? (config values go "
         "by their full path, as in --trainer.hard_stop.value=20)"),
        ("--optim.weight-decay=3", "optim: no such field; did you mean "
         "--train_module.optim.weight_decay?"),
        ("--trainer.lr=3", "trainer.lr: no such field; did you mean --train_module.optim.lr?"),
        ("--checkpointer.interval=3",
         "checkpointer: no such field; did you mean --trainer.callbacks.checkpointer.interval?"),
        ("--x.interval_seconds=3", "x: no such field; did you mean "
         "--trainer.callbacks.system_monitor.interval_seconds?"),
    ],
)  # fmt: skip
def test_what_was_meant_is_named(flag: str, expected: str) -> None:
    assert message("smoke", [flag]) == expected


def test_the_name_of_a_type_alone_is_answered_with_its_mapping() -> None:
    said = message("smoke", ["--dataset.tokenizer=byte"])
    assert said.endswith(", not 'byte'; write {type: byte}")


def test_a_preset_by_name_alone_is_answered_in_a_file_too(tmp_path: Path) -> None:
    assert message(write(tmp_path / "my.json", {"model": "llama_271M"})) == (
        'model: expected a mapping, not \'llama_271M\'; for a preset give {"preset": "llama_271M"}'
    )
