"""`toolkit plan`: its arithmetic by itself, the search, and what the command says."""

import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from toolkit.cli import main as cli
from toolkit.commands.plan import plan_experiment
from toolkit.commands.plan.devices import DEVICES, find_device
from toolkit.commands.plan.job import Stage, in_flight
from toolkit.commands.plan.memory import fullest, least_memory, memory_of
from toolkit.commands.plan.plans import Plan, Target, changed, job_of, plan_of
from toolkit.commands.plan.report import flags
from toolkit.commands.plan.search import Limits, layouts, search
from toolkit.distributed.config import ActivationCheckpointingConfig, PipelineParallelConfig
from toolkit.distributed.layout import layout_of
from toolkit.distributed.sizes import Besides, check_sizes
from toolkit.errors import ConfigError
from toolkit.experiment.load import load_experiment

FSDP = "--train_module.dp_config.name=fsdp"
ANY = Limits(Besides(), batch_rows=64)


def planned(recipe: str, world_size: int, *overrides: str, device: str = "h100") -> Plan:
    config = load_experiment(recipe, overrides).config
    layout = layout_of(config.train_module, {"WORLD_SIZE": f"{world_size}"})
    return plan_of(job_of(config, layout, Target(find_device(device, 8), 8)))


def test_it_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from toolkit.cli.main import run\n"
        "assert run(['plan', 'llama3_8B', '--world-size', '8', '--search']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "toolkit train llama3_8B --processes 8" in result.stdout


def test_flops_of_a_step_are_those_of_its_tokens() -> None:
    from toolkit.commands.plan.step_time import model_flops

    plan = planned("llama3_8B", 8, FSDP)
    config = load_experiment("llama3_8B").config
    tokens = config.data_loader.global_batch_size
    assert plan.job.batch_tokens == tokens
    assert model_flops(plan.job) == config.model.flops_per_token(8192) * tokens


def test_more_shards_hold_less_and_full_checkpointing_keeps_less() -> None:
    few, many = planned("llama3_8B", 8, FSDP), planned("llama3_8B", 64, FSDP)
    assert many.memory.weights == pytest.approx(few.memory.weights / 8)
    assert many.memory.optimizer == pytest.approx(few.memory.optimizer / 8, rel=1e-5)
    kept = planned("llama3_8B", 64, FSDP, "--train_module.ac_config=null")
    assert kept.memory.activations > 5 * many.memory.activations
    assert kept.time.total < many.time.total
    assert many.time.recomputing > 0 == kept.time.recomputing


def test_each_axis_cuts_what_it_is_for() -> None:
    one = planned("llama3_8B", 8, FSDP, "--train_module.ac_config=null")
    rows = "--train_module.rank_microbatch_size=8192"
    for axis in ("tp", "cp", "pp"):
        flag = f"--train_module.{axis}_config.degree=2"
        other = planned("llama3_8B", 8, FSDP, flag, rows, "--train_module.ac_config=null")
        assert other.job.layout.world_size == 8
        if axis == "pp":
            # Half of the model over half of the ranks.
            assert other.memory.weights == pytest.approx(one.memory.weights, rel=0.1)
            assert other.time.bubble > 0
        elif axis == "cp":
            assert other.memory.feed_forward == one.memory.feed_forward / 2
        else:  # what it reads is gathered
            gathered = 32 * 8192 * 4096 * 2
            assert other.memory.feed_forward == (one.memory.feed_forward + gathered) / 2
        assert axis in {traffic.axis for traffic in other.traffic}


def test_a_schedule_with_a_smaller_bubble_waits_less() -> None:
    bubbles = []
    plain = ("--train_module.compile_model=false", "--train_module.ac_config=null")
    for schedule in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble"):
        flag = f"--train_module.pp_config={{degree: 4, schedule: {schedule}}}"
        bubbles.append(planned("llama3_8B", 8, flag, *plain).time.bubble)
    assert bubbles[0] > bubbles[1] > bubbles[2] > 0
    assert bubbles[1] == pytest.approx(bubbles[0] / 2)
    zero_bubble = "--train_module.pp_config={degree: 4, schedule: ZBVZeroBubble}"
    recomputing = planned("llama3_8B", 8, zero_bubble, plain[0]).time
    assert recomputing.recomputing > 0
    assert recomputing.bubble >= bubbles[0]


