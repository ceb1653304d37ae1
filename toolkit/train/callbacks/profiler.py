"""torch.profiler over some steps of some ranks."""

import logging
import os
from typing import Any

import torch
from torch import profiler

from toolkit.errors import ConfigError
from toolkit.runs.files import RUN_FILES
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config_monitors import ProfilerConfig, check_profiler_device

log = logging.getLogger(__name__)

_LOGGED_ROWS, _WRITTEN_ROWS = 12, 100


class Profiler(Callback):
    """Writes profiles/rank{R}_step{N}.json.gz (a trace), .txt (operators by their own time), and
    with `memory_snapshot` .pickle, at the end of each cycle."""

    def __init__(self, config: ProfilerConfig) -> None:
        self._config = config
        self._profile: profiler.profile | None = None

    def pre_train(self) -> None:
        config, environment = self._config, self.state.environment
        device = environment.device.type
        check_profiler_device(config, device)
        absent = [r for r in config.ranks or () if not 0 <= r < environment.world_size]
        if absent:
            raise ConfigError(
                f"trainer.callbacks.profiler.ranks: there is no rank {absent[0]} of "
                f"{environment.world_size}"
            )
        if config.ranks is not None and environment.rank not in config.ranks:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it tells of its own start and stop
        activities = [profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(profiler.ProfilerActivity.CUDA)
        self._profile = profiler.profile(
            activities=activities,
            schedule=profiler.schedule(
                skip_first=config.skip_first,
                wait=config.wait,
                warmup=config.warmup,
                active=config.active,
                repeat=config.repeat,
            ),
            on_trace_ready=self._write,
            record_shapes=config.record_shapes,
            profile_memory=config.profile_memory,
            with_stack=config.with_stack,
        )
        self._profile.start()

    def post_record(self) -> None:
        if self._profile is None:
            return
        self._profile.step()
        if self._config.memory_snapshot:
            is_recording = self._profile.current_action != profiler.ProfilerAction.NONE
            history: Any = torch.cuda.memory
            history._record_memory_history("all" if is_recording else None)

    def close(self) -> None:
        if self._profile is not None:
            running, self._profile = self._profile, None
            running.stop()

    def _write(self, trace: profiler.profile) -> None:
        state = self.state
        folder = state.run.path(RUN_FILES.profiles)
        name = f"rank{state.environment.rank}_step{state.step}"
        own = "self_cuda_time_total" if state.environment.device.type == "cuda" else None
        sort = own or "self_cpu_time_total"
        averages = trace.key_averages()
        try:
            folder.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(folder / f"{name}.json.gz"))
            table = averages.table(sort_by=sort, row_limit=_WRITTEN_ROWS)
            (folder / f"{name}.txt").write_text(table)
            if self._config.memory_snapshot:
                snapshot: Any = torch.cuda.memory
                snapshot._dump_snapshot(str(folder / f"{name}.pickle"))
        except OSError as error:
            log.warning("the profile of step %d is not written: %s", state.step, error)
            return
        if state.environment.rank == (self._config.ranks or (0,))[0]:
            table = averages.table(sort_by=sort, row_limit=_LOGGED_ROWS, max_name_column_width=40)
            log.info("%s: profile up to step %d\n%s", folder / name, state.step, table)
