"""Recipes of published models hold what was published, and fit the GPUs that they are for."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from toolkit.commands.dry_run import summarize
from toolkit.commands.plan import plan_experiment
from toolkit.commands.recipes import copy_recipe, describe_recipes
from toolkit.config.interpolation import variables
from toolkit.data.config import DatasetConfig
from toolkit.data.order.config import mix_names, read_mix
from toolkit.data.order.resolve import resolve_mix, resolve_schedule
from toolkit.data.prepare.text.instructions.template import ChatTemplate
from toolkit.errors import ConfigError
from toolkit.experiment.checks import batches_of
from toolkit.experiment.load import LoadedExperiment, load_experiment
from toolkit.experiment.sources import OFFICIAL, recipe_names, recipe_text

VARIABLES = ["OLMO_DATA_ROOT", "PYTHON_EDU"]


@pytest.fixture(autouse=True)
def data_roots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Somewhere else: no file of this machine is looked at."""
    monkeypatch.setenv("OLMO_DATA_ROOT", "s3://olmo")
    (tmp_path / "python.jsonl").write_text('{"text": "pass"}\n')
    monkeypatch.setenv("PYTHON_EDU", str(tmp_path / "python.jsonl"))
    monkeypatch.chdir(tmp_path)


class Published(NamedTuple):
    preset: str
    """Of the recipe's model, or of the one that `--base` gives."""
    parameters: int
    batch_tokens: int
    steps: int | None
    """None: of whole epochs."""
    lr: float
    end: float
    """Learning rate of the last step, as a fraction of `lr`; of epochs, of a step like it."""
    gpus: tuple[int, int]
    """The fewest, in nodes of 8, and those that the layout was searched for."""


B1, B7, B13, B32 = 1_484_916_736, 7_298_617_344, 13_716_198_400, 32_234_279_936
OLMOE, LLAMA = 6_919_161_856, 8_030_261_248
M1, M7, M13, M32 = "olmo2_1B", "olmo2_7B", "olmo2_13B", "olmo2_32B"
PUBLISHED = {
    # Rates at the end of stage 1 are those that stage 2 begins with (7B: 6.1499e-5 there).
    "OLMo-2-0425-1B-stage1": Published(M1, B1, 512 * 4096, 1_907_359, 4e-4, 0.186218, (8, 64)),
    "OLMo-2-0425-1B-stage2": Published(M1, B1, 512 * 4096, 23_852, 7.4487e-5, 0.0, (8, 64)),
    "OLMo-2-1124-7B-stage1": Published(M7, B7, 1024 * 4096, 928_646, 3e-4, 0.205, (8, 128)),
    "OLMo-2-1124-7B-stage2": Published(M7, B7, 1024 * 4096, 11_931, 6.1499e-5, 0.0, (8, 128)),
    "OLMo-2-1124-13B-stage1": Published(M13, B13, 2048 * 4096, 596_057, 9e-4, 0.1, (8, 256)),
    "OLMo-2-1124-13B-stage2-100B": Published(M13, B13, 2048 * 4096, 11_931, 9e-5, 0.0, (8, 256)),
    "OLMo-2-1124-13B-stage2-300B": Published(M13, B13, 2048 * 4096, 35_773, 9e-5, 0.0, (8, 256)),
    "OLMo-2-0325-32B-stage1": Published(M32, B32, 2048 * 4096, 721_901, 6e-4, 0.110387, (64, 512)),
    "OLMo-2-0325-32B-stage2-100B": Published(
        M32, B32, 2048 * 4096, 11_921, 6.6232e-5, 0.0, (64, 512)
    ),
    "OLMo-2-0325-32B-stage2-300B": Published(
        M32, B32, 2048 * 4096, 35_763, 6.6232e-5, 0.0, (64, 512)
    ),
    "OLMoE-1B-7B-0924": Published(
        "olmoe_1B_7B", OLMOE, 1024 * 4096, 1_200_000, 4e-4, 0.1, (8, 256)
    ),
    "OLMoE-1B-7B-0924-anneal": Published(
        "olmoe_1B_7B", OLMOE, 1024 * 4096, 23_842, 4e-5, 0.0, (8, 256)
    ),
    # 124,439,808 and 1,557,611,200, and 47 rows of padding to 50,304 tokens.
    "gpt2_124M": Published("gpt2_124M", 124_475_904, 524_288, 18_865, 6e-4, 0.0, (8, 8)),
    "gpt2_1558M": Published("gpt2_1558M", 1_557_686_400, 1_048_576, 32_000, 6e-4, 0.1, (8, 8)),
    "SmolLM2-135M": Published(
        "smollm2_135M", 134_515_008, 64 * 8 * 2048, 2_000_000, 3e-3, 0.0, (8, 64)
    ),
    "SmolLM2-360M": Published(
        "smollm2_360M", 361_821_120, 128 * 6 * 2048, 2_600_000, 3e-3, 0.0, (8, 128)
    ),
    "Llama-3-8B": Published("llama3_8B", LLAMA, 4_194_304, 3_576_279, 3e-4, 0.01, (8, 128)),
    "OLMo-2-0425-1B-SFT": Published(M1, B1, 128 * 4096, None, 3e-5, 0.0, (8, 8)),
    "OLMo-2-1124-7B-SFT": Published(M7, B7, 128 * 4096, None, 1e-5, 0.0, (8, 32)),
    "OLMo-2-1124-13B-SFT": Published(M13, B13, 128 * 4096, None, 6e-6, 0.0, (8, 32)),
    "OLMo-2-0325-32B-SFT": Published(M32, B32, 256 * 4096, None, 4e-6, 0.0, (16, 64)),
    "OLMoE-1B-7B-0924-SFT": Published("olmoe_1B_7B", OLMOE, 128 * 4096, None, 2e-5, 0.0, (8, 8)),
    "Llama-3.1-Tulu-3-8B-SFT": Published("llama3_8B", LLAMA, 128 * 4096, None, 5e-6, 0.0, (8, 64)),
    "SmolLM2-135M-SFT": Published("smollm2_135M", 134_515_008, 128 * 8192, None, 1e-3, 0.0, (8, 8)),
    "SmolLM2-360M-SFT": Published("smollm2_360M", 361_821_120, 128 * 8192, None, 1e-3, 0.0, (8, 8)),
    "OLMo-2-0425-1B-DPO": Published(M1, B1, 128 * 4096, None, 2.5e-6, 0.0, (8, 8)),
    "OLMo-2-1124-7B-DPO": Published(M7, B7, 128 * 4096, None, 8e-7, 0.0, (8, 32)),
    "OLMo-2-1124-13B-DPO": Published(M13, B13, 128 * 4096, None, 8e-7, 0.0, (8, 32)),
    "Llama-3.1-Tulu-3-8B-DPO": Published("llama3_8B", LLAMA, 128 * 4096, None, 5e-7, 0.0, (8, 64)),
}


