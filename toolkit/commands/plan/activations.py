"""What a forward keeps for backward, in bytes of one microbatch on one rank.

Counted from what the model's operations save (toolkit/models): a linear layer its input, a norm its
input and statistics, attention its queries, keys, values, outputs and one number per head and
query, a gated feed-forward its two products, the activation and what goes into the last product.
torch.compile keeps the same but for the activation, which it computes again.
"""

from typing import NamedTuple

from toolkit.commands.plan.devices import CPU
from toolkit.commands.plan.job import FP32, Job, Parameter
from toolkit.commands.plan.pieces import local_shape
from toolkit.models.layer_configs import DeltaNetConfig
from toolkit.models.shapes import loss_chunk_rows

_INDEX = 8
"""Bytes of an int64."""
_CHUNK_SIZE = 64
"""Of linear attention: `toolkit.models.delta_rule.CHUNK_SIZE`."""


_READ_BLOCK_INPUT = {
    f"attention.{name}" for name in ("query", "key", "value", "gate", "decay", "write")
}
"""Layers of attention of either kind that multiply what the block is given."""


class Activations(NamedTuple):
    """Bytes that one block, or several, keep from forward to backward."""

    residual: float = 0
    """The residual stream and what norms keep of it."""
    attention: float = 0
    feed_forward: float = 0
    """Or the experts and their router."""
    casts: float = 0
    """Copies of weights in the compute type, where autocast makes them."""

    @property
    def total(self) -> float:
        return sum(self)

    def __add__(self, other: "Activations") -> "Activations":  # type: ignore[override]
        return Activations(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: float) -> "Activations":
        return Activations(*(number * value for value in self))


