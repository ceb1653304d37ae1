"""`toolkit init`: a first config from answers: data, tokenizer, size and time.

What is not asked is the recipe quickstart's. Batch and rate follow the size by the law of
`toolkit ladder`, and steps follow from the time by what `toolkit plan` takes a step of this device
to need.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.commands.ladder.rungs import BATCH_EXPONENT, RATE_EXPONENT, parse_number
from toolkit.commands.ladder.sizes import multiplied_weights, scaled_model
from toolkit.commands.plan.devices import CPU, DEVICES, GIB, find_device
from toolkit.commands.plan.plans import Target, job_of, plan_of
from toolkit.config import convert
from toolkit.config.base import in_seconds
from toolkit.config.defaults import differing
from toolkit.config.files import YAML_SUFFIXES, check_new, write_new
from toolkit.config.paths import local_path
from toolkit.config.types import nearest
from toolkit.config.yaml_text import dump_yaml
from toolkit.data.config import TOKENIZER_PRESETS
from toolkit.data.prepare.text.files import list_files, why_missing
from toolkit.data.prepare.text.sources import file_kind
from toolkit.data.source_config import FilesSourceConfig, PythonStdlibSourceConfig, SourceConfig
from toolkit.errors import ConfigError, DataError, ErrorList
from toolkit.experiment.checks import check_experiment, layout_for
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.sources import own_name
from toolkit.launch.capacity import capacity_here
from toolkit.models.config import TransformerConfig
from toolkit.models.presets import PRESETS
from toolkit.storage.atomic import encode_json
from toolkit.wording import count

STDLIB = "python_stdlib"
_VOCABULARIES = {"byte": 257, "bpe": 4_096, "gpt2": 50_257, "dolma2": 100_278}
"""Tokenizer -> ids; of `bpe`, which is trained on the data, as many as quickstart has."""
_BYTES_A_TOKEN = {"byte": 1.0, "bpe": 3.4, "gpt2": 4.2, "dolma2": 4.4}
"""Of prose and code, about."""
_MANY_EPOCHS = 4
"""Up to here repeated text is about as good as new text (Muennighoff et al. 2023)."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_BASE_TOKENS, _BASE_RATE = 2_048, 3e-3
"""Tokens of a batch and peak rate of the recipe quickstart."""
_LONGEST = 1_024
_MICROBATCH = 16_384
_FEWEST_STEPS = 10
_EVALUATIONS = 10


class Answers(NamedTuple):
    data: str
    """Files and folders with commas, `python_stdlib`, or the name of a data set on the hub."""
    tokenizer: str
    """byte, bpe, gpt2 or dolma2."""
    size: str
    """A preset, or how many parameters, those of the output head among them: `10M`."""
    time: str
    """How long the training may take: 10m, 2h."""


class First(NamedTuple):
    """A first config."""

    data: dict[str, Any]
    """The content of its file."""
    config: ExperimentConfig
    steps: int
    seconds: float
    """Expected of the training."""
    device: str
    tokens: int | None
    """About how many the data has; None: not told before it is read."""

    @property
    def epochs(self) -> float | None:
        """About how often the training reads the data."""
        if self.tokens is None:
            return None
        return self.steps * self.config.data_loader.global_batch_size / self.tokens

    @property
    def is_repetitive(self) -> bool:
        return (self.epochs or 0) > _MANY_EPOCHS


def check_answer(name: str, answer: str) -> None:
    """Raise ConfigError where `answer` to a question of `Answers` cannot be used, whatever the
    others are."""
    if name == "size":
        _model(answer, min(_VOCABULARIES.values()))  # what is too small here always is
    else:
        {"data": _source, "tokenizer": _tokenizer, "time": _seconds}[name](answer)


