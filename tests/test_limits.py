"""bench/limits.py: its FLOPs against torch's counter, its seconds against a calculation by hand."""

import dataclasses
import importlib.util
import json
import re

import pytest
import torch
from helpers import ROOT, run
from torch.utils.flop_counter import FlopCounterMode

import egrsd
from support.shared import models, sizes
from support.shared.data import encode_prompt

spec = importlib.util.spec_from_file_location("limits", ROOT / "bench" / "limits.py")
limits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(limits)

LENGTH = 96
TARGETS = models.layer_names(egrsd.Settings().lora_targets)


@pytest.fixture(scope="module")
def student():
    """(a random Qwen3 with an adapter, its sizes)"""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    base = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    base.set_attn_implementation("eager")  # whose products the counter sees, forward and backward
    m = sizes.sizes_of(base, TARGETS, 8)
    return egrsd.add_adapter(base, egrsd.parse_settings(["--lora_r", "8"])), m


def count(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_flops_of_the_passes_are_what_the_counter_counts(student) -> None:
    model, m = student
    ids = torch.randint(0, 500, (1, LENGTH))
    with torch.no_grad():
        adapted = count(lambda: egrsd.hidden_states(model, ids))
        with egrsd.as_teacher(model):
            teacher = count(lambda: egrsd.hidden_states(model, ids))
    assert teacher == limits.forward_flops(m, LENGTH, False)
    assert adapted == limits.forward_flops(m, LENGTH, True)

    hidden = egrsd.hidden_states(model, ids)
    backward = count(lambda: hidden.backward(torch.ones_like(hidden)))
    # A flash kernel computes the attention's first product again, which eager attention keeps; and
    # no gradient goes below the first layer's queries, keys and values.
    again = 2 * m.layers * m.queries * LENGTH**2
    first = 2 * LENGTH * m.hidden * (m.queries + 2 * m.keys + 3 * m.rank)
    assert backward == limits.backward_flops(m, LENGTH) - again - first


def test_flops_of_the_head_are_what_the_counter_counts(student) -> None:
    model, m = student
    head = models.head_of(model)
    hidden = torch.randn(50, m.hidden)
    y = torch.randint(0, 500, (50,))
    one = count(lambda: egrsd.logprob_and_entropy(hidden, head, y, 16))
    two = count(lambda: egrsd.logprob_and_gradient(hidden, head, y, 16))
    assert (one, two) == (limits.head_flops(m, 50, 1), limits.head_flops(m, 50, 2))


def test_seconds_of_qwen3_8b_on_one_a100_by_hand() -> None:
    m = sizes.sizes_of(limits.skeleton_of("qwen3-8b"), TARGETS, 64)
    o = limits.Options()
    alone = limits.phases(m, limits.GPUS["a100"], 8, 1, o, False)
    read = 2 * (8.19e9 - 0.62e9 + 0.175e9)  # bytes: all weights but the embedding, and the adapter
    read += 4 * (200 + 512) * 36 * 2 * 1024 * 2  # the cache of four rollouts, on average
    waiting = 1024 * 36 * 0.13e-3  # measured, for each layer and token
    assert alone["decode"] == pytest.approx(1024 * read / 2.04e12 + waiting, rel=0.01)  # 13 s
    flops = 2 * 4 * 1924 * 6.95e9 + 4 * 4 * 36 * 4096 * 1924**2 + 2 * 4 * 1024 * 0.62e9
    assert alone["teacher"] == pytest.approx(flops / 312e12 / 0.25, rel=0.01)  # 1.5 s
    shared = limits.phases(m, limits.GPUS["a100"], 8, 8, o, False)
    assert shared["decode"] - waiting < 0.3 * (alone["decode"] - waiting)
    slower = limits.phases(m, limits.GPUS["a100"], 8, 8, o, True)
    assert 1.3 < slower["student"] / shared["student"] < 1.6  # what checkpointing costs
    assert alone["step"] == pytest.approx(sum(v for k, v in alone.items() if k != "step"))


def test_the_table_of_the_docs_is_what_the_program_prints() -> None:
    table = run(str(ROOT / "bench" / "limits.py"), "--table")
    rows = re.findall(r"^\|.*\|$", table, re.MULTILINE)
    assert len(rows) == 2 + len(limits.MODELS)
    assert "\n".join(rows) in (ROOT / "docs" / "gpu.md").read_text()
    output = run(str(ROOT / "bench" / "limits.py"), "--model", "qwen3-8b", "--gpu", "h100")
    assert "All of it computed" in output and re.search(r"decode +\d", output)


@pytest.fixture
def measured_run(tmp_path):
    """A run of two processes and two steps of the tiny model, with lengths that are easy to add."""
    settings = dataclasses.asdict(egrsd.parse_settings(["--preset", "tiny"]))
    settings["rollout_tp"] = 1
    about = {
        "device": "x86_64 CPU",
        "processes": 2,
        "tensor_parallel": 1,
        "engine": "vllm (asked for)",
    }
    seconds = {"rollout": 0.5, "passes": 0.25, "update": 0.001}
    log = [{"step": 0, "seconds": dict.fromkeys(seconds, 99)}, {"step": 1, "seconds": seconds}]
    rollouts = []
    for step in (0, 1):
        for tokens in (30, 10, 20, 40):
            rollouts.append(
                {
                    "step": step,
                    "id": "a",
                    "problem": "Compute 1 #1 +6 .",
                    "solution": "#1 1 +6 = 7",
                    "prompt_ids": [3] * 8,
                    "completion_ids": [4] * tokens,
                }
            )
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "versions.json").write_text(json.dumps(about))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    return tmp_path


