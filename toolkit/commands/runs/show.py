"""`toolkit runs show`: one run on one page."""

import shlex
from pathlib import Path
from typing import Any

import msgspec

from toolkit.commands.runs.curves import overlay
from toolkit.metrics.history import read_history
from toolkit.runs.facts import AttemptFacts, RunFacts, run_facts
from toolkit.wording import compact, count, labelled, span, visible

_LONGEST_LIST = 12
_MOST_ATTEMPTS = 8


def page(folder: Path, *, width: int = 76) -> list[str]:
    """The lines of the page. Raises RunError: `folder` is no run."""
    run = run_facts(folder)
    rows: list[tuple[str, list[str]]] = [
        ("folder", [run.folder]),
        ("mirror", [run.record.mirror] if run.record.mirror else []),
        ("tags", [", ".join(run.tags)] if run.tags else []),
        ("note", [run.note] if run.note else []),
        ("started", [_started(run)]),
        ("duration", [_duration(run)]),
        ("progress", [_progress(run)]),
        ("loss", _losses(run)),
        ("model", _model(run)),
        ("data", _data(run)),
        ("machine", _machine(run)),
        ("code", _code(run)),
        ("command", _command(run)),
        ("given", _given(run)),
        ("attempts", _attempts(run)),
        ("checkpoints", _checkpoints(run)),
    ]
    lines = [f"{run.title}  {run.id}  {_state(run)}"]
    lines += labelled((label, texts) for label, texts in rows if texts)
    curves = read_history(folder, ["loss"], points=4_000)
    if "loss" in curves.train:
        shown = {"t": curves.train["loss"]}
        legend = "t: training loss"
        name = f"{run.progress.val_name}/loss"
        if name in curves.eval:
            shown["V"] = curves.eval[name]
            legend += f", V: {run.progress.val_name} loss"
        lines += ["", legend, *overlay(shown, width=width)]
    return [visible(line) for line in lines]


def as_json(folder: Path) -> dict[str, Any]:
    """Everything for machines. Raises RunError: `folder` is no run."""
    run = run_facts(folder)
    values = msgspec.to_builtins(run)
    del values["status"]
    return {"id": run.id, "title": run.title, "age": run.age, "seconds": run.seconds, **values}


def _state(run: RunFacts) -> str:
    reason = run.status.exit_reason
    text = run.record.state
    if reason not in (None, "done") and text != "running":
        text += f" ({reason})"
    return f"{text}: {run.status.message}" if run.status.message else text


def _started(run: RunFacts) -> str:
    age = f" ({span(run.age)} ago)" if run.age is not None else ""
    number = count(run.status.attempt, "attempt")
    return f"{run.record.created}{age}, {number}, on {run.record.host}"


def _duration(run: RunFacts) -> str:
    return "unknown" if run.seconds is None else span(run.seconds)


def _progress(run: RunFacts) -> str:
    record = run.record
    if record.step is None:
        return "no step yet"
    text = f"step {record.step:,}"
    duration = run.config.get("trainer", {}).get("max_duration")
    if isinstance(duration, dict) and "value" in duration:
        text += f" (asked for: {duration['value']:,} {duration.get('unit', '')})"
    if record.tokens is not None:
        text += f", {compact(record.tokens)} tokens"
    if record.tokens_per_second is not None:
        text += f", {compact(record.tokens_per_second)} tokens/s"
    return text


def _losses(run: RunFacts) -> list[str]:
    progress, lines = run.progress, []
    if run.record.loss is not None:
        lines.append(f"training {run.record.loss:.4f}")
    if progress.val_loss is not None:
        line = f"{progress.val_name} {progress.val_loss:.4f} at step {progress.val_step:,}"
        if progress.best_val_loss is not None:
            line += f", best {progress.best_val_loss:.4f} at step {progress.best_val_step:,}"
        lines.append(line)
    return lines


def _model(run: RunFacts) -> list[str]:
    model, words = run.config.get("model"), []
    if run.record.parameters is not None:
        words.append(f"{run.record.parameters:,} parameters")
    if isinstance(model, dict):
        names = {"num_layers": "layers", "d_model": "wide", "vocab_size": "in the vocabulary"}
        words += [f"{model[key]:,} {word}" for key, word in names.items() if _is_int(model, key)]
    return [", ".join(words)] if words else []


