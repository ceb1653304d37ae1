"""Text and conversations continued by a model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer as BackendTokenizer

from toolkit.data.prepare.build.stops import turn_ends
from toolkit.data.prepare.text.instructions import template_process
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.errors import ConfigError
from toolkit.evaluate.continuation import Continuation, Sampling

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": ...}`."""

_MOST_TOKENS_OF_A_CHARACTER = 8


class Generated(NamedTuple):
    text: str
    """Without the prompt and without the token that ended it."""
    num_prompt_tokens: int
    num_new_tokens: int
    stopped: Literal["end", "length", "context"]
    """By an end token, at `max_new_tokens`, or where the model's context was full."""


class TextGenerator:
    """A model and its tokenizer of `transformers`. `name` is the model's, for messages. Raises
    ConfigError where the tokenizer has ids that the model does not know."""

    def __init__(self, name: str, continuation: Continuation, tokenizer: Any) -> None:
        self._name, self._continue, self._tokenizer = name, continuation, tokenizer
        needed = max(tokenizer.get_vocab().values(), default=0) + 1
        if needed > continuation.vocab_size:
            raise ConfigError(
                f"{name}: its tokenizer has {needed} ids, the model {continuation.vocab_size}; "
                "give the tokenizer that the model was trained with (--tokenizer)"
            )
        self._stop_ids = continuation.stop_ids | ({tokenizer.eos_token_id} - {None})

    def complete(
        self, prompt: str, sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> Generated:
        """Continue `prompt`, which starts as the tokenizer starts texts; without text, from the
        token that starts documents, or else ends them. `on_text` is called with each new piece of
        text; together they are the result's. Raises ConfigError: the prompt is longer than the
        model's context, or empty where no token starts or ends documents."""
        ids = self._tokenizer(prompt)["input_ids"] if prompt else []
        if not ids:
            starts = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
            ids = [start for start in starts if start is not None][:1]
        if not ids:
            raise ConfigError("the prompt is empty; give some text")
        return self._generate(ids, "the prompt", sampling, self._stop_ids, on_text)

    def answer(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
    ) -> Generated:
        """The assistant's next turn of a conversation, rendered by the tokenizer's chat template.
        Raises ConfigError: there is no template, it refuses the conversation, or the conversation
        is longer than the model's context."""
        # The template has written the start token, if there is one.
        ids = self._tokenizer(self._render(messages), add_special_tokens=False)["input_ids"]
        stop_ids = self._stop_ids | self._turn_ends
        return self._generate(ids, "the conversation", sampling, stop_ids, on_text)

    def check_chat(self) -> None:
        """Raise ConfigError when the tokenizer has no chat template that is the default one."""
        template = self._tokenizer.chat_template
        has_default = "default" in template if isinstance(template, dict) else bool(template)
        if not has_default:
            others = f" but those called {', '.join(template)}" if template else ""
            raise ConfigError(
                f"{self._name}: its tokenizer has no chat template{others}, so it cannot chat; "
                "give one with `toolkit convert-hf --chat-template FILE`, or continue text with "
                "--prompt"
            )

    def _generate(
        self,
        ids: list[int],
        what: str,
        sampling: Sampling,
        stop_ids: frozenset[int],
        on_text: Callable[[str], None] | None,
    ) -> Generated:
        sampling = sampling.filled(self._continue.recommended)
        context, is_cut = self._continue.context, False
        if context is not None:
            room = context - len(ids)
            if room < 1:
                raise ConfigError(
                    f"{what} has {len(ids)} tokens; the context of {self._name} is {context}, the "
                    "answer's included; shorten it"
                )
            is_cut = room < sampling.max_new_tokens
            sampling = sampling._replace(max_new_tokens=min(room, sampling.max_new_tokens))
        stream = _TextStream(self._tokenizer, ids)
        new: list[int] = []
        pieces: list[str] = []

        def give(piece: str) -> None:
            pieces.append(piece)
            if piece and on_text is not None:
                on_text(piece)

        def on_token(number: int) -> None:
            new.append(number)
            if number not in stop_ids:
                give(stream.put(number))

        self._continue(ids, sampling, stop_ids, on_token)
        give(stream.new_text())
        has_ended = bool(new) and new[-1] in stop_ids
        stopped: Literal["end", "length", "context"] = "context" if is_cut else "length"
        return Generated("".join(pieces), len(ids), len(new), "end" if has_ended else stopped)

    def _render(self, messages: Sequence[Message]) -> str:
        self.check_chat()
        # What `apply_chat_template` of the tokenizer does, within limits of time and memory.
        request = {
            "conversations": [list(messages)],
            "chat_template": self._tokenizer.get_chat_template(),
            "add_generation_prompt": True,
            **self._tokenizer.special_tokens_map,
        }
        try:
            return template_process.render(request)[0]
        except template_process.TemplateError as reason:
            raise ConfigError(
                f"{self._name}: its chat template refuses this conversation: {reason}"
            ) from None

    @functools.cached_property
    def _turn_ends(self) -> frozenset[int]:
        """What ends an answer by the chat template, whatever ends documents."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return frozenset()
        own = Tokenizer(
            BackendTokenizer.from_str(backend.to_str()),
            self._tokenizer.eos_token,
            {TOKENIZER_CONFIG_FILE: {"chat_template": self._tokenizer.chat_template}},
            bos_token=self._tokenizer.bos_token,
        )
        return frozenset(turn_ends(own))


class _TextStream:
    """Text of tokens that come one at a time.

    A token's text may depend on the one before it (spaces), and a character may need several
    tokens: each piece is what decoding has more than before, once it ends with a whole character.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-8:])
        self._known = len(self._ids)
        """Ids whose text was given."""

    def put(self, number: int) -> str:
        """The text that is certain now, often that of `number`."""
        self._ids.append(number)
        text = self.new_text()
        waiting = len(self._ids) - self._known
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        if not is_whole and waiting < _MOST_TOKENS_OF_A_CHARACTER:
            return ""
        self._ids = self._ids[self._known :] if text else self._ids
        self._known = len(self._ids)
        return text

    def new_text(self) -> str:
        before = self._decode(self._ids[: self._known])
        return self._decode(self._ids)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
