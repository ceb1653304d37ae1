"""Whole inputs, made once: a model folder of transformers, a run, and its prepared data."""

from pathlib import Path

from toolkit.cli import main as cli


def make_whole(folder: Path) -> dict[str, Path]:
    """Made in `folder`, by name of the kind."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from toolkit.data.prepare.tokenizers.tokenizer import train_bpe

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = folder / "model"
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(model)
    train_bpe([" ".join(f"{n} small words" for n in range(900))], 300).save(model)
    text = folder / "text.txt"
    text.write_text("".join(f"line {n}: é and {n * n}\n" for n in range(400)), encoding="utf-8")
    args = [
        "train", "smoke", "--save-folder", folder / "run", "--data-root", folder / "data",
        f"--dataset.source={{type: files, paths: ['{text}']}}", "--dataset.num_processes=1",
        "--data_loader.eval_tokens=600", "--trainer.max_duration.value=4",
        "--trainer.callbacks.checkpointer={interval: 2, export_hf: false}",
        "--trainer.callbacks.system_monitor.enabled=false",
    ]  # fmt: skip
    assert cli.run([str(arg) for arg in args]) == 0
    return {name: folder / name for name in ("model", "run", "data")}
