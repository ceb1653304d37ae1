"""litgpt's side of `step_speed.py`: runs under the interpreter that has `litgpt`.

Speaks as `_olmo_core_worker.py` does. A step is the inner loop of `litgpt pretrain`: GPT under
torch.compile, set up by Fabric, its chunked cross entropy, clipping, AdamW. litgpt asks for fused
AdamW on CUDA only; here it has it.
"""

import json
import os
import sys
import time

BATCH, SEQUENCE, VOCABULARY = 8, 256, 8192
PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32-true"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    clock = getattr(time, sys.argv[2])
    steps = {name: build(precision) for name, precision in PRECISIONS.items()}
    answers.write(json.dumps({"parameters": steps["bf16"][1]}) + "\n")
    for line in sys.stdin:
        name, count = line.split()
        seconds = []
        for _ in range(int(count)):
            started = clock()
            steps[name][0]()
            seconds.append(clock() - started)
        answers.write(json.dumps(seconds) + "\n")


def build(precision: str):
    import lightning
    import torch
    from litgpt.model import GPT
    from litgpt.model import Config as LitGPTConfig
    from litgpt.utils import chunked_cross_entropy

    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.seed_everything(0)
    config = LitGPTConfig(
        block_size=SEQUENCE,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        n_layer=4,
        n_head=4,
        n_embd=256,
        intermediate_size=768,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    bare = GPT(config)
    count = sum(parameter.numel() for parameter in bare.parameters())
    model = fabric.setup(torch.compile(bare))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    optimizer = fabric.setup_optimizers(optimizer)
    batches = [torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1)) for _ in range(16)]
    done = 0

    def step() -> None:
        nonlocal done
        ids = batches[done % len(batches)]
        done += 1
        logits = model(ids[:, :-1].contiguous().long())
        loss = chunked_cross_entropy(logits, ids[:, 1:].contiguous().long())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, count


if __name__ == "__main__":
    main()
