"""Which layout runs: launcher, config, silence, and their disagreements."""

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.distributed.config import (
    ContextParallelConfig,
    DataParallelConfig,
    ExpertParallelConfig,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.distributed.launcher import offloads
from toolkit.distributed.layout import Layout, resolve_layout
from toolkit.distributed.ranks import ENGINE
from toolkit.errors import ConfigError

CPU = {"device": "cpu"}
TWO = {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
FSDP = TWO | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = TWO | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def resolve(
    environ: dict[str, str], name: Any = None, precision: Any = "auto", **dp: Any
) -> Layout:
    config = DataParallelConfig(name=name, **dp) if name else None
    return resolve_layout(precision, config, environ)


@pytest.mark.parametrize(
    ("environ", "config", "expected"),
    [
        ({}, None, "single"),
        (TWO, None, "ddp"),
        (TWO, "fsdp", "fsdp"),
        (FSDP, None, "fsdp"),
        (FSDP, "fsdp", "fsdp"),
        (ZERO3, None, "zero3"),
        ({}, "ddp", "single"),
        ({}, "zero2", "zero2"),
    ],
)
def test_who_speaks_decides(environ: dict[str, str], config: Any, expected: str) -> None:
    assert resolve(environ, config).name == expected


@pytest.mark.parametrize(("environ", "name"), [(FSDP, "zero2"), (ZERO3, "fsdp"), (FSDP, "hsdp")])
def test_two_engines_are_an_error_that_names_both(environ: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=f"two engines asked for: accelerate .* says {name}"):
        resolve(environ, name)


def test_single_with_several_processes_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match="asks for the engine single, which is one process, not 2"
    ):
        resolve(TWO, "single")


def test_fsdp1_and_other_precisions_are_refused() -> None:
    with pytest.raises(ConfigError, match="only FSDP2 is supported; set fsdp_version: 2"):
        resolve(FSDP | {"FSDP_VERSION": "1"})
    with pytest.raises(ConfigError, match="mixed_precision fp8 is not supported"):
        resolve(TWO | {"ACCELERATE_MIXED_PRECISION": "fp8"})
    assert resolve(TWO | {"ACCELERATE_MIXED_PRECISION": "fp16"}).precision == "fp16"
    with pytest.raises(ConfigError, match="fp16 does not go with zero3; use ddp, fsdp or hsdp"):
        resolve(ZERO3 | {"ACCELERATE_MIXED_PRECISION": "fp16"})


def test_what_is_left_of_a_launcher_is_told_from_what_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = r"^ACCELERATE_MIXED_PRECISION=fp8 in the environment, where no `accelerate launch` "
    unset = r".*mixed_precision fp8 is not supported.*or `unset ACCELERATE_MIXED_PRECISION`$"
    with pytest.raises(ConfigError, match=left + unset):
        resolve({"ACCELERATE_MIXED_PRECISION": "fp8"})
    old = r"^ACCELERATE_USE_FSDP=true and FSDP_VERSION=1 in the .* `unset ACCELERATE_USE_FSDP FSDP"
    with pytest.raises(ConfigError, match=old):
        resolve(FSDP | {"FSDP_VERSION": "1"})
    with pytest.raises(ConfigError, match="or `unset ACCELERATE_USE_FSDP`, which no `accelerate"):
        resolve(FSDP, "zero2")
    monkeypatch.setattr("toolkit.distributed.launcher.is_accelerated", lambda: True)
    with pytest.raises(
        ConfigError, match=r"^accelerate launch: mixed_precision fp8 .*bf16 or fp16$"
    ):
        resolve({"ACCELERATE_MIXED_PRECISION": "fp8"})


@pytest.mark.parametrize(
    ("dp", "mesh"),
    [({}, (2, 4)), ({"num_replicas": 4}, (4, 2)), ({"shard_degree": 2}, (4, 2))],
)
def test_hsdp_mesh_fills_in_what_is_not_given(dp: dict, mesh: tuple[int, int]) -> None:
    layout = resolve({"WORLD_SIZE": "8"}, "hsdp", **dp)
    assert (layout.dp_replicate, layout.dp_shard) == mesh


def test_mesh_that_does_not_fit_names_the_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"2 x shard_degree 1 does not fit 3 ranks .*s 1 and .* 3"
    ):
        resolve({"WORLD_SIZE": "3"}, "hsdp")
    with pytest.raises(ConfigError, match=r"num_replicas 4 x .* does not fit 6 .* 3 and .* 2,"):
        resolve({"WORLD_SIZE": "6"}, "hsdp", num_replicas=4)