def first_config(answers: Answers, device: str | None = None) -> First:
    """A config of what was answered, for one device (as `toolkit plan --device` has them; default:
    that of this machine). Raises ConfigError: an answer cannot be used."""
    errors = ErrorList()
    for word, answer in answers._asdict().items():
        errors.ask(check_answer, word, answer)
    errors.raise_any()
    seconds = _seconds(answers.time)
    source, tokenizer = _source(answers.data), _tokenizer(answers.tokenizer)
    given, model = _model(answers.size, _VOCABULARIES[answers.tokenizer])
    name = device_here() if device is None else device
    target = Target(find_device(name, 1), 1)

    growth = multiplied_weights(model) / multiplied_weights(TransformerConfig.preset("quickstart"))
    longest = 256 if name == CPU else _LONGEST
    length = _power_of_two(min(model.max_sequence_length, longest))
    batch = length * _power_of_two(max(8.0, _BASE_TOKENS * growth**BATCH_EXPONENT / length))
    if model.max_sequence_length != length:  # positions that are not trained are not promised
        model = model.replace(max_sequence_length=length)
        given["max_sequence_length"] = length
    dataset = {"source": source, "tokenizer": tokenizer, "sequence_length": length}
    dataset["dataset_name"] = own_name(source, tokenizer)
    data: dict[str, Any] = {
        "description": f"{answers.size} on {answers.data}, for {answers.time}",
        "run": {"experiment": _experiment(answers)},
        "model": given,
        "dataset": dataset,
        "data_loader": {"global_batch_size": batch},
        "train_module": {
            # A share of the batch for each of up to eight ranks, or all of a small one.
            "rank_microbatch_size": (
                None if batch <= _MICROBATCH else max(length, min(_MICROBATCH, batch // 8))
            ),
            "optim": {
                "type": "muon",
                "lr": float(f"{_BASE_RATE * growth**RATE_EXPONENT:.2g}"),
                "betas": [0.9, 0.95],
                "weight_decay": 0.1,
            },
            "scheduler": {"type": "cosine", "units": "steps", "warmup": 0, "alpha_f": 0.1},
        },
        "trainer": {"max_duration": {"value": _FEWEST_STEPS, "unit": "steps"}},
    }
    layout = layout_for(_config(data, model), {})
    plan = plan_of(job_of(_config(data, model), layout, target))
    if not plan.fits:
        need, have = plan.memory.total / GIB, target.device.memory / GIB
        raise ConfigError(
            f"--size {answers.size}: needs {need:.1f} GiB, and {name} has {have:.1f} GiB; give a "
            "smaller size, or another --device"
        )
    steps = int(seconds / plan.time.total)
    if steps < _FEWEST_STEPS:
        raise ConfigError(
            f"--time {answers.time}: enough for {count(steps, 'step')} of about "
            f"{plan.time.total:.0f} s on {name}; give a longer time or a smaller --size"
        )
    interval = max(1, steps // _EVALUATIONS)
    data["train_module"]["scheduler"]["warmup"] = max(1, steps // 20)
    data["trainer"] = {
        "max_duration": {"value": steps, "unit": "steps"},
        "callbacks": {
            "lm_evaluator": {"interval": interval},
            "checkpointer": {"interval": interval, "keep_last": 2},
        },
    }
    config = _config(data, model)
    check_experiment(config, layout.batch_ranks, layout=layout)
    tokens = _tokens(config.dataset.source, answers.tokenizer)
    return First(data, config, steps, steps * plan.time.total, name, tokens)


def first_file(file: str) -> Path:
    """Where a first config goes. Raises ConfigError: nothing can be written there."""
    path = local_path(file, "FILE")
    check_new(path)
    return path


def write_first(first: First, path: Path) -> None:
    """Write it to `path`, as YAML where that is its ending. Raises ConfigError: it exists, or
    cannot be written."""
    is_yaml = path.suffix.lower() in YAML_SUFFIXES
    write_new(path, dump_yaml(first.data) if is_yaml else encode_json(first.data).decode())


def device_here() -> str:
    """What `toolkit plan --device` calls this machine's device. Raises ConfigError: its GPU is not
    in the table."""
    if not capacity_here().gpus:
        return CPU
    import torch

    title = torch.cuda.get_device_name(0)
    found = next((name for name, device in DEVICES.items() if device.title == title), None)
    if found is None:
        known = ", ".join([*DEVICES, CPU])
        raise ConfigError(
            f"{title}: its speed is not known; give the most similar --device: {known}"
        )
    return found


def _config(data: dict[str, Any], model: TransformerConfig) -> ExperimentConfig:
    return convert({**data, "model": model.to_dict()}, ExperimentConfig)


def _seconds(time: str) -> float:
    try:
        return in_seconds(time)
    except ValueError as error:
        raise ConfigError(f"--time {time}: {error}") from None


def _source(data: str) -> dict[str, Any]:
    if data == STDLIB:
        return {"type": STDLIB}
    paths = [path.strip() for path in data.split(",") if path.strip()]
    if "${" in data:
        raise ConfigError(f"--data {data}: a config takes ${{NAME}} for a variable; rename it")
    missing = [p for p in paths if why_missing(p) is not None]
    if paths and not missing:
        try:
            list_files(FilesSourceConfig(paths=paths))
        except DataError as error:
            raise ConfigError(f"--data {data}: {error.problem}") from None
        return {"type": "files", "paths": paths}
    if len(paths) == 1 and _HUB_NAME.fullmatch(paths[0]):
        return {"type": "hub", "name": paths[0]}
    raise ConfigError(
        f"--data {data}: no such file or folder: {', '.join(missing) or 'nothing given'}; give "
        f"files or folders with commas, OWNER/NAME of the hub, or {STDLIB}"
    )


def _tokens(source: SourceConfig | None, tokenizer: str) -> int | None:
    """About how many tokens the text of plain files has."""
    if not isinstance(source, FilesSourceConfig | PythonStdlibSourceConfig):
        return None
    files = list_files(source).files
    if any(file_kind(file, "text") not in ("text", "jsonl") for file in files):
        return None
    return int(sum(file.num_bytes for file in files) / _BYTES_A_TOKEN[tokenizer])


def _tokenizer(name: str) -> dict[str, Any]:
    if name not in _VOCABULARIES:
        raise ConfigError(
            f"--tokenizer {name}: give one of {', '.join(_VOCABULARIES)}; with another, edit "
            "dataset.tokenizer and model.vocab_size of the file afterwards"
        )
    if name == "bpe":
        return {"type": "bpe", "vocab_size": _VOCABULARIES[name]}
    return dict(TOKENIZER_PRESETS.get(name, {"type": name}))


def _model(size: str, vocab_size: int) -> tuple[dict[str, Any], TransformerConfig]:
    """What the file says of the model, and the model."""
    if size in PRESETS:
        model = TransformerConfig.preset(size)
        if model.vocab_size == vocab_size:
            return {"preset": size}, model
        own = model.replace(vocab_size=vocab_size)
        return {"preset": size, "vocab_size": vocab_size}, own
    if not size[:1].isdigit():
        near = nearest(size, PRESETS)
        hint = f"did you mean {near!r}?" if near else "`toolkit models` lists presets"
        raise ConfigError(f"--size {size}: neither a preset nor a number such as 10M; {hint}")
    base = TransformerConfig.preset("quickstart").replace(vocab_size=vocab_size)
    try:
        model = scaled_model(base, parse_number(size, "--size"))
    except ConfigError as error:
        raise ConfigError(error.problem.replace("--sizes", "--size")) from None
    named = {"type"} | {path.partition(".")[0] for path in differing(model)}
    return {key: value for key, value in model.to_dict().items() if key in named}, model


def _experiment(answers: Answers) -> str:
    word = Path(answers.data.split(",")[0].rstrip("/")).name.partition(".")[0]
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-")
    return f"{word or 'first'}-{answers.size}"


def _power_of_two(number: float) -> int:
    return 1 << (int(number).bit_length() - 1)
