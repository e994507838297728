"""The base model: loaded whole or as a skeleton, frozen, bfloat16 on a GPU, and checked."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from support.shared.console import fail, first_line
from support.shared.processes import first_rank_first

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
    model: str, device: torch.device, attn: str = "sdpa", trust_remote_code: bool = False
):
    """The frozen base model on `device`; exits with a sentence if it is not there, or too big."""
    from transformers import AutoModelForCausalLM

    refuse_big_model_on_cpu(model, device)
    try:
        with first_rank_first():
            if not Path(model).is_dir():
                from huggingface_hub import snapshot_download

                snapshot_download(model, allow_patterns=WANTED)
        base = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            attn_implementation=attn,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # no pickle is loaded
        )
    except (OSError, ValueError, ImportError) as error:
        fail(
            f"--model {model} cannot be loaded ({first_line(error)}). --model takes a hub id or a "
            "local folder with safetensors weights; --preset tiny needs neither network nor GPU"
        )
    return base.to(device).eval().requires_grad_(False)


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


def head_of(model) -> Tensor:
    return model.get_output_embeddings().weight  # (V, d)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 products on a GPU although the adapter is float32; float32 on a CPU. [D11]"""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def check_head(model, name: str, hidden_states: Callable[..., Tensor]) -> None:
    """Refuse a model whose logits are not hidden @ W.T, with W its head. [D13]

    `hidden_states(model, ids)` are (B, L, d). Soft-capped, scaled and biased heads end here.
    """
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
            f"--model {name}: its logits are not hidden @ W.T (relative distance {distance:.2g}); "
            "a soft-capped, scaled or biased head is not supported [D13]"
        )


def check_targets(model, targets: list[str], name: str) -> None:
    """Each of the adapter's target names must match a linear layer, and not only the head."""
    head = model.get_output_embeddings()  # in neither pass of the trainer: it stays frozen
    linear = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            linear.add(f".{path}")
    absent = []
    for target in targets:
        if not target or not any(path.endswith(f".{target}") for path in linear):
            absent.append(target)
    if absent:
        there = sorted({path.split(".")[-1] for path in linear})
        fail(
            f"--lora_targets: {absent} match nothing in {name}; its linear layers are "
            f"{', '.join(there)}"
        )
