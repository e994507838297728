"""The base model: loaded whole or as a skeleton, frozen, bfloat16 on a GPU, and checked."""

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from support.shared.console import fail, first_line
from support.shared.processes import first_rank_first, rank_and_world, ranks_here

WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]  # of a hub repository


def load_tokenizer(model: str, trust_remote_code: bool = False):
    from transformers import AutoTokenizer

    try:
        with first_rank_first():
            return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(
            f"--model {model}: its tokenizer cannot be loaded ({first_line(error)}). --model takes "
            "a hub id or a local folder; --preset tiny needs neither network nor GPU"
        )


def refuse_big_model_on_cpu(model: str, device: torch.device) -> None:
    """By the size of its files or by its name, before any fetch; and refuse an absent folder."""
    folder = Path(model)
    if not folder.is_dir() and model.startswith(("/", "./", "../", "~")):
        fail(f"--model {model}: there is no such folder")
    billions = 0.0
    if folder.is_dir():
        files = folder.glob("*.safetensors")
        billions = sum(path.stat().st_size for path in files) / 2e9  # 2 bytes a weight: bfloat16
    else:
        named = re.search(r"(\d+(?:\.\d+)?)B\b", model, re.IGNORECASE)
        if named:
            billions = float(named[1])
    if device.type == "cpu" and billions >= 2:
        fail(f"--model {model} needs a GPU, and none was found. Without one: --preset tiny")


def load_base(
    model: str,
    device: torch.device,
    attn: str = "sdpa",
    trust_remote_code: bool = False,
    shard: bool = False,
):
    """The frozen base model on `device`; exits with a sentence if it is not there, or too big.

    `shard`: on the CPU, for shard_layers to spread.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    refuse_big_model_on_cpu(model, device)
    from safetensors import SafetensorError

    why = "--model takes a hub id or a local folder with safetensors weights; --preset tiny needs "
    why += "neither network nor GPU"
    unreadable = (OSError, ValueError, ImportError, SafetensorError)
    try:
        with first_rank_first():
            if not Path(model).is_dir():
                from huggingface_hub import snapshot_download

                snapshot_download(model, allow_patterns=WANTED)
    except unreadable as error:
        fail(f"--model {model} cannot be loaded ({first_line(error)}). {why}")
    try:
        base, report = AutoModelForCausalLM.from_pretrained(
            model,
            output_loading_info=True,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            attn_implementation=attn,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # no pickle is loaded
            # Straight there: 8 ranks need not hold 8 copies in RAM first.
            device_map={"": "cpu" if shard else device},
        )
    except (*unreadable, RuntimeError) as error:  # the last: of another shape, or out of memory
        fail(f"--model {model} cannot be loaded ({first_line(error)}). {why}")
    # transformers would draw them at random, on each rank others, and say so in passing.
    missing = sorted(report["missing_keys"])
    if missing:
        fail(f"--model {model} has no weights for {', '.join(missing[:3])}")
    # Where vLLM has no code of its own for a model (Olmo 3), it runs transformers', and turns the
    # class itself, of which ours is an instance too, into one that it compiles.
    getattr(base, base.base_model_prefix).do_not_compile = True
    # Of the model's own defaults only the end tokens: transformers' generate would put the others,
    # a repetition penalty, say, before our sampler; vLLM, which takes requests alone, would not.
    base.generation_config = GenerationConfig(eos_token_id=base.generation_config.eos_token_id)
    return base.eval().requires_grad_(False)


def checkpoint_layers(model, on: bool) -> None:
    """Whether layers drop their activations and compute them again in the backward pass.

    transformers does so with a layer in training mode. What is inside it stays in evaluation mode,
    without dropout. Nothing happens unless the model's checkpointing is enabled.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = on


def shard_layers(model, device: torch.device) -> None:
    """Keep on `device` this rank's part of each decoder layer, and the rest whole. In place.

    PyTorch's FSDP2: a layer is gathered when it is about to run, and dropped after it. Frozen
    weights have no gradient, so that nothing is scattered back. Adapters, which have one, stay
    whole on every GPU, and so do embedding, head and last norm: the head's arithmetic reads it.

    `model` has all its adapters (PEFT makes them by the shape of the weights that it finds) and is
    on the CPU, where weights are read from their files as they are touched: a machine's processes
    share one copy in the system's cache, and a GPU holds one whole layer at a time. Machines do not
    share: each holds all layers, so that nothing is gathered over the network between them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = rank_and_world()[1] // ranks_here(), ranks_here()
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("machine", "gpu"))["gpu"]
    base = model.get_base_model()
    backbone = getattr(base, base.base_model_prefix)
    layers = set()  # their frozen weights
    for layer in backbone.layers:
        layers.update(p for name, p in layer.named_parameters() if "lora_" not in name)
    whole = set(model.parameters()) - layers
    for layer in backbone.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # The root has no weights of its own: it lets a layer be gathered while the one before runs.
    fully_shard(backbone, mesh=mesh, ignored_params=whole)
    model.to(device)


def model_files(model: str) -> list[Path]:
    """The files that a model and its tokenizer were loaded from."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=WANTED, local_files_only=True))
    files = []
    for pattern in WANTED:
        files += folder.glob(pattern)
    return sorted(files)


