"""OLMo-core's side of `checkpoint_speed.py`: runs under the interpreter that has `ai2-olmo-core`.

Reads lines `save FOLDER` and `load FOLDER` on standard input and answers each with the seconds it
took. What is timed are the functions that OLMo-core's `Checkpointer` saves and loads model and
optimizer with. Everything OLMo-core prints goes to standard error.
"""

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    from olmo_core.distributed.checkpoint import (
        load_model_and_optim_state,
        save_model_and_optim_state,
    )
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import AdamWConfig

    torch.set_num_threads(int(sys.argv[1]))
    config = TransformerConfig.llama_like(
        d_model=512, vocab_size=16_384, n_layers=8, n_heads=8, hidden_size_multiple_of=64
    )
    model = config.build(init_device="cpu")
    model.init_weights(max_seq_len=256, device=torch.device("cpu"))
    optimizer = AdamWConfig(fused=True).build(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    actions = {"save": save_model_and_optim_state, "load": load_model_and_optim_state}
    count = sum(parameter.numel() for parameter in model.parameters())
    answers.write(json.dumps(count) + "\n")
    for line in sys.stdin:
        action, folder = line.split()
        started = time.perf_counter()
        actions[action](folder, model, optimizer)
        answers.write(json.dumps(time.perf_counter() - started) + "\n")


if __name__ == "__main__":
    main()
