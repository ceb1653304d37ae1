"""`toolkit`: the app, and the one place that turns errors into a line and an exit code."""

import contextlib
import errno
import gc
import io
import logging
import os
import shlex
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from toolkit import __version__, signals
from toolkit.cli import (
    data,
    doctor,
    generate,
    init,
    ladder,
    launch,
    models,
    plan,
    recipes,
    report,
    runs,
    schedule,
    stop_leaving,
    sweep,
    train,
    tune,
    verify,
)
from toolkit.cli.options import OVERRIDABLE, Invocation, option
from toolkit.cli.output import has_lost_reader, open_missing_streams, outlive_readers
from toolkit.distributed.ranks import ENGINE, LAUNCH_FOLDER, adopt_ranks
from toolkit.distributed.tuning import set_defaults
from toolkit.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    SeveralErrors,
    ToolkitError,
    reason_of_machine,
)
from toolkit.parents import is_surely_one_of_many
from toolkit.wording import shortened

EXIT_INTERRUPTED = 130
"""Ctrl-C before there is a run (128 + SIGINT); a run ends with `EXIT_STOPPED`."""

_TRAINING = ("train", "resume")
_COMPUTING = (*_TRAINING, "verify", "eval", "generate")
_READING = (
    "",
    "plan",
    "schedule",
    "runs",
    "recipes",
    "models",
    "init",
    "schema",
    "batch",
    "generate",
    "show",
    "inspect",
    "doctor",
)
"""Verbs that are done when nobody reads on. The others work, whether anybody looks or not."""

# Rank 0's line should be out before the launcher sees any rank end and stops the others.
_SECONDS_FOR_RANK_0 = 1.0

# typer brings its own copy of click, under a private name; this is its UsageError.
_UsageError: Any = typer.BadParameter.__base__

_LONGEST_MESSAGE = 1_500
"""Characters; values of files from elsewhere may be of any length."""
_OTHER_NAMES = {
    "dry_run": "toolkit train {} --dry-run",
    "dry-run": "toolkit train {} --dry-run",
    "prep": "toolkit prepare {}",
    "train_single": "toolkit train {}",
    "runs remove": "toolkit runs rm {}",
    "runs delete": "toolkit runs rm {}",
}
"""Verbs of OLMo-core's scripts and other words, and the command that does the same."""

_NO_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES)
"""What the operating system says of a path that cannot be one, or is not ours."""

_COLLECTIONS = (100_000, 10, 10)
"""Objects and younger collections before Python looks for garbage. Its own 700 suit small programs:
a fifth of the time that torch and its like take to load would go into it."""

_CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that tell of kernels for other devices when transformers or peft import torchao."""

app = typer.Typer(
    name="toolkit",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(init.init)
for _verb in (train.train, train.resume, train.prepare):
    app.command(context_settings=OVERRIDABLE)(_verb)
app.command(context_settings=OVERRIDABLE, cls=launch.LaunchCommand)(launch.launch)
app.add_typer(launch.jobs, name="jobs")
app.command(context_settings=OVERRIDABLE)(plan.plan)
app.command(context_settings=OVERRIDABLE)(sweep.sweep)
app.command(context_settings=OVERRIDABLE)(schedule.schedule)
app.command(context_settings=OVERRIDABLE)(ladder.ladder)
app.command(context_settings=OVERRIDABLE)(tune.tune)
app.add_typer(recipes.app, name="recipes")
app.add_typer(runs.app, name="runs")
app.command()(report.report)
app.command()(report.board)
app.add_typer(data.app, name="data")
app.command()(verify.verify)
app.command()(verify.batch)
app.command("convert-hf")(models.convert_hf)
app.command("export-hf")(models.export_hf)
app.command()(models.merge)
app.command("eval")(models.evaluate)
app.command()(generate.generate)
app.command()(recipes.models)
app.command()(recipes.schema)
app.command()(doctor.doctor)


@app.callback()
def _toolkit(
    version: Annotated[bool, option("Print the version and exit.", "--version")] = False,
    debug: Annotated[bool, option("Show tracebacks of errors. Goes anywhere.", "--debug")] = False,
) -> None:
    """Train language models: a typed config in, a run folder out.

    \b
    Examples:
      toolkit train quickstart
      toolkit train quickstart --processes 2 --engine fsdp --train_module.optim.lr=2e-3
      toolkit train my.json --dry-run
    """


def main() -> None:
    """The console script: run the command line and exit with the code of what happened."""
    gc.set_threshold(*_COLLECTIONS)
    set_defaults()
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    args = sys.argv[1:]
    verbs = [word for word in args if not word.startswith("-") and word != "data"]
    verb = verbs[0] if verbs else ""
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    stop_leaving()
    if "--debug" in args and verb in _COMPUTING:
        _wait_for_kernels()
    with contextlib.ExitStack() as stack:
        if verb not in _READING:
            outlive_readers()
            doing = "stopping before the first step" if verb in _TRAINING else "stopping"
            stack.enter_context(signals.listening(signals.Starting(doing=doing)))
        code = run(args)
    sys.exit(code)


def _wait_for_kernels() -> None:
    """Have an error of a CUDA kernel point to the line that launched it. Before torch is there."""
    mode = os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
    if os.environ.get("RANK", "0") == "0" and LAUNCH_FOLDER not in os.environ:
        typer.echo(
            f"--debug: CUDA_LAUNCH_BLOCKING={mode} in every process"
            + (": GPU kernels run one at a time, which is slow" if mode == "1" else ""),
            err=True,
        )


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error ends here."""
    engine = os.environ.get(ENGINE)
    try:
        return _run(args)
    finally:  # `--engine` of this command line is not that of the next one
        os.environ.pop(ENGINE, None)
        if engine is not None:
            os.environ[ENGINE] = engine