@pytest.mark.parametrize(
    ("degree", "place", "passes", "counted"),
    [
        (2, 0, 4, 2.17), (2, 1, 2, 2.35), (2, 1, 4, 2.48), (2, 1, 6, 2.48), (4, 0, 4, 2.96),
        (4, 0, 8, 4.17), (4, 1, 8, 4.35), (4, 2, 8, 4.73), (4, 3, 8, 5.92),
    ],
)  # fmt: skip
def test_a_zero_bubble_pipeline_holds_what_was_counted(
    degree: int, place: int, passes: int, counted: float
) -> None:
    """Counted in torch's schedule with blocks of `olmo2_7B`, in microbatches of a whole stage."""
    config = PipelineParallelConfig(degree=degree, schedule="ZBVZeroBubble")
    stage = Stage(place, (0, 1), has_embeddings=False, has_head=False, chunks=2)
    assert in_flight(config, stage, passes) == pytest.approx(counted, rel=0.1)


def test_every_device_has_its_figures() -> None:
    for name, device in DEVICES.items():
        assert find_device(name.upper(), 8) is device
        assert device.flops("bf16") > 1e14
        assert 20e9 < device.memory < 250e9
        assert device.inside.bandwidth >= device.between.bandwidth


def test_a_search_finds_legal_layouts_the_fastest_first() -> None:
    job = planned("olmoe_1B_7B", 1, "--train_module.rank_microbatch_size=4096").job
    limits = ANY._replace(batch_rows=256)
    found = search(job, 16, limits)
    times = [plan.time.total for plan in found.plans]
    assert times == sorted(times)
    assert len(found.plans) <= found.num_layouts
    shapes = set()
    for plan in found.plans:
        layout = plan.job.layout
        check_sizes(layout, job.model)
        assert layout.world_size == 16
        assert plan.fits
        assert plan.job.batch_tokens == job.batch_tokens
        shapes.add((layout.tp, layout.cp, layout.pp, layout.ep))
    assert {(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 8)} <= shapes


def test_flags_of_a_plan_ask_for_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_experiment("olmoe_1B_7B")
    job = planned("olmoe_1B_7B", 1, "--train_module.rank_microbatch_size=4096").job
    for plan in search(job, 8, ANY._replace(batch_rows=256)).plans[::5]:
        monkeypatch.setenv("WORLD_SIZE", "8")
        again = load_experiment("olmoe_1B_7B", flags(loaded, plan)).config
        layout = layout_of(again.train_module, {"WORLD_SIZE": "8"})
        wanted = plan.job.layout
        assert layout.shape == wanted.shape
        assert layout.parallel_configs == wanted.parallel_configs
        assert again.train_module.ac_config == plan.job.ac_config
        assert again.train_module.rank_microbatch_size == plan.job.rows * 4096
    assert loaded.config.train_module.ac_config is None


def test_what_the_engines_refuse_is_not_proposed() -> None:
    job = planned("llama3_8B", 1, "--train_module.rank_microbatch_size=8192").job
    axes = {
        axis
        for layout in layouts(job, 16, ANY._replace(besides=Besides(has_adapter=True)))
        for axis in ("tp", "cp", "pp", "ep")
        if getattr(layout, axis) > 1
    }
    assert axes == {"tp", "cp"}


def test_a_microbatch_is_as_large_as_fits() -> None:
    from toolkit.commands.plan.plans import largest_rows

    plan = planned(
        "llama3_8B", 8, FSDP, "--train_module.ac_config=null",
        "--train_module.rank_microbatch_size=8192", device="h200",
    )  # fmt: skip
    rows = largest_rows(plan.job)
    assert rows is not None
    assert 1 <= rows < 8
    assert fullest(changed(plan.job, rows=rows))[1].total <= plan.job.device.memory
    assert fullest(changed(plan.job, rows=2 * rows))[1].total > plan.job.device.memory


def test_selected_blocks_keep_half_of_what_all_blocks_do() -> None:
    none = planned("llama3_8B", 8, FSDP, "--train_module.ac_config=null").job
    half = msgspec.structs.replace(
        none, ac_config=ActivationCheckpointingConfig(mode="selected_blocks")
    )
    full, kept = (memory_of(job, job.stages[0]).feed_forward for job in (none, half))
    assert kept == full / 2


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert cli.run(["plan", *words]) == code
    output = capsys.readouterr()
    return output.out if code == 0 else output.err.strip()


