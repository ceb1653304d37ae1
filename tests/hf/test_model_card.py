"""Model cards say what is known and nothing else."""

import yaml

from toolkit.hf.model_card import ModelCard, render_card


def front_matter(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_names_base_license_and_data():
    text = render_card(
        ModelCard(
            title="a/b",
            base_model="some/base",
            license="apache-2.0",
            datasets=["some/data"],
            has_tokenizer=True,
        )
    )
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "some/base",
        "license": "apache-2.0",
        "datasets": ["some/data"],
        "tags": ["toolkit"],
    }


def test_what_is_not_known_is_left_out():
    text = render_card(ModelCard(title="mine"))
    assert set(front_matter(text)) == {"library_name", "pipeline_tag", "tags"}
    for word in ("## Training", "## Results", "Trained with", "command", "AutoTokenizer", "None"):
        assert word not in text
    assert "model = AutoModelForCausalLM.from_pretrained(folder)" in text


def test_values_cannot_break_the_table():
    text = render_card(ModelCard(title="mine", training={"Data": "a | b\nc"}))
    assert "| Data | a \\| b c |" in text


def test_an_adapter_is_loaded_onto_its_base():
    text = render_card(ModelCard(title="mine", is_adapter=True, base_model="some/base"))
    assert front_matter(text)["library_name"] == "peft"
    assert "base = AutoModelForCausalLM.from_pretrained('some/base')" in text
    assert "PeftModel.from_pretrained(base, folder)" in text


def test_the_snippet_is_python():
    for chat in (False, True):
        card = ModelCard(title="m", has_tokenizer=True, has_chat_template=chat)
        code = render_card(card).split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert ("apply_chat_template" in code) == chat
