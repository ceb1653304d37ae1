"""Configs and command lines that nobody means: strategies for the fuzz of `toolkit train`."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from toolkit.config.types import alternatives, field_types, item_type, value_type
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.sources import recipe_names, recipe_text

RECIPES = [name for name in recipe_names() if "model" in json.loads(recipe_text(name))]


def typed_paths(node: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Dotted path and type of every field of a config, through unions, lists and mappings."""
    if path:
        yield path, node
    if depth > 8:
        return
    for option in alternatives(node):
        if isinstance(option, inspect.StructType):
            for name, kind in field_types(option).items():
                yield from typed_paths(kind, f"{path}.{name}" if path else name, depth + 1)
        elif item_type(option, 0) is not None:
            yield from typed_paths(item_type(option, 0), f"{path}.0", depth + 1)
        elif value_type(option) is not None:
            yield from typed_paths(value_type(option), f"{path}.x", depth + 1)


TYPES = dict(typed_paths(msgspec.inspect.type_info(ExperimentConfig)))
PATHS = sorted(TYPES)

ODD_TEXTS = [
    *("", " ", ".", "..", "/", "~", "~nouser/x", "a" * 300, "ä" * 200, "/".join(["a" * 200] * 30)),
    *("\udcff", "x\udc80y", "\ud800", "\0", "a\0b", "\x1b[31m", "\n", "null", "true", "NaN", "*"),
    *("[", "[" * 3000, "{" * 3000, "[" * 150 + "]" * 150, "&a [*a]", "*a", "&a x", "{[1]: 2}"),
    *("!!python/name:os", "!!int '3'", "<<: 3", "{<<: {a: 1}}", "{a: 1, a: 2}", "? x", "- 1\n- 2"),
    *("a: b: c", "s3://b/x", "s3:/b", "file:///tmp/x", "http://[::1", "gs://", "://", "C:\\x"),
    *("9" * 5000, "1e400", "-1e400", "1e308", "0x10", "1_000", ".inf", "-.inf", ".nan", "6e-3"),
    *("'", '"', '"\\ud800"', "%s%n", "{0}", "{{ x }}", "{% raw", "step3", "nope.txt", "/etc/*zz"),
    *("/dev/null", "/proc/self/mem", "module:Class", "os:nothing", "quickstart", "adamw", "fsdp"),
    *("hsdp", "zero3", "budget", "packed", "&a [&b [*b], " + "*a," * 50 + "]", "**"),
    "{a: &a [x,x], b: &b [*a,*a], c: &c [*b,*b], d: [*c,*c]}",
]
ODD_NUMBERS = [
    0, 1, -1, 2, 3, 7, 64, 257, 4096, 2**31, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    -(2**63), 10**30, 10**400, 0.0, -0.0, 1e-300, 1e300, 0.1, 1.5, -1.5, 1e18,
]  # fmt: skip

odd_text = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.text(st.characters(), max_size=20),
    st.text("[]{}:,&*!\"'#-?|>%@ ab1~/\\\t", max_size=30),
)
numbers = st.one_of(
    st.sampled_from(ODD_NUMBERS), st.integers(), st.floats(allow_nan=False, allow_infinity=False)
)
scalars = st.one_of(st.none(), st.booleans(), numbers, odd_text)
keys = st.one_of(
    st.sampled_from(sorted({part for path in PATHS for part in path.split(".")})), odd_text
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=6,
)


