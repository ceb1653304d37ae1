"""The JSON Schema describes every field in words."""

import re
from typing import Any

import pytest

from toolkit.config.schema import field_docs, json_schema
from toolkit.experiment.config import ExperimentConfig
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


@pytest.mark.parametrize("part", ["optim", "scheduler", "model"])
def test_a_class_of_the_users_is_known_by_its_name_or_as_target(part: str) -> None:
    schema = json_schema(ExperimentConfig)["$defs"]
    section = "ExperimentConfig" if part == "model" else "TransformerTrainModuleConfig"
    union = schema[section]["properties"][part]
    assert "discriminator" not in union
    options = [schema[option["$ref"].rpartition("/")[2]] for option in union["anyOf"]]

    def taken(values: dict[str, Any]) -> list[str]:
        """The options whose tag and keys `values` fit."""
        return [
            option["title"]
            for option in options
            if fits(values["type"], option["properties"]["type"])
            and ("target" in values) <= ("target" in option["properties"])
            and any(
                set(rule.get("required", ())) <= values.keys()
                and fits(values["type"], rule.get("properties", {}).get("type", {}))
                for rule in option.get("anyOf", [{}])
            )
        ]

    def fits(value: str, rule: dict[str, Any]) -> bool:
        if "anyOf" in rule:
            return any(fits(value, one) for one in rule["anyOf"])
        in_enum = value in rule.get("enum", [value])
        return in_enum and re.search(rule.get("pattern", ""), value) is not None

    (own,) = taken({"type": "my_module:Mine"})
    assert own.startswith("Class")
    assert taken({"type": "class", "target": "my_module:Mine"}) == [own]
    assert taken({"type": "class"}) == taken({"type": "mine"}) == taken({"type": "a:b c"}) == []
