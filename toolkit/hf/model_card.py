"""README.md of an exported model: what is known of it, and nothing else."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.hf.tokenizer_files import scoring_pad

OLDEST = "transformers 4.57 or newer"
"""What exports are tested with."""


class Scoring(NamedTuple):
    """How training scored texts; see `scoring_of`."""

    end: str | None = None
    """The token that ends documents, at which they are scored; None: at the last of their own."""
    adds_bos: bool = False
    """Whether the tokenizer puts the start-of-document token before texts."""
    has_padding: bool = False
    """Whether a token can fill up rows of a batch."""


def scoring_of(
    tokenizer: Tokenizer | None,
    generation: Mapping[str, Any] | None,
    vocab_size: int,
    *,
    append_eos: bool,
) -> Scoring:
    """How a reward model with `tokenizer` scores texts; `append_eos` as in `dataset`."""
    if tokenizer is None:
        return Scoring()
    pad = scoring_pad(tokenizer, generation, vocab_size)
    end = tokenizer.eos_token if append_eos else None
    return Scoring(end, tokenizer.adds_bos, has_padding=pad is not None)


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a card says. What is None or empty is left out."""

    title: str
    description: str = ""
    """A line by whoever trained it."""
    is_adapter: bool = False
    base_model: str | None = None
    """Name on the hub of the model that training began from; None: it has none, or it is not
    known."""
    base_name: str | None = None
    """What an adapter calls its base where that is not on the hub."""
    license: str | None = None
    """As the base model states it."""
    license_name: str | None = None
    license_link: str | None = None
    """Of a license that has no short name of its own (`license: other`)."""
    datasets: list[str] = []
    """Names on the hub."""
    model: dict[str, str] = {}
    """Rows of a table: architecture, sizes."""
    training: dict[str, str] = {}
    """Rows of a table: data, length, optimizer, machine."""
    results: dict[str, str] = {}
    """Rows of a table: losses."""
    command: str | None = None
    """That trained it."""
    config: str = ""
    """Values that are no defaults, as YAML, where no command says all of them."""
    versions: dict[str, str] = {}
    """Of the libraries it was trained with."""
    needs: str = OLDEST
    """Releases that compute what it computed here."""
    has_tokenizer: bool = False
    has_chat_template: bool = False
    scoring: Scoring = Scoring()
    """Of a reward model."""

    @property
    def gives_scores(self) -> bool:
        """Whether it is a reward model."""
        return self.model.get("Architecture", "").endswith("ForSequenceClassification")


def render_card(card: ModelCard) -> str:
    """The card as Markdown, with the front matter that the hub reads."""
    from huggingface_hub import ModelCardData

    front = ModelCardData(
        library_name="peft" if card.is_adapter else "transformers",
        pipeline_tag="text-classification" if card.gives_scores else "text-generation",
        base_model=card.base_model,
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        datasets=card.datasets or None,
        tags=["toolkit"],
    )
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {card.title}",
        card.description,
        _table("Model", card.model),
        _table("Training", card.training),
        _table("Results", card.results),
        f"The command:\n\n```bash\n{card.command}\n```" if card.command else "",
        f"The config, without what has its default:\n\n```yaml\n{card.config}```"
        if card.config
        else "",
        f"Trained with {versions}." if versions else "",
        f"## Use\n\nWith {card.needs}:\n\n```python\n{_snippet(card)}\n```",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _table(heading: str, rows: dict[str, str]) -> str:
    cells = {name: " ".join(value.split()).replace("|", "\\|") for name, value in rows.items()}
    lines = [f"## {heading}", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {n} | {c} |" for n, c in cells.items())]) if rows else ""


def _snippet(card: ModelCard) -> str:
    kind = "AutoModelForSequenceClassification" if card.gives_scores else "AutoModelForCausalLM"
    imports = f"from transformers import {kind}"
    loading = f"model = {kind}.from_pretrained(folder)"
    if card.has_tokenizer:
        imports += ", AutoTokenizer"
    if card.is_adapter:
        imports += "\nfrom peft import PeftModel"
        base = card.base_model or card.base_name or "BASE"
        loading = f"base = {kind}.from_pretrained({base!r})\n"
        loading += "model = PeftModel.from_pretrained(base, folder)"
    lines = [imports, "", 'folder = "path/to/this/folder"', loading]
    if not card.has_tokenizer:
        return "\n".join(lines)
    if card.gives_scores:
        return "\n".join([*lines, *_scoring(card)])
    inputs = ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    if card.has_chat_template:
        inputs = [
            'messages = [{"role": "user", "content": "Hello"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)", *inputs]
    lines.append("print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))")
    return "\n".join(lines)


def _scoring(card: ModelCard) -> list[str]:
    """Whole texts, scored at the token at which training scored them."""
    lines = ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    special, (end, adds_bos, has_padding) = "", card.scoring
    if card.has_chat_template:
        special = ", add_special_tokens=False"
        if adds_bos:
            special = ", add_special_tokens=not text.startswith(tokenizer.bos_token)"
        lines += [
            "messages = [",
            '    {"role": "user", "content": "Hello"},',
            '    {"role": "assistant", "content": "Hello, how can I help?"},',
            "]",
            "text = tokenizer.apply_chat_template(messages, tokenize=False)",
        ]
    else:
        lines.append('text = "What is 2 + 2? " + "4"  # the prompt with its answer')
    if end is not None:
        lines += [
            f"end = {json.dumps(end)}  # training scored texts at this token",
            "text = text.rstrip() if text.rstrip().endswith(end) else text + end",
        ]
    if has_padding and card.is_adapter:
        lines.append("base.config.pad_token_id = tokenizer.pad_token_id")
    if has_padding:
        rest = f'padding=True, return_tensors="pt"{special})'
        lines.append(f"inputs = tokenizer([text, text], {rest}")
    else:
        lines += [
            "# One text at a time: no token can fill up the rows of a batch.",
            f'inputs = tokenizer(text, return_tensors="pt"{special})',
        ]
    return [*lines, "print(model(**inputs).logits[:, 0])"]