def load_skeleton(model: str, trust_remote_code: bool = False):
    """The model without weights: configuration, modules, shapes, end tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        fail(f"--model {model} cannot be loaded ({first_line(error)})")
    with contextlib.suppress(OSError):  # not every model has one; the config knows the end token
        skeleton.generation_config = GenerationConfig.from_pretrained(model)
    return skeleton


def refuse_other_decoders(skeleton, model: str) -> None:
    """Exits for what names its parts otherwise than Llama, Qwen and Olmo: GPT-2, with images."""
    lacking = []
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if getattr(skeleton.config, name, None) is None:
            lacking.append(name)
    if not hasattr(getattr(skeleton, skeleton.base_model_prefix), "layers"):
        lacking.append("layers")
    if lacking:
        fail(
            f"--model {model}: no {lacking[0]}. What can be trained are decoders that are built "
            "like those of Llama, Qwen and Olmo"
        )


def heads_of(config) -> tuple[int, int, int]:
    """Query heads, key heads (as many as values) and the size of a head."""
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    return queries, keys, size


def context_of(config) -> float:
    """Tokens that a model reads: its configuration's, or what YaRN and its like make of them."""
    said = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") or 1
    original = rope.get("original_max_position_embeddings") or 0
    return max(said, factor * original)


def head_of(model) -> Tensor:
    return model.get_output_embeddings().weight  # (V, d)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 products on a GPU although the adapter is float32; float32 on a CPU. [D11]"""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def check_head(model, name: str, hidden_states: Callable[..., Tensor]) -> None:
    """Refuse a model whose logits are not hidden @ U.T, with U its head. [D13]

    `hidden_states(model, ids)` are (B, L, d). Soft-capped, scaled and biased heads end here: by
    their configuration, since a cap of 30 changes small logits by next to nothing, then by numbers.
    """
    refuse_head(model.config, name)
    head = head_of(model)
    same_everywhere = torch.Generator().manual_seed(0)
    ids = torch.randint(0, head.shape[0], (1, 8), generator=same_everywhere).to(head.device)
    with autocast(head.device):
        theirs = model(input_ids=ids, attention_mask=None, use_cache=False).logits[0].float()
    ours = (hidden_states(model, ids)[0].to(head.dtype) @ head.T).float()  # (8, V)
    distance = ((theirs - ours).norm() / theirs.norm()).item()
    limit = 1e-3 if head.dtype == torch.float32 else 2e-2
    if not distance < limit:
        fail(
            f"--model {name}: its logits are not hidden @ U.T (relative distance {distance:.2g}); "
            "a soft-capped, scaled or biased head is not supported [D13]"
        )


# What models call it in their configuration, and the value that changes nothing.
HEAD_CHANGES = {
    "final_logit_softcapping": None,  # Gemma 2, 3 and 4, nanochat: cap * tanh(logits / cap)
    "logits_scaling": 1,  # Granite divides by it, HyperCLOVA X multiplies
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier_scale": 1,  # Grok
}


def refuse_head(config, name: str) -> None:
    """Refuse a head whose configuration says that it caps or scales its logits. [D13]"""
    config = config.get_text_config()
    for key, neutral in HEAD_CHANGES.items():
        value = getattr(config, key, neutral)
        if value not in (neutral, None):
            fail(
                f"--model {name}: its logits are not hidden @ U.T ({key} is {value}); a "
                "soft-capped or scaled head is not supported [D13]. Take another model, or write "
                "its head in _softmax_of_tile and the two functions that use it"
            )


def layer_names(targets: str) -> list[str]:
    """The last parts of --lora_targets: what the layers themselves are called."""
    return [target.strip().split(".")[-1] for target in targets.split(",")]


def take_input_as_it_is(model):
    """Keep PEFT from copying each layer's input to float32, the adapter's dtype.

    Autocast makes bfloat16 of it again, so that both copies are waste, and the second stays until
    the backward pass. Without autocast the dtypes are equal, and nothing changes.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return model


ATTENTION_ONLY = "--lora_targets q_proj,k_proj,v_proj,o_proj"


def check_targets(model, targets: list[str], name: str) -> None:
    """Each of the adapter's target names must match a linear layer, and not only the head.

    Nor may it match some layers and miss the experts of a mixture, which are no linear layers: a
    target that names what an expert has must name the other layers in full.
    """
    head = model.get_output_embeddings()  # in neither pass of the trainer: it stays frozen
    linear = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            linear.add(f".{path}")
    absent = []
    for target in targets:
        if not target or not any(path.endswith(f".{target}") for path in linear):
            absent.append(target)
    experts = expert_names(model)
    advice = ""
    if experts:
        advice = (
            f". Its experts ({', '.join(sorted(experts))}) are no linear layers: train the "
            f"attention alone, {ATTENTION_ONLY}. PEFT's target_parameters would reach them, but "
            "vLLM does not load such an adapter without more (docs/gpu.md)"
        )
    if absent:
        there = sorted({path.split(".")[-1] for path in linear})
        fail(
            f"--lora_targets: {absent} match nothing in {name}; its linear layers are "
            f"{', '.join(there)}{advice}"
        )
    partly = [target for target in targets if target in EXPERT_PARTS]
    if experts and partly:
        fail(f"--lora_targets: {partly} match only a part of {name}{advice}")


EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")  # gate and up may be one gate_up_proj


def expert_names(model) -> set[str]:
    """Names of the weights that hold all experts of a mixture: (experts, out, in)."""
    names = set()
    for path, p in model.named_parameters():
        if p.ndim == 3 and ".experts." in path:
            names.add(path.split(".")[-1])
    return names