def _run(args: Sequence[str]) -> int:
    debug = "--debug" in args
    words = [word for word in args if word != "--debug"] or ["--help"]
    if words == ["--version"]:
        print(f"toolkit {__version__}")
        return EXIT_DONE
    for length in (1, 2):
        if (name := " ".join(words[:length])) in _OTHER_NAMES:
            rest = shlex.join(words[length:]) or ("CONFIG" if length == 1 else "RUN")
            message = f"no such command: {name}; type: {_OTHER_NAMES[name].format(rest)}"
            return _report(message, EXIT_BAD_INPUT, debug=debug)
    try:
        # Who starts processes itself is one process of each machine, whatever `srun` says.
        if not any(word.partition("=")[0] == "--processes" for word in words):
            adopt_ranks(os.environ)
        result = app(
            words, prog_name="toolkit", standalone_mode=False, obj=Invocation(tuple(words), debug)
        )
        sys.stdout.flush()
        asked = signals.asked()
        if result == EXIT_INTERRUPTED and asked is not None:  # typer's word for all of them
            return signals.exit_code(asked)
        return result if isinstance(result, int) else EXIT_DONE
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        # typer leaves with 1, without a word, by whatever pipe the error came.
        cause = error.__context__ if isinstance(error, SystemExit) else error
        if not isinstance(cause, BrokenPipeError):
            raise
        if not has_lost_reader(sys.stdout):  # another pipe: a worker's, a server's
            raise cause from None
        # The reader (`| head`) has what it wants; Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        if error.errno == errno.ENOENT and not _is_somewhere():
            gone = "the current folder was removed; change to another one"
            return _report(gone, EXIT_BAD_INPUT, debug=debug)
        if error.errno in _NO_PATHS and error.filename is not None:
            name = shortened(str(error.filename))
            return _report(f"{name}: {error.strerror}", EXIT_BAD_INPUT, debug=debug)
        line = reason_of_machine(error)
        if line is None:
            raise
        return _report(line, EXIT_FAILED, debug=debug)
    except RuntimeError as error:
        if "home directory" not in str(error):  # of pathlib: `~name` of nobody
            raise
        name = next((word for word in words if "~" in word), "~")
        return _report(f"{shortened(name)}: no such user here", EXIT_BAD_INPUT, debug=debug)
    except _UsageError as error:
        message = error.format_message().replace("Value error, ", "")  # pydantic's word
        if message.startswith("No such command") and "Did you mean" not in message:
            verb = error.ctx.command_path if error.ctx is not None else "toolkit"
            message += f" `{verb} --help` lists them."
        return _report(message, EXIT_BAD_INPUT, debug=debug)
    except SeveralErrors as error:
        number = f"{len(error.errors)} problems, one a line:"
        return _report("\n".join([number, *map(str, error.errors)]), error.exit_code, debug=debug)
    except ToolkitError as error:
        message = " ".join(str(error).split())
        return _report(message, error.exit_code, debug=debug, only_here=error.only_here)


def _is_somewhere() -> bool:
    """Whether the current folder is there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _report(message: str, code: int, *, debug: bool, only_here: bool = False) -> int:
    """Print the lines of the error on rank 0; other ranks keep quiet, unless it is theirs alone."""
    from toolkit.config.secrets import mask_secrets

    signals.settle()
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not only_here and is_surely_one_of_many():
        time.sleep(_SECONDS_FOR_RANK_0)
        return code
    if only_here or rank != "0":
        message = f"[rank {rank}, {socket.gethostname()}] {message}"
    if debug:
        traceback.print_exc()
    sys.stdout.flush()
    label = typer.style("error:", fg=typer.colors.RED, bold=True)
    for line in message.splitlines():
        text = str(mask_secrets(" ".join(line.split())))
        if len(text) > _LONGEST_MESSAGE and not debug:
            text = f"{text[:_LONGEST_MESSAGE]}... (cut; --debug shows all)"
        typer.echo(f"{label} {text}", err=True)
    return code
