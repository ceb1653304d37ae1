"""DPO side by side with TRL: real tokens a second, of one model on the same pairs.

    python benchmarks/dpo_speed.py            # needs trl==1.16.0

Counted are the tokens of prompts and answers, of both answers of each pair; padding is not. Timed
are whole training steps: reading a batch, forward, backward, clipping and AdamW, in fp32, without
what comes once (tokenizing, packing, the reference's log-probabilities of our side and of
`precompute`). Both take about as many tokens a step. The variants run in turns in one process, and
each keeps its median over the rounds.

    toolkit       packed rows of 1,024 tokens, reference log-probabilities from their table
    precompute    TRL's DPOTrainer, precompute_ref_log_probs=True
    trl           TRL's DPOTrainer as it comes: the reference model computes in every step
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.utils import logging as hf_logging

from toolkit.models.config import TransformerConfig
from toolkit.optim.config import AdamWConfig
from toolkit.optim.schedules import ConstantConfig
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Progress
from toolkit.train.preference.config import DPOConfig as Objective

try:
    from trl import DPOConfig, DPOTrainer
except ImportError:
    print("left out: pip install trl==1.16.0")
    raise SystemExit from None

VOCAB, WIDTH, LAYERS, HEADS, INNER = 4096, 256, 4, 4, 704
ROW, ROWS, PAIRS_A_STEP = 1024, 4, 8


def pairs(number: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids of prompt, chosen and rejected, with the lengths of chat data: log-normal."""
    rng = np.random.default_rng(0)

    def ids(mean: float, spread: float, most: int) -> np.ndarray:
        length = int(np.clip(rng.lognormal(np.log(mean), spread), 4, most))
        return rng.integers(2, VOCAB, length)

    return [(ids(60, 0.7, 200), ids(120, 0.6, 290), ids(110, 0.6, 290)) for _ in range(number)]


def batches(rows: list[tuple[np.ndarray, ...]]) -> list[tuple[dict[str, torch.Tensor], int]]:
    """Batches of `ROWS` packed rows (first fit by falling length), and their real tokens."""
    sizes = [2 * len(p) + len(c) + len(r) + 2 for p, c, r in rows]
    packed: list[tuple[int, list[int]]] = []
    for number in np.argsort(sizes)[::-1]:
        for place, (used, own) in enumerate(packed):
            if used + sizes[number] <= ROW:
                packed[place] = used + sizes[number], [*own, int(number)]
                break
        else:
            packed.append((sizes[number], [int(number)]))
    np.random.default_rng(1).shuffle(packed)  # type: ignore[arg-type]
    most = max(len(own) for _, own in packed)
    found = []
    for first in range(0, len(packed) - ROWS + 1, ROWS):
        ids = torch.ones(ROWS, ROW, dtype=torch.int64)
        mask = torch.zeros(ROWS, ROW, dtype=torch.uint8)
        documents = torch.zeros(ROWS, ROW, dtype=torch.int32)
        units = torch.full((ROWS, most), -1, dtype=torch.int64)
        tokens = 0
        for row, (_, own) in enumerate(packed[first : first + ROWS]):
            place = 0
            for k, number in enumerate(own):
                units[row, k] = number
                prompt, *answers = rows[number]
                for side, answer in enumerate(answers):
                    document = torch.from_numpy(np.concatenate([prompt, answer, [1]]))
                    end = place + len(document)
                    ids[row, place:end] = document
                    mask[row, place + len(prompt) : end] = 1 + side
                    documents[row, place:end] = 2 * k + side
                    place = end
            documents[row, place:] = 2 * len(own)
            tokens += place
        reference = torch.full((ROWS, most, 2), -1000.0)
        batch = {"input_ids": ids, "label_mask": mask, "document_ids": documents, "units": units}
        found.append(({**batch, "reference_log_probs": reference}, tokens))
    return found


