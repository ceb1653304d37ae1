"""Text in, text out: streaming, ends, context, chat templates, sampling through transformers."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit.data.prepare.tokenizers.auto import load_auto_tokenizer
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer
from toolkit.errors import CheckpointError, ConfigError, DataError
from toolkit.evaluate.continuation import (
    OnToken,
    PlainContinuation,
    Sampling,
    TransformersContinuation,
)
from toolkit.evaluate.prompts import Prompt, completed, read_prompts
from toolkit.evaluate.text import TextGenerator
from toolkit.hf.loading import load_causal_lm
from toolkit.models.config import TransformerConfig

EOS, TURN_END = 256, 257
TINY = TransformerConfig(
    vocab_size=258, d_model=16, num_layers=1, num_heads=2, intermediate_size=24,
    max_sequence_length=64, init_std=0.5,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Says:
    """A model that says what it was told to say."""

    def __init__(self, *ids: int, context: int | None = 64, vocab_size: int = 258) -> None:
        self.ids, self.context, self.vocab_size = ids, context, vocab_size
        self.stop_ids: frozenset[int] = frozenset()
        self.recommended = Sampling(temperature=0.5)
        self.seen: list[int] = []
        self.sampling = Sampling()
        self.stops: Collection[int] = ()

    def __call__(
        self, ids: list[int], sampling: Sampling, stop_ids: Collection[int], on_token: OnToken
    ) -> None:
        self.seen, self.sampling, self.stops = ids, sampling, stop_ids
        for number in self.ids[: sampling.max_new_tokens]:
            on_token(number)
            if number in stop_ids:
                break


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bytes, `<|endoftext|>` 256 and `<|turn|>` 257, with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ByteTokenizer().with_chat_template(TEMPLATE).save(folder)
    loaded = load_auto_tokenizer(folder)
    loaded.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, eos_token_id=EOS,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_pieces_are_whole_characters_and_add_up(tokenizer: Any) -> None:
    text = "né語 😀\n  x"
    pieces: list[str] = []
    model = Says(*text.encode(), EOS, 65)
    done = TextGenerator("m", model, tokenizer).complete("ab", Sampling(), pieces.append)
    assert pieces == list(text)
    assert done == (text, 2, len(text.encode()) + 1, "end")
    assert model.seen == [97, 98]
    assert model.sampling == Sampling(62, temperature=0.5, top_k=50, top_p=1.0)


def test_bytes_that_are_no_character_are_shown_all_the_same(tokenizer: Any) -> None:
    done = TextGenerator("m", Says(*[0xFF] * 20, 65), tokenizer).complete("a", Sampling())
    assert done.text.endswith("A")
    assert set(done.text) == {"\N{REPLACEMENT CHARACTER}", "A"}


def test_a_space_before_a_word_stays_where_the_decoder_takes_leading_ones_away() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁good": 0, "▁day": 1, "?": 2}, unk_token="?"))
    backend.decoder = decoders.Metaspace()
    loaded = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="?")
    pieces: list[str] = []
    TextGenerator("m", Says(1, 0, 1), loaded).complete("▁good", Sampling(), pieces.append)
    assert pieces == [" day", " good", " day"]


def test_an_answer_ends_with_the_turn_and_a_text_does_not(tokenizer: Any) -> None:
    model = Says(*b"ok", TURN_END, 65, EOS)
    generator = TextGenerator("m", model, tokenizer)
    done = generator.answer([{"role": "user", "content": "hi"}], Sampling())
    assert done[0] == "ok"
    assert done.stopped == "end"
    assert model.seen == [*b"user: hi", TURN_END, *b"\nassistant: "]
    assert generator.complete("hi", Sampling()).text == "okA"
    assert model.stops == {EOS}


def test_texts_end_where_the_context_does(tokenizer: Any) -> None:
    generator = TextGenerator("m", Says(*b"abcdef", context=5), tokenizer)
    done = generator.complete("xyz", Sampling())
    assert (done.text, done.stopped) == ("ab", "context")
    assert generator.complete("xyz", Sampling(max_new_tokens=1)).stopped == "length"
    message = "the prompt has 6 tokens; the context of m is 5, the answer's included"
    with pytest.raises(ConfigError, match=message):
        generator.complete("uvwxyz", Sampling())


def test_an_empty_prompt_starts_a_document(tokenizer: Any) -> None:
    model = Says(65)
    TextGenerator("m", model, tokenizer).complete("", Sampling())
    assert model.seen == [EOS]


def test_what_does_not_fit_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="m: its tokenizer has 258 ids, the model 257; give the"):
        TextGenerator("m", Says(vocab_size=257), tokenizer)
    generator = TextGenerator("m", Says(), tokenizer)
    with pytest.raises(ConfigError, match=r"m: its chat template refuses .*: no tools here"):
        generator.answer([{"role": "tool", "content": ""}], Sampling())
    with pytest.raises(DataError, match="no tokenizer here; give one with --tokenizer FOLDER"):
        load_auto_tokenizer(tmp_path)
    ByteTokenizer().save(tmp_path)
    plain = TextGenerator("m", Says(), load_auto_tokenizer(tmp_path))
    with pytest.raises(ConfigError, match=r"m: its tokenizer has no chat template.*convert-hf"):
        plain.answer([{"role": "user", "content": ""}], Sampling())
    named = load_auto_tokenizer(tmp_path)
    named.chat_template = {"tool_use": "{{ messages }}"}
    with pytest.raises(ConfigError, match="no chat template but those called tool_use, so"):
        TextGenerator("m", Says(), named).answer([{"role": "user", "content": "a"}], Sampling())


@pytest.mark.parametrize(("name", "value"), [
    ("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5),
])  # fmt: skip
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value}: give "):
        Sampling(**{name: value}).filled(Sampling())


def run(model: Any, **settings: Any) -> list[int]:
    found: list[int] = []
    sampling = Sampling(**{"max_new_tokens": 20, **settings}).filled(Sampling())
    model(list(b"abc"), sampling, {EOS}, found.append)
    return found


@torch.no_grad()
@pytest.mark.slow
def test_transformers_samples_by_seed_and_greedily(folder: Path) -> None:
    model = TransformersContinuation(load_causal_lm(folder, dtype=torch.float32))
    assert (model.context, model.vocab_size, model.stop_ids) == (64, 258, {EOS})
    before = torch.get_rng_state()
    first, again, other = (run(model, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())
    expected = list(b"abc")
    net = AutoModelForCausalLM.from_pretrained(folder)
    for number in run(model, temperature=0):
        assert number == int(net(torch.tensor([expected])).logits[0, -1].argmax())
        expected.append(number)
    likely = run(model, temperature=5.0, top_k=1)
    assert likely == run(model, temperature=0)
    assert run(model, temperature=5.0, top_k=0, top_p=1e-6) == likely


def test_weights_that_are_missing_are_no_random_ones(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"transformers misses model\.norm\.weight \(1 in all"
    ):
        load_causal_lm(tmp_path, dtype=torch.float32)


def test_models_without_a_class_are_sampled_the_same_way() -> None:
    model = PlainContinuation(TINY.build(), stop_ids=())
    assert model.context == 64
    assert run(model, seed=1) == run(model, seed=1) != run(model, seed=2)
    assert run(model, temperature=3.0, top_p=1e-6) == run(model, temperature=0)


def test_prompts_are_lines_or_objects(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert [p.prompt for p in read_prompts(tmp_path / "a.txt")] == ["one", " two "]
    message = {"role": "user", "content": "x"}
    objects = [{"prompt": "p", "id": 3}, {"messages": [message]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(entry) for entry in objects))
    first, second = read_prompts(tmp_path / "a.jsonl")
    assert completed(first, "t") == {"prompt": "p", "completion": "t"}
    answer = {"role": "assistant", "content": "t"}
    assert completed(second, "t") == {"messages": [message, answer]}
    assert second == Prompt(messages=[message])


@pytest.mark.parametrize(("content", "expected"), [
    ("\n", "a.jsonl: holds no prompt"),
    ('{"prompt": "a"}\n{"text": "b"}', 'a.jsonl: line 2: give an object with "prompt"'),
    ('{"prompt": 3}', r"a.jsonl: line 1: Expected `str \| null`, got `int`"),
    ('{"messages": [{"role": "user"}]}', 'a.jsonl: line 1: each of "messages" needs'),
    ("{", "a.jsonl: line 1: Input data was truncated"),
    (None, "a.jsonl: cannot be read: No such file"),
])  # fmt: skip
def test_files_that_hold_no_prompts_are_named(
    content: str | None, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=expected):
        read_prompts(path)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_no_numbers_are_named(folder: Path, temperature: float) -> None:
    theirs = load_causal_lm(folder, dtype=torch.float32)
    ours = TINY.build()
    for net in (theirs, ours):
        next(net.parameters()).data.fill_(math.nan)
    for model in (TransformersContinuation(theirs), PlainContinuation(ours, stop_ids=())):
        with pytest.raises(CheckpointError, match="logits are nan or infinite: training diverged"):
            run(model, temperature=temperature)
