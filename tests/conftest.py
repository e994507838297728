"""Fixtures that several test files share, each made once."""

import fcntl
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@pytest.fixture(autouse=True)
def own_signals():
    """A run within a test takes Ctrl-C and SIGTERM for itself: give them back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer():
    from support.shared.models import load_tokenizer

    return load_tokenizer(str(ROOT / "tiny"))


@pytest.fixture(scope="session")
def rollouts(tokenizer) -> list[dict]:
    """Eight real rollouts of different lengths, with made-up advantages of both signs and 0."""
    from helpers import CPU, fresh_model, load

    import egrsd
    from support.shared.engines import end_tokens

    model, s = fresh_model("--batch_size", 8)
    batch, _, _ = egrsd.next_problems(load(s), tokenizer, s, 0)
    eos_ids = end_tokens(model, tokenizer)
    sample, _ = egrsd.start_engine(s, model, eos_ids, CPU, "hf", 1)
    sampling = {"temperature": 1.1, "top_p": 0.95, "top_k": 20}
    rows = egrsd.roll_out(sample, batch, tokenizer, eos_ids, 3, s, **sampling)
    for row, A in zip(rows, (1.5, -0.5, 0.0, 2.5, -1.0, 0.3, -0.2, 0.8)):
        row["advantage"] = A
    assert len({len(row["completion_ids"]) for row in rows}) > 3
    return rows


@pytest.fixture
def one_shared_engine():
    """Waits for the other tests: two engines that ranks share cannot be on one machine, since
    vLLM's CPU build names their memory alike."""
    with (Path(tempfile.gettempdir()) / f"egrsd-shared-engine-{os.getuid()}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def qwen_like(tmp_path_factory) -> Path:
    """A random Qwen3 and a byte-level BPE tokenizer, trained on the spot, with Qwen's tokens."""
    import torch
    from helpers import DATA, QWEN_TEMPLATE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    files = [DATA / "gsm8k_train.jsonl", DATA / "math500.jsonl"]
    if not all(map(Path.exists, files)):
        files = [ROOT / "egrsd.py"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    backend.train_from_iterator([file.read_text() for file in files], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=QWEN_TEMPLATE,
    )
    tokenizer.add_tokens(["<think>", "</think>"])  # as in Qwen3: added, not special
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer.save_pretrained(folder)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    """A run of six steps with checkpoints after 2, 4 and 6."""
    from helpers import SMALL, run

    out = tmp_path_factory.mktemp("runs") / "whole"
    run(*SMALL, "--steps", 6, "--save_every", 2, "--out", out)
    return out
