"""When checkpoints are written and how many stay."""

from toolkit.checkpoint.commit import prune_checkpoints
from toolkit.runs.files import RUN_FILES
from toolkit.train.callbacks.base import Callback
from toolkit.train.checkpointing import save_trainer
from toolkit.train.config import CheckpointerConfig


class Checkpointer(Callback):
    """Saves every `interval` steps, at the end, and when training is asked to stop."""

    def __init__(self, config: CheckpointerConfig) -> None:
        self._config = config
        self._saved_at = -1

    def pre_train(self) -> None:
        saved = self.trainer.saved_step
        self._saved_at = -1 if saved is None else saved

    def post_record(self) -> None:
        if self.trainer.step % self._config.interval == 0 and not self.trainer.is_last_step:
            self.save()

    def on_stop(self) -> None:
        self.save()

    def post_train(self) -> None:
        if self._config.at_end:
            self.save(final=True)

    def save(self, *, final: bool = False) -> None:
        """Commit a checkpoint of this step, once; then remove those beyond `keep_last`."""
        trainer = self.trainer
        if trainer.config.no_checkpoints or self._saved_at == trainer.step:
            return
        save_trainer(trainer, export_hf=final and self._config.export_hf)
        self._saved_at = trainer.step
        if self._config.keep_last is not None and trainer.environment.is_main:
            prune_checkpoints(
                trainer.run.path(RUN_FILES.checkpoints),
                keep_last=self._config.keep_last,
                newest=trainer.step,
            )