def _data(run: RunFacts) -> list[str]:
    dataset, words = run.config.get("dataset"), []
    if isinstance(dataset, dict):
        if dataset.get("mix"):
            words.append("a mixture")
        elif dataset.get("dataset_name"):
            words.append(f"{dataset['dataset_name']}/{dataset.get('dataset_config')}")
        if _is_int(dataset, "sequence_length"):
            words.append(f"{dataset['sequence_length']:,} tokens a row")
    if "fingerprint" in run.data:
        words.append(f"fingerprint {run.data['fingerprint']}, seed {run.data.get('seed')}")
    return [", ".join(words)] if words else []


def _machine(run: RunFacts) -> list[str]:
    words = []
    if run.record.engine is not None:
        words.append(f"{run.record.engine} x {run.record.world_size}")
    if "precision" in run.engine:
        words.append(str(run.engine["precision"]))
    if _is_int(run.engine, "threads"):
        words.append(count(run.engine["threads"], "thread"))
    asked, chosen = run.config.get("train_module"), run.engine.get("chosen")
    asked = asked.get("compile_model") if isinstance(asked, dict) else None
    if asked == "auto" and isinstance(chosen, dict):
        asked = bool(chosen.get("compile_model"))
    if isinstance(asked, bool):
        words.append("compiled" if asked else "not compiled")
    if "device" in run.engine:
        words.append(str(run.engine["device"]))
    return [", ".join(words)] if words else []


def _code(run: RunFacts) -> list[str]:
    versions = run.environment.get("versions")
    words = []
    if isinstance(versions, dict):
        words = [f"{name} {versions[name]}" for name in ("toolkit", "torch") if versions.get(name)]
    if commit := run.git.get("commit"):
        dirty = " with uncommitted changes" if run.git.get("dirty") else ""
        words.append(f"commit {str(commit)[:12]} of {run.git.get('branch')}{dirty}")
    return [", ".join(words)] if words else []


def _command(run: RunFacts) -> list[str]:
    typed = [one.get("argv") for one in (run.command, *run.resumes)]
    known = [argv for argv in typed if isinstance(argv, list) and len(argv) > 1]
    return list(dict.fromkeys(shlex.join(["toolkit", *map(str, argv[1:])]) for argv in known))


def _given(run: RunFacts) -> list[str]:
    """Values that neither the recipe nor a default says."""
    given = {
        path: origin
        for path, origin in run.origins.items()
        if not origin.startswith("recipe") and path != "description"
    }
    from_flags = [origin for origin in given.values() if origin.startswith("--")]
    files = dict.fromkeys(o for o in given.values() if not o.startswith("--"))
    lines = [*files, *dict.fromkeys(from_flags)]
    more = len(lines) - _LONGEST_LIST
    return lines[:_LONGEST_LIST] + ([f"and {more} more"] if more > 0 else [])


def _attempts(run: RunFacts) -> list[str]:
    if len(run.attempts) < 2:
        return []
    lines = [_attempt(attempt) for attempt in run.attempts[-_MOST_ATTEMPTS:]]
    earlier = len(run.attempts) - len(lines)
    return [*([f"{count(earlier, 'earlier attempt')}"] if earlier else []), *lines]


def _attempt(attempt: AttemptFacts) -> str:
    text = f"{attempt.number}: {attempt.started or 'unknown'}"
    if attempt.seconds is not None:
        text += f", {span(attempt.seconds)}"
    if attempt.last_step is not None:
        first = f"steps {attempt.first_step:,} to " if attempt.first_step is not None else "step "
        text += f", {first}{attempt.last_step:,}"
    if attempt.done_again:
        text += f" (the last {attempt.done_again:,} done again)"
    text += f", {attempt.state}"
    if attempt.reason not in (None, "done") and attempt.state != "running":
        text += f" ({attempt.reason})"
    return f"{text} on {attempt.host}" if attempt.host else text


def _checkpoints(run: RunFacts) -> list[str]:
    if not run.checkpoints:
        return []
    names = [f"step{saved.step}" for saved in run.checkpoints]
    shown = names if len(names) <= _LONGEST_LIST else [*names[:3], "...", *names[-6:]]
    return [f"{len(names)}: {', '.join(shown)}"]


def _is_int(mapping: dict[str, Any], key: str) -> bool:
    return type(mapping.get(key)) is int
