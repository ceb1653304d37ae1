"""Callbacks that watch a run: statistics, spikes, ranks, GPU memory, profiles, messages."""

import gzip
import http.server
import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import build, global_batch, module_config, open_environment
from tests.train.test_remote_runs import run as run_smoke
from tests.workers import WorkerPool
from toolkit.config.check import convert
from toolkit.distributed.config import PipelineParallelConfig
from toolkit.errors import ConfigError
from toolkit.launch.watchdog import Heartbeat
from toolkit.train.callbacks.config import CallbacksConfig
from toolkit.train.callbacks.config_monitors import (
    GPUMemoryMonitorConfig,
    NotifierConfig,
    ProfilerConfig,
    RankMonitorConfig,
    StabilityMonitorConfig,
    StatisticsMonitorConfig,
)
from toolkit.train.callbacks.gpu_memory_monitor import GPUMemoryMonitor
from toolkit.train.callbacks.notifier import Notifier
from toolkit.train.callbacks.profiler import Profiler
from toolkit.train.callbacks.rank_monitor import RankMonitor
from toolkit.train.callbacks.stability_monitor import StabilityMonitor

FLAGS = [
    "--trainer.no_evals",
    "--trainer.no_checkpoints",
    "--trainer.callbacks.statistics_monitor={enabled: true, interval: 4}",
    "--trainer.callbacks.rank_monitor={enabled: true, interval: 4}",
    "--trainer.callbacks.gpu_memory_monitor={enabled: true}",
    "--trainer.callbacks.profiler={enabled: true, skip_first: 1, wait: 0, warmup: 1, active: 2, "
    "ranks: [0], record_shapes: true}",
    "--trainer.callbacks.stability_monitor={enabled: true, window: 4, sigma_factor: 0.5}",
]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_is_watched(workers: WorkerPool, tmp_path: Path) -> None:
    for ranks in (1, 2):
        place = f"{tmp_path}/r{ranks}"
        results = workers.run(ranks, run_smoke, place, f"{tmp_path}/data", *FLAGS)
        assert [code for code, _ in results] == [0] * ranks, results
    one, two = tmp_path / "r1", tmp_path / "r2"
    for ours, theirs in zip(
        lines(one / "metrics/network.jsonl"), lines(two / "metrics/network.jsonl"), strict=True
    ):
        assert ours.keys() == theirs.keys()
        kinds = {name.split("/")[0] for name in ours}
        if ours["step"] % 4 == 0:
            assert {"gradient_max", "weight_max", "activation_rms", "activation_max"} <= kinds
        for name in ours.keys() - {"time"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-6), name
    steps = [line["step"] for line in lines(one / "metrics/network.jsonl")]
    assert steps == [1, 4, 8, 10, 12]
    first = lines(one / "metrics/network.jsonl")[0]  # of two monitors
    assert {"gradient_max", "grad_norm"} <= {name.split("/")[0] for name in first}
    train = lines(two / "metrics/train.jsonl")
    assert all(("data_slowest_rank" in record) == (record["step"] % 4 == 0) for record in train)
    assert {record["compute_slowest_rank"] for record in train if "compute_ratio" in record} <= {
        0,
        1,
    }
    [trace] = (one / "profiles").glob("rank0_step*.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    assert "aten::" in trace.with_name(trace.name.replace(".json.gz", ".txt")).read_text()
    assert [p.name.split("_")[0] for p in (two / "profiles").glob("*.gz")] == ["rank0"]
    spikes = lines(one / "metrics/spikes.jsonl")
    assert spikes, "half a standard deviation is exceeded soon"
    assert all(len(spike["instances"]) > 0 for spike in spikes)


def blocks_statistics(pp: int) -> list[dict[str, float]]:
    """What the monitor records of one step."""
    from toolkit.train.callbacks.statistics_monitor import StatisticsMonitor

    given = {"pp_config": PipelineParallelConfig(degree=pp)} if pp > 1 else {}
    config = module_config("fsdp" if pp > 1 else None, rank_microbatch_size=32, **given)
    env = open_environment(config)
    try:
        module = build(config, env)
        found: list[dict[str, float]] = []

        def record(stream: str, values: Any, reductions: Any) -> None:
            for name, value in values.items():
                if reductions.get(name) == "max" and pp > 1:
                    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
            found.append({name: float(value) for name, value in values.items()})

        monitor = StatisticsMonitor(StatisticsMonitorConfig(enabled=True, interval=1))
        monitor.state = SimpleNamespace(  # type: ignore[assignment]
            step=1, train_module=module, environment=env, record=record
        )
        monitor.pre_step()
        module.train_batch({"input_ids": global_batch(0)})
        monitor.pre_optim_step()
        return found
    finally:
        env.close()


def test_statistics_of_a_pipeline_are_those_of_one_process(workers: WorkerPool) -> None:
    [[expected]] = workers.run(1, blocks_statistics, 1)
    for [found] in workers.run(2, blocks_statistics, 2):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert found["activation_rms/blocks.1"] > 0


def test_compiled_blocks_are_watched_too() -> None:
    from toolkit.train.callbacks.statistics_monitor import _watch

    block = torch.nn.Linear(2, 2)
    block.compile(backend="eager")
    block(torch.ones(1, 2))
    seen: list[torch.Tensor] = []
    undo = _watch(block, seen.append)
    output = block(torch.ones(1, 2)).detach()
    undo()
    block(torch.ones(1, 2))
    [sums] = seen
    assert sums.tolist() == pytest.approx(
        [float(output.square().sum()), 2.0, float(output.abs().max())]
    )


def stability(tmp_path: Path, **config: Any) -> StabilityMonitor:
    (tmp_path / "metrics").mkdir(exist_ok=True)
    monitor = StabilityMonitor(StabilityMonitorConfig(enabled=True, window=8, **config))
    corpus = SimpleNamespace(locate=lambda index: ("web" if index % 2 else "code", index))
    numbers = torch.arange(4).numpy()
    loader = SimpleNamespace(corpus=corpus, instance_indices=lambda batch: numbers + 4 * batch)
    run = SimpleNamespace(folder=tmp_path, path=lambda name: tmp_path / name)
    monitor.state = SimpleNamespace(  # type: ignore[assignment]
        is_main=True, step=0, run=run, train_loader=loader
    )
    monitor.pre_train()
    return monitor


def record(step: int, loss: float, norm: float = 1.0) -> dict[str, Any]:
    return {"step": step, "time": 0.0, "loss": loss, "grad_norm": norm + step / 1000}


def test_a_spike_is_kept_with_its_batch_and_never_twice(tmp_path: Path) -> None:
    monitor = stability(tmp_path)
    calm = [record(step, 2.0 + step % 3 / 100) for step in range(1, 7)]
    monitor.on_metrics("train", calm)
    saved = monitor.state_dict()
    monitor.on_metrics("train", [record(7, 9.0), record(8, 2.0, 50.0), record(9, float("nan"))])
    monitor.on_metrics("eval", [{"step": 9, "loss": 100.0}])
    monitor.close()
    found = lines(tmp_path / "metrics/spikes.jsonl")
    assert [(s["step"], "loss_sigmas" in s, "grad_norm_sigmas" in s) for s in found] == [
        (7, True, False), (8, False, True), (9, True, False),
    ]  # fmt: skip
    assert found[0]["instances"] == [24, 25, 26, 27]
    assert found[0]["sources"] == {"web": 2, "code": 2}
    again = stability(tmp_path)
    assert lines(tmp_path / "metrics/spikes.jsonl") == []
    again.load_state_dict(saved)
    again.on_metrics("train", [record(7, 9.0)])
    again.close()
    assert lines(tmp_path / "metrics/spikes.jsonl") == found[:1]


def test_ranks_that_take_longer_are_named(caplog: pytest.LogCaptureFixture) -> None:
    monitor = RankMonitor(RankMonitorConfig(enabled=True, interval=1))
    environment = SimpleNamespace(device=torch.device("cpu"), rank=2)
    monitor.state = SimpleNamespace(  # type: ignore[assignment]
        step=1, data_seconds=0.0, environment=environment
    )
    seconds = [(0.0, 0.010), (0.0, 0.011), (0.2, 0.050)]
    monitor._of_all = lambda own: seconds  # type: ignore[method-assign]
    found = monitor.post_step() or {}
    values = {name: metric.value for name, metric in found.items()}
    assert (values["data_slowest_rank"], values["compute_slowest_rank"]) == (2, 2)
    assert values["compute_ratio"] == pytest.approx(50 / 11)
    assert "rank 2" in caplog.text
    assert "200.0 ms for data, the median rank 0.0 ms" in caplog.text


def test_a_device_is_not_waited_for_in_the_step_it_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self, stream: Any) -> None:
            calls.append(f"record {stream}")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, other: Any) -> float:
            return 20.0

    module = SimpleNamespace(Event=Event, current_stream=lambda device: "stream")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monitor = RankMonitor(RankMonitorConfig(enabled=True, interval=3))
    monitor._matrix = torch.ones(2, 2)
    environment = SimpleNamespace(device=torch.device("cuda"), rank=0, cpu_group=None)
    monitor.state = SimpleNamespace(  # type: ignore[assignment]
        step=0, data_seconds=0.0, environment=environment
    )
    monitor.pre_train()
    for step, expected in ((1, []), (2, ["record stream"] * 4), (3, ["wait"] * 3)):
        calls.clear()
        monitor.state.step = step
        found = monitor.post_step() or {}
        assert calls == expected
    assert found["compute_seconds_max"].value == pytest.approx(0.02)


