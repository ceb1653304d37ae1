"""Model cards say what is known and nothing else."""

import pytest
import yaml

from toolkit.commands.card import data_words, hub_data_sets
from toolkit.data.config import DatasetConfig, DiskSourceConfig, FilesSourceConfig, HubSourceConfig
from toolkit.data.order.config import MixConfig, MixSourceConfig
from toolkit.errors import ConfigError
from toolkit.hf.licenses import read_license
from toolkit.hf.loading import name_in_cache
from toolkit.hf.model_card import ModelCard, Scoring, render_card


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


def test_a_base_that_is_not_on_the_hub_is_named_in_the_snippet_alone():
    text = render_card(ModelCard(title="mine", is_adapter=True, base_name="run/step4/hf"))
    assert "base_model" not in front_matter(text)
    assert "from_pretrained('run/step4/hf')" in text


def test_licenses_are_ids_of_the_hub_or_have_a_name():
    assert read_license("mit")["license"] == "mit"
    assert read_license("other: ours") == {
        "license": "other",
        "license_name": "ours",
        "license_link": None,
    }
    for wrong, hint in (("MIT", "did you mean 'mit'? One"), ("mylicense", "id; "), ("mit:x", "")):
        with pytest.raises(ConfigError, match=r"the hub has no such id") as error:
            read_license(wrong)
        assert hint in str(error.value)


def test_the_snippet_is_python():
    for chat in (False, True):
        card = ModelCard(title="m", has_tokenizer=True, has_chat_template=chat)
        code = render_card(card).split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert ("apply_chat_template" in code) == chat


def test_an_adapter_that_gives_scores_tells_its_base_the_padding():
    for has_padding in (False, True):
        card = ModelCard(
            title="m",
            is_adapter=True,
            has_tokenizer=True,
            model={"Architecture": "LlamaForSequenceClassification"},
            scoring=Scoring("</s>", has_padding=has_padding),
        )
        text = render_card(card)
        assert ("base.config.pad_token_id = tokenizer.pad_token_id" in text) == has_padding
        assert ("padding=True" in text) == has_padding


def test_a_license_without_a_short_name_keeps_its_own():
    card = ModelCard(title="m", license="other", license_name="ours", license_link="LICENSE")
    front = front_matter(render_card(card))
    assert [front[key] for key in ("license", "license_name", "license_link")] == [
        "other", "ours", "LICENSE"
    ]  # fmt: skip
    assert "With transformers 4.57 or newer:" in render_card(card)


def files(*paths: str) -> FilesSourceConfig:
    return FilesSourceConfig(paths=list(paths))


@pytest.mark.parametrize(
    ("dataset", "words", "names"),
    [
        (DatasetConfig(source=files("chat.jsonl")), "`chat.jsonl`", []),
        (
            DatasetConfig(source=files(*(f"{n}.txt" for n in range(10)))),
            ", ".join(f"`{n}.txt`" for n in range(8)) + ", and 2 more",
            [],
        ),
        (
            DatasetConfig(source=HubSourceConfig(name="a/b", config="en")),
            "a/b (en), train",
            ["a/b"],
        ),
        (DatasetConfig(source=DiskSourceConfig(path="saved")), "`saved`, train", []),
        (
            DatasetConfig(
                mix=MixConfig(
                    sources={
                        "web": MixSourceConfig(ratio=3, source=HubSourceConfig(name="a/b")),
                        "mine": MixSourceConfig(ratio=1, source=files("x.txt")),
                        "old": MixSourceConfig(ratio=0),
                    }
                ),
                source=None,
            ),
            "a mixture of web 75.0%: a/b, train; mine 25.0%: `x.txt`; old 0.0%: token files old",
            ["a/b"],
        ),
        (
            DatasetConfig(source=None, root="/nowhere", dataset_name="c", dataset_config="d"),
            "token files c/d",
            [],
        ),
    ],
)
def test_sources_are_named_as_they_were_given(dataset, words, names):
    assert data_words(dataset) == words
    assert hub_data_sets(dataset) == names


def test_the_place_of_a_model_in_the_cache_tells_its_name(tmp_path):
    folder = tmp_path / "hub/models--some--base-1B/snapshots/0123abc"
    folder.mkdir(parents=True)
    assert name_in_cache(folder) == "some/base-1B"
    (tmp_path / "link").symlink_to(folder)
    assert name_in_cache(tmp_path / "link") == "some/base-1B"
    assert name_in_cache(tmp_path) is None