def test_launcher_hsdp_and_offload_are_read() -> None:
    environ = FSDP | {
        "WORLD_SIZE": "8",
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
    }
    layout = resolve(environ)
    assert (layout.name, layout.dp_replicate, layout.dp_shard) == ("hsdp", 2, 4)
    assert layout.dp_config.cpu_offload
    assert not layout.dp_config.reshard_after_forward


PARALLEL = FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize(
    ("variables", "degrees", "style"),
    [
        ({"TP_SIZE": "2"}, {"tp": 2, "dp_shard": 2}, None),
        ({"CP_SIZE": "2"}, {"cp": 2, "dp_shard": 2}, "allgather"),
        ({"CP_SIZE": "2", "CP_COMM_STRATEGY": "alltoall"}, {"cp": 2, "dp_shard": 2}, "ring"),
        ({"SP_SIZE": "4", "DP_SHARD_SIZE": "1"}, {"cp": 4, "dp_shard": 1}, "ulysses"),
        ({"TP_SIZE": "2", "DP_SHARD_SIZE": "2"}, {"tp": 2, "dp_shard": 2}, None),
    ],
)
def test_launcher_says_tensor_and_context_parallelism(
    variables: dict[str, str], degrees: dict[str, int], style: str | None
) -> None:
    said = {f"PARALLELISM_CONFIG_{name}": value for name, value in variables.items()}
    layout = resolve(PARALLEL | {"WORLD_SIZE": "4"} | said)
    assert {axis: getattr(layout, axis) for axis in degrees} == degrees
    assert layout.world_size == 4
    assert (None if layout.cp_config is None else layout.cp_config.style) == style


