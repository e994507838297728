"""The model: base weights frozen (bfloat16 on a GPU), adapter float32. Adapter off, it is the teacher."""
from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from support.basics import fail, first_line, first_rank_first, first_wrong, read_json

if TYPE_CHECKING:
    from egrsd import Settings


def load_tokenizer(s: Settings):
    from transformers import AutoTokenizer
    try:
        with first_rank_first():
            return AutoTokenizer.from_pretrained(s.model, trust_remote_code=s.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--model {s.model}: its tokenizer cannot be loaded ({first_line(error)}). --model takes a hub id or a "
             "local folder; --preset tiny needs neither network nor GPU")


def check_place(s: Settings, device: torch.device) -> None:
    """Refuse a big model on a CPU, by the size of its files or by its name, before any fetch, and an absent folder."""
    folder = Path(s.model).is_dir()
    if not folder and s.model.startswith(("/", "./", "../", "~")):
        fail(f"--model {s.model}: there is no such folder")
    name = re.search(r"(\d+(?:\.\d+)?)B\b", s.model, re.IGNORECASE)
    size = sum(path.stat().st_size for path in Path(s.model).glob("*.safetensors")) / 2e9 if folder else 0  # bfloat16
    if device.type == "cpu" and (size if folder else float(name[1]) if name else 0) >= 2:
        fail(f"--model {s.model} needs a GPU, and none was found. Without one: --preset tiny")


