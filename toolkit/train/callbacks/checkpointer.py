"""When checkpoints are written, at once or in a background thread, and how many stay.

A save in the background copies this rank's part of the state into host memory, most of it while the
next step is computed, which may not change it before. A thread of each rank then writes, and the
ranks commit together over a process group of their own.
At most one save is in flight; the next waits for it.
"""

import functools
import logging
import time
from collections.abc import Collection, Iterable
from pathlib import Path

from toolkit.checkpoint.commit import Save, write_checkpoint
from toolkit.checkpoint.folder import Kind, step_folder
from toolkit.checkpoint.host_copy import HostCopy, changed_by_optimizer
from toolkit.checkpoint.remote import upload_checkpoint
from toolkit.checkpoint.retention import prune_checkpoints
from toolkit.checkpoint.save_plan import Resolve, ShardWriter
from toolkit.errors import ToolkitError, TrainingError
from toolkit.runs.files import RUN_FILES
from toolkit.threads import Thread
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import CheckpointerConfig
from toolkit.train.saving import begin_save

log = logging.getLogger(__name__)

SECONDS_AFTER_FAILURE = 30.0
"""How long a failing run waits for the save in flight: other ranks may be gone."""


class Checkpointer(Callback):
    """Saves at the configured steps, at the end, and when training is asked to stop.

    During training a save that fails costs only itself, unless `on_error` says "stop"; at the end
    it fails the run.
    """

    def __init__(self, config: CheckpointerConfig) -> None:
        self._config = config
        self._rule = config.retention
        self._saved_at: int | None = None
        self._uploaded_at: int | None = None
        self._is_ending = False
        """A save has failed, and the config says that this ends the run."""
        self._thread: Thread | None = None
        self._error: Exception | None = None
        """Of a save in the background."""

    @functools.cached_property
    def _shards(self) -> ShardWriter:
        return ShardWriter(self.state.environment.checkpoint_group)

    def pre_train(self) -> None:
        self.state.check_metrics()
        self._saved_at = self.state.saved_step

    def pre_optim_step(self) -> None:
        self.state.wait_for_copies()

    def post_record(self) -> None:
        self._report()
        kind = self._due(self.state.step)
        if kind is None or self.state.is_last_step or self._is_done():
            return
        # The one before: all ranks know from here on whether it failed, and do the same.
        self._wait()
        self._report()
        if self._is_ending:
            return
        if self._config.asynchronous:
            self._save(kind, in_background=True)
            return
        try:
            self._save(kind)
        except ToolkitError as error:
            self._handle(error)

    def on_stop(self) -> None:
        self._save_now()
        self._finish_upload()

    def post_train(self) -> None:
        if self._config.at_end:
            self._save_now(export_hf=self._config.export_hf)
        else:
            self._wait()
            self._report()
        self._finish_upload()

    def on_failure(self) -> None:
        self.close()
        self._report()

    def close(self) -> None:
        self._wait(SECONDS_AFTER_FAILURE)

    def _due(self, step: int) -> Kind | None:
        """What kind of checkpoint `step` asks for."""
        config = self._config
        if step in config.fixed_steps:
            return "fixed"
        if step % config.interval == 0:
            return "permanent"
        if config.ephemeral_interval and step % config.ephemeral_interval == 0:
            return "ephemeral"
        return None

    def _is_done(self) -> bool:
        return self.state.config.no_checkpoints or self._saved_at == self.state.step

    def _save_now(self, *, export_hf: bool = False) -> None:
        """The last one: nothing goes on before it is there, and its failure is the run's."""
        self._wait()
        if (error := self._take_error()) is not None:
            log.error("%s", error)
            self._saved_at = None
        if not self._is_done():
            self._save("permanent", export_hf=export_hf)

    def _save(self, kind: Kind, *, in_background: bool = False, export_hf: bool = False) -> None:
        """Commit a checkpoint of the current step; in the background, return when it is copied."""
        save = begin_save(self.state, kind=kind, export_hf=export_hf)
        tensors = self.state.state_tensors()
        if in_background:
            copy = self._shards.copy(tensors, late=self._late(tensors))
            self._thread = Thread(
                target=self._work, args=(save, copy), name="checkpoint", daemon=True
            )
            self._thread.start()
            self.state.copying = copy
        else:
            self._write(save, self._shards.live(tensors))
        self._saved_at = self.state.step

    def _late(self, tensors: Iterable[str]) -> Collection[str]:
        """What nothing changes before the optimizer's next step. A callback or train module of the
        user's may change anything at any time, and evaluations exchange weights and averages."""
        state = self.state
        exchanges = state.train_module.averages or state.also_evaluated
        return () if state.has_own_parts or exchanges else changed_by_optimizer(tensors)

    def _work(self, save: Save, copy: HostCopy) -> None:
        try:
            copy.finish()
            self._write(save, copy)
        except Exception as error:
            self._error = error

    def _write(self, save: Save, resolve: Resolve) -> None:
        state, environment = self.state, self.state.environment
        started = time.monotonic()
        folder = write_checkpoint(
            save,
            self._shards,
            resolve,
            rank=environment.rank,
            group=environment.checkpoint_group,
        )
        state.saved_step = save.step
        state.stop_request.allow_for(time.monotonic() - started)
        state.run.set_status("running", step=save.step, tokens=save.tokens)
        log.info("checkpoint: %s", folder)
        if self._config.upload_to is not None:
            try:
                self._upload(self._config.upload_to, folder, save.step)
            except ToolkitError as error:
                if state.is_main:
                    log.error("%s; training goes on, the next one will be tried", error)
        if state.is_main:
            try:
                prune_checkpoints(
                    folder.parent, self._rule, newest=save.step, in_use=state.steps_in_use
                )
            except OSError as error:
                log.warning("older checkpoints are not removed: %s", error)

    def _wait(self, timeout: float | None = None) -> None:
        """For the save in flight, if there is one."""
        if self._thread is not None:
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self._thread = None

    def _take_error(self) -> ToolkitError | None:
        """What went wrong in the background; once."""
        error, self._error = self._error, None
        if error is None or isinstance(error, ToolkitError):
            return error
        wrapped = TrainingError(f"checkpoint not saved: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        return wrapped

    def _report(self) -> None:
        """Deal with a save in the background that failed, if one did."""
        if (error := self._take_error()) is not None:
            self._handle(error)

    def _handle(self, error: ToolkitError) -> None:
        if self._config.on_error == "stop":
            self._is_ending = True
            self.state.fail(error)
        elif (removed := self.state.run.find_removal()) is not None:
            self.state.fail(removed)
        elif self.state.is_main:
            log.error("%s; training goes on", error)

    def _upload(self, url: str, folder: Path, step: int) -> None:
        environment = self.state.environment
        upload_checkpoint(folder, url, rank=environment.rank, group=environment.checkpoint_group)
        self._uploaded_at = step
        if environment.is_main:
            prune_checkpoints(url, self._rule, newest=step)

    def _finish_upload(self) -> None:
        """The newest checkpoint must have arrived: this machine may be gone in a minute."""
        url, step = self._config.upload_to, self.state.saved_step
        if url is not None and step not in (None, self._uploaded_at):
            self._upload(url, step_folder(self.state.run.path(RUN_FILES.checkpoints), step), step)
