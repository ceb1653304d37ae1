"""What a preparation refuses: settings that its source cannot have, a result of no use."""

from toolkit.data.config import BPETokenizerConfig, DatasetConfig, TokenFilesSourceConfig
from toolkit.data.prepare.build.worker import WorkerSetup, make_encoder
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.readers import read_shard
from toolkit.data.prepare.text.reading import Counts
from toolkit.data.prepare.text.shards import Plan
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.data.tokens.prepared import SplitInfo
from toolkit.errors import DataError


def check_choices(config: DatasetConfig) -> None:
    """Settings that need text or rows, given for a source of tokens."""
    if not isinstance(config.source, TokenFilesSourceConfig):
        return
    for name in ("filters", "instructions"):
        if getattr(config, name) is not None:
            raise DataError(
                f"dataset.{name}: needs text, but dataset.source holds tokens; leave it out"
            )
    if config.tokenizer is None:
        for name in ("vocab_size", "eos_id"):
            if getattr(config.source, name) is None:
                raise DataError(
                    f"dataset.source.{name}: must be given where dataset.tokenizer is null"
                )
    if isinstance(config.tokenizer, BPETokenizerConfig):
        raise DataError(
            "dataset.tokenizer: bpe is trained on text, but dataset.source holds tokens; give the "
            "tokenizer that made them, or null"
        )


def no_training_text(splits: dict[str, SplitInfo], left_out: dict[str, int], skipped: int) -> str:
    """Why no document is left, in words."""
    reasons = [f"{count} by {reason}" for reason, count in left_out.items() if count]
    if skipped:
        reasons.append(f"{skipped} empty")
    if splits:
        reasons.append("all others were held out")
    why = f" (left out: {', '.join(reasons)})" if reasons else ""
    return (
        f"dataset.source: gave no training text{why}; check its paths, text field and filters, or "
        "set dataset.validation_fraction=0"
    )


def check_targets(
    setup: WorkerSetup,
    plan: Plan,
    tokenizer: Tokenizer | None,
    splits: dict[str, SplitInfo],
    left_out: dict[str, int],
) -> None:
    """Instruction data whose loss asks for nothing, or for every token, was misread."""
    if setup.instructions is None:
        return
    from toolkit.data.prepare.build.instructions import InstructionEncoder

    def first_piece() -> Piece | None:
        pieces = (p for shard in plan.shards for p in read_shard(shard, setup.reading, Counts()))
        return next(pieces, None)

    encoder = make_encoder(setup, tokenizer)
    assert isinstance(encoder, InstructionEncoder)
    infos = splits.values()
    encoder.check(
        num_tokens=sum(info.num_tokens for info in infos),
        num_targets=sum(info.num_targets or 0 for info in infos),
        filtered=left_out,
        first_piece=first_piece,
    )