def test_memory_of_a_gpu_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"active_bytes.all.peak": 3 << 30, "num_alloc_retries": 2}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monitor = GPUMemoryMonitor(GPUMemoryMonitorConfig(enabled=True, interval=2))
    environment = SimpleNamespace(device=torch.device("cuda"))
    monitor.state = SimpleNamespace(step=1, environment=environment)  # type: ignore[assignment]
    assert monitor.post_step() is None
    monitor.state.step = 2
    found = {name: metric.value for name, metric in (monitor.post_step() or {}).items()}
    assert (found["gpu_active_gib"], found["gpu_alloc_retries"]) == (3.0, 2.0)


@pytest.fixture
def hook() -> Any:
    """A server that keeps what is posted to it; the second one fails."""
    posted: list[tuple[str, dict[str, Any]]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.path, json.loads(body)))
            self.send_response(500 if len(posted) == 2 else 200)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    server.server_close()


def notifier(folder: Path, state: str, **config: Any) -> Notifier:
    (folder / "metadata").mkdir(exist_ok=True)
    status = {
        "state": state,
        "message": "disk full at s3://b/p?token=hidden",
        "step": 7,
        "attempt": 1,
        "pid": 1,
    }
    status |= dict.fromkeys(("experiment", "name", "created", "started", "updated", "host"), "x")
    (folder / "metadata/status.json").write_text(json.dumps(status))
    told = Notifier(NotifierConfig(enabled=True, **config))
    environment = SimpleNamespace(layout=SimpleNamespace(description="fsdp x 2"))
    told.state = SimpleNamespace(  # type: ignore[assignment]
        is_main=True, step=7, tokens=70, last_loss=2.5, failure=None, environment=environment,
        run=SimpleNamespace(folder=folder), stop_request=SimpleNamespace(reason="SIGTERM"),
        heartbeat=Heartbeat(),
    )  # fmt: skip
    return told


