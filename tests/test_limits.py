"""bench/limits.py: its FLOPs against torch's counter, its seconds against a calculation by hand."""

import importlib.util
import re

import pytest
import torch
from helpers import ROOT, run
from torch.utils.flop_counter import FlopCounterMode

import egrsd
from support.shared import models, sizes

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
    assert alone["decode"] == pytest.approx(1024 * read / 2.04e12, rel=0.01)  # 8 s
    flops = 2 * 4 * 1924 * 6.95e9 + 4 * 4 * 36 * 4096 * 1924**2 + 2 * 4 * 1024 * 0.62e9
    assert alone["teacher"] == pytest.approx(flops / 312e12 / 0.5, rel=0.01)  # 0.75 s
    shared = limits.phases(m, limits.GPUS["a100"], 8, 8, o, False)
    assert shared["decode"] < 0.3 * alone["decode"]
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
