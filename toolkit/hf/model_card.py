"""README.md of an exported model: what is known of it, and nothing else."""

import msgspec

_TEXT_GENERATION = "text-generation"
OLDEST = "transformers 4.57 or newer"
"""What exports are tested with."""


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a card says. What is None or empty is left out."""

    title: str
    description: str = ""
    """A line by whoever trained it."""
    is_adapter: bool = False
    base_model: str | None = None
    """Name on the hub of the model that training began from; None: it has none, or it is not
    known."""
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
    versions: dict[str, str] = {}
    """Of the libraries it was trained with."""
    needs: str = OLDEST
    """Releases that compute what it computed here."""
    has_tokenizer: bool = False
    has_chat_template: bool = False


def render_card(card: ModelCard) -> str:
    """The card as Markdown, with the front matter that the hub reads."""
    from huggingface_hub import ModelCardData

    front = ModelCardData(
        library_name="peft" if card.is_adapter else "transformers",
        pipeline_tag=_TEXT_GENERATION,
        base_model=card.base_model,
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        datasets=card.datasets or None,
        tags=["toolkit"],
    )
    sections = [f"---\n{front.to_yaml()}\n---", f"# {card.title}"]
    if card.description:
        sections.append(card.description)
    for heading, rows in (
        ("Model", card.model),
        ("Training", card.training),
        ("Results", card.results),
    ):
        if rows:
            sections += [f"## {heading}", _table(rows)]
    if card.command:
        sections += ["The command:", f"```bash\n{card.command}\n```"]
    if card.versions:
        listed = ", ".join(f"{name} {version}" for name, version in card.versions.items())
        sections.append(f"Trained with {listed}.")
    sections += ["## Use", f"With {card.needs}:", f"```python\n{_snippet(card)}\n```"]
    return "\n\n".join(sections) + "\n"


def _table(rows: dict[str, str]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")


def _snippet(card: ModelCard) -> str:
    imports = "from transformers import AutoModelForCausalLM"
    if card.has_tokenizer:
        imports += ", AutoTokenizer"
    lines = [imports]
    if card.is_adapter:
        lines += [
            "from peft import PeftModel",
            "",
            'folder = "path/to/this/folder"',
            f"base = AutoModelForCausalLM.from_pretrained({(card.base_model or 'BASE')!r})",
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    else:
        lines += [
            "",
            'folder = "path/to/this/folder"',
            "model = AutoModelForCausalLM.from_pretrained(folder)",
        ]
    if card.has_tokenizer:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
        if card.has_chat_template:
            lines += [
                'messages = [{"role": "user", "content": "Hello"}]',
                "inputs = tokenizer.apply_chat_template(",
                '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
                ")",
            ]
        else:
            lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
        lines.append("print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))")
    return "\n".join(lines)
