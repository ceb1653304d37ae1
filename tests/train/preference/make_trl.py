"""Makes trl_numbers.json: losses and gradients of TRL 1.16.0's trainers on a tiny model.

Run it in an environment with `trl==1.16.0` (the suite needs none):

    python -m tests.train.preference.make_trl

The model is a Llama of `transformers` in fp32 with the weights of `tests.train.preference.rows`,
the reference another one. Each trainer computes the loss of all rows as one batch by its own
`compute_loss`; kept are the loss, and of the gradient of every parameter its norm and its
projection on a direction.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.train.preference.rows import (
    PAIRS,
    VOCAB,
    binary_rows,
    direction,
    llama,
    scored_llama,
)

OUT = Path(__file__).with_name("trl_numbers.json")


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{n}": n for n in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="t1", pad_token="t0")


def numbers(trainer: Any, batch: Any) -> dict[str, Any]:
    model = trainer.model
    model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        "loss": loss.item(),
        "gradients": {
            name: [grad.norm().item(), (grad * direction(name, grad.shape)).sum().item()]
            for name, grad in grads.items()
        },
    }


def settings(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": len(PAIRS), "report_to": "none",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": None,
        "disable_dropout": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def main() -> None:
    found: dict[str, Any] = {}
    text = [{"prompt": "t2", "chosen": "t3", "rejected": "t4"}] * 2
    pairs = [
        {"prompt_ids": list(p), "chosen_ids": list(c), "rejected_ids": list(r)} for p, c, r in PAIRS
    ]
    with tempfile.TemporaryDirectory() as folder:
        common = settings(folder)
        for name, options in {
            "dpo_sigmoid": {"loss_type": ["sigmoid"], "beta": 0.3},
            "dpo_ipo": {"loss_type": ["ipo"], "beta": 0.3},
            "dpo_length_normalised": {"loss_type": ["sigmoid_norm"], "beta": 5.0},
        }.items():
            trainer = DPOTrainer(
                model=llama(0), ref_model=llama(1), args=DPOConfig(**common, **options),
                train_dataset=Dataset.from_list(text), processing_class=tokenizer(),
            )  # fmt: skip
            found[name] = numbers(trainer, trainer.data_collator(pairs))
        trainer = KTOTrainer(
            model=llama(0), ref_model=llama(1),
            args=KTOConfig(**common, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7),
            train_dataset=Dataset.from_list(
                [{"prompt": "t2", "completion": f"t{n}", "label": bool(n % 2)} for n in range(12)]
            ),
            processing_class=tokenizer(),
        )  # fmt: skip
        rows = [
            {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": k, "label": label}
            for p, c, k, label in binary_rows()
        ]
        found["kto"] = numbers(trainer, trainer.data_collator(rows))
        trainer = RewardTrainer(
            model=scored_llama(), args=RewardConfig(**common, center_rewards_coefficient=0.1),
            train_dataset=Dataset.from_list(text), processing_class=tokenizer(),
        )  # fmt: skip
        scored = [
            {"chosen_ids": p["prompt_ids"] + p["chosen_ids"],
             "rejected_ids": p["prompt_ids"] + p["rejected_ids"]}
            for p in pairs
        ]  # fmt: skip
        found["reward"] = numbers(trainer, trainer.data_collator(scored))
        common.pop("max_length")
        labelled = [pair_columns(p) for p in pairs]
        for name, kind, config in (
            ("orpo", ORPOTrainer, ORPOConfig(**common, beta=0.3, max_length=64)),
            (
                "simpo", CPOTrainer,
                CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.8,
                          max_length=64),
            ),
        ):  # fmt: skip
            trainer = kind(
                model=llama(0), args=config, train_dataset=Dataset.from_list(text),
                processing_class=tokenizer(),
            )  # fmt: skip
            found[name] = numbers(trainer, trainer.data_collator(labelled))
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def pair_columns(pair: dict[str, Any]) -> dict[str, Any]:
    """The columns that the older trainers tokenize rows into."""
    columns: dict[str, Any] = {"prompt": "", "chosen": "", "rejected": ""}
    prompt = pair["prompt_ids"]
    columns |= {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        ids = prompt + pair[f"{side}_ids"]
        columns[f"{side}_input_ids"] = ids
        columns[f"{side}_attention_mask"] = [1] * len(ids)
        columns[f"{side}_labels"] = [-100] * len(prompt) + pair[f"{side}_ids"]
    return columns


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
