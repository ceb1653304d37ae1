"""Exports in the last transformers 4: equal logits, equal ids, and answers that end.

It is run in an environment of its own: `TRANSFORMERS_4_PYTHON` names its Python. Without it, one is
made with pip, of this environment's packages and the few that differ.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.prepare.build.test_stops import CHATML, with_template
from tests.data.prepare.tokenizers.test_auto import write
from tests.hf.cases import DENSE, LINEAR, LLAMA3, MIXED, MOE, YARN, rope, rope_by_kind
from tests.hf.fidelity import pair, their_config
from toolkit.data.prepare.tokenizers.auto import HARD_TEXTS, settle
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.hf.adapter import export_adapter
from toolkit.hf.choose import choose_family
from toolkit.hf.export import add_tokenizer, export_hf
from toolkit.models.lora_config import LoRAConfig

RELEASE = "4.57"
PACKAGES = (f"transformers=={RELEASE}.*", "huggingface_hub<1.0", "tokenizers<0.23", "typer-slim")

SCALED: dict[str, tuple[str, dict[str, Any]]] = {}
"""Every kind of scaled rope in every family that has it."""
for _kind, _scaling in {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}.items():
    for _type in ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "olmoe", "gpt_neox"):
        _fields: dict[str, Any] = {"hidden_size": 72, **rope(1000.0, **_scaling)}
        if _type == "gpt_neox":
            _fields |= {"hidden_size": 144, "hidden_act": "gelu"}
        SCALED[f"{_type}_{_kind}"] = (_type, _fields)
    for _type in ("mixtral", "qwen3_moe"):
        SCALED[f"{_type}_{_kind}"] = (_type, {"head_dim": 16, **rope(1000.0, **_scaling)})
    for _type, _base in (("gemma3_text", 10.0), ("olmo3", 1000.0), ("olmo3", 50.0)):
        _fields = {"head_dim": 32, **MIXED, **rope_by_kind(1000.0, _base, **_scaling)}
        SCALED[f"{_type}_{_kind}_{_base:.0f}"] = (_type, _fields)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with that release."""
    given = os.environ.get("TRANSFORMERS_4_PYTHON")
    if given:
        return given
    folder = tmp_path_factory.mktemp("transformers4")
    venv.create(folder, with_pip=True)
    own, site = folder / "bin/python", next((folder / "lib").glob("python*")) / "site-packages"
    run = subprocess.run(
        [own, "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], capture_output=True, text=True
    )
    if run.returncode:
        pytest.skip(f"pip cannot install transformers {RELEASE}: {run.stderr.strip()[-200:]}")
    # All else comes from here. A .pth comes after what is installed in the environment itself.
    here = [path for path in sys.path if path.endswith("site-packages")]
    here.append(sysconfig.get_path("purelib"))
    (site / "zz_others.pth").write_text("\n".join(dict.fromkeys(here)) + "\n")
    return str(own)


def ask(python: str, root: Path) -> dict[str, Any]:
    """What it answers to the folders in `root`; see older_transformers.py."""
    script = Path(__file__).with_name("older_transformers.py")
    run = subprocess.run([python, script, root], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    answers = json.loads((root / "answers.json").read_text())
    assert answers["version"].startswith(RELEASE)
    return answers


def test_every_family_and_rope_gives_the_same_logits(python: str, tmp_path: Path) -> None:
    root, ours, only_newer = tmp_path / "exported", {}, set()
    tokenizer = with_template(CHATML)
    tokenizer.save(tmp_path / "tokenizer")
    for name, (model_type, fields) in {**DENSE, **MOE, **SCALED}.items():
        vocab = {} if name in DENSE else {"vocab_size": 300}
        made = pair(their_config(model_type, **{**fields, **vocab}), tmp_path / "theirs" / name)
        exported = export_hf(
            made.read.config,
            made.ours.state_dict(),
            root / name,
            model_type=model_type,
            tokenizer_folder=tmp_path / "tokenizer" if vocab else None,
        )
        size = made.read.config.vocab_size
        ids = torch.randint(size, (2, 40), generator=torch.Generator().manual_seed(1))
        np.save(root / name / "ids.npy", ids.numpy())
        with torch.no_grad():
            ours[name] = made.ours.eval()(ids).numpy()
        if exported.only_newer is not None:
            only_newer.add(name)
    errors = ask(python, root)["errors"]
    # Said at export, because this release has no words for it.
    assert only_newer == {
        "olmo2_llama3", "olmo2_yarn", "olmo3_linear_50", "olmo3_llama3_50", "olmo3_yarn_50"
    }  # fmt: skip
    assert errors.keys() == {"olmo2_llama3", "olmo2_yarn"}
    end = tokenizer.id_of("<|im_end|>")
    for name in sorted(ours.keys() - errors.keys()):
        theirs = np.load(root / name / "logits.npy")
        equal = np.abs(theirs - ours[name]).max() <= 1e-4 * np.abs(ours[name]).max()
        assert equal == (name not in only_newer), name
        facts = json.loads((root / name / "facts.json").read_text())
        assert facts["dtype"] == "torch.float32"
        assert facts["eos_token_id"] == (None if name in DENSE else [256, end]), name
        assert facts["pad_token_id"] == (None if name in DENSE else 256), name


@pytest.mark.parametrize(
    "name",
    ["TokenizersBackend", "NobodysTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"],
)
def test_tokenizers_give_the_same_ids(name: str, python: str, tmp_path: Path) -> None:
    """A space before the first word, tokens listed as 5 lists them, an end chosen for the data."""
    from tokenizers import pre_tokenizers

    folders = {
        "pattern": write(tmp_path / "pattern", tokenizer_class=name),
        "space": write(
            tmp_path / "space",
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            tokenizer_class=name,
            extra_special_tokens=["<|im_end|>"],
            eos_token="<|im_end|>",
            chat_template=CHATML,
        ),
    }
    stale = {"eos_token": "<|endoftext|>"}
    (folders["space"] / "special_tokens_map.json").write_text(json.dumps(stale))
    for folder in folders.values():
        settle(folder, where="it")
        (folder / "texts.json").write_text(json.dumps([*HARD_TEXTS, "a<|im_end|> b"]))
    answers = ask(python, tmp_path)
    assert answers["errors"] == {}
    for folder in folders.values():
        found = json.loads((folder / "token_ids.json").read_text())
        ours = load_tokenizer(folder)
        expected = [ids.tolist() for ids in ours.encode_batch(HARD_TEXTS)]
        assert found["ids"][:-1] == expected
        ((controls, _),) = ours.encode_offsets(["a<|im_end|> b"], special_tokens=True)
        assert found["ids"][-1] == controls.tolist()
        assert found["eos_token"] == ours.eos_token
        assert found["chat_template"] == ours.chat_template


def test_adapters_give_the_same_logits(python: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = pair(their_config("llama", vocab_size=300), tmp_path / "theirs")
    root = tmp_path / "exported"
    export_hf(made.read.config, made.ours.state_dict(), root / "base", model_type="llama")
    layer, width = "blocks.1.attention.query", made.read.config.d_model
    adapter = {
        f"{layer}.lora_A.weight": torch.randn(2, width),
        f"{layer}.lora_B.weight": torch.randn(width, 2),
    }
    lora = LoRAConfig(rank=2, alpha=4.0)
    export_adapter(
        made.read.config, choose_family(made.read.config), lora, adapter, root / "base/adapter"
    )
    with_template(CHATML).save(tmp_path / "tokenizer")
    add_tokenizer(root / "base/adapter", tmp_path / "tokenizer", None)
    ids = torch.arange(20)[None]
    np.save(root / "base/ids.npy", ids.numpy())
    with torch.no_grad():
        weight = made.ours.get_parameter(f"{layer}.weight")
        weight += 2.0 * adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
        expected = made.ours.eval()(ids).numpy()
    assert ask(python, root)["errors"] == {}
    found = np.load(root / "base/logits.npy")
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    shutil.rmtree(root)
