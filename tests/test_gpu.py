"""What only a GPU can show: bfloat16 against float32, memory, and vLLM's CUDA build.

`pytest -m gpu`. Without a GPU all of it is skipped, but for EGRSD_REHEARSE=1, with which it runs on
a CPU in float32: that shows that the tests themselves work, and nothing about a GPU.
"""

import os

import pytest
import torch
from helpers import ROOT, SMALL, read_log, run

import egrsd
from bench import gpu, limits, shapes
from support.shared import models, sizes

REHEARSE = os.environ.get("EGRSD_REHEARSE") == "1"
ON_GPU = torch.cuda.is_available() and not REHEARSE
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or REHEARSE), reason="there is no GPU"),
]
SHAPE = "4-layer" if ON_GPU else "rehearsal"
WORK = gpu.Work((SHAPE,), rows=4, prompt=20, teacher_prompt=60, completion=128 if ON_GPU else 16)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def passes(attn: str = "sdpa", *options: str, dtype: torch.dtype | None = None):
    """-> the rollouts' flat tensors and the adapter's gradient, of the same weights each time."""
    s = gpu.settings("--attn", attn, *options)
    model = gpu.student_of(SHAPE, DEVICE, s)
    if dtype:
        model.to(dtype)  # base and adapter: the reference
    _, tokens = egrsd.accumulate_gradient(model, gpu.fixed_rollouts(SHAPE, WORK), s)
    gradient = torch.cat([p.grad.flatten() for p in egrsd.trainable(model).values()])
    return tokens, gradient


def test_the_head_in_bfloat16_accumulates_in_float32() -> None:
    hidden, U, y = gpu.head_input(SHAPE, WORK, DEVICE)
    logp, H, gradient = gpu.both_heads((hidden, U, y), 100)
    z = hidden.double() @ U.double().T  # from the same rounded numbers
    exact = z.log_softmax(-1)
    p = exact.exp()
    assert logp.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact[range(len(y)), y], atol=2e-4, rtol=0)
    torch.testing.assert_close(H.double(), -(p * exact).sum(-1), atol=2e-4, rtol=0)
    want = U[y].double() - p @ U.double()
    # p itself is rounded to bfloat16 before its product: half a percent, not more.
    assert apart(gradient, want) < 5e-3


def test_the_passes_in_bfloat16_follow_float32(monkeypatch) -> None:
    tokens, gradient = passes()
    monkeypatch.setattr(models, "autocast", lambda _: torch.autocast(DEVICE.type, enabled=False))
    reference, want = passes(dtype=torch.float32)
    for name in ("logp", "logp_T", "H"):
        assert (tokens[name] - reference[name]).abs().mean() < 0.05, name
    assert apart(gradient, want) < 0.1
    cosine = torch.nn.functional.cosine_similarity(gradient.double(), want.double(), dim=0)
    assert cosine > 0.99


def test_checkpointing_changes_nothing() -> None:
    tokens, gradient = passes()
    again, same = passes("sdpa", "--gradient_checkpointing")
    torch.testing.assert_close(again["logp"], tokens["logp"], atol=1e-3, rtol=0)
    assert apart(same, gradient) < 1e-3


@pytest.mark.parametrize("attn", ["eager", "flash_attention_2"])
def test_attention_implementations_agree(attn) -> None:
    if attn == "flash_attention_2" and not egrsd.console.installed("flash_attn"):
        pytest.skip("flash-attn is not installed")
    tokens, gradient = passes()
    others, other = passes(attn)
    assert (others["logp"] - tokens["logp"]).abs().mean() < 0.02
    assert apart(other, gradient) < 0.1


def test_micro_batches_and_chunks_change_nothing_but_rounding() -> None:
    _, gradient = passes()
    _, other = passes("sdpa", "--micro_batch_tokens", "100", "--head_chunk", "33")
    assert apart(other, gradient) < 0.02


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_the_estimate_says(checkpointing) -> None:
    if not ON_GPU:
        pytest.skip("there is no GPU whose memory could be measured")
    shape = "qwen3-4b"  # of the small one, what the estimate leaves out would be most
    if torch.cuda.mem_get_info()[0] < 60 * sizes.GIB:
        shape = "4-layer"
    options = ["--gradient_checkpointing"] if checkpointing else []
    s = gpu.settings(*options)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = gpu.student_of(shape, DEVICE, s)
    optimizer = torch.optim.AdamW(egrsd.trainable(model).values(), lr=1e-5)
    skeleton = limits.skeleton_of(shape)
    work = gpu.Work((shape,), rows=3, prompt=340, teacher_prompt=340, completion=1_024)
    for _ in range(2):  # Adam's numbers are there from the second time on
        torch.cuda.reset_peak_memory_stats()
        egrsd.accumulate_gradient(model, gpu.fixed_rollouts(shape, work), s)
        optimizer.step()
    measured = (torch.cuda.max_memory_allocated() - before) / sizes.GIB
    targets = models.layer_names(s.lora_targets)
    tile = egrsd.VOCAB_TILE["cuda"]
    estimate = sizes.estimator(skeleton, DEVICE, targets, s.lora_r, 0, 0, tile, gpus=1)
    estimated = estimate(s.micro_batch_tokens, checkpointing, s.head_chunk, False)["sum"]
    assert 0.8 * estimated < measured + 0.5 and measured < 1.2 * estimated + 0.5


def test_vllm_starts_is_probed_and_stays_near_the_trainer(tmp_path) -> None:
    if not egrsd.console.installed("vllm"):
        pytest.skip("vLLM is not installed")
    output = run(*SMALL, "--steps", 3, "--engine", "vllm", "--out", tmp_path / "run")
    assert "a random adapter reached the engine" in output
    limit = 0.01 if ON_GPU else 1e-3  # an H200 read 0.002 at most
    assert all(row["canary"] < limit for row in read_log(tmp_path / "run"))


def test_generate_and_vllm_see_the_same_random_model(tmp_path) -> None:
    if not egrsd.console.installed("vllm"):
        pytest.skip("vLLM is not installed")
    if not ON_GPU:
        pytest.skip("there is no GPU: the test above has shown vLLM's CPU build")
    folder = shapes.make_folder(SHAPE, tmp_path / "model", DEVICE)
    options = ["--model", folder, "--data", ROOT / "tiny" / "train.jsonl", "--batch_size", 8]
    options += ["--max_completion", 64, "--max_length", 1_024, "--steps", 2]
    for engine in ("hf", "vllm"):
        run(*options, "--engine", engine, "--out", tmp_path / engine)
        assert all(row["canary"] < 0.05 for row in read_log(tmp_path / engine))