def test_launcher_whose_axes_do_not_fit_is_refused() -> None:
    four = PARALLEL | {"WORLD_SIZE": "4", "PARALLELISM_CONFIG_TP_SIZE": "2"}
    flag = r"dp_shard_size is 4, but 2 fits .*to 2 \(--parallelism_config_dp_shard_size 2\)"
    with pytest.raises(ConfigError, match=flag):
        resolve(four | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"})
    both = {"PARALLELISM_CONFIG_CP_SIZE": "2", "PARALLELISM_CONFIG_SP_SIZE": "2"}
    with pytest.raises(ConfigError, match=r"cp_size 2 and parallelism_config_sp_size 2 .*keep one"):
        resolve(PARALLEL | both)
    tp = TensorParallelConfig(degree=4)
    with pytest.raises(ConfigError, match=r"tp_config .*degree': 2.*degree': 4.*keep one"):
        resolve_layout("auto", None, four, tp_config=tp)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TP_SIZE": "x"}, "parallelism_config_tp_size must be a whole number, 1 or more, not 'x'"),
        ({"DP_SHARD_SIZE": "-1"}, "parallelism_config_dp_shard_size must be .*, not '-1'"),
        ({"SP_SIZE": ""}, "parallelism_config_sp_size must be .*, not ''"),
        ({"CP_SIZE": "2", "CP_COMM_STRATEGY": "rign"}, "cp_comm_strategy 'rign' is not known; use"),
        ({"DP_SHARD_SIZE": "2"}, "dp_shard_size is 2, but 1 fits .*or .*distributed_type: FSDP"),
        ({"DP_REPLICATE_SIZE": "4", "CP_SIZE": "2"}, "dp_replicate_size is 4, but 2 fits"),
    ],
)
def test_what_the_launcher_says_and_is_not_done_is_refused(
    variables: dict[str, str], message: str
) -> None:
    environ = {"WORLD_SIZE": "4", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    with pytest.raises(ConfigError, match=message):
        resolve(environ | {f"PARALLELISM_CONFIG_{name}": v for name, v in variables.items()})


def test_axes_of_the_config_take_their_ranks_and_data_parallelism_the_rest() -> None:
    tp, pp = TensorParallelConfig(degree=2), PipelineParallelConfig(degree=2)
    axes = {"tp_config": tp, "pp_config": pp, "cp_config": ContextParallelConfig(degree=1)}
    layout = resolve_layout("auto", None, {"WORLD_SIZE": "8"}, **axes)
    assert (layout.name, layout.description) == ("fsdp", "fsdp, pp 2, tp 2")
    assert (layout.pp, layout.dp_shard, layout.cp, layout.tp, layout.cp_config) == (
        2, 2, 1, 2, None,
    )  # fmt: skip
    assert layout.grad_ranks == 1
    hsdp = DataParallelConfig(name="hsdp")
    layout = resolve_layout("auto", hsdp, {"WORLD_SIZE": "8"}, tp_config=tp)
    assert (layout.dp_replicate, layout.dp_shard) == (2, 2)
    zero = DataParallelConfig(name="zero2")
    context = ContextParallelConfig(degree=2)
    layout = resolve_layout("auto", zero, {"WORLD_SIZE": "4"}, cp_config=context)
    assert (layout.name, layout.dp_shard, layout.cp, layout.grad_ranks) == ("zero2", 2, 2, 4)


@pytest.mark.parametrize("name", ["single", "ddp", "zero1", "zero3"])
@pytest.mark.parametrize("axis", ["tp", "pp", "ep"])
def test_engines_that_do_not_cut_models_are_refused(name: Any, axis: str) -> None:
    kind = {"tp": TensorParallelConfig, "pp": PipelineParallelConfig, "ep": ExpertParallelConfig}
    with pytest.raises(ConfigError, match=f"{name}, which .*train_module.{axis}_config; use fsdp"):
        resolve_layout(
            "auto", DataParallelConfig(name=name), TWO, **{f"{axis}_config": kind[axis](degree=2)}
        )


def test_degrees_that_do_not_fit_the_world_name_what_does() -> None:
    tp, cp = TensorParallelConfig(degree=2), ContextParallelConfig(degree=3)
    with pytest.raises(
        ConfigError, match=r"tp 2 does not divide the 1 process of .*start 2 .*or set .*to null"
    ):
        resolve_layout("auto", None, {}, tp_config=tp)
    with pytest.raises(ConfigError, match=r"tp 2 x cp 3 = 6 ranks does not .* 8 .*start 6 or 12"):
        resolve_layout("auto", None, {"WORLD_SIZE": "8"}, tp_config=tp, cp_config=cp)


def test_an_accelerate_launch_without_an_engine_is_told_which_one_runs() -> None:
    stages = PipelineParallelConfig(degree=2)
    layout = resolve_layout("auto", None, TWO, pp_config=stages)
    assert layout.name == "fsdp"
    assert layout.notices == (
        "accelerate launch names no engine; with train_module.pp_config it is fsdp, not ddp",
    )
    torchrun = {"WORLD_SIZE": "2"}
    assert resolve_layout("auto", None, torchrun, pp_config=stages).notices == ()
    assert resolve_layout("auto", None, FSDP, pp_config=stages).notices == ()
    with pytest.raises(ConfigError, match=r"DeepSpeed.* asks for the engine zero3, which does not"):
        resolve_layout("auto", None, ZERO3, pp_config=stages)


def test_a_deepspeed_config_that_is_not_there_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/mine.json"}
    message = f"there is no ds_configs/mine.json in {tmp_path}; .*--deepspeed_config_file"
    with pytest.raises(ConfigError, match=message):
        resolve(environ)


def test_the_deepspeed_configs_that_come_along_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero3_offload.json"}
    assert offloads(resolve(environ).dp_config)
    own = tmp_path / "ds_configs" / "zero3_offload.json"
    own.parent.mkdir()
    own.write_text('{"zero_optimization": {"stage": 3}}')
    assert not offloads(resolve(environ).dp_config)


def test_engine_is_a_launchers_word() -> None:
    two = {"WORLD_SIZE": "2", ENGINE: "fsdp"}
    layout = resolve(two, "fsdp", cpu_offload=True)
    assert (layout.name, layout.origin, layout.dp_config.cpu_offload) == ("fsdp", "--engine", True)
    with pytest.raises(ConfigError, match=r"--engine says fsdp, train_module\.dp_config says ddp"):
        resolve(two, "ddp")
    with pytest.raises(ConfigError, match=r"launch \(DeepSpeed\) says zero3, --engine says fsdp"):
        resolve(ZERO3 | {ENGINE: "fsdp"})
    assert resolve(ZERO3 | {ENGINE: "zero3"}).zero_stage == 3
    with pytest.raises(ConfigError, match="TOOLKIT_ENGINE='fdsp' in the environment is no engine"):
        resolve({ENGINE: "fdsp"})


def test_settings_of_both_sides_add_up() -> None:
    layout = resolve(FSDP, "fsdp", reduce_dtype="bfloat16", cpu_offload=True)
    assert (layout.dp_config.reduce_dtype, layout.dp_config.cpu_offload) == ("bfloat16", True)
    layout = resolve(FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp")
    assert not layout.dp_config.reshard_after_forward
    layout = resolve(ZERO3, "zero3", deepspeed_config={"wall_clock_breakdown": True})
    assert layout.dp_config.deepspeed_config == {"wall_clock_breakdown": True}


def test_settings_of_both_sides_that_differ_are_an_error() -> None:
    environ = PARALLEL | {
        "WORLD_SIZE": "16",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8",
    }
    with pytest.raises(ConfigError, match=r"num_replicas 2, .*dp_config\.num_replicas says 4"):
        resolve(environ, "hsdp", num_replicas=4)


def test_launcher_options_that_the_config_decides_are_noticed(tmp_path: Path) -> None:
    environ = FSDP | {
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }
    assert [notice.split(":")[1].split()[0] for notice in resolve(environ).notices] == [
        "dynamo_backend",
        "fsdp_activation_checkpointing",
        "gradient_clipping",
        "gradient_accumulation_steps",
    ]
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"gradient_clipping": 0.5, "train_batch_size": "auto"}))
    layout = resolve(ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    (notice,) = layout.notices
    assert notice.endswith(
        "gradient_clipping is not used; train_module.max_grad_norm of the config decides"
    )


def test_launchers_offload_variables_are_read_one_by_one() -> None:
    environ = ZERO3 | {
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    }
    layout = resolve(environ)
    assert layout.dp_config.deepspeed_config == {"zero_optimization": {"offload_optimizer": CPU}}
    assert offloads(layout.dp_config)
    with pytest.raises(ConfigError, match="offload_optimizer to nvme is not supported"):
        resolve(environ | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero1", {"offload_optimizer": CPU}),
        ("zero2", {"offload_optimizer": CPU}),
        ("zero3", {"offload_optimizer": CPU, "offload_param": CPU}),
    ],
)
def test_cpu_offload_of_each_stage(name: str, expected: dict) -> None:
    layout = resolve(TWO, name, cpu_offload=True)
    assert layout.dp_config.deepspeed_config == {"zero_optimization": expected}
    # What a run records asks for the same layout again.
    assert resolve_layout("auto", layout.dp_config, TWO) == layout


