"""Everything a run folder holds, by name.

`metrics.streams`, which stands beside this room and not above it, spells its own four files; a test
holds the two together.
"""

import msgspec


class RunFiles(msgspec.Struct, frozen=True):
    """Paths relative to the run folder; `RunManager.path(RUN_FILES.x)` makes them whole."""

    metadata: str = "metadata"
    """Folder: what ran, where, and how it ended."""
    config: str = "metadata/config.json"
    """The resolved `ExperimentConfig`; `toolkit resume` starts from it."""
    origins: str = "metadata/origins.json"
    """Where each value of the config came from: recipe, file or flag (defaults left out)."""
    data_config: str = "metadata/data_config.json"
    """`DataConfig`: data set and data loader."""
    model_config: str = "metadata/model_config.json"
    """The model's config."""
    trainer_config: str = "metadata/trainer_config.json"
    """`train_module` and `trainer`."""
    engine: str = "metadata/engine.json"
    """Engine, processes, precision, threads and device: what decides how numbers are rounded."""
    optimizer_groups: str = "metadata/optimizer_groups.json"
    """Which parameters have which settings of the optimizer, where a config says it."""
    environment: str = "metadata/environment.json"
    """Python, library versions, host, devices, launcher variables."""
    command: str = "metadata/command.json"
    """Command line, folder and interpreter of the newest attempt."""
    git: str = "metadata/git.json"
    """Commit, branch and cleanness of the repository the command ran in."""
    requirements: str = "metadata/requirements.txt"
    """Every installed package, where `config_saver` is on."""
    changes: str = "metadata/changes.patch"
    """Uncommitted changes of tracked files, where `config_saver` is on and there are some."""
    status: str = "metadata/status.json"
    """State, step, attempt; see `RunStatus`."""
    lock: str = "metadata/lock"
    """A lock of the operating system, held while a writer takes or takes over the run."""
    lock_info: str = "metadata/lock.json"
    """Host, pid and heartbeat of that writer; absent when nobody writes."""
    copy_of: str = "metadata/copy_of.json"
    """The URL that this folder was fetched from; gone when a writer has begun here."""

    ranks: str = "metadata/ranks"
    """Folder: where each rank runs, and why the first one failed."""

    metrics: str = "metrics"
    """Folder: one JSON object a line."""
    train_metrics: str = "metrics/train.jsonl"
    """One line per optimizer step."""
    eval_metrics: str = "metrics/eval.jsonl"
    """One line per evaluation."""
    network_metrics: str = "metrics/network.jsonl"
    """The neural network: gradient and weight norms per layer."""
    system_metrics: str = "metrics/system.jsonl"
    """The machine: GPU, CPU, memory, disk, network interfaces."""

    final_metrics: str = "metrics/final.json"
    """The last values of training and of every evaluation, where `metric_saver` is on."""
    samples: str = "metrics/samples.jsonl"
    """Text generated from the model; absent where none was."""

    trackers: str = "trackers"
    """Folder: how far each tracker has been told; absent where none is enabled."""
    spikes: str = "metrics/spikes.jsonl"
    """One line per spike of loss or gradient norm, where `stability_monitor` is on."""
    profiles: str = "profiles"
    """Folder: traces of `profiler`, by rank and step."""

    tensorboard: str = "tb"
    """Folder: TensorBoard event files in train/, eval/, network/, system/."""
    checkpoints: str = "checkpoints"
    """Folder: step{N}/ each."""
    merged: str = "merged"
    """Folder: step{N}/ each, means of weights, from `model_merger` and `toolkit merge`."""
    exports: str = "hf"
    """Folder: step{N}/ each, for transformers, from `hf_converter`."""
    downloads: str = "downloads"
    """Folder: step{N}/ of the remote `trainer.load_path` that the run began from."""
    tokenizer: str = "tokenizer"
    """Folder: the tokenizer of the data, for whoever uses the model; absent where none is known."""
    logs: str = "logs"
    """Folder: one log file per rank."""


RUN_FILES = RunFiles()
