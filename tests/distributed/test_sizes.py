"""Which models a layout divides, and what is said of those that it does not."""

from typing import Any

import pytest

from toolkit.distributed.config import ContextParallelConfig, DataParallelConfig
from toolkit.distributed.layout import Layout
from toolkit.distributed.sizes import (
    GATHERED_SHARE,
    Besides,
    check_combination,
    check_sizes,
    keeps_gathered,
    tensor_degrees,
)
from toolkit.errors import ConfigError
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import DeltaNetConfig, MoEConfig


def model(**changes: Any) -> TransformerConfig:
    base: dict[str, Any] = {
        "vocab_size": 250, "vocab_multiple": 64, "d_model": 48, "num_layers": 2, "num_heads": 12,
        "num_key_value_heads": 4, "intermediate_size": 144, "max_sequence_length": 64,
    }  # fmt: skip
    return TransformerConfig(**(base | changes))


MOE = MoEConfig(num_experts=6, top_k=2, intermediate_size=40)


@pytest.mark.parametrize(
    ("degrees", "changes", "message"),
    [
        ({"tp": 5}, {}, "tp 5 does not divide model.num_heads 12; use 4"),
        ({"tp": 6, "dp_shard": 2}, {"intermediate_size": 144}, "256; use 4"),
        ({"tp": 5, "cp": 3, "dp_shard": 2}, {"vocab_multiple": 250}, "num_heads 12; use 2"),
        ({"tp": 3}, {}, "tp 3 does not divide the padded vocabulary .* 256; use 2 or 4"),
        ({"tp": 4}, {"intermediate_size": 98}, "model.intermediate_size 98; use 2"),
        ({"tp": 3}, {"vocab_multiple": 192}, "num_key_value_heads 4, nor is divided by it; use 2"),
        ({"ep": 4, "dp_shard": 4}, {"moe": MOE}, "ep 4 does not divide .*num_experts 6; use 2"),
        ({"ep": 3, "dp_shard": 4}, {"moe": MOE}, "ep 3 does not divide the 4 ranks .*; use 2$"),
        ({"ep": 3, "dp_shard": 1, "dp_replicate": 3}, {"moe": MOE}, "1 rank .*leave ep_config out"),
        ({"ep": 3, "dp_shard": 2}, {}, "^train_module.ep_config: the model has no experts"),
        ({"ep": 2, "dp_shard": 2}, {}, "the model has no experts"),
        *(
            (
                {axis: 2, "dp_shard": 2},
                {"num_mtp_layers": 1},
                f"num_mtp_layers: 1 does not go with train_module.{axis}_config; use fsdp, or set",
            )
            for axis in ("tp", "cp", "pp")
        ),
    ],
)
def test_what_does_not_divide_is_named_with_what_would(
    degrees: dict[str, int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sizes(Layout(**degrees, is_fsdp=True), model(**changes))


def test_heads_may_be_fewer_than_ranks() -> None:
    few = model(num_heads=8, num_key_value_heads=2)
    check_sizes(Layout(tp=4, is_fsdp=True), few)
    assert tensor_degrees(few) == [1, 2, 4, 8]


def test_experts_that_ranks_share_need_not_divide_by_tp() -> None:
    moe = model(moe=MoEConfig(num_experts=6, top_k=2, intermediate_size=41), num_heads=8)
    with pytest.raises(ConfigError, match=r"model.moe.intermediate_size 41"):
        check_sizes(Layout(tp=2, is_fsdp=True), moe)
    check_sizes(Layout(tp=2, ep=2, is_fsdp=True), moe)


def test_styles_of_context_parallelism_have_needs_of_their_own() -> None:
    ulysses = ContextParallelConfig(degree=3, style="ulysses")
    with pytest.raises(ConfigError, match=r"cp 3 does not divide the 2 heads of each tp rank"):
        check_sizes(Layout(cp=3, tp=4, cp_config=ulysses, is_fsdp=True), model(num_heads=8))
    ring = ContextParallelConfig(degree=2, style="ring")
    with pytest.raises(ConfigError, match=r"ring does not know model.attention_soft_cap"):
        check_sizes(Layout(cp=2, cp_config=ring), model(attention_soft_cap=50.0))
    with pytest.raises(ConfigError, match=r"ring does not know model.attention_sinks"):
        check_sizes(Layout(cp=2, cp_config=ring), model(attention_sinks=True))


def test_ranks_share_heads_of_linear_attention_but_not_rows() -> None:
    net = DeltaNetConfig(num_key_heads=6, num_value_heads=12, key_head_dim=4, value_head_dim=4)
    hybrid = model(num_heads=12, attention_pattern=("linear", "full"), delta_net=net)
    with pytest.raises(ConfigError, match=r"tp 4 does not divide model.delta_net.num_key_heads 6"):
        check_sizes(Layout(tp=4, is_fsdp=True), hybrid)
    check_sizes(Layout(tp=2, is_fsdp=True), hybrid)
    for style in ("allgather", "ulysses", "ring"):
        cp = ContextParallelConfig(degree=2, style=style)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"pass a state from token to token.*fsdp or tp_conf"):
            check_sizes(Layout(cp=2, cp_config=cp), hybrid)


def test_zero_does_not_keep_the_weights_of_an_ngpt() -> None:
    layout = Layout(dp_config=DataParallelConfig(name="zero2"), zero_stage=2, dp_shard=2)
    with pytest.raises(ConfigError, match=r"norm_placement: zero2 steps flat .* use ddp, fsdp"):
        check_sizes(layout, model(norm_placement="normalized"))


@pytest.mark.parametrize("axis", ["tp", "pp", "ep"])
def test_combinations_that_do_not_work_are_refused_by_name(axis: str) -> None:
    offload = DataParallelConfig(name="fsdp", cpu_offload=True)
    degrees: dict[str, Any] = {axis: 2, "dp_shard": 2}
    layout = Layout(**degrees, is_fsdp=True, dp_config=offload)
    with pytest.raises(ConfigError, match=f"cpu_offload does not go with .*{axis}_config"):
        check_combination(layout, Besides())
    layout = Layout(**degrees, is_fsdp=True)
    with pytest.raises(ConfigError, match=r"model.type mine:Mine does not go with"):
        check_combination(layout, Besides(own_model="mine:Mine"))
    if axis == "tp":
        check_combination(layout, Besides(has_frozen=True, has_adapter=True))
        return
    with pytest.raises(ConfigError, match=f"lora does not go with train_module.{axis}_config"):
        check_combination(layout, Besides(has_frozen=True, has_adapter=True))


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (
            Layout(tp=2, is_fsdp=True),
            "fsdp and .*tp_con",
        ),
        (Layout(zero_stage=3, dp_shard=2), "zero3, which"),
        (Layout(is_fsdp=True, dp_replicate=2, dp_shard=2), "hsdp, which"),
        (Layout(cp=2), r"train_module\.cp_config, which"),
    ],
)
def test_a_base_in_few_bits_is_not_cut(layout: Layout, named: str) -> None:
    check_combination(Layout(dp_replicate=2), Besides(has_adapter=True, quantize_base="nf4"))
    with pytest.raises(ConfigError, match=f"quantize_base: nf4 does not go with {named}"):
        check_combination(layout, Besides(has_adapter=True, quantize_base="nf4"))


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (
            Layout(cp=2, is_fsdp=True, cp_config=ContextParallelConfig(degree=2, style="ring")),
            "cp_config.style ring",
        ),
        (
            Layout(
                dp_shard=2,
                is_fsdp=True,
                dp_config=DataParallelConfig(name="fsdp", wrapping_strategy="fine_grained"),
            ),
            "wrapping_strategy fine_grained",
        ),
    ],
)
def test_operations_are_not_selected_in_blocks_that_are_compiled_in_parts(
    layout: Layout, key: str
) -> None:
    check_combination(layout, Besides())
    check_combination(Layout(dp_shard=2, is_fsdp=True), Besides(compiles_selected_ops=True))
    with pytest.raises(ConfigError, match=rf"ac_config.mode: selected_ops finds no .*{key}"):
        check_combination(layout, Besides(compiles_selected_ops=True))