def test_deepspeed_json_decides_stage_and_offload(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    file.write_text(json.dumps({"zero_optimization": zero}))
    layout = resolve(ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert (layout.name, layout.dp_config.deepspeed_config) == (
        "zero2",
        {"zero_optimization": zero},
    )
    file.write_text(json.dumps({"bf16": {"enabled": True}}))
    assert resolve(ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}).precision == "bf16"
    file.write_text(json.dumps({"fp16": {"enabled": True}}))
    with pytest.raises(ConfigError, match="fp16 is not supported"):
        resolve(ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    file.write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    with pytest.raises(ConfigError, match=r"remove 'optimizer' there; it is train_module\.optim"):
        resolve(ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


@pytest.mark.parametrize(
    ("asked", "param_dtype", "launched", "expected"),
    [
        ("auto", None, "no", "auto"),
        ("auto", None, "bf16", "bf16"),
        ("fp32", None, "no", "fp32"),
        ("auto", "bfloat16", "no", "bf16"),
        ("bf16", "bfloat16", "no", "bf16"),
    ],
)
def test_precision(asked: str, param_dtype: Any, launched: str, expected: str) -> None:
    environ = {"ACCELERATE_MIXED_PRECISION": launched, "WORLD_SIZE": "2"}
    assert resolve(environ, "fsdp", asked, param_dtype=param_dtype).precision == expected


def test_explicit_precision_over_the_launchers_is_noticed() -> None:
    layout = resolve({"ACCELERATE_MIXED_PRECISION": "bf16"}, precision="fp32")
    assert layout.precision == "fp32"
    assert layout.notices == ("precision fp32 from the config overrides the launcher's bf16",)


def test_two_precisions_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"two precisions asked for: train_module\.precision"):
        resolve(TWO, "fsdp", "fp32", param_dtype="bfloat16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prescale_gradients": True}, "remove 'prescale_gradients' there .True.: gradients are"),
        ({"gradient_predivide_factor": 2.0}, "remove 'gradient_predivide_factor' there"),
        ({"gradient_allreduce_op": "sum"}, "remove 'gradient_allreduce_op' there .sum.: the loss"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "gradients are accumulated in fp32"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "the norm is always needed"),
        ({"zero_optimization": {"stage": 3}}, "says stage 3, .*dp_config.name says zero2; keep"),
        ({"zero_optimization": True}, "zero_optimization must be an object, not True"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "offload_param must be an object, not"),
    ],
)
def test_deepspeed_settings_that_would_change_numbers_are_refused(
    settings: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(TWO, "zero2", deepspeed_config=settings)


def test_deepspeed_settings_that_the_config_decides_are_noticed_there_too() -> None:
    settings = {"gradient_clipping": 5, "torch_autocast": {"enabled": True}, "bf16": "auto"}
    assert resolve(TWO, "zero2", deepspeed_config=settings).notices == tuple(
        f"train_module.dp_config.deepspeed_config: {key} is not used; {ours} of the config decides"
        for key, ours in (
            ("gradient_clipping", "train_module.max_grad_norm"),
            ("torch_autocast", "train_module.precision"),
        )
    )
    both = resolve(ZERO3, "zero3", deepspeed_config={"gradient_clipping": 5})
    assert len(both.notices) == 1


def test_degrees_of_more_than_one_axis_as_numbers() -> None:
    layout = Layout(pp=2, dp_replicate=2, dp_shard=3, cp=2, tp=2, ep=4, is_fsdp=True)
    assert (layout.name, layout.world_size) == ("hsdp", 48)
    assert layout.shape == {"pp": 2, "dp_replicate": 2, "dp_shard": 3, "cp": 2, "tp": 2}
    assert layout.expert_shape == {"pp": 2, "dp_replicate": 2, "efsdp": 3, "ep": 4}
    assert (layout.batch_ranks, layout.grad_ranks) == (6, 1)  # gradients are added up
    assert Layout(dp_replicate=2, dp_shard=3, cp=2, is_fsdp=True).grad_ranks == 12
    # tp neighbours, then cp, dp_shard, dp_replicate, and the stages lie farthest apart.
    assert layout.place(47) == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1}
    assert layout.place(21) == {"pp": 0, "dp_replicate": 1, "dp_shard": 2, "cp": 0, "tp": 1}
    # Experts divide the same dp_shard x cp x tp otherwise.
    assert layout.place(21, experts=True) == {"pp": 0, "dp_replicate": 1, "efsdp": 2, "ep": 1}


