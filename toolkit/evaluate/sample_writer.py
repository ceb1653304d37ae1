"""Text from the final model."""

import contextlib
import logging
import time
from pathlib import Path

from rich import get_console

from toolkit.data.prepare.build.stops import stop_ids
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.errors import ConfigError
from toolkit.evaluate.generate import generate
from toolkit.metrics.lines import JsonlSink, trim_jsonl
from toolkit.runs.files import RUN_FILES
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import SampleWriterConfig

log = logging.getLogger(__name__)


class SampleWriter(Callback):
    """Continues a prompt after the last step and prints both.

    All ranks generate together (a sharded model needs them); rank 0 chooses, from the seed.
    """

    def __init__(self, config: SampleWriterConfig) -> None:
        self._config = config

    def pre_train(self) -> None:
        """Raises ConfigError when nothing could turn ids into text: now, not after training."""
        self._tokenizer_folder()

    def post_train(self) -> None:
        state, config = self.state, self._config
        if state.stop_request.is_agreed:
            return
        tokenizer = load_tokenizer(self._tokenizer_folder())
        prompt = tokenizer.prompt_ids(config.prompt)
        if not prompt:
            log.warning("no sample: trainer.callbacks.sample_writer.prompt is empty")
            return
        with state.train_module.evaluating():
            ids = generate(
                state.train_module.logits,
                prompt,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=state.environment.seed,
                eos_id=stop_ids(tokenizer),
                max_sequence_length=state.train_loader.sequence_length,
                device=state.environment.device,
                broadcast=state.environment.broadcast,
            )
        if state.is_main:
            self._keep(tokenizer.decode(prompt), tokenizer.decode(ids))
            with contextlib.suppress(OSError, ValueError, SystemExit):
                console = get_console()
                console.rule("sample", align="left")
                console.print(tokenizer.decode([*prompt, *ids]), markup=False, highlight=False)
                console.rule()

    def _keep(self, prompt: str, text: str) -> None:
        """Write it to metrics/samples.jsonl, in the place of one from this step on."""
        state = self.state
        path = state.run.path(RUN_FILES.samples)
        trim_jsonl(path, last_step=state.step - 1)
        sink = JsonlSink(path)
        sink.write([{"step": state.step, "time": time.time(), "prompt": prompt, "text": text}])
        sink.close()

    def _tokenizer_folder(self) -> Path:
        folder: Path | None = self.state.train_loader.tokenizer_folder
        if folder is None:
            raise ConfigError(
                "trainer.callbacks.sample_writer.enabled: the training data came without a "
                "tokenizer, so samples cannot be written as text; set it to false, or name the "
                "tokens' tokenizer in dataset.tokenizer"
            )
        return folder
