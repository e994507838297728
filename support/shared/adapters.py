"""Adapters of other runs: nothing may end in the base model's score under the adapter's name."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from support.shared.console import fail
from support.shared.files import read_json
from support.shared.options import check_rules

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ENDS = 1 << 20  # bytes of a file's beginning and of its end that its fingerprint reads
NOT_PLAIN = ("use_dora", "rank_pattern", "layers_to_transform", "modules_to_save")
LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def fingerprint(files: Iterable[Path]) -> str:
    """Hash of the names, sizes and ends of files: tells weights apart without reading 16 GB."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def adapter_fingerprint(folder: Path) -> str:
    """Hash of the weights and of what scales them; the rest of its config is paths and sets."""
    config = read_json(folder / ADAPTER_FILES[0])
    parts = [fingerprint([folder / ADAPTER_FILES[1]])]
    for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern"):
        if config.get(key):
            parts.append(f"{key} {config[key]}")
    return " ".join(parts)


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and weights; exits with a sentence where they are not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            example = next(folder.glob("step_*"), "runs/x/step_100")
            fail(
                f"--adapter {folder}: {' and '.join(ADAPTER_FILES)} are not both in it. It takes a "
                f"checkpoint's folder, such as {example}"
            )
    try:
        config = read_json(folder / ADAPTER_FILES[0])
        tensors = load_file(folder / ADAPTER_FILES[1])
        for key in ("base_model_name_or_path", "r", "target_modules"):
            config[key]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        fail(f"--adapter {folder} cannot be read ({reason}). Copy it again, or take another")
    return config, tensors


def find_misfits(parts: dict[tuple[str, str], Tensor], config: dict, skeleton) -> list[str]:
    """Names of layers whose A or B is of another shape than the model's, or is not there."""
    rank = config["r"]
    shapes = {}
    for name, module in skeleton.named_modules():
        if hasattr(module, "in_features"):
            shapes[name, "A"] = (rank, module.in_features)
            shapes[name, "B"] = (module.out_features, rank)
    misfits = []
    for (name, kind), tensor in parts.items():
        if tensor.shape != shapes.get((name, kind)):
            misfits.append(name)
    targets = config["target_modules"]
    if isinstance(targets, list):  # then each such layer must have its pair
        for name, kind in shapes:
            if name.split(".")[-1] in targets and (name, kind) not in parts:
                misfits.append(name)
    return list(dict.fromkeys(misfits))


def check_adapter(adapter: str, model: str, skeleton) -> int:
    """The rank of an adapter that is whole, not zero, and made for this base model."""
    folder = Path(adapter)
    config, tensors = read_adapter(folder)
    parts = {}
    for key, tensor in tensors.items():
        match = LORA_KEY.fullmatch(key)
        if match:
            parts[match[1], match[2]] = tensor
    misfits = find_misfits(parts, config, skeleton)
    special = [key for key in NOT_PLAIN if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA":
        special.append("peft_type")
    finite = all(tensor.isfinite().all() for tensor in parts.values())
    zero = not any(tensor.any() for (_, kind), tensor in parts.items() if kind == "B")
    base = config["base_model_name_or_path"] or "?"
    rules = [
        (special, f"is no plain LoRA adapter ({', '.join(special)})"),
        (not parts, "holds no LoRA weights"),
        (
            len(parts) < len(tensors),
            "holds weights that are no part of a LoRA adapter, and would be left out",
        ),
        (
            Path(base).name != Path(model).name,
            f"was trained on {base}, not on --model {model}. If that is the same model under "
            "another name, correct base_model_name_or_path in adapter_config.json",
        ),
        (
            misfits,
            f"does not fit --model {model}: {', '.join(misfits[:3])} is missing, or of another "
            "shape. It is another model's",
        ),
        (not finite, "holds weights that are not finite"),
        (
            zero,
            "is all zeros: it would score as the base model. Leave --adapter out to evaluate that",
        ),
    ]
    check_rules(rules, lambda sentence: fail(f"--adapter {folder} {sentence}"))
    return config["r"]


def target_modules(adapter: str) -> list[str] | None:
    """The layers that an adapter changes, for vLLM, which else wraps the head too."""
    if not adapter:
        return None
    targets = read_json(Path(adapter) / "adapter_config.json")["target_modules"]
    return targets if isinstance(targets, list) else None


def training_settings(adapter: Path) -> dict:
    """Method, gamma, W, step and folder of an adapter's run, as far as its files tell."""
    for path in (adapter / "trainer.json", adapter.parent / "settings.json"):
        saved = read_json(path, {})
        saved = saved.get("settings", saved)
        if "gamma" in saved and "W" in saved:
            step = re.fullmatch(r"step_(\d+)", adapter.resolve().name)
            return {
                "method": method_name(saved),
                "gamma": saved["gamma"],
                "W": saved["W"],
                "run": str(adapter.parent),
                "step": int(step[1]) if step else 0,
            }
    return {}


def method_name(saved: dict) -> str:
    """What a run's settings amount to: "CL-EGRSD", "OPSD", "EGRSD, shuffled, ema teacher"."""
    name = saved.get("method", "egrsd").upper()
    if name == "EGRSD" and saved["W"]:
        name = "CL-EGRSD"
    elif name == "EGRSD" and not saved["gamma"]:
        name = "RLSD"
    parts = [name]
    if saved.get("control", "none") != "none":
        parts.append(saved["control"])
    if saved.get("gamma_schedule", "constant") != "constant":
        parts.append(f"gamma {saved['gamma_schedule']}")
    if saved.get("teacher", "frozen") != "frozen":
        parts.append(f"{saved['teacher']} teacher")
    return ", ".join(parts)


def use_student(model, folder: str) -> None:
    """Make the adapter in `folder` the student; '' is the base model (a fresh adapter)."""
    name = "default"
    if folder:
        name = re.sub(r"\W", "_", f"student {folder}")
    if name not in model.peft_config:
        model.load_adapter(folder, name)
    model.set_adapter(name)
