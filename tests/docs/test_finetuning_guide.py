"""The way of a model out, in, through training and out again, as docs/finetuning.md shows it."""

from pathlib import Path

from tests.docs.running import ROOT, commands, reader_folder, run_command
from toolkit.commands.recipes import describe_recipes

GUIDE = (ROOT / "docs" / "finetuning.md").read_text()


def test_the_whole_way_runs_as_it_stands(tmp_path: Path) -> None:
    folder = reader_folder(tmp_path)
    said = [run_command(command, folder) for command in commands(GUIDE)]
    assert len(said) == 7
    assert "logits equal those of transformers" in said[2]
    merged, scored = said[4], said[5]
    assert "LlamaForCausalLM in float32" in merged
    assert "README.md" in scored
    assert (folder / "exported/tuned/model.safetensors").is_file()


def test_recipes_that_start_from_a_model_are_in_the_guide() -> None:
    for recipe in describe_recipes():
        if not recipe.has_model and not recipe.name.startswith("official/"):
            assert f"| `{recipe.name}` |" in GUIDE


def test_families_are_in_the_guide() -> None:
    from toolkit.hf.families import FAMILIES

    for family in FAMILIES:
        assert f"`{family.model_type}`" in GUIDE
