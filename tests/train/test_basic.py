"""`BasicTrainModule` and the example that is no language model."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers import WorkerPool
from toolkit import BasicTrainModule
from toolkit.distributed.config import DataParallelConfig
from toolkit.errors import ConfigError, ToolkitError
from toolkit.experiment.checks import check_experiment
from toolkit.experiment.load import load_experiment
from toolkit.models.lora_config import LoRAConfig
from toolkit.optim.config import SGDConfig
from toolkit.optim.schedules import ConstantConfig
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Progress

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = str(EXAMPLES / "classify_images.json")


def example(folder: str, *flags: str) -> tuple[int, str]:
    from toolkit.commands.train import train

    os.chdir(EXAMPLES)  # where a user's modules are found
    config = load_experiment(
        CONFIG,
        [
            f"--run.save_folder={folder}",
            f"--run.root={folder}s",
            "--train_module.precision=fp32",
            "--train_module.rank_microbatch_size=1040",
            "--trainer.max_duration.value=40",
            "--trainer.callbacks.lm_evaluator.interval=20",
            "--trainer.callbacks.console_logger.enabled=false",
            "--trainer.callbacks.system_monitor.enabled=false",
            *flags,
        ],
    ).config
    try:
        return train(config), ""
    except ToolkitError as error:
        return error.exit_code, str(error)


def losses(folder: Path, stream: str = "train") -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / f"metrics/{stream}.jsonl").open()]


def test_the_example_learns_resumes_bit_equal_and_agrees_over_ranks(
    workers: WorkerPool, tmp_path: Path
) -> None:
    for ranks, name, flags in (
        (1, "whole", ()),
        (1, "parts", ("--trainer.hard_stop.value=17",)),
        (1, "parts", ("--trainer.hard_stop=null",)),
        (2, "two", ()),
    ):
        assert workers.run(ranks, example, str(tmp_path / name), *flags) == [(0, "")] * ranks
    whole, parts, two = (losses(tmp_path / name) for name in ("whole", "parts", "two"))
    assert len(whole) == 40
    assert whole == parts
    assert two == pytest.approx(whole, rel=1e-4)
    assert losses(tmp_path / "whole", "eval")[-1] < 0.8 < 1.3 < whole[0]
    assert losses(tmp_path / "two", "eval") == pytest.approx(
        losses(tmp_path / "whole", "eval"), rel=1e-4
    )
    assert not (tmp_path / "whole/checkpoints/step40/hf").exists()


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([0.5]))
        self.offset = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.slope + self.offset


class Regression(BasicTrainModule):
    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (outputs[:, 0] - batch["input_ids"][:, 1]).square().sum()


def settings(**changes: Any) -> TransformerTrainModuleConfig:
    chosen: dict[str, Any] = {
        "optim": SGDConfig(lr=0.01),
        "scheduler": ConstantConfig(),
        "max_grad_norm": None,
        "precision": "fp32",
        "rank_microbatch_size": 4,
    }
    return TransformerTrainModuleConfig(**(chosen | changes))


def test_a_step_is_that_of_the_mean_over_the_batch_and_nan_is_skipped() -> None:
    module = Regression(settings(freeze=("offset",)), Line())
    rows = torch.tensor([[1, 2], [2, 4], [3, 6]])  # microbatches of two rows and of one
    loss = module.train_batch({"input_ids": rows})["loss"].value
    assert float(loss) == pytest.approx((1.5**2 + 3**2 + 4.5**2) / 3)
    metrics = module.optim_step(Progress(0, 0, 10, 60, 6))
    gradient = -2 * (1.5 * 1 + 3 * 2 + 4.5 * 3) / 3
    assert float(metrics["grad_norm"].value) == pytest.approx(-gradient)
    line: Any = module.model
    assert line.slope.item() == pytest.approx(0.5 - 0.01 * gradient)
    assert line.offset.item() == 0.0
    before = line.slope.item()
    line.offset.data.fill_(torch.nan)
    module.train_batch({"input_ids": rows})
    assert float(module.optim_step(Progress(1, 6, 10, 60, 6))["skipped"].value) == 1.0
    assert line.slope.item() == before


def test_rows_that_fill_up_an_evaluation_do_not_count() -> None:
    module = Regression(settings(), Line())
    mask = torch.tensor([[True, True], [False, False]])
    sums = module.eval_batch({"input_ids": torch.tensor([[2, 4], [2, 4]]), "label_mask": mask})
    assert (float(sums.loss), int(sums.num_targets)) == (9.0, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_module.dp_config={name: fsdp}"], "train_module.dp_config: a model of your own"),
        (["--train_module.z_loss_multiplier=0.1"], "train_module.z_loss_multiplier: is for lang"),
        (["--train_module.float8_config={}"], "train_module.float8_config: is for language models"),
        (["--train_module.activation_offload=true"], "train_module.activation_offload: is for lan"),
        (
            ["--train_module.schedules={weigth_decay: {type: linear}}"],
            "train_module.schedules.weigth_decay: no setting that a schedule can change; did you",
        ),
        (["--train_module.target=null"], "train_module.type: model.type is a model of your own"),
        (["--model.options={height: 3}"], "model.options: classify_images:Net: "),
        (["--model.type=classify_images:Images"], "model.type: classify_images:Images: derive it"),
        (["--train_module.type=classify_images:Net"], "train_module.target: classify_images:Net: "),
    ],
)
def test_what_such_a_model_cannot_do_is_one_line(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    from toolkit.distributed.layout import layout_of

    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])

    def check() -> None:
        config = load_experiment(CONFIG, flags).config
        check_experiment(config, 1, layout=layout_of(config.train_module, {}))

    with pytest.raises(ConfigError) as error:
        check()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_options_of_language_models_are_refused_in_python_too() -> None:
    with pytest.raises(ConfigError, match=r"train_module\.lora: is for language models"):
        Regression(settings(lora=LoRAConfig()), Line())
    with pytest.raises(ConfigError, match=r"schedules\.momentun: no setting that a schedule can"):
        Regression(settings(schedules={"momentun": ConstantConfig()}), Line())
    with pytest.raises(ConfigError, match=r"optim\.layer_lr_decay: no parameter is of a block"):
        Regression(settings(optim=SGDConfig(layer_lr_decay=0.9)), Line())
    with pytest.raises(ConfigError, match="nothing is left to train"):
        Regression(settings(freeze=("*",)), Line())
    single = DataParallelConfig(name="single")
    with pytest.raises(NotImplementedError, match="say what the loss is"):
        BasicTrainModule(settings(dp_config=single), Line()).train_batch(
            {"input_ids": torch.ones(2, 2)}
        )