@pytest.mark.parametrize(
    ("asked", "memory", "has_pipeline", "keeps"),
    [
        ("auto", round(1000 / GATHERED_SHARE), False, True),
        ("auto", round(1000 / GATHERED_SHARE) - 10, False, False),
        ("auto", None, False, False),
        (False, 1000, False, True),
        (True, 10**9, False, False),
        (True, 1000, True, True),
    ],
)
def test_weights_stay_gathered_where_they_are_few_or_asked_to(
    asked: Any, memory: int | None, has_pipeline: bool, keeps: bool
) -> None:
    settings = DataParallelConfig(name="fsdp", reshard_after_forward=asked)
    assert keeps_gathered(settings, 1000, memory, has_pipeline=has_pipeline) is keeps


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2, is_fsdp=True, dp_config=DataParallelConfig(name="fsdp")),
        Layout(zero_stage=1, dp_shard=2, dp_config=DataParallelConfig(name="zero1")),
        Layout(cp=2),
    ],
    ids=["fsdp", "zero1", "cp"],
)
def test_graphs_are_recorded_where_weights_stay_in_their_place(layout: Layout, mode: Any) -> None:
    check_combination(layout, Besides(compile_mode="max-autotune-no-cudagraphs"))
    check_combination(Layout(), Besides(compile_mode=mode))
    with pytest.raises(ConfigError, match=f"compile_mode: {mode} records CUDA graphs, for single"):
        check_combination(layout, Besides(compile_mode=mode))
