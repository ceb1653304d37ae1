"""Exports for `transformers` while training goes on."""

import logging
from pathlib import Path
from typing import Any

import torch

from toolkit.checkpoint.folder import step_folder
from toolkit.hf.choose import hf_architecture
from toolkit.hf.export import export_source
from toolkit.hf.source import ModelSource, averaged, find_source
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import TEMPORARY_SUFFIX, publish_folder, remove_tree
from toolkit.threads import Thread
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import HFConverterConfig

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HFConverter(Callback):
    """Writes hf/step{N} into the run folder from the checkpoint of that step, as
    `toolkit export-hf` does: on rank 0, in a thread of its own, one at a time. A checkpoint that is
    saved while another is being exported is left out; the last one never is."""

    def __init__(self, config: HFConverterConfig) -> None:
        self._config = config
        self._thread: Thread | None = None
        self._saves = 0
        """Checkpoints so far, the one in `_seen` the last of them."""
        self._seen: int | None = None
        self._due: int | None = None
        """To be exported."""
        self._done: int | None = None

    def post_record(self) -> None:
        if not self.state.is_main or self._config.interval is None:
            return
        self._look()
        due, self._due = self._due, None
        if due is not None and (self._thread is None or not self._thread.is_alive()):
            self.state.steps_in_use.add(due)
            self._thread = Thread(target=self._export, args=(due,), name="hf", daemon=True)
            self._thread.start()

    def post_train(self) -> None:
        self._finish()

    def on_stop(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def state_dict(self) -> dict[str, Any]:
        self._look()  # at the checkpoint before the one that is saved now
        return {"saves": self._saves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saves = state.get("saves", 0)

    def _look(self) -> None:
        """Count a checkpoint that is new. That of a resumed run is: its export may have been cut
        off."""
        saved = self.state.saved_step
        if saved is not None and saved != self._seen:
            self._seen = saved
            self._saves += 1
            if self._config.interval is not None and self._saves % self._config.interval == 0:
                self._due = saved

    def _finish(self) -> None:
        if self._thread is not None:
            self._thread.join()
        saved = self.state.saved_step
        if self.state.is_main and self._config.at_end and saved not in (None, self._done):
            self._export(saved)

    def _export(self, step: int | None) -> None:
        assert step is not None
        run = self.state.run
        folder = run.path(RUN_FILES.exports) / f"step{step}"
        try:
            source = find_source(step_folder(run.path(RUN_FILES.checkpoints), step))
            if self.state.exported_weights is not None:
                source = averaged(source, self.state.exported_weights)
            if hf_architecture(source.config, source.origin.get("model_type")) is None:
                log.warning("hf_converter: no transformers class has the parts of this model")
                return
            self._write(source, folder)
            self._done = step
            log.info("hf_converter: %s", folder)
        except Exception as error:  # training is worth more than an export
            log.error("hf_converter: step %d: %s: %s", step, type(error).__name__, error)
        finally:
            self.state.steps_in_use.discard(step)

    def _write(self, source: ModelSource, folder: Path) -> None:
        folder.parent.mkdir(exist_ok=True)
        new = folder.with_name(f"{folder.name}{TEMPORARY_SUFFIX}")
        remove_tree(new)
        export_source(source, new, dtype=_DTYPES.get(self._config.dtype), check=False)
        remove_tree(folder)  # of an attempt that came this far before
        publish_folder(new, folder)