def load_base(s: Settings, device: torch.device):
    """The frozen base model on `device`; exits with a sentence where it is not there, or too big for a CPU."""
    from transformers import AutoModelForCausalLM
    check_place(s, device)
    try:
        with first_rank_first():
            if not Path(s.model).is_dir():
                from huggingface_hub import snapshot_download
                snapshot_download(s.model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"])
        model = AutoModelForCausalLM.from_pretrained(
            s.model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, attn_implementation=s.attn,
            trust_remote_code=s.trust_remote_code, use_safetensors=True)  # safetensors: no pickle is loaded
    except (OSError, ValueError, ImportError) as error:
        fail(f"--model {s.model} cannot be loaded ({first_line(error)}). --model takes a hub id or a local folder with "
             "safetensors weights; --preset tiny needs neither network nor GPU")
    return model.to(device).eval().requires_grad_(False)


def add_adapter(model, s: Settings):
    """The PEFT model with a fresh float32 LoRA adapter with B = 0: student and base start equal. Section 5.1 [D11]"""
    from peft import LoraConfig, get_peft_model
    targets = [name.strip() for name in s.lora_targets.split(",")]
    linear = [f".{name}" for name, module in model.named_modules()  # the head is in neither pass, and stays frozen
              if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()]
    absent = [target for target in targets if not target or not any(name.endswith(f".{target}") for name in linear)]
    if absent:
        fail(f"--lora_targets: {absent} match nothing in {s.model}; its linear layers are "
             f"{', '.join(sorted({name.split('.')[-1] for name in linear}))}")
    torch.manual_seed(s.seed)  # the same A on every rank
    config = LoraConfig(r=s.lora_r, lora_alpha=s.lora_alpha, lora_dropout=0.0, target_modules=targets)
    model = get_peft_model(model, config)  # float32, also beside a bfloat16 base
    if s.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.eval()


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def head_of(model) -> Tensor:
    return model.get_output_embeddings().weight  # (V, d)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 products on a GPU although the adapter is float32; float32 throughout on a CPU. [D11]"""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def hidden_states(model, ids: Tensor) -> Tensor:
    """(B, L, d) last hidden states of (B, L) right-padded ids. No mask: no token sees the pads, which come after it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(base, base.base_model_prefix)  # everything but the head
    with autocast(ids.device):
        return backbone(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model, s: Settings) -> None:
    """Refuse a model whose logits are not hidden @ W.T, with W its head (soft-capped, scaled, biased). [D13]"""
    head = head_of(model)
    ids = torch.randint(0, head.shape[0], (1, 8), generator=torch.Generator().manual_seed(0)).to(head.device)
    with autocast(head.device):
        theirs = model(input_ids=ids, attention_mask=None, use_cache=False).logits[0].float()  # (8, V)
    ours = (hidden_states(model, ids)[0].to(head.dtype) @ head.T).float()  # (8, V)
    distance = ((theirs - ours).norm() / theirs.norm()).item()
    if not distance < (1e-3 if head.dtype == torch.float32 else 2e-2):
        fail(f"--model {s.model}: its logits are not hidden @ W.T (relative distance {distance:.2g}); a soft-capped, "
             "scaled or biased head is not supported [D13]")


# ---------------------------------------------------------------------------------------------------------------------
# Adapters of other runs: nothing may end in the base model's score under the adapter's name

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def fingerprint(files: Iterable[Path]) -> str:
    """Hash of the names, sizes and ends of files: tells weights apart without reading all 16 GB of them."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def adapter_fingerprint(folder: Path) -> str:
    """Hash of the weights and of what scales them; the rest of its config is paths, and sets in any order."""
    config = read_json(folder / ADAPTER_FILES[0])
    scale = [f"{key} {config[key]}" for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern") if config.get(key)]
    return " ".join([fingerprint([folder / ADAPTER_FILES[1]]), *scale])


def load_skeleton(s: Settings):
    """The model without weights: configuration, modules, shapes, end tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    try:
        config = AutoConfig.from_pretrained(s.model, trust_remote_code=s.trust_remote_code)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=s.trust_remote_code)
    except (OSError, ValueError) as error:
        fail(f"--model {s.model} cannot be loaded ({first_line(error)})")
    with contextlib.suppress(OSError):  # not every model has one; the configuration knows the end token too
        skeleton.generation_config = GenerationConfig.from_pretrained(s.model)
    return skeleton


def check_adapter(adapter: str, model: str, skeleton) -> int:
    """The rank of an adapter that is whole, not zero, and made for this base model; exits with a sentence if not."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = Path(adapter)
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        fail(f"--adapter {folder}: {' and '.join(ADAPTER_FILES)} are not both in it. It takes a checkpoint's folder, "
             f"such as {next(folder.glob('step_*'), 'runs/x/step_100')}")
    try:
        config, tensors = read_json(folder / ADAPTER_FILES[0]), load_file(folder / ADAPTER_FILES[1])
        base, rank, targets = config["base_model_name_or_path"] or "?", config["r"], config["target_modules"]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        fail(f"--adapter {folder} cannot be read ({type(error).__name__}: {error}). Copy it again, or take another")
    linear = {n: (m.out_features, m.in_features) for n, m in skeleton.named_modules() if hasattr(m, "in_features")}
    parts = {(m[1], m[2]): tensor for key, tensor in tensors.items()
             if (m := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key))}
    shapes = {(n, kind): shape for n, (o, i) in linear.items() for kind, shape in (("A", (rank, i)), ("B", (o, rank)))}
    misfits = [name for (name, kind), tensor in parts.items() if tensor.shape != shapes.get((name, kind))]
    if isinstance(targets, list):  # then each such layer must have its pair
        misfits += [n for n in linear if n.split(".")[-1] in targets and not {(n, "A"), (n, "B")} <= parts.keys()]
    special = [key for key in ("use_dora", "rank_pattern", "layers_to_transform", "modules_to_save") if config.get(key)]
    first_wrong([
        (config.get("peft_type", "LORA") != "LORA" or special, f"is no plain LoRA adapter ({special or 'peft_type'})"),
        (not parts, "holds no LoRA weights"),
        (len(parts) < len(tensors), "holds weights that are no part of a LoRA adapter, and would be left out"),
        (Path(base).name != Path(model).name, f"was trained on {base}, not on --model {model}. If that is the same "
         "model under another name, correct base_model_name_or_path in adapter_config.json"),
        (misfits, f"does not fit --model {model}: {', '.join(misfits[:3])} is missing, or of another shape. It is "
         "another model's"),
        (not all(tensor.isfinite().all() for tensor in parts.values()), "holds weights that are not finite"),
        (not any(tensor.any() for (_, kind), tensor in parts.items() if kind == "B"),
         "is all zeros: it would score as the base model. Leave --adapter out to evaluate that"),
    ], lambda sentence: fail(f"--adapter {folder} {sentence}"))
    return rank


def training_settings(adapter: Path) -> dict:
    """gamma, W, step and folder of the training run that an adapter comes from, as far as its files tell."""
    for path in (adapter.parent / "settings.json", adapter / "trainer.json"):
        saved = read_json(path, {})
        saved = saved.get("settings", saved)
        if "gamma" in saved and "W" in saved:
            step = re.fullmatch(r"step_(\d+)", adapter.resolve().name)
            known = {"gamma": saved["gamma"], "W": saved["W"], "run": str(adapter.parent)}
            return {**known, "step": int(step[1]) if step else 0}
    return {}


def use_student(model, folder: str) -> None:
    """Make the adapter in `folder` the student; '' is the base model (a fresh adapter, which changes nothing)."""
    name = re.sub(r"\W", "_", f"student {folder}") if folder else "default"
    if name not in model.peft_config:
        model.load_adapter(folder, name)
    model.set_adapter(name)
