"""Rollouts: seeds, the sampled distribution, vLLM against transformers, lost pushes."""

import importlib.util
import json
import math
import shutil

import pytest
import torch
from helpers import CPU, ROOT, SMALL, figures_of, fresh_model, load, read_log, run, tiny_settings

import egrsd
from support.shared import engines, processes
from support.shared.data import encode_prompt
from support.shared.engines import end_tokens, hf_generate, rollout_seed
from support.shared.models import load_base


def test_a_rollout_depends_on_its_seed_and_on_nothing_else(tokenizer) -> None:
    model, s = fresh_model()
    ends = end_tokens(model, tokenizer)
    batch, _, _ = egrsd.next_problems(load(s), tokenizer, s, 0)
    prompts, seeds = (
        [row["prompt_ids"] for row in batch[:12]],
        [rollout_seed(0, 7, i) for i in range(12)],
    )
    how = {"temperature": 1.1, "top_p": 0.95, "top_k": 20, "max_new": 40}
    whole = {i: (ids, logps) for i, ids, logps in hf_generate(model, ends, prompts, seeds, **how)}
    parts = {
        i: (ids, logps)
        for i, ids, logps in hf_generate(model, ends, prompts, seeds, **how, batch=5)
    }
    single = {
        i: next(hf_generate(model, ends, [prompts[i]], [seeds[i]], **how))[1] for i in range(12)
    }
    assert (
        {i: ids for i, (ids, _) in whole.items()}
        == {i: ids for i, (ids, _) in parts.items()}
        == single
    )
    other = {
        i: ids for i, ids, _ in hf_generate(model, ends, prompts, [n + 1 for n in seeds], **how)
    }
    assert sum(other[i] == single[i] for i in range(12)) < 6
    for i, (ids, logps) in whole.items():  # D9: an end token counts, and is the last
        assert not set(ids[:-1]) & set(ends) and (ids[-1] in ends or len(ids) == 40)
        z = (
            model(input_ids=torch.tensor([prompts[i] + ids]))
            .logits[0, len(prompts[i]) - 1 : -1]
            .log_softmax(-1)
        )
        torch.testing.assert_close(
            torch.tensor(logps), z[range(len(ids)), ids].detach(), atol=2e-5, rtol=0
        )