def test_the_command_shows_memory_exchanges_time_and_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(
        capsys, "llama3_8B", "--world-size", "64", "--train_module.tp_config.degree=4",
        "--price-per-gpu-hour", "2",
    )  # fmt: skip
    assert "plan of llama3_8B on 64 x h100" in text
    assert "dp 16 tp 4: fsdp" in text
    assert "optimizer state" in text
    assert "of 79.1: fits" in text
    assert "all-gather" in text
    assert "residual stream" in text
    assert "3,072 a day" in text


def test_json_holds_what_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    found: Any = json.loads(said(capsys, "llama3_8B", "--world-size", "16", "--search", "--json"))
    assert found["fits"] is True
    assert found["seconds"]["total"] == found["layouts"][0]["seconds"]
    assert found["flags"] == found["layouts"][0]["flags"]
    assert found["memory"]["total"] < found["memory"]["device"]


def test_without_a_number_of_ranks_it_is_the_fewest_that_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "on 2 x h100" in said(capsys, "llama3_8B", FSDP).splitlines()[0]
    assert "on 8 x a100-40" in said(capsys, "llama3_8B", FSDP, "--device=a100-40").splitlines()[0]


def test_a_schedule_of_batch_sizes_is_planned_at_its_largest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flag = "--data_loader.batch_size_schedule=[{tokens: 5000}]"
    text = said(capsys, "smoke", "--device=cpu", flag)
    assert "2,048 tokens a step = 1 share of" in text
    assert "20 steps, 35,840 tokens" in text


def test_length_in_epochs_waits_for_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(
        capsys, "quickstart", "--device=cpu", "--trainer.max_duration={value: 1, unit: epochs}"
    )
    assert "its length is in epochs" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h101"], "--device h101: did you mean h100? known devices: h100, h200"),
        (["--world-size", "0"], "--world-size 0: give a number from 1"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0: give a number from 1"),
        (
            ["--price-per-gpu-hour", "-1"],
            "--price-per-gpu-hour -1.0: give a number, not a negative one",
        ),
        (["--price-per-gpu-hour", "nan"], "--price-per-gpu-hour nan: give a number"),
        (["--world-size", "6"], "nearest that work: 491520 or 540672"),
        (
            ["--world-size", "1", "--search", "--device", "rtx4090"],
            "no layout of 1 rank fits rtx4090; the nearest number that works is 8",
        ),
        (
            ["--world-size", "67", "--search"],
            "--world-size 67: no layout divides 67 ranks",
        ),
        (
            ["--world-size", "8", "--train_module.tp_config.degree=16"],
            "tp 16 does not divide the 8 processes of this run; start 16 processes",
        ),
        # No number of processes would do.
        (
            ["--world-size", "8", "--train_module.tp_config.degree=3"],
            "tp 3 does not divide model.num_heads 32; use 2 or 4",
        ),
        (
            ["--world-size", "8", "--train_module.pp_config.degree=64"],
            "has 64 stages, but the model has 32 layers; use 8",
        ),
        (
            ["--train_module.pp_config.degree=2", "--train_module.optim.lrr=1"],
            "optim.lrr: no such field",
        ),
        (
            ["--world-size=8", "--train_module.pp_config.degree=2", "--train_module.optim.lrr=1"],
            "optim.lrr: no such field",
        ),
        (
            ["--world-size=64", "--train_module.pp_config.degree=64"],
            "has 64 stages, but the model has 32 layers; use 32",
        ),
        (["--train_module.ep_config.degree=2"], "the model has no experts"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    line = said(capsys, "llama3_8B", *words, code=2)
    assert message in line
    assert "\n" not in line


def test_stages_left_out_need_no_more_than_those_that_are_looked_at() -> None:
    job = planned("olmoe_1B_7B", 1, "--train_module.rank_microbatch_size=4096").job
    modes = None, ActivationCheckpointingConfig(mode="selected_blocks")
    for layout in layouts(job, 16, ANY):
        for mode in modes if layout.pp > 1 else ():
            for rows in (1, 2, 4):
                own = changed(job, layout=layout, rows=rows, ac_config=mode, keeps_ac=False)
                needed = fullest(own)[1].total
                assert needed == max(memory_of(own, stage).total for stage in own.stages)
                assert needed >= least_memory(own)


def test_nothing_fits_at_all() -> None:
    loaded = load_experiment("llama3_8B")
    with pytest.raises(ConfigError, match="no layout of 1 rank fits rtx4090"):
        plan_experiment(loaded, {}, world_size=1, device="rtx4090", searches=True)
