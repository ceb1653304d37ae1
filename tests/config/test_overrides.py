"""Overrides become typed values at the path they name."""

import pytest

from toolkit.config import Config, ConfigLayers, Override, parse_override_args
from toolkit.errors import ConfigError, ErrorList


class Adam(Config, kw_only=True, tag_field="type", tag="adam"):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    patterns: list[str] = []  # noqa: RUF012


class SGD(Config, kw_only=True, tag_field="type", tag="sgd"):
    lr: float = 1e-2
    momentum: float = 0.0


class Stop(Config, kw_only=True):
    value: int
    unit: str = "steps"


class Example(Config, kw_only=True):
    optim: Adam | SGD = Adam()
    stop: Stop | None = None
    duration: Stop = Stop(value=1, unit="epochs")
    name: str = "x"
    note: str | None = None
    fast: bool = False
    seed: int = 0
    scales: dict[str, float] = {}  # noqa: RUF012


SECTIONS = Example.__struct_fields__


class Layers(ConfigLayers[Example]):
    def apply(self, override: Override) -> None:
        self.set(override.path, self.parse(override), override.flag)

    def resolve(self) -> Example:
        checked = self.check()
        ErrorList(checked.errors).raise_any()
        return checked.config


def resolve(*args: str) -> Example:
    layers = Layers(Example)
    for override in parse_override_args(args, sections=SECTIONS, options=["name", "save-folder"]):
        layers.apply(override)
    return layers.resolve()


def message(*args: str) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("args", "path", "value"),
    [
        (["--optim.lr=6e-3"], "optim.lr", 6e-3),
        (["--optim.lr", "6e-3"], "optim.lr", 6e-3),
        (["--optim.lr=3"], "optim.lr", 3.0),
        (["--optim.lr", "-5"], "optim.lr", -5.0),
        (["--optim={type: sgd, lr: 6e-3}"], "optim", SGD(lr=6e-3)),
        (["--optim.type=sgd", "--optim.momentum=.9"], "optim", SGD(lr=1e-3, momentum=0.9)),
        (["--optim.betas.1=0.99"], "optim.betas", (0.9, 0.99)),
        (["--optim.betas=[0.8, 0.9]"], "optim.betas", (0.8, 0.9)),
        (["--optim.patterns=[no, 1e3, 'a b', *.bias]"], "optim.patterns", None),
        (["--optim.patterns=[no, 1e3, 'a b', \"*.bias\"]"], "optim.patterns",
         ["no", "1e3", "a b", "*.bias"]),
        (["--stop={value: 20, unit: steps}"], "stop", Stop(value=20)),
        (['--stop={"value": 1e3}'], "stop", Stop(value=1000)),
        (["--stop.value=7"], "stop", Stop(value=7)),
        (["--stop=null"], "stop", None),
        (["--duration.value=3"], "duration", Stop(value=3, unit="epochs")),
        (["--fast"], "fast", True),
        (["--fast", "--seed=2"], "fast", True),
        (["--fast", "false"], "fast", False),
        (["--seed", "-1"], "seed", -1),
        (["--seed=1_000"], "seed", 1000),
        (["--seed=1e3"], "seed", 1000),
        (["--name=no"], "name", "no"),
        (["--name=1e5"], "name", "1e5"),
        (["--name=null"], "name", "null"),
        (["--name="], "name", ""),
        (["--name=a: [b"], "name", "a: [b"),
        (["--name='quoted: it''s'"], "name", "quoted: it's"),
        (["--note=null"], "note", None),
        (["--note='null'"], "note", "null"),
        (["--scales={a: 6e-3, 'no': 2}"], "scales", {"a": 6e-3, "no": 2.0}),
        (["--scales.a=.5"], "scales", {"a": 0.5}),
    ],
)  # fmt: skip
def test_values_take_the_type_of_their_target(args: list[str], path: str, value: object) -> None:
    if value is None and path == "optim.patterns":
        assert message(*args).startswith("optim.patterns: ")  # YAML reads *.bias as an alias
        return
    found: object = resolve(*args)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--optim.lrr=1"], "optim.lrr: no such field; did you mean 'lr'?"),
        (["--optimm.lr=1"], "optimm: no such field; did you mean 'optim'?"),
        (["--optim.lr.x=1"], "optim.lr: a single value; it has no field 'x'"),
        (["--optim.lr=abc"], "optim.lr: expected a number, not 'abc'"),
        (["--optim.lr=1e999"], "optim.lr: must be a finite number, not inf"),
        (["--optim.lr=.nan"], "optim.lr: expected a number, not '.nan'"),
        (["--seed=99999999999999999999"], "seed: must fit in 64 bits, not 99999999999999999999"),
        (["--seed=1.5"], "seed: expected a whole number, not 1.5"),
        (["--seed=true"], "seed: expected a whole number, not true"),
        (["--fast=maybe"], "fast: expected true or false, not 'maybe'"),
        (["--optim.type=sgdd"], "optim.type: 'sgdd' is not one of adam, sgd; did you mean 'sgd'?"),
        (["--optim={lr: 1}"], "optim.type: required, and not given; one of adam, sgd"),
        (["--stop=5"], "stop: expected a mapping with value, unit or null, not 5"),
        (["--stop.unit=steps"], "stop.value: required, and not given (expected a whole number)"),
        (["--optim.betas=[1]"], "optim.betas: expected a list of 2 values, not [1]"),
        (["--optim.betas.2=1"], "optim.betas.2: the list has 2 items; give an index below that"),
        (["--optim.patterns=a"], "optim.patterns: expected a list, not 'a'; write [a]"),
        (["--scales={a: b}"], "scales.a: expected a number, not 'b'"),
        (["--stop={value: 1"], "stop: '{value: 1' is not a JSON or YAML value: "),
        (["--save-foldr", "x"], "no such option: --save-foldr; did you mean --save-folder? "),
        (["-z"], "no such option: -z; see --help"),
        (["word"], "unexpected argument 'word'; overrides look like --"),
    ],
)
def test_mistakes_name_path_value_and_what_was_expected(args: list[str], expected: str) -> None:
    assert message(*args).startswith(expected)