def test_each_forward_pass_of_generate_is_progress_also_where_nothing_is_drawn(tokenizer) -> None:
    model, _ = fresh_model()
    before = processes._here["moves"]
    with engines.counting_passes(model), torch.no_grad():
        model(input_ids=torch.ones(1, 2, dtype=torch.long))  # of a rank that keeps others company
    assert processes._here["moves"] == before + 1
    how = {"temperature": 1.1, "top_p": 0.95, "top_k": 20, "max_new": 3}
    drawn = list(hf_generate(model, [71], [[5, 6]], [0], **how))
    assert processes._here["moves"] == before + 1 + len(drawn[0][1])
    model(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert processes._here["moves"] == before + 4


def test_an_adapter_of_a_rank_that_vllm_does_not_serve_is_refused() -> None:
    with pytest.raises(SystemExit, match="rank 513: vLLM serves ranks up to 512"):
        egrsd.start_vllm("anything", CPU, 1, 256, lora_r=513)


def test_the_models_own_penalties_do_not_come_before_our_sampler(tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tiny", folder)
    penalties = {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(penalties))
    prompts = [[3, 10, 11], [3, 12]]
    how = {"temperature": 1.1, "top_p": 0.95, "top_k": 20, "max_new": 30}
    drawn = []
    for model in (ROOT / "tiny", folder):
        base = load_base(str(model), torch.device("cpu"))
        drawn.append(list(hf_generate(base, [2], prompts, [0, 1], **how)))
    assert drawn[0] == drawn[1]


def test_samples_follow_the_tempered_and_truncated_distribution(tokenizer) -> None:
    model, s = fresh_model()
    ids = (
        encode_prompt(tokenizer, "Compute 1 #1 +6 #2 -3 .", False) + tokenizer("<think>").input_ids
    )
    z = model(input_ids=torch.tensor([ids])).logits[0, -1].double() / 2.0
    values, order = z.topk(20)
    p = values.softmax(-1)
    keep = (p.cumsum(0) - p) < 0.95  # the smallest set with at least 0.95
    want = torch.zeros_like(z).index_copy_(0, order[keep], p[keep] / p[keep].sum())
    n = 4000
    drawn = hf_generate(
        model,
        end_tokens(model, tokenizer),
        [ids] * n,
        range(n),
        temperature=2.0,
        top_p=0.95,
        top_k=20,
        max_new=1,
        batch=1000,
    )
    counts = torch.bincount(torch.tensor([y[0] for _, y, _ in drawn]), minlength=len(z)).double()
    assert counts[want == 0].sum() == 0
    real = want > 0
    chi2 = ((counts[real] - n * want[real]) ** 2 / (n * want[real])).sum().item()
    assert chi2 < real.sum() + 5 * math.sqrt(2 * real.sum()), (chi2, real.sum())


VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@VLLM
def test_vllm_trains_like_transformers_with_one_process_and_with_two_sharing_an_engine(
    tmp_path, one_shared_engine
) -> None:
    logs = {}
    for name, nproc, options in (("one", 0, ()), ("two", 2, ()), ("apart", 2, ("--rollout_tp", 1))):
        output = run(
            *SMALL,
            "--steps",
            3,
            "--engine",
            "vllm",
            *options,
            "--out",
            tmp_path / name,
            nproc=nproc,
        )
        assert (
            "a random adapter reached the engine" in output and "engine=vllm (asked for)" in output
        )
        assert "Traceback" not in output  # the engine's end included
        about = json.loads((tmp_path / name / "versions.json").read_text())
        assert about["tensor_parallel"] == (2 if name == "two" else 1)
        logs[name] = read_log(tmp_path / name)
        assert len(logs[name]) == 3 and all(row["canary"] < 1e-5 for row in logs[name])
    ids = {
        name: [r["completion_ids"] for r in read_log(tmp_path / name, "rollouts.jsonl")]
        for name in logs
    }
    assert ids["one"] == ids["two"] == ids["apart"]
    for row, *others in zip(logs["one"], logs["two"], logs["apart"]):
        for other in others:
            assert figures_of(other) == pytest.approx(figures_of(row), rel=1e-4, abs=1e-6)


@VLLM
@pytest.mark.parametrize("lost", ["at the start", "later"])
def test_a_lost_adapter_push_stops_the_run(lost, tmp_path) -> None:
    script = tmp_path / "lost.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import egrsd
real = egrsd.start_engine
def start_engine(*args):
    generate, push = real(*args)
    calls = []
    def sometimes():
        calls.append(1)
        if {lost == "later"} and len(calls) <= 2:  # the two pushes of the probe
            push()
    push()
    return generate, sometimes
egrsd.start_engine = start_engine
options = ['--steps', '6', '--engine', 'vllm', '--out', sys.argv[1]]
egrsd.train(egrsd.parse_settings({[*map(str, SMALL)]} + options))
""")
    output = run(str(script), tmp_path / "out", code=1)
    assert (
        "does not use the adapter that was pushed"
        if lost == "at the start"
        else "it runs other weights"
    ) in output


def test_engines_and_tensor_parallelism_are_chosen_and_explained(monkeypatch) -> None:
    from transformers import Qwen3Config

    s = tiny_settings()
    assert engines.choose_engine(s.engine, CPU) == ("hf", "there is no GPU")
    for here, heads, kv, want in (
        (8, 32, 8, 8),
        (8, 12, 4, 4),
        (6, 32, 8, 2),
        (4, 28, 4, 4),
        (1, 32, 8, 1),
    ):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        assert (
            engines.tensor_parallel(
                s.rollout_tp, Qwen3Config(num_attention_heads=heads, num_key_value_heads=kv)
            )
            == want
        )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = Qwen3Config(num_attention_heads=32, num_key_value_heads=8)
    monkeypatch.setenv("WORLD_SIZE", "16")  # two machines share an engine if they are told to
    assert engines.tensor_parallel(0, config) == 8
    assert engines.tensor_parallel(16, config) == 16
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit, match="3 processes cannot share.* allow 1 or 2 or 4 or 8"):
        engines.tensor_parallel(3, Qwen3Config())
