"""OLMo-core's side of `step_speed.py`: runs under the interpreter that has `ai2-olmo-core`.

Reads a line `PRECISION STEPS` on standard input, does that many optimizer steps and answers with
one JSON line of seconds per step; in between it sleeps. Arguments: number of threads, and the clock
of module `time` to count by. Everything OLMo-core prints goes to standard error.
"""

import json
import os
import sys
import time

BATCH, SEQUENCE, VOCABULARY = 8, 256, 8192


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    clock = getattr(time, sys.argv[2])
    steps = {name: build(name) for name in ("bf16", "fp32")}
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
    """One step of the eager loop: OLMo-core's Transformer and AdamW, clipped at 1.0.

    OLMo-core's AdamWConfig leaves `fused` open, and torch then takes the slowest form on CPUs;
    here it is asked for the fastest.
    """
    import torch
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig

    config = TransformerConfig.llama_like(
        d_model=256,
        vocab_size=VOCABULARY,
        n_layers=4,
        n_heads=4,
        hidden_size_multiplier=768 / 682,
        hidden_size_multiple_of=64,
    )
    torch.manual_seed(0)
    model = config.build(init_device="cpu")
    model.init_weights(max_seq_len=SEQUENCE, device=torch.device("cpu"))
    optimizer = AdamWConfig(lr=1e-3, fused=True).build(model)
    batches = [torch.randint(0, VOCABULARY, (BATCH, SEQUENCE)) for _ in range(16)]
    done = 0

    def step() -> None:
        nonlocal done
        ids = batches[done % len(batches)]
        done += 1
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(
                ids,
                labels=labels,
                ignore_index=-100,
                loss_reduction="sum",
                loss_div_factor=BATCH * (SEQUENCE - 1),
                return_logits=False,
            )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