def fitting(node: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of the right type, most of them of no use."""
    choices = [_fitting(option, depth) for option in alternatives(node)]
    return st.one_of(choices) if choices else scalars


def _fitting(option: Any, depth: int) -> st.SearchStrategy[Any]:
    if isinstance(option, inspect.LiteralType):
        return st.sampled_from(option.values)
    if isinstance(option, inspect.IntType):
        return st.one_of(
            st.integers(1, 5000), st.sampled_from([n for n in ODD_NUMBERS if n == n // 1])
        )
    if isinstance(option, inspect.FloatType):
        return st.one_of(st.floats(0, 2), numbers)
    if isinstance(option, inspect.BoolType):
        return st.booleans()
    if isinstance(option, inspect.NoneType):
        return st.none()
    if isinstance(option, inspect.StructType) and depth < 3:
        fields = {f.encode_name: fitting(f.type, depth + 1) for f in option.fields if f.required}
        others = {
            f.encode_name: fitting(f.type, depth + 1) for f in option.fields if not f.required
        }
        tag = {option.tag_field: st.just(option.tag)} if option.tag_field else {}
        return st.fixed_dictionaries({**fields, **tag}, optional=others)
    if item_type(option, 0) is not None and depth < 4:
        return st.lists(fitting(item_type(option, 0), depth + 1), max_size=3)
    if value_type(option) is not None and depth < 4:
        names = st.one_of(st.sampled_from(["a", "b", "web"]), odd_text)
        return st.dictionaries(names, fitting(value_type(option), depth + 1), max_size=2)
    return odd_text


FITTING = {path: fitting(node) for path, node in TYPES.items()}


def as_json(value: Any) -> str:
    return json.dumps(value, allow_nan=True)


@st.composite
def odd_paths(draw: st.DrawFn) -> str:
    path = draw(st.sampled_from(PATHS))
    change = draw(st.integers(0, 9))
    if change == 0:
        at = draw(st.integers(0, len(path)))
        return path[:at] + draw(st.text("abc._0 -", max_size=3)) + path[at + 1 :]
    if change == 1:
        return f"{path}.{draw(keys)}"
    if change == 2:
        return draw(odd_text)
    return path


@st.composite
def flags(draw: st.DrawFn) -> list[str]:
    """One override, or an option with its value."""
    if draw(st.integers(0, 4)) == 0:
        option = draw(
            st.sampled_from(
                ["--name", "--base", "--save-folder", "--data-root", "--work-dir", "--base",
                 "--sequence-length", "--nmae", "--model.preset", "--dataset.mix", "-x", "--"]
            )
        )  # fmt: skip
        return [option, draw(st.one_of(odd_text, numbers.map(str)))]
    if draw(st.integers(0, 2)):
        path = draw(st.sampled_from(PATHS))
        return [f"--{path}={as_json(draw(FITTING[path]))}"]
    text = draw(st.one_of(odd_text, values.map(as_json), numbers.map(str)))
    path = draw(odd_paths())
    return draw(st.sampled_from([[f"--{path}={text}"], [f"--{path}", text]]))


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _places(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _places(value, (*path, index))


def _changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(data, list) and str(first).isdigit():
        return [_changed(v, rest, value) if i == int(first) else v for i, v in enumerate(data)]
    inside = data if isinstance(data, dict) else {}
    return {**inside, first: _changed(inside.get(first), rest, value)}


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A config file: a recipe with values replaced and added, perhaps torn."""
    data: Any = json.loads(recipe_text(draw(st.sampled_from(RECIPES))))
    for _ in range(draw(st.integers(0, 1))):
        place = draw(st.sampled_from(list(_places(data))[1:]))
        data = _changed(data, place, draw(values))
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(PATHS))
        value = draw(st.one_of(FITTING[path], values))
        data = _changed(data, tuple(path.split(".")), value)
    text = as_json(data).encode("utf-8", "surrogatepass")
    damage = draw(st.integers(0, 11))
    if damage == 0:
        text = text[: draw(st.integers(0, len(text)))]
    elif damage == 1:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=5)) + text[at:]
    elif damage == 2:
        at = draw(st.integers(0, len(text)))
        odd = draw(
            st.sampled_from([b",", b"// x\n", b"#", b"'", b"[" * 3000, b"NaN", b"\xff", b"\0"])
        )
        text = text[:at] + odd + text[at:]
    return text


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[bytes | None, list[str]]:
    """A config file, if any, and the words after `toolkit train`; CONFIG stands for the file."""
    file = draw(st.one_of(st.none(), files()))
    source = (
        "CONFIG"
        if file is not None
        else draw(st.one_of(st.sampled_from(RECIPES), st.sampled_from(RECIPES), odd_text))
    )
    words = [source]
    for _ in range(draw(st.integers(0, 2))):
        words += draw(flags())
    return file, [*words, "--dry-run", *draw(st.sampled_from([[], ["--json"]]))]