def block_activations(job: Job, *, sparse: bool, linear: bool = False) -> Activations:
    """Of a block that is not computed again."""
    model, size, tp = job.model, job.compute_bytes, job.layout.tp
    tokens, chunk = job.tokens, job.chunk_tokens
    width = model.d_model
    # LayerNorm keeps its input in fp32, and two statistics; RMSNorm its input, and one.
    eager_layer_norm = model.norm == "layer_norm" and not job.is_compiled
    norm_input = FP32 if eager_layer_norm else size
    statistics = FP32 * (2 if model.norm == "layer_norm" else 1)
    norms = 4 if model.norm_placement == "sandwich" else 1 if model.shared_norm else 2
    residual = chunk * norms * (width * norm_input + statistics)
    if model.is_normalized:
        # Of each step: what it goes to, before and after its length is one; where it arrives.
        residual = chunk * 2 * (width * (2 * FP32 + size) + 2 * FP32)
    if model.parallel_residual and norms == 2:  # both norms read the same stream
        residual -= chunk * width * norm_input
    gathered = tokens * width * size
    # What attention and feed-forward read: the normed stream, or where norms come after, the stream
    # itself, gathered over tp.
    feed_forward = 0.0
    if sparse:
        feed_forward += _experts(job)
    else:
        kept = _kept_widths(job) + (2 if model.is_normalized else 0)  # before their scales
        feed_forward += gathered + tokens * -(-model.intermediate_size // tp) * size * kept
    attention = gathered + (_delta_net(job) if linear else _attention(job))
    return Activations(residual, attention, feed_forward)


def of_adapters(
    job: Job, parameters: tuple[Parameter, ...], *, sparse: bool
) -> tuple[Activations, Activations]:
    """(what a block of these parameters keeps besides, what of `block_activations` it does not
    keep): adapters add their own, and a layer whose weight is frozen needs no input."""
    trained = {p.name for p in parameters if p.is_trained}
    shapes = {p.name: local_shape(p.name, p.shape, job.model, job.layout.tp, 1) for p in parameters}
    dropout, size = job.parts.has_dropout, job.compute_bytes
    attention = feed_forward = 0.0
    for name, shape in shapes.items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind != "lora_A" or not {name, f"{layer}.lora_B.weight"} & trained:
            continue
        rows = job.tokens
        if ".experts." in layer and job.model.moe is not None:
            rows *= job.model.moe.top_k
        kept = rows * shape[-2] * size
        if dropout:  # its own input, and what of it is zero
            kept += rows * shape[-1] * (size + 1)
        if f"{layer}.lora_magnitude" in shapes:
            kept += rows * shapes[f"{layer}.lora_B.weight"][0] * size
        if layer.startswith("attention."):
            attention += kept
        else:
            feed_forward += kept
    needed = {name.removesuffix(".weight") for name in trained}
    if not dropout:
        needed |= {name.removesuffix(".lora_A") for name in needed}
    block_input = job.tokens * job.model.d_model * size
    spared = Activations()
    if not needed & _READ_BLOCK_INPUT:
        spared += Activations(attention=block_input)
    if not sparse:
        if not needed & {"feed_forward.gate", "feed_forward.up"}:
            spared += Activations(feed_forward=block_input)
        if "feed_forward.down" not in needed:
            inner = -(-job.model.intermediate_size // job.layout.tp)
            spared += Activations(feed_forward=job.tokens * inner * size)
    return Activations(attention=attention, feed_forward=feed_forward), spared


def casts(job: Job, matrices: int) -> float:
    """Bytes of the copies of matrices that autocast makes for a forward and its backward. FSDP has
    gathered them in the compute type."""
    is_cast = job.precision != "fp32" and not job.layout.is_fsdp
    return matrices * job.compute_bytes if is_cast else 0


def block_input(job: Job) -> float:
    """Bytes of what a block that is computed again keeps."""
    return job.chunk_tokens * job.model.d_model * job.compute_bytes


def joining(job: Job) -> float:
    """Bytes of what a module for multi-token prediction keeps before its block: both inputs and
    statistics of its norms, and what its projection reads."""
    return job.chunk_tokens * (4 * job.model.d_model * job.compute_bytes + 2 * FP32)


def saved_results(job: Job, *, sparse: bool, linear: bool = False) -> Activations:
    """Bytes of the results that a block keeps which is computed again but for them."""
    config, model, layout, size = job.ac_config, job.model, job.layout, job.compute_bytes
    if config is None or config.mode != "selected_ops":
        return Activations()
    heads, kv_heads = model.num_heads // layout.tp, max(model.kv_heads // layout.tp, 1)
    tokens, head = job.tokens, model.attention_head_dim
    query, key = heads * head, kv_heads * head
    # In the order in which a block computes them.
    gates = [model.gate_width // layout.tp] if model.gate_width else []
    attention = [query, key, key, *gates, model.d_model]
    scores = float(query * size + heads * FP32)
    if linear and (net := _delta_net_of(job)) is not None:
        attention = [net.key_width, net.key_width, net.value_width, net.value_width]
        attention += [net.num_value_heads, net.num_value_heads, model.d_model]
        # Corrections, and a state for each chunk.
        scores = int(FP32 * net.value_width * (1 + net.key_head_dim / _chunk_size(job)))
    inner = -(-model.intermediate_size // layout.tp)
    feed_forward = [inner] * (2 if model.is_gated else 1) + [model.d_model]
    if sparse:
        feed_forward = []
    step = {"matmuls": 1, "every_second_matmul": 2}
    steps = [step[op] for op in config.saved_ops if op in step]
    products = [0.0, 0.0]
    for number, width in enumerate([*attention, *feed_forward]):
        if steps and number % steps[0] == 0:
            products[number >= len(attention)] += tokens * width * size
    own = tokens * scores if "attention" in config.saved_ops else 0.0
    return Activations(attention=products[0] + own, feed_forward=products[1])


def _kept_widths(job: Job) -> int:
    """Tensors of the hidden width that a feed-forward keeps."""
    if job.model.is_gated:
        return 3 if job.is_compiled else 4
    return 2


def _attention(job: Job) -> float:
    model, size, layout = job.model, job.compute_bytes, job.layout
    head, tokens = model.attention_head_dim, job.tokens
    heads = model.num_heads // layout.tp
    kv_heads = max(model.kv_heads // layout.tp, 1)
    query, key = heads * head, kv_heads * head
    kept = tokens * (2 * query * size + heads * FP32)
    all_tokens = tokens
    if layout.cp > 1 and cp_style(layout) == "allgather":
        all_tokens = tokens * layout.cp  # keys and values of whole rows
    kept += all_tokens * 2 * key * size
    if model.qk_norm != "none":
        numbers = 2 if model.qk_norm == "full" else heads + kv_heads
        kept += tokens * ((query + key) * size + numbers * FP32)
    if model.is_normalized:  # before and after their length is one
        kept += tokens * ((query + key) * (FP32 + size) + (heads + kv_heads) * FP32)
    if model.attention_sinks:  # the result before the sink's share is taken off, in fp32
        kept += tokens * (query * (size if size == FP32 else FP32 + size) + 2 * heads * FP32)
    if model.gate_width:
        kept += tokens * (query + model.gate_width // layout.tp) * size
    return kept


def _delta_net_of(job: Job) -> DeltaNetConfig | None:
    """What one rank has of linear attention."""
    net, tp = job.model.delta_net, job.layout.tp
    if net is None:
        return None
    return net.replace(
        num_key_heads=net.num_key_heads // tp, num_value_heads=net.num_value_heads // tp
    )


def _chunk_size(job: Job) -> int:
    return min(_CHUNK_SIZE, job.sequence_length)


def _delta_net(job: Job) -> float:
    """By chunks, the form that keeps more; kernels of flash-linear-attention keep queries, keys,
    values and the chunks' inverses alone, and make the rest anew."""
    net, size, chunk = _delta_net_of(job), job.compute_bytes, _chunk_size(job)
    assert net is not None
    heads, keys, values = net.num_value_heads, net.key_width, net.value_width
    spread = heads * net.key_head_dim  # keys of each value head
    # Before and after the convolutions; gate, its SiLU, output, its norm, and their product.
    kept = float(size * (2 * (2 * keys + values) + 5 * values))
    kept += FP32 * 3 * heads
    # Queries and keys before and after they have length one.
    kept += FP32 * 4 * (keys + net.num_key_heads)
    # In chunks: values, corrections, what solves for both; keys and queries with their decays.
    kept += FP32 * (3 * values + 3 * spread + 12 * heads)
    # Pairs of tokens of a chunk.
    kept += FP32 * chunk * (4 * heads + 2 * net.num_key_heads)
    kept += FP32 * values * net.key_head_dim // chunk  # states
    return job.tokens * kept


def cp_style(layout: object) -> str:
    """How context parallelism exchanges keys and values."""
    config = getattr(layout, "cp_config", None)
    return "allgather" if config is None else str(config.style)


def _experts(job: Job) -> float:
    model, size, layout = job.model, job.compute_bytes, job.layout
    moe = model.moe
    assert moe is not None
    # Under expert parallelism each tp rank sends its own part of the row.
    tokens = job.chunk_tokens if layout.ep > 1 else job.tokens
    inner = moe.intermediate_size if layout.ep > 1 else -(-moe.intermediate_size // layout.tp)
    pairs = tokens * moe.top_k
    stream = tokens * model.d_model * size
    # Logits, their softmax and exponentials in fp32; the sum of each token.
    router = tokens * FP32 * (3 * moe.num_experts + 1)
    # Chosen experts and weights of each pair, and its place in both orders.
    router += pairs * (3 * _INDEX + FP32 + (size if moe.normalize_top_k else 0))
    rows = pairs * model.d_model * size
    products = pairs * inner * size * _kept_widths(job)
    kept = stream + router + 2 * rows + products
    if layout.ep > 1:  # rows as they came, before they lie sorted by expert, are not kept
        kept += pairs * 2 * _INDEX
    if moe.shared_expert_intermediate_size is not None:
        shared = -(-moe.shared_expert_intermediate_size // layout.tp)
        kept += tokens * shared * size * _kept_widths(job)
    return kept


class LossMemory(NamedTuple):
    """Bytes of the head and its loss."""

    kept: float
    """From the loss to its backward: the stream before the final norm, and the gradients that the
    loss has computed already."""
    working: float
    """While the loss is computed: logits of a chunk, and what is made of them."""
    returning: float
    """In its backward: both gradients once more, multiplied by what comes in."""


def loss_chunks(job: Job) -> tuple[int, int]:
    """Into how many chunks the rows of a microbatch are cut for the loss, and rows of each."""
    rows, model = job.tokens, job.model
    device = "cpu" if job.device.name == CPU else "cuda"
    most = loss_chunk_rows(model.loss_chunk_size, model.padded_vocab_size, device)
    number = -(-rows // (most * job.layout.tp))  # a shard's chunks are as many times longer
    return number, -(-rows // number)


def loss_memory(job: Job, head: Parameter | None) -> LossMemory:
    """`head`: the weight of the output head, tied or not; None in a stage without it."""
    if head is None:
        return LossMemory(0, 0, 0)
    model, size, tp = job.model, job.compute_bytes, job.layout.tp
    width, rows = model.d_model, job.tokens
    columns = -(-model.padded_vocab_size // tp)
    times = 1 + model.num_mtp_layers
    weight_grad = times * FP32 * columns * width if head.is_trained else 0
    # What adapters make of it is another table.
    changed = FP32 * columns * width if head.name in job.parts.adapted_tables else 0
    hidden_grad = times * rows * width * size
    norm_input = times * job.chunk_tokens * (width * size + FP32)
    num_chunks, chunk = loss_chunks(job)
    is_padded = model.padded_vocab_size != model.vocab_size
    # Logits and their gradient in the compute type; where that is not fp32 or a compiled kernel
    # goes through them in one pass, the logits in fp32, perhaps without padding ids, and their
    # exponentials. The gradient of the chunk before is still there.
    numbers = size * (3 if num_chunks > 1 else 2)
    if not (job.is_compiled and job.device.name != CPU):
        numbers += 2 * FP32 if size < FP32 else FP32 * is_padded
    copy = size * columns * width if job.precision != "fp32" and not job.layout.is_fsdp else 0
    hidden = rows * width * size
    working = hidden + chunk * columns * numbers + copy
    kept = norm_input + hidden_grad + weight_grad + changed
    return LossMemory(kept, working, hidden_grad + weight_grad)
