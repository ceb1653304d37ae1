"""Which choices a start makes: recorded ones, else by timings, else fixed ones."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from toolkit.autotune import cache
from toolkit.autotune.choices import (
    MARGINS,
    PRODUCTS_SHARE,
    Choices,
    Timings,
    fastest,
    pays_to_compile,
    ratio,
)
from toolkit.autotune.question import Aspect, Question, can_compile
from toolkit.wording import count


class Answer(NamedTuple):
    choices: Choices
    notices: tuple[str, ...] = ()
    """Lines to show once."""


def choose(
    question: Question,
    measure: Callable[[Question], Timings],
    *,
    fixed: str,
    recorded: Choices | None = None,
    anew: frozenset[Aspect] = frozenset(),
) -> Answer:
    """What `question` leaves open, from timings of this machine: from its cache, or `measure`d now.

    `fixed`: the precision where none is measured. With `recorded`, the choices of a run that goes
    on, nothing is measured but what is chosen `anew`: they stay, what they leave open is as without
    measuring, and a notice says what this machine would choose instead, as far as its cache knows.
    """
    notices: list[str] = []
    if recorded is None:
        timings = Timings()
        if needs_timings(question):
            timings = cache.find_or_measure(question.key, lambda: measure(question), notices)
        choices = decide(question, timings, fixed)
        return Answer(choices, (*notices, *_line(question, choices, timings)))
    kept = recorded_for(question, recorded, fixed)
    if again := question.asks & anew:
        known = question.precision if "precision" in again else kept.precision
        part = msgspec.structs.replace(question, asks=again, precision=known or question.precision)
        answer = choose(part, measure, fixed=fixed)
        chosen = {name: getattr(answer.choices, name) for name in again}
        return Answer(msgspec.structs.replace(kept, **chosen), answer.notices)
    if kept.precision is not None and kept.precision == recorded.precision:
        notices += _other_here(question, kept, fixed)
    return Answer(kept, tuple(notices))


def _other_here(question: Question, kept: Choices, fixed: str) -> Iterator[str]:
    """Where this machine would compute in another precision than the run does."""
    asks: frozenset[Aspect] = question.asks | {"precision"}
    question = msgspec.structs.replace(question, asks=asks, precision="auto")
    timings = cache.find(question.key)
    here = decide(question, timings or Timings(), fixed).precision
    assert here is not None  # asked for
    if here != kept.precision and (timings is not None or question.device != "cpu"):
        yield (
            f"precision {kept.precision}, as the run recorded it; this machine would choose {here}"
            f"{_measured(here, timings)}: --train_module.precision={here} takes it"
        )


def needs_timings(question: Question) -> bool:
    """Whether anything that is open is measured on this device."""
    if question.device == "cpu":
        return bool(question.asks & {"precision", "threads", "compile_model"})
    return question.device == "cuda" and "attention" in question.asks


def unmeasured(question: Question, fixed: str) -> Choices:
    """The choices where nothing is measured: `fixed`, all of the share of the cores, uncompiled."""
    return decide(msgspec.structs.replace(question, steps=None), Timings(), fixed)


def decide(question: Question, timings: Timings, fixed: str) -> Choices:
    """The choices that follow from `timings`: a pure function, but for whether there is a
    compiler."""
    asks, found = question.asks, Choices()
    precision = question.precision
    if "precision" in asks:
        precision = fixed
        if timings.precision:
            precision = fastest(timings.precision, "fp32", MARGINS["precision"])
        found = msgspec.structs.replace(found, precision=precision)
    if "threads" in asks:
        threads = fastest(timings.threads, question.threads, MARGINS["threads"])
        fewer = threads if threads != question.threads else None
        found = msgspec.structs.replace(found, threads=fewer)
    if "attention" in asks and "flash" in timings.attention:
        kernel = fastest(timings.attention, "flash", MARGINS["attention"])
        found = msgspec.structs.replace(found, attention=kernel)
    if "compile_model" in asks:
        seconds = timings.precision.get(precision, 0.0) * question.passes / PRODUCTS_SHARE
        if question.device == "cuda":
            seconds = question.estimate
        compiles = pays_to_compile(
            seconds, question.steps, device=question.device, precision=precision
        )
        found = msgspec.structs.replace(found, compile_model=compiles and can_compile())
    return found


def recorded_for(question: Question, recorded: Choices, fixed: str) -> Choices:
    """`recorded` where `question` is open, and what is chosen without measuring where it says
    nothing."""
    known = {n: v for n in question.asks if (v := getattr(recorded, n)) is not None}
    # A precision that was filled in already is a choice of `auto` all the same.
    if question.precision == recorded.precision:
        known["precision"] = recorded.precision
    return msgspec.structs.replace(unmeasured(question, fixed), **known)


def _line(question: Question, choices: Choices, timings: Timings) -> list[str]:
    parts = describe(question, choices, timings)
    lines = [", ".join(parts)] if parts else []
    if question.device == "cpu" and not timings.lasts:
        compared = ": threads not compared, and" if "threads" in question.asks else ":"
        lines.append(f"other programs use this machine{compared} the measurement is not kept")
    return lines


def describe(question: Question, choices: Choices, timings: Timings) -> list[str]:
    """What was chosen and why, in a few words each; nothing of what was not asked."""
    parts = []
    if choices.precision is not None:
        parts.append(f"precision {choices.precision}{_measured(choices.precision, timings)}")
    if choices.threads is not None:
        gain = timings.threads[question.threads] / timings.threads[choices.threads]
        parts.append(f"{choices.threads} of {question.threads} threads (measured {gain:.1f}x)")
    elif "threads" in question.asks:
        parts.append(count(question.threads, "thread"))
    if choices.attention == "cudnn":
        gain = timings.attention["flash"] / timings.attention["cudnn"]
        parts.append(f"attention by cuDNN (measured {gain:.1f}x of flash)")
    if choices.compile_model:
        parts.append(f"compiled (pays within {question.steps:,} steps)")
    elif "compile_model" in question.asks:
        parts.append(f"not compiled ({_why_not_compiled(question)})")
    return parts


def _why_not_compiled(question: Question) -> str:
    if not can_compile():
        return "no C++ compiler and headers of Python"
    if question.steps is None:
        return "for a length in epochs"
    return count(question.steps, "step")


def _measured(precision: str, timings: Timings | None) -> str:
    gain = None if timings is None else ratio(timings)
    if gain is None:
        return ""
    if precision == "bf16":
        return f" (measured {gain:.1f}x of fp32 on this CPU)"
    return f" (measured on this CPU: bf16 is {gain:.1f}x of it)"