class Toolkit:
    def __init__(self, rows: list[tuple[np.ndarray, ...]], microbatch: int) -> None:
        config = TransformerTrainModuleConfig(
            precision="fp32", rank_microbatch_size=microbatch, objective=Objective(),
            optim=AdamWConfig(lr=5e-7, weight_decay=0.0), scheduler=ConstantConfig(),
            compile_model=False,
        )  # fmt: skip
        model = TransformerConfig(
            vocab_size=VOCAB, d_model=WIDTH, num_layers=LAYERS, num_heads=HEADS,
            intermediate_size=INNER, max_sequence_length=ROW,
        )  # fmt: skip
        self.module = config.build(model.build(init_device="meta"))
        self.batches, self.step = batches(rows), 0

    def run(self, steps: int) -> float:
        tokens, started = 0, time.perf_counter()
        for _ in range(steps):
            batch, real = self.batches[self.step % len(self.batches)]
            size = ROWS * ROW
            self.module.train_batch(batch)
            self.module.optim_step(Progress(self.step, self.step * size, 10**6, 10**9, size))
            self.step += 1
            tokens += real
        return tokens / (time.perf_counter() - started)


class Timer(TrainerCallback):
    started = ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()


class TRL:
    def __init__(
        self, rows: list[tuple[np.ndarray, ...]], folder: str, *, precompute: bool, at_once: int
    ) -> None:
        words = {f"t{n}": n for n in range(VOCAB)}
        made = Tokenizer(models.WordLevel(words, unk_token="t0"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="t1", pad_token="t0")
        text = [
            {
                "prompt": " ".join(f"t{n}" for n in p),
                "chosen": "".join(f" t{n}" for n in c) + " t1",
                "rejected": "".join(f" t{n}" for n in r) + " t1",
            }
            for p, c, r in rows
        ]
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=ROW, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )  # fmt: skip
        args = DPOConfig(
            output_dir=folder, per_device_train_batch_size=at_once,
            gradient_accumulation_steps=PAIRS_A_STEP // at_once, learning_rate=5e-7,
            lr_scheduler_type="constant", report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, max_length=None, precompute_ref_log_probs=precompute,
            logging_steps=1000, save_strategy="no", disable_tqdm=True, max_steps=1,
            dataloader_pin_memory=False, optim="adamw_torch_fused",
        )  # fmt: skip
        self.timer = Timer()
        self.trainer = DPOTrainer(
            model=LlamaForCausalLM(config), ref_model=LlamaForCausalLM(config), args=args,
            train_dataset=Dataset.from_list(text), processing_class=tokenizer,
            callbacks=[self.timer],
        )  # fmt: skip
        collate, self.tokens = self.trainer.data_collator, 0

        def counted(examples: Any) -> Any:
            batch = collate(examples)
            self.tokens += int(batch["attention_mask"].sum())
            return batch

        self.trainer.data_collator = counted

    def run(self, steps: int) -> float:
        self.trainer.args.max_steps, self.tokens = steps, 0
        self.trainer.train()
        return self.tokens / (self.timer.ended - self.timer.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--microbatch", type=int, default=4096)
    parser.add_argument("--at-once", type=int, default=4)
    asked = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    rows = pairs(asked.pairs)
    with tempfile.TemporaryDirectory() as folder:
        ours = Toolkit(rows, asked.microbatch)
        theirs = {
            name: TRL(rows, folder, precompute=name == "precompute", at_once=asked.at_once)
            for name in ("precompute", "trl")
        }
        sides: dict[str, Any] = {"toolkit": ours, **theirs}
        found: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side.run(1)
        for _ in range(asked.rounds):
            for name, side in sides.items():
                found[name].append(side.run(asked.steps))
            print({name: round(values[-1]) for name, values in found.items()}, flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    mean = statistics.mean(tokens for _, tokens in ours.batches)
    print(f"{torch.get_num_threads()} threads, {mean:,.0f} real tokens in a step of the toolkit")
    for name, median in medians.items():
        low, high = min(found[name]), max(found[name])
        ratio = medians["toolkit"] / median
        print(f"{name:<12}{median:>8,.0f} tok/s ({low:,.0f} to {high:,.0f}), toolkit {ratio:.2f}x")


if __name__ == "__main__":
    main()