def test_start_and_failure_are_told_in_every_way(tmp_path: Path, hook: Any, caplog: Any) -> None:
    url, posted = hook
    script = (
        "import os, sys\n"
        "open(sys.argv[1], 'a').write(sys.stdin.read() + os.environ['TOOLKIT_EVENT'])"
    )
    told = notifier(
        tmp_path, "failed", webhook=f"{url}/all", slack=f"{url}/slack?key=hidden",
        command=(sys.executable, "-c", script, str(tmp_path / "mail")),
    )  # fmt: skip
    told.pre_train()
    told.close()
    assert [path for path, _ in posted] == ["/all", "/slack?key=hidden"] * 2
    assert [body["event"] for path, body in posted if path == "/all"] == ["start", "failure"]
    assert posted[2][1]["message"] == "failed: disk full at s3://b/p?token=***"
    assert posted[3][1] == {"text": posted[2][1]["text"]}
    assert "failed: disk full at s3://b/p?token=*** (step 7, loss 2.5000" in posted[2][1]["text"]
    assert (tmp_path / "mail").read_text().count('"event"') == 2
    assert "was not sent" in caplog.text
    assert "hidden" not in caplog.text


def test_a_stall_is_told_once_and_its_end(tmp_path: Path, hook: Any) -> None:
    url, posted = hook
    told = notifier(tmp_path, "running", webhook=url, events=("stall", "end"), stall_seconds=0.2)
    told.pre_train()
    deadline = time.monotonic() + 60
    while len(posted) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    told.state.heartbeat.beat("forward and backward", 8)
    while len(posted) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    told.post_train()
    told.close()
    assert [body["message"].split(" for")[0] for _, body in posted[:2]] == [
        "has made no progress", "goes on",
    ]  # fmt: skip
    assert posted[-1][1]["event"] == "end"


def test_what_cannot_be_is_said_in_a_line() -> None:
    for given, said in (
        ({"notifier": {"enabled": True}}, "needs one of webhook, slack and command"),
        ({"notifier": {"webhook": "ftp://x"}}, "webhook must begin with https://"),
        ({"profiler": {"active": 0}}, "active must be greater than 0"),
        ({"stability_monitor": {"window": 1}}, "window must be at least 2"),
        ({"statistics_monitor": {"interval": 0}}, "interval must be greater than 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            convert(given, CallbacksConfig)


def test_a_profile_of_what_is_not_there_is_refused() -> None:
    environment = SimpleNamespace(device=torch.device("cpu"), world_size=2, rank=0)
    for config, said in (
        (
            ProfilerConfig(enabled=True, memory_snapshot=True),
            "memory_snapshot: needs a CUDA device",
        ),
        (ProfilerConfig(enabled=True, ranks=(0, 2)), "there is no rank 2 of 2"),
    ):
        profiler = Profiler(config)
        profiler.state = SimpleNamespace(environment=environment)  # type: ignore[assignment]
        with pytest.raises(ConfigError, match=said):
            profiler.pre_train()
