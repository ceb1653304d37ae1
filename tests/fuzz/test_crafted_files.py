"""Whatever a file from elsewhere holds, a verb answers: no traceback, no hang, no code of the file.

Each case is one seed: a whole input with one thing changed, given to verbs of the command line in
this process. A failure names kind and seed; `check("checkpoint", 24, ...)` repeats it.
"""

import random
from pathlib import Path

import pytest

from tests.fuzz.cases import CASES
from tests.fuzz.verbs import canary_of, run
from tests.fuzz.whole import make_whole

FAST = 5
MANY = 100


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_whole(tmp_path_factory.mktemp("whole"))


def check(kind: str, seed: int, place: Path, whole: dict[str, Path]) -> list[str]:
    """What is wrong with the answers to one input."""
    place.mkdir()
    rng = random.Random(f"{kind}-{seed}")
    verbs = CASES[kind](rng, place, whole)
    canary = canary_of(place)
    found = [(words, run(words, canary)) for words in verbs]
    return [f"{kind} {seed}: {words[:2]}: {wrong}" for words, wrong in found if wrong is not None]


@pytest.mark.parametrize("kind", CASES)
def test_a_few_crafted_inputs_are_answered(
    kind: str, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = [w for s in range(FAST) for w in check(kind, s, tmp_path / str(s), whole)]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", CASES)
def test_many_crafted_inputs_are_answered(
    kind: str, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seeds = range(FAST, FAST + MANY)
    wrong = [w for s in seeds for w in check(kind, s, tmp_path / str(s), whole)]
    assert wrong == []