def test_a_run_against_its_limits_by_hand(measured_run, tokenizer) -> None:
    o = limits.Options(run=str(measured_run), tflops=0.05, gbps=10)
    found = limits.analyse_run(measured_run, o)
    # tiny: d 96, MLP 288, 2 layers, 128 wide queries, 64 wide keys, V 72, tied; rank 16
    layer = 96 * 128 + 2 * 96 * 64 + 128 * 96 + 3 * 96 * 288
    norms = 2 * (2 * 96 + 2 * 32) + 96
    pairs = (96 + 128) + 2 * (96 + 64) + (128 + 96) + 3 * (96 + 288)
    linear, head, adapter = 2 * layer, 72 * 96, 2 * 16 * pairs
    # Engine 1 has the rollouts of 10 and 40 tokens: 40 reads of all weights, in float32, and each
    # of its tokens reads its row's keys and values up to there.
    read = 40 * 4 * (linear + norms + head + adapter)
    seen = sum(8 + t for t in range(10)) + sum(8 + t for t in range(40))
    read += seen * 4 * 2 * 2 * 64
    assert found["decode_share"] == pytest.approx(read / 10e9 / 0.5)

    text = "Compute 1 #1 +6 . Reference : #1 1 +6 = 7 Solve it in your own way ."
    teacher = len(encode_prompt(tokenizer, text, False))
    flops = 0
    for tokens in (30, 10, 20, 40):
        whole, short = teacher + tokens, 8 + tokens
        flops += 2 * whole * linear + 4 * 2 * 128 * whole**2
        flops += 2 * short * (linear + adapter) + 4 * 2 * 128 * short**2
        flops += 2 * short * (linear + 2 * adapter) + 10 * 2 * 128 * short**2
        flops += 3 * 2 * tokens * head
    assert found["mfu"] == pytest.approx(flops / 2 / 0.25 / 0.05e12)  # half of it on each process
    assert found["passes_least"] == pytest.approx(flops / 2 / 0.05e12)
    assert "--rollout_tp" in found["advice"]  # two engines of one process each
    output = run(str(ROOT / "bench" / "limits.py"), "--run", measured_run, "--gpu", "h100")
    assert "2 steps on 2 x x86_64 CPU" in output and "against h100" in output


def test_what_cannot_be_held_against_a_limit_is_refused_with_a_sentence(measured_run) -> None:
    with pytest.raises(SystemExit, match="no data sheet.*--tflops X --gbps Y"):
        limits.analyse_run(measured_run, limits.Options())
    assert limits.gpu_of(limits.Options(), "NVIDIA H100 80GB HBM3")[0] == "h100"
    assert limits.gpu_of(limits.Options(), "NVIDIA GeForce RTX 4090")[0] == "rtx4090"
    for other in ("NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA A100-PCIE-40GB"):
        assert limits.find_gpu(limits.Options(), other) is None
        with pytest.raises(SystemExit, match="no data sheet"):
            limits.gpu_of(limits.Options(), other)
        given = limits.Options(tflops=835, gbps=3_900)
        assert limits.find_gpu(given, other)[1].tb_s == 3.9
    (measured_run / "rollouts.jsonl").unlink()
    with pytest.raises(SystemExit, match="there is no rollouts.jsonl"):
        limits.analyse_run(measured_run, limits.Options(gpu="h100"))