def test_who_reads_which_rows_and_whose_sums_count() -> None:
    layout = Layout(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2, is_fsdp=True)
    readers: dict[int, set[int]] = {}
    for rank in range(layout.world_size):
        readers.setdefault(layout.batch_rank(rank), set()).add(rank)
    assert sorted(readers) == list(range(layout.batch_ranks))
    for batch_rank, ranks in readers.items():
        assert len(ranks) == 8
        shared = {(p["dp_replicate"], p["dp_shard"]) for p in map(layout.place, ranks)}
        assert shared == {divmod(batch_rank, layout.dp_shard)}
        # Of the ranks that read the same rows, one for each part of the positions.
        owners = [rank for rank in sorted(ranks) if layout.owns_loss(rank)]
        assert [layout.place(rank)["cp"] for rank in owners] == [0, 1]
        assert all(layout.place(rank)["pp"] == 1 for rank in owners)


def test_ranks_are_told_apart_by_what_they_have() -> None:
    assert Layout(dp_shard=4, is_fsdp=True).role(3) == ""
    assert Layout(pp=2, dp_shard=2, tp=2, is_fsdp=True).role(5) == "stage 2 of 2, tp 2 of 2"
    looped, in_a_v = (
        Layout(pp=2, is_fsdp=True, pp_config=PipelineParallelConfig(degree=2, schedule=schedule))
        for schedule in ("Interleaved1F1B", "ZBVZeroBubble")
    )
    assert (looped.role(0), in_a_v.role(0)) == ("stages 1 and 3 of 4", "stages 1 and 4 of 4")
    assert (looped.owns_loss(1), in_a_v.owns_loss(1), in_a_v.owns_loss(0)) == (True, False, True)


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "hsdp", "zero1", "zero3"])
def test_a_layout_is_called_what_configs_call_it(name: Any) -> None:
    layout = resolve({"WORLD_SIZE": "1" if name == "single" else "4"}, name)
    assert (layout.name, layout.dp_config.name) == (name, name)
    assert (layout.backend, layout.zero_stage) == (
        ("deepspeed", int(name[4:])) if name.startswith("zero") else ("torch", 0)
    )
    assert all(layout.batch_rank(rank) == rank for rank in range(layout.world_size))
    assert all(layout.owns_loss(rank) for rank in range(layout.world_size))
