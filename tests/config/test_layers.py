"""Layers merge, remember origins, and complain with the name of the layer."""

import json
import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.test_overrides import SGD, Adam, Example, Layers, Stop
from toolkit.config import Override, convert, parse_override_args
from toolkit.errors import ConfigError


def test_origins_name_default_recipe_file_and_flag() -> None:
    layers = Layers(Example)
    layers.add({"optim": {"lr": 0.5}, "name": "r", "note": "r"}, "recipe tiny")
    layers.add({"name": "f", "stop": {"value": 3}}, "my.json")
    flags = ["--optim.betas.0=0.5", "--duration={value: 2}"]
    for override in parse_override_args(flags, sections=["duration"]):
        layers.apply(override)
    config = layers.resolve()
    origins = layers.origins(config)
    assert origins["optim.lr"] == "recipe tiny"
    assert origins["note"] == "recipe tiny"
    assert origins["name"] == "my.json"
    assert origins["stop.value"] == "my.json"
    assert origins["stop.unit"] == "default"
    assert origins["optim.betas"] == "--optim.betas.0=0.5"
    assert origins["duration.value"] == "--duration={value: 2}"
    assert origins["duration.unit"] == "default"
    assert origins["seed"] == origins["fast"] == "default"
    assert config.duration == Stop(value=2, unit="steps")


def test_an_added_layer_is_not_changed_by_later_ones() -> None:
    recipe = {"optim": {"type": "adam", "betas": [0.1, 0.2]}}
    layers = Layers(Example)
    layers.add(recipe, "recipe")
    layers.set("optim.betas.0", 0.5, "flag")
    assert recipe == {"optim": {"type": "adam", "betas": [0.1, 0.2]}}


def test_another_tag_drops_what_the_new_type_does_not_know() -> None:
    layers = Layers(Example)
    layers.add({"optim": {"type": "adam", "lr": 0.5, "betas": [0.1, 0.2]}}, "recipe")
    layers.add({"optim": {"type": "sgd", "momentum": 0.9}}, "my.json")
    config = layers.resolve()
    assert config.optim == SGD(lr=0.5, momentum=0.9)
    assert layers.origins(config)["optim.lr"] == "recipe"
    layers.set("optim.type", "adam", "flag")
    assert layers.resolve().optim == Adam(lr=0.5)


def test_mistakes_in_a_layer_name_the_layer() -> None:
    layers = Layers(Example)
    layers.add({"optim": {"type": "adam", "lrr": 1}}, "my.json")
    with pytest.raises(ConfigError) as error:
        layers.resolve()
    assert str(error.value) == "optim.lrr: no such field; did you mean 'lr'? (in my.json)"


def test_unknown_top_level_names_list_the_known_ones() -> None:
    layers = Layers(Example)
    layers.add({"zzz": 1}, "my.json")
    with pytest.raises(ConfigError) as error:
        layers.resolve()
    known = "duration, fast, name, note, optim, scales, seed, stop"
    assert str(error.value) == f"zzz: no such field; known: {known} (in my.json)"


number = st.floats(allow_nan=False, allow_infinity=False)
whole = st.integers(-(2**63), 2**63 - 1)
# YAML does not join the two halves that JSON writes for characters above U+FFFF.
text = st.text(st.characters(codec="utf-8", min_codepoint=1, max_codepoint=0xD7FF))
# YAML knows no longer keys inside a line than 1,024 characters, escaped.
key = st.text(st.characters(codec="utf-8", min_codepoint=1, max_codepoint=0xD7FF), max_size=80)
stop = st.builds(Stop, value=whole, unit=text)
examples = st.builds(
    Example,
    optim=st.one_of(
        st.builds(Adam, lr=number, betas=st.tuples(number, number), patterns=st.lists(text)),
        st.builds(SGD, lr=number, momentum=number),
    ),
    stop=st.none() | stop,
    duration=stop,
    name=text,
    note=st.none() | text,
    fast=st.booleans(),
    seed=whole,
    scales=st.dictionaries(key, number),
)


@given(examples)
def test_every_config_round_trips_through_json_and_plain_data(config: Example) -> None:
    assert msgspec.json.decode(config.to_json(), type=Example) == config
    assert convert(config.to_dict(), Example) == config
    layers = Layers(Example)
    layers.add(config.to_dict(), "file")
    assert layers.resolve() == config


plain_text = st.text(st.sampled_from(string.printable), min_size=0).filter(
    lambda t: not t.startswith(('"', "'"))
)


@given(plain_text)
def test_a_text_field_keeps_its_characters_whatever_they_look_like(value: str) -> None:
    layers = Layers(Example)
    layers.apply(Override("name", value, "--name"))
    assert layers.resolve().name == value


@given(examples)
def test_every_value_can_be_given_as_a_flag_in_json(config: Example) -> None:
    layers = Layers(Example)
    for name, value in config.to_dict().items():
        layers.apply(Override(name, json.dumps(value), f"--{name}"))
    assert layers.resolve() == config
