"""The JSON Schema describes every field in words."""

from toolkit.config.schema import field_docs, json_schema
from toolkit.optim.config import AdamWConfig
from toolkit.train.config import Duration, TrainerConfig


def test_field_docstrings_become_descriptions() -> None:
    schema = json_schema(TrainerConfig)
    stop = schema["$defs"]["TrainerConfig"]["properties"]["hard_stop"]
    assert stop["description"].startswith("Stop here without changing the schedule")
    assert schema["$defs"]["Duration"]["required"] == ["value"]


def test_docs_are_read_from_the_source_in_one_line() -> None:
    assert field_docs(Duration)["value"] == "How many."
    assert "\n" not in field_docs(AdamWConfig)["lr"]
