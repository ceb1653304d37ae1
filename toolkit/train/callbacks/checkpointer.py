"""When checkpoints are written and how many stay."""

import functools
import logging
from pathlib import Path

from toolkit.checkpoint.folder import Kind, step_folder, step_of
from toolkit.checkpoint.remote import upload_checkpoint
from toolkit.checkpoint.retention import Retention, prune_checkpoints
from toolkit.errors import ToolkitError
from toolkit.runs.files import RUN_FILES
from toolkit.train.callbacks.base import Callback
from toolkit.train.config import CheckpointerConfig
from toolkit.train.saving import TrainerSaver
from toolkit.train.scores import check_best_metric

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
        self._rule = Retention(
            config.keep_last,
            config.keep_every,
            config.keep_best,
            config.best_metric,
            config.best_mode,
        )
        self._saved_at: int | None = None
        self._uploaded_at: int | None = None
        self._is_ending = False
        """A save has failed, and the config says that this ends the run."""

    @functools.cached_property
    def _saver(self) -> TrainerSaver:
        return TrainerSaver(self.state, self._after_commit)

    def pre_train(self) -> None:
        check_best_metric(self.state.config, self.state.eval_loaders)
        self._saved_at = self.state.saved_step

    def post_record(self) -> None:
        self._report()
        kind = self._due(self.state.step)
        if kind is None or self.state.is_last_step or self._is_done():
            return
        # The one before: all ranks know from here on whether it failed, and do the same.
        self._saver.wait()
        self._report()
        if self._is_ending:
            return
        if self._config.asynchronous:
            self._saver.begin_save(kind=kind)
        else:
            try:
                self._saver.save(kind=kind)
            except ToolkitError as error:
                self._handle(error)
                return
        self._saved_at = self.state.step

    def on_stop(self) -> None:
        self._save_now()
        self._finish_upload()

    def post_train(self) -> None:
        if self._config.at_end:
            self._save_now(export_hf=self._config.export_hf)
        else:
            self._saver.wait()
            self._report()
        self._finish_upload()

    def on_failure(self) -> None:
        self.close()
        self._report()

    def close(self) -> None:
        self._saver.wait(SECONDS_AFTER_FAILURE)

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

    def _save_now(self, *, export_hf: bool = False) -> None:
        """The last one: nothing goes on before it is there, and its failure is the run's."""
        self._saver.wait()
        error = self._saver.take_error()
        if error is not None:
            log.error("%s", error)
            self._saved_at = None
        if not self._is_done():
            self._saver.save(export_hf=export_hf)
            self._saved_at = self.state.step

    def _is_done(self) -> bool:
        return self.state.config.no_checkpoints or self._saved_at == self.state.step

    def _report(self) -> None:
        """Deal with a background save that failed, if one did."""
        if (error := self._saver.take_error()) is not None:
            self._handle(error)

    def _handle(self, error: ToolkitError) -> None:
        if self._config.on_error == "stop":
            self._is_ending = True
            self.state.fail(error)
        elif (removed := self.state.run.find_removal()) is not None:
            self.state.fail(removed)
        elif self.state.is_main:
            log.error("%s; training goes on", error)

    def _after_commit(self, folder: Path) -> None:
        """In the thread that saves, on all ranks."""
        step = step_of(folder.name)
        assert step is not None, "the folder of a checkpoint"
        if self._config.upload_to is not None:
            try:
                self._upload(folder, step)
            except ToolkitError as error:
                if self.state.is_main:
                    log.error("%s; training goes on, the next one will be tried", error)
        if self.state.is_main:
            try:
                prune_checkpoints(folder.parent, self._rule, newest=step)
            except OSError as error:
                log.warning("older checkpoints are not removed: %s", error)

    def _upload(self, folder: Path, step: int) -> None:
        url, environment = self._config.upload_to, self.state.environment
        assert url is not None, "asked for"
        upload_checkpoint(folder, url, rank=environment.rank, group=environment.checkpoint_group)
        self._uploaded_at = step
        if environment.is_main:
            prune_checkpoints(url, self._rule, newest=step)

    def _finish_upload(self) -> None:
        """The newest checkpoint must have arrived: this machine may be gone in a minute."""
        step = self.state.saved_step
        if self._config.upload_to is not None and step not in (None, self._uploaded_at):
            self._upload(step_folder(self.state.run.path(RUN_FILES.checkpoints), step), step)
