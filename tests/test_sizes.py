"""The memory estimate against what autograd keeps, and what it refuses on GPUs of made-up sizes."""

import functools

import pytest
import torch
from test_gpu_path import bfloat16_model, pass_under_autocast, saved_tensors

import egrsd
from support.shared import models, sizes
from support.training import opening

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": False,
}
TARGETS = models.layer_names(egrsd.Settings().lora_targets)


def skeleton(**config: object):
    from transformers import AutoModelForCausalLM, Qwen3Config

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Qwen3Config(**config))


def estimate(engine_tp: int = 8, **config: object):
    model = skeleton(**(config or QWEN3_8B))
    gpu = torch.device("cuda", 0)
    tokens = 65_536
    tile = egrsd.VOCAB_TILE["cuda"]
    return sizes.estimator(model, gpu, TARGETS, 64, engine_tp, tokens, tile, gpus=8)


def test_sizes_of_qwen3_8b_are_those_of_the_model_card() -> None:
    m = sizes.sizes_of(skeleton(**QWEN3_8B), TARGETS, 64)
    assert m.base == 8_190_735_360  # 8.2 billion
    assert m.adapter == 174_587_904
    assert (m.queries, m.keys, m.targets, m.vocab) == (4096, 1024, 7, 151_936)
    tied = sizes.sizes_of(skeleton(**{**QWEN3_8B, "tie_word_embeddings": True}), TARGETS, 64)
    assert tied.base == m.base - 151_936 * 4096
    assert (m.embedding, tied.embedding) == (151_936 * 4096, 0)


@pytest.mark.parametrize("targets", [",".join(TARGETS), "q_proj,k_proj,v_proj,o_proj"])
def test_activations_are_what_autograd_keeps(targets) -> None:
    tokens = 512
    two = bfloat16_model(2, targets)
    four = bfloat16_model(4, targets)
    kept = pass_under_autocast(four, tokens)[0] - pass_under_autocast(two, tokens)[0]
    m = sizes.sizes_of(two.get_base_model(), ["base_layer"], 16)  # Qwen3's own linear layers
    m = sizes.dataclasses.replace(m, rank=16, targets=len(targets.split(",")))
    weights = 2 * m.targets * 2 * 16 * (256 + 768)  # at most: autocast's copies of the adapter
    counted = 2 * tokens * sizes.layer_activations(m)
    assert kept <= 1.03 * counted + weights, (kept, counted)
    most = 1.0 if m.targets == 7 else 1.2  # without an adapter the MLP keeps less
    assert counted <= most * kept, (kept, counted)


def test_checkpointing_keeps_the_inputs_of_the_layers_and_one_layer() -> None:
    at = functools.partial(estimate(), 4_096, head_chunk=1_024, shard=False)
    without, with_it = at(checkpointing=False), at(checkpointing=True)
    inputs = 36 * 2 * 4096 * 4096 / 2**30
    one_layer = without["activations"] / 36
    assert with_it["activations"] == pytest.approx(inputs + one_layer, abs=0.02)
    model = bfloat16_model(4)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 100, (1, 256))
    with saved_tensors(model) as kept, torch.autocast("cpu", torch.bfloat16):
        model.get_base_model().model(input_ids=ids, attention_mask=None, use_cache=False)
    hidden = [t for t in kept.values() if t.shape == (1, 256, 256)]
    assert 4 <= len(hidden) <= 6  # one input a layer, and what the last norm keeps


def check(free: float, **options: object) -> dict[str, float]:
    chosen = {"micro_batch_tokens": 4_096, "checkpointing": False, "head_chunk": 1_024}
    chosen.update(shard=False, **options)
    return opening.check_memory(estimate(), **chosen, free=free, gpus=8)


def test_what_cannot_fit_is_refused_with_what_makes_it_fit(capsys) -> None:
    memory = check(80)
    assert not capsys.readouterr().out
    assert memory["sum"] == pytest.approx(sum(v for k, v in memory.items() if k != "sum"), abs=0.05)
    assert check(memory["sum"] + 1) == memory  # near the limit: it may work
    assert "THIS MAY NOT FIT" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"needs about .* This makes it fit: --micro_batch_tok"):
        check(memory["sum"] - 1)
    with pytest.raises(SystemExit, match="This makes it fit: --gradient_checkpointing$"):
        check(31.5)
    with pytest.raises(SystemExit, match="This makes it fit: --shard --gradient_checkpointing$"):
        check(19.0)
    with pytest.raises(SystemExit, match="No option makes it fit: take larger GPUs"):
        check(10.0)
    assert check(31.5, checkpointing=True)["sum"] < 31.5 - opening.SPARE


def test_one_gpu_is_told_what_it_can_do_alone() -> None:
    model = skeleton(**QWEN3_8B)
    work = 1, 65_536, egrsd.VOCAB_TILE["cuda"], 1, 1_024, 32 * 1_280
    one = sizes.estimator(model, torch.device("cuda", 0), TARGETS, 64, *work)
    with pytest.raises(SystemExit, match="This makes it fit: --gradient_checkpointing --engine hf"):
        opening.check_memory(one, 4_096, False, 1_024, False, free=31.0, gpus=1)


def test_a_long_row_and_the_cache_of_generate_are_counted() -> None:
    at = functools.partial(estimate(), 2_048, False, 1_024, False)
    assert at(longest=8_192)["activations"] == pytest.approx(4 * at()["activations"], abs=0.05)
    assert at(longest=1_024) == at()
    cache = 128 * 1_280 * 36 * 2 * 1_024 * 2  # bytes: rows, tokens, layers, keys and values, bf16
    hf = at(engine_tp=0, generate_bytes=cache)
    passes = hf["activations"] + hf["head"]
    assert hf["generate's cache, beyond the passes"] == pytest.approx(
        cache / 2**30 - passes, abs=0.1
    )
    assert at(engine_tp=0, generate_bytes=2**30)["generate's cache, beyond the passes"] == 0


def test_a_sharded_base_is_its_part_of_the_layers_two_whole_ones_and_the_rest() -> None:
    at = functools.partial(estimate(), 4_096, False, 1_024)
    layer = 4096 * (4096 * 2 + 1024 * 2 + 3 * 12288) + 2 * 4096 + 2 * 128
    rest = 2 * 151_936 * 4096 + 4096
    assert at(False)["base"] == pytest.approx(2 * (36 * layer + rest) / 2**30, abs=0.01)
    assert at(True)["base"] == pytest.approx(
        2 * (36 / 8 * layer + 2 * layer + rest) / 2**30, abs=0.01
    )


def test_every_way_that_is_named_is_made_of_options_that_exist(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    for way in opening.WAYS_TO_FIT:
        egrsd.parse_settings(way.split())


def test_a_run_asks_before_it_loads_anything(monkeypatch, tmp_path) -> None:
    s = egrsd.parse_settings(["--preset", "tiny", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(egrsd.opening, "free_memory", lambda device: 0.001)
    monkeypatch.setattr(egrsd.models, "load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match="and 0.0 GiB of its GPU are free"):
        egrsd.train(s)
    assert not (tmp_path / "run").exists()
