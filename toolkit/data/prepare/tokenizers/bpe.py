"""BPE trained on the corpus itself."""

from collections.abc import Iterable

from toolkit.data.prepare.tokenizers.byte import byte_characters
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE
from toolkit.data.prepare.tokenizers.tokenizer import EOS_TOKEN, Tokenizer, fast_config


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; GPT-2's byte alphabet and word pattern).

    The same texts give the same tokenizer. Little text may give fewer than `vocab_size` ids.
    """
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, EOS_TOKEN, {TOKENIZER_CONFIG_FILE: fast_config()})
