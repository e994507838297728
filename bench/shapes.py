"""Random weights of a given shape in a folder, with a tokenizer: nothing is downloaded.

    python bench/shapes.py --shape qwen3-4b --out runs/qwen3-4b    # 8 GB: mind the disk

What a step costs depends on the shape alone, so that the benches need no trained model. The
tokenizer is the tiny model's, whose 72 words are the first of the vocabulary.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from support.shared import console  # noqa: E402

# Configurations: d, MLP width, layers, query heads, KV heads, head size, V, is the head the
# embedding? Those of Qwen3 are the hub's.
SHAPES = {
    "rehearsal": (64, 128, 2, 4, 2, 32, 1_000, True),  # for the tests: all parts in seconds
    "4-layer": (512, 1_536, 4, 8, 4, 64, 151_936, True),  # what two cores can measure
    "qwen3-4b": (2_560, 9_728, 36, 32, 8, 128, 151_936, True),
    "qwen3-8b": (4_096, 12_288, 36, 32, 8, 128, 151_936, False),
    "qwen3-14b": (5_120, 17_408, 40, 40, 8, 128, 151_936, False),
    "qwen3-32b": (5_120, 25_600, 64, 64, 8, 128, 151_936, False),
}
POSITIONS = 32_768


def config_of(shape: str):
    from transformers import Qwen3Config

    if shape not in SHAPES:
        console.fail(f"{shape!r} is no shape: it is one of {', '.join(SHAPES)}")
    hidden, mlp, layers, heads, kv_heads, head_dim, vocab, tied = SHAPES[shape]
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=POSITIONS,
        eos_token_id=vocab - 1,
        pad_token_id=0,
    )


def random_model(shape: str, device: torch.device):
    """Frozen, on the device; bfloat16 on a GPU, float32 on a CPU."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)
    model.requires_grad_(False)
    # The end token's logit is always 0, never among the 20 highest: rollouts reach their cap.
    model.get_output_embeddings().weight[-1] = 0
    return model.eval()


def make_folder(shape: str, folder: Path, device: torch.device) -> Path:
    """What --model takes; made once, and whole when it is there."""
    if (folder / "config.json").exists():
        return folder
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    random_model(shape, device).save_pretrained(beside)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / name, beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--out", type=Path, required=True)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=there)
    given = parser.parse_args()
    print(make_folder(given.shape, given.out, torch.device(given.device)))


if __name__ == "__main__":
    main()
