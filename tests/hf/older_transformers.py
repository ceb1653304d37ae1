"""Run by the Python of another environment: what its `transformers` makes of exported folders.

`python older_transformers.py ROOT`: each folder in ROOT may hold `ids.npy`, `(batch, seq)`,
`adapter/` to be put onto the model, and `texts.json`, a list. Beside them go `logits.npy` in fp32,
`facts.json` and `token_ids.json`; `answers.json` in ROOT holds the version and, by folder, the
error where there was one.
"""

import json
import sys
from pathlib import Path


def main(root: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    errors: dict[str, str] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        try:
            _answer(folder)
        except Exception as error:
            errors[folder.name] = f"{type(error).__name__}: {error}"
    answer = {"version": transformers.__version__, "errors": errors}
    (root / "answers.json").write_text(json.dumps(answer))


def _answer(folder: Path) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "ids.npy").is_file():
        ids = torch.from_numpy(np.load(folder / "ids.npy"))
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"], info["missing_keys"]
        assert not info["unexpected_keys"], info["unexpected_keys"]
        settings = model.generation_config
        dtype = str(model.config.torch_dtype)
        if (folder / "adapter").is_dir():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(folder / "adapter"))
        with torch.no_grad():
            logits = model.float().eval()(ids, use_cache=False).logits
        np.save(folder / "logits.npy", logits.numpy())
        facts = {
            "dtype": dtype,
            "eos_token_id": settings.eos_token_id,
            "pad_token_id": settings.pad_token_id,
        }
        (folder / "facts.json").write_text(json.dumps(facts))
    if (folder / "texts.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        facts = {
            "class": type(tokenizer).__name__,
            "ids": found,
            "eos_token": tokenizer.eos_token,
            "chat_template": tokenizer.chat_template,
        }
        (folder / "token_ids.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