def load(name: str) -> LoadedExperiment:
    """The recipe, with the model that it is for."""
    recipe, flags = f"{OFFICIAL}{name}", []
    if '"model"' not in recipe_text(recipe):
        flags = [f"--model.preset={PUBLISHED[name].preset}"]
        if name.endswith("DPO"):  # which starts from one
            flags.append("--train_module.objective.reference=s3://models/sft")
        if name.startswith("SmolLM2"):  # as on the hub
            flags.append("--model.max_sequence_length=8192")
    return load_experiment(recipe, flags)


def test_each_has_its_figures_here() -> None:
    found = {name for name in recipe_names() if name.startswith(OFFICIAL)}
    assert found == {f"{OFFICIAL}{name}" for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_dry_run_and_figures(name: str) -> None:
    published, loaded = PUBLISHED[name], load(name)
    config = loaded.config
    module, total = config.train_module, published.steps or 1000
    assert config.model.num_parameters == published.parameters
    assert config.data_loader.global_batch_size == published.batch_tokens
    assert module.optim.lr == published.lr
    text = summarize(loaded, {"WORLD_SIZE": str(published.gpus[1]), "RANK": "0"})
    assert f"{published.batch_tokens:,} tokens a step" in text
    if published.steps is not None:
        assert f"duration    {published.steps:,} steps, " in text
        duration = config.trainer.max_duration
        assert batches_of(config, None).steps_of(duration.value, duration.unit) == published.steps
    size = published.batch_tokens if module.scheduler.units == "tokens" else 1
    end = module.scheduler.factor(total * size, total * size, step_size=size, peak=published.lr)
    assert end == pytest.approx(published.end, rel=3e-3, abs=1e-9)
    assert config.run.experiment == name
    assert config.description


def fits(loaded: LoadedExperiment, gpus: int) -> bool:
    try:
        return bool(plan_experiment(loaded, {}, world_size=gpus).data["fits"])
    except ConfigError:  # the layout has more ranks
        return False


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_fits_its_gpus_and_no_fewer_nodes(name: str) -> None:
    (few, many), loaded = PUBLISHED[name].gpus, load(name)
    assert fits(loaded, few)
    assert fits(loaded, many)
    assert few == 8 or not fits(loaded, few // 2)


def test_stage_2_of_olmo_2_begins_at_the_rate_that_stage_1_ends_with() -> None:
    for size, name in ("1B", "OLMo-2-0425-1B"), ("32B", "OLMo-2-0325-32B"):
        first, second = PUBLISHED[f"{name}-stage1"], f"{name}-stage2"
        second = second if size == "1B" else f"{second}-100B"
        assert first.lr * first.end == pytest.approx(PUBLISHED[second].lr, rel=1e-4)


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLMO_DATA_ROOT")
    with pytest.raises(ConfigError, match=r"OLMO_DATA_ROOT is not set.*docs/recipes\.md#mixes"):
        load("OLMo-2-0425-1B-stage1")
    needs = {recipe.name: recipe.needs for recipe in describe_recipes()}
    assert needs["official/OLMo-2-0425-1B-stage1"] == ["download", "OLMO_DATA_ROOT"]
    assert needs["official/OLMo-2-0425-1B-stage2"] == ["--base", "OLMO_DATA_ROOT"]
    assert needs["official/SmolLM2-135M"] == ["download", "PYTHON_EDU"]


def test_a_name_that_is_nearly_right_gets_the_right_one() -> None:
    with pytest.raises(
        ConfigError, match=r"no such recipe or file; did you mean 'official/SmolLM2-135M'\?"
    ):
        load_experiment("official/SmolLM-135M")


def test_a_copy_lies_in_the_folder_itself(tmp_path: Path) -> None:
    assert copy_recipe("official/gpt2_124M", tmp_path) == tmp_path / "gpt2_124M.json"


MIX_TOTALS = {
    # Billions of tokens, or percent.
    "OLMo-mix-1124": 3_900, "OLMoE-mix-0824": 4_070, "OLMo-mix-0625": 5_930,
    "OLMo-mix-0925": 5_930, "OLMo-midtraining-mix-0625-100B": 99.95, "smollm-corpus": 252,
    "dolmino-mix-1124-50B": 100, "dolmino-mix-1124-100B": 100, "dolmino-mix-1124-300B": 100,
}  # fmt: skip


@pytest.mark.parametrize("name", mix_names())
def test_shares_of_a_mix_add_up(name: str) -> None:
    mix = read_mix(name)
    total = sum(source.ratio for source in mix.sources.values())
    assert total == pytest.approx(MIX_TOTALS.get(name, total), rel=2e-3)
    dataset = DatasetConfig(mix=mix)
    shares = resolve_schedule(dataset)[0].shares
    assert sum(shares.values()) == 1
    assert {source.name for source in resolve_mix(dataset)} >= shares.keys()
    assert set(variables(mix)) <= set(VARIABLES)


def test_dolmino_repeats_what_the_paper_says() -> None:
    """Shares x tokens of a mix are the tokens of a source x its passes (Team OLMo 2025)."""
    passes = {"50B": (0.5, 1, 1), "100B": (1, 2, 1), "300B": (2, 4, 4)}
    for size, expected in passes.items():
        sources = read_mix(f"dolmino-mix-1124-{size}").sources
        tokens = {"flan": 17.0, "stackexchange": 1.26, "wiki": 3.7}
        for (name, available), times in zip(tokens.items(), expected, strict=True):
            taken = sources[name].ratio / 100 * float(size.removesuffix("B"))
            assert taken / available == pytest.approx(times, rel=0.05), (size, name)


CHAT: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]


@pytest.mark.parametrize(
    ("name", "expected", "asked"),
    [
        (
            "OLMo-2-1124-7B-SFT",
            "<s><|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello</s>\n"
            "<|user|>\nBye\n<|assistant|>\nCiao</s>",
            "<s><|user|>\nHi\n<|assistant|>\n",
        ),
        (
            "SmolLM2-135M-SFT",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\nCiao<|im_end|>\n",
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_conversations_look_as_the_published_templates_have_them(
    name: str, expected: str, asked: str
) -> None:
    instructions = load(name).config.dataset.instructions
    assert instructions is not None
    assert instructions.chat_template is not None
    template = ChatTemplate(
        instructions.chat_template,
        control_tokens=(),
        variables={"bos_token": "<s>", "eos_token": "</s>"},
    )
    assert template.render(CHAT).text == expected
    assert template.render([CHAT[1]], add_generation_prompt=True).text == asked
