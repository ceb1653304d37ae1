"""JSON Schema of a config file."""

from typing import Any

from toolkit.config.files import SCHEMA_KEY
from toolkit.config.schema import json_schema
from toolkit.experiment.config import ExperimentConfig
from toolkit.models.presets import PRESETS


def experiment_schema() -> dict[str, Any]:
    """The schema of what `toolkit train` reads: `ExperimentConfig`, or with a preset as model, and
    `$schema`, by which an editor finds this schema."""
    schema = json_schema(ExperimentConfig)
    model = schema["$defs"]["ExperimentConfig"]["properties"]["model"]
    with_preset = {
        "type": "object",
        "description": "A named size; further fields replace the preset's.",
        "properties": {"preset": {"enum": sorted(PRESETS)}},
        "required": ["preset"],
    }
    choices = model.pop("anyOf", None)
    model["anyOf"] = [*(choices or [{"$ref": model.pop("$ref", None)}]), with_preset]
    model.pop("discriminator", None)
    schema["$defs"]["ExperimentConfig"]["properties"][SCHEMA_KEY] = {
        "type": "string",
        "description": "Where the schema of this file is, for editors.",
    }
    return schema
