"""Models that continue token ids: through `transformers`' own `generate`, or without a cache."""

import warnings
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from toolkit.errors import ConfigError
from toolkit.evaluate.generate import check_logits, generate

OnToken = Callable[[int], None]


class Sampling(NamedTuple):
    """How the next token is chosen. None: what the model's generation_config.json recommends for
    sampling, else the number named."""

    max_new_tokens: int = 256
    temperature: float | None = None
    """Divides the logits; 0 takes the most likely token. 0.8."""
    top_k: int | None = None
    """Draw among this many most likely tokens; 0: among all. 50."""
    top_p: float | None = None
    """Draw among the fewest tokens whose probabilities reach this sum; 1: among all. 1."""
    seed: int = 0

    def filled(self, recommended: "Sampling") -> "Sampling":
        """The values that count; raises ConfigError for one that is out of range."""
        values = self._asdict()
        for defaults in (recommended, Sampling(temperature=0.8, top_k=50, top_p=1.0)):
            values |= {k: v for k, v in defaults._asdict().items() if values[k] is None}
        for name, is_right, advice in (
            ("max_new_tokens", values["max_new_tokens"] > 0, "a number of tokens, 1 or more"),
            ("temperature", values["temperature"] >= 0, "0 (the most likely token) or more"),
            ("top_k", values["top_k"] >= 0, "a number of tokens, or 0 for all"),
            ("top_p", 0 < values["top_p"] <= 1, "a sum of probabilities, above 0 and up to 1"),
        ):
            if not is_right:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} {values[name]}: give {advice}")
        return Sampling(**values)


class Continuation(Protocol):
    """A model that continues ids."""

    context: int | None
    """Tokens it can see at once, prompt and answer together; None: no limit is known."""
    vocab_size: int
    stop_ids: frozenset[int]
    """Tokens that end a text."""
    recommended: Sampling
    """What the model's authors recommend."""

    def __call__(
        self, ids: list[int], sampling: Sampling, stop_ids: Collection[int], on_token: OnToken
    ) -> None:
        """Call `on_token` with each new id up to the first of `stop_ids`, which is included. The
        same seed gives the same ids; the global random state is left alone. Raises CheckpointError
        where the model's logits are no numbers."""


class TransformersContinuation:
    """A causal language model of `transformers`, with a key/value cache."""

    def __init__(self, model: Any) -> None:
        self._model, self._device = model, model.device
        text_config = model.config.get_text_config()
        self.context = getattr(text_config, "max_position_embeddings", None)
        self.vocab_size = text_config.vocab_size
        settings = model.generation_config
        ends = settings.eos_token_id
        self.stop_ids = frozenset(ends if isinstance(ends, list) else {ends} - {None})
        self.recommended = Sampling()
        if settings.do_sample:
            self.recommended = Sampling(
                temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
            )

    def __call__(
        self, ids: list[int], sampling: Sampling, stop_ids: Collection[int], on_token: OnToken
    ) -> None:
        from transformers import GenerationConfig

        how = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
        stops = sorted(stop_ids)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
            do_sample=bool(sampling.temperature),
            **(how if sampling.temperature else {}),
        )
        inputs = torch.tensor([ids], device=self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(sampling.seed)
            self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                logits_processor=[_checked],
                streamer=_Tokens(on_token),
            )


class PlainContinuation:
    """One of our models, computed anew for every token: for those that no class of `transformers`
    holds."""

    def __init__(self, model: nn.Module, *, stop_ids: Collection[int]) -> None:
        self._model = model
        config: Any = model.config
        self.context: int | None = config.max_sequence_length
        self.vocab_size: int = config.vocab_size
        self.stop_ids = frozenset(stop_ids)
        self.recommended = Sampling()

    def __call__(
        self, ids: list[int], sampling: Sampling, stop_ids: Collection[int], on_token: OnToken
    ) -> None:
        assert sampling.temperature is not None, "filled"
        generate(
            self._model,
            ids,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            eos_id=stop_ids,
            on_token=on_token,
        )


def _checked(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What `generate` calls a logits processor."""
    check_logits(logits)
    return logits


class _Tokens:
    """What `generate` calls a streamer: gives on each new id."""

    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for number in value.reshape(-1).tolist():
            self._on_token(number)

    def end(self) -> None:
        self._is_prompt = True
