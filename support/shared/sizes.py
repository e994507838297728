"""What a model and its adapter take in GPU memory: from the configuration alone, nothing loaded."""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from support.shared.engines import kv_cache_bytes
from support.shared.models import head_of, heads_of

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a decoder and its adapter; weights are numbers, not bytes."""

    layers: int
    hidden: int  # d
    mlp: int  # width of the MLP; in a mixture that of all experts that see a token
    queries: int  # query heads * head size
    keys: int  # key heads * head size, as many as values
    vocab: int  # V
    base: int  # weights of the frozen model
    linear: int  # those of its linear layers, without the head
    embedding: int  # those of the input embedding that are not also the head's
    frozen: int  # those of the decoder layers, which --shard spreads
    adapter: int  # weights of the adapter
    rank: int
    targets: int  # layers with an adapter in one decoder layer


def sizes_of(skeleton, targets: list[str], rank: int) -> Sizes:
    """Of a model on the meta device, as models.load_skeleton gives it."""
    config = skeleton.config.get_text_config()
    queries, keys, head_dim = heads_of(config)
    linear = 0
    adapter = 0
    adapted = 0
    for path, module in skeleton.named_modules():
        if not isinstance(module, torch.nn.Linear) or module.weight is head_of(skeleton):
            continue
        linear += module.weight.numel()
        if path.split(".")[-1] in targets:
            adapter += rank * (module.in_features + module.out_features)
            adapted += 1
    embedding = skeleton.get_input_embeddings().weight
    tied = embedding is head_of(skeleton)
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        mlp=mlp_width(config),
        queries=queries * head_dim,
        keys=keys * head_dim,
        vocab=head_of(skeleton).shape[0],
        base=sum(p.numel() for p in skeleton.parameters()),
        linear=linear,
        embedding=0 if tied else embedding.numel(),
        frozen=layer_weights(skeleton),
        adapter=adapter,
        rank=rank,
        targets=math.ceil(adapted / config.num_hidden_layers),
    )


def estimator(
    skeleton,
    device: torch.device,
    targets: list[str],
    rank: int,
    engine_tp: int,
    cache_tokens: int,
    tile: int,
    gpus: int,
    longest: int = 0,
    generate_tokens: int = 0,
) -> Callable[..., dict[str, float]]:
    """estimate_memory, but for micro_batch_tokens, checkpointing, head_chunk and shard.

    `cache_tokens` are those of a vLLM engine's cache, `generate_tokens` of transformers' generate.
    """
    config = skeleton.config
    return functools.partial(
        estimate_memory,
        sizes_of(skeleton, targets, rank),
        tile=tile,
        gpus=gpus,
        engine_tp=engine_tp,
        cache_bytes=kv_cache_bytes(config, device, max(1, engine_tp), cache_tokens),
        generate_bytes=kv_cache_bytes(config, device, 1, generate_tokens),
        longest=longest,
        bytes_each=2 if device.type == "cuda" else 4,
    )


def layer_weights(skeleton) -> int:
    backbone = getattr(skeleton, skeleton.base_model_prefix)
    return sum(p.numel() for p in backbone.layers.parameters())


def mlp_width(config) -> int:
    experts = getattr(config, "num_experts_per_tok", None)
    width = getattr(config, "moe_intermediate_size", None)
    if experts and width:
        return experts * width
    return config.intermediate_size * (experts or 1)


def layer_activations(m: Sizes, bytes_each: int = 2) -> int:
    """Bytes that one decoder layer keeps for the backward pass, for one token.

    Counted on a Qwen3 under autocast (tests/test_sizes.py holds it to that): inputs of the adapted
    layers, what their adapters make of them, queries, keys, values and the attention's output, four
    MLP widths; and in float32 what the norms keep.
    """
    linear = 2 * m.hidden + 4 * m.mlp + (m.targets + 1) * m.rank
    attention = 2 * m.queries + 2 * m.keys
    norms = 2 * m.hidden + m.queries + m.keys
    return bytes_each * (linear + attention) + 4 * norms


def estimate_memory(
    m: Sizes,
    micro_batch_tokens: int,
    checkpointing: bool,
    head_chunk: int,
    shard: bool,
    *,
    tile: int,
    gpus: int,
    engine_tp: int,
    cache_bytes: int,
    generate_bytes: int = 0,
    longest: int = 0,
    bytes_each: int = 2,
) -> dict[str, float]:
    """GiB of one process during the student's pass, when most is alive.

    `engine_tp` is the number of ranks that share a vLLM engine, 0 where there is none;
    `cache_bytes` is one rank's part of its cache, `generate_bytes` that of transformers' generate,
    which is gone before the passes; a row of `longest` tokens is passed whole, however few
    `micro_batch_tokens` there are; `head_chunk` tokens meet `tile` rows of the head at a time;
    `gpus` are those of the machine, over which `shard` spreads the layers; `bytes_each` is 2 in
    bfloat16.
    """
    base = m.base
    if shard:  # a part of each layer, and two whole ones: one runs, the next is being gathered
        base = m.base - m.frozen + m.frozen / gpus + 2 * m.frozen / m.layers
    layer = layer_activations(m, bytes_each)
    kept = m.layers * layer
    if checkpointing:  # the input of each layer, and one layer that runs again
        kept = m.layers * bytes_each * m.hidden + layer
    parts = {
        "base": bytes_each * min(base, m.base),
        "adapter, gradient, Adam": 16 * m.adapter,  # all float32
        "activations": max(micro_batch_tokens, longest) * kept,
        "head": 4 * head_chunk * (4 * tile + 2 * m.hidden),  # float32; two tiles, measured
    }
    if engine_tp:
        # Its share of the weights; the adapter where the layers take it, and as it was handed over.
        parts["engine"] = bytes_each * (m.base / engine_tp + 2 * m.adapter)
        parts["engine's cache"] = cache_bytes
    else:
        passes = parts["activations"] + parts["head"]
        parts["generate's cache, beyond the passes"] = max(0, generate_bytes - passes)
    parts["sum"] = sum(parts.values())
    return {name: round(size / GIB, 2) for name, size in parts.items()}
