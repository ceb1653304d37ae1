"""Gemma3ForCausalLM: Gemma 2 with normalised query and key heads, and a rope for each kind of
attention."""

from functools import partial
from typing import Any

from toolkit.hf.families.gemma2 import NORMS, read_gemma, write_gemma
from toolkit.hf.families.llama import decoder_rules
from toolkit.hf.families.rope import only_newer, read_rope_by_kind, write_rope_by_kind
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings

_NORMS = {
    **NORMS,
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
}
_SLIDING_BASE = "rope_local_base_freq"


def _read_config(settings: Settings) -> dict[str, Any]:
    # The class has this field and does not use it.
    settings.require("attn_logit_softcapping", None)
    return {**read_gemma(settings), **read_rope_by_kind(settings), "qk_norm": "per_head"}


GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    write_config=lambda config: {
        **write_gemma(config),
        **write_rope_by_kind(config, sliding_base=_SLIDING_BASE),
    },
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, _NORMS),
    only_newer=partial(only_newer, sliding_base=_SLIDING_BASE),
)
