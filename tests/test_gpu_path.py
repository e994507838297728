"""What docs/gpu.md says of the sources of the pinned packages, as far as a CPU can show it."""

import contextlib
import math
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, base_of, fresh_model, read_log, run, tiny_settings

import egrsd
from support.shared import engines, models, processes
from support.shared.console import installed
from support.training import guards

TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@contextlib.contextmanager
def saved_tensors(model):
    """The storages that autograd keeps inside the block, but for parameters: address -> tensor."""
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def bfloat16_model(layers: int, targets: str = TARGETS, cast: bool = False):
    """A random Qwen3 as on a GPU: bfloat16 base, float32 adapter with a random B."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=100,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    base = Qwen3ForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets.split(","))
    model = get_peft_model(base, lora)
    for name, p in egrsd.trainable(model).items():
        p.data = p.data.float()
        if "lora_B" in name:
            p.data.normal_(0, 0.02)
    return model if cast else models.take_input_as_it_is(model)


def pass_under_autocast(model, tokens: int = 512) -> tuple[int, torch.Tensor]:
    """-> bytes kept for the backward pass, and the adapter's gradient"""
    ids = torch.randint(0, 100, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
    with saved_tensors(model) as kept, torch.autocast("cpu", torch.bfloat16):
        backbone = model.get_base_model().model
        hidden = backbone(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state
    hidden.float().pow(2).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in egrsd.trainable(model).values()])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), gradient


def test_the_adapter_takes_its_input_as_it_is_which_saves_memory_and_changes_nothing() -> None:
    ours, gradient = pass_under_autocast(bfloat16_model(2))
    peft, theirs = pass_under_autocast(bfloat16_model(2, cast=True))
    assert torch.equal(gradient, theirs)
    assert ours < 0.9 * peft, (ours, peft)
    s = tiny_settings()
    layers = [m for m in egrsd.add_adapter(base_of(s), s).modules() if hasattr(m, "lora_A")]
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_right_padded_rows_need_no_mask_and_sdpa_gets_its_causal_flag(attn, monkeypatch) -> None:
    model = base_of(tiny_settings())
    model.set_attn_implementation(attn)
    rows = [[3, 5, 7, 9, 4, 6, 8], [3, 5, 7], [9]]
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def note(*args, attn_mask=None, is_causal=False, **options):
        seen.append((attn_mask, is_causal, options.get("enable_gqa")))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    ids = torch.zeros(3, 7, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    hidden = egrsd.hidden_states(model, ids)
    if attn == "sdpa":
        assert seen and all(mask is None and causal for mask, causal, _ in seen)
        assert all(gqa for _, _, gqa in seen)  # keys and values are not copied for each query head
    for row, tokens in enumerate(rows):
        alone = egrsd.hidden_states(model, torch.tensor([tokens]))[0]
        torch.testing.assert_close(hidden[row, : len(tokens)], alone, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_keeps_the_gradient_and_little_else(rollouts) -> None:
    gradients = []
    sizes = []
    for options in ((), ("--gradient_checkpointing",)):
        model, s = fresh_model(*options)
        with saved_tensors(model) as kept:
            egrsd.accumulate_gradient(model, rollouts, s)
        sizes.append(sum(tensor.numel() for tensor in kept.values()))
        grads = [p.grad.flatten() for p in egrsd.trainable(model).values()]
        gradients.append(torch.cat(grads))
        assert not model.training
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert sizes[1] < 0.5 * sizes[0], sizes


def test_checkpointing_turns_on_no_dropout_of_the_base(rollouts) -> None:
    model, s = fresh_model("--gradient_checkpointing")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
    gradients = []
    for _ in range(2):
        egrsd.accumulate_gradient(model, rollouts, s)
        gradients.append(torch.cat([p.grad.flatten() for p in egrsd.trainable(model).values()]))
    assert torch.equal(*gradients) and gradients[0].any()


def test_mm_with_a_float32_result_has_no_gradient_and_no_cpu_kernel() -> None:
    a = torch.ones(2, 3, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError):
        torch.mm(a, a.T, out_dtype=torch.float32)
    schemas = map(str, torch._C._jit_get_schemas_for_operator("aten::mm"))
    assert "aten::mm.dtype(Tensor self, Tensor mat2, ScalarType out_dtype) -> Tensor" in schemas
    assert torch.get_float32_matmul_precision() == "highest"  # no TF32 in the float32 products


def test_more_processes_than_gpus_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert processes.own_gpu(4) == torch.device("cuda", 3)
    with pytest.raises(SystemExit, match="8 processes and 2 GPUs.*--nproc_per_node 2"):
        processes.own_gpu(2)


def test_the_engine_gets_a_copy_of_the_adapter_in_the_dtype_to_which_it_would_round(
    tmp_path,
) -> None:
    from safetensors.torch import load_file

    for model in (bfloat16_model(1), fresh_model()[0]):
        got = engines.adapter_copy(model)
        egrsd.save_student(model, tmp_path / "checkpoint")
        want = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
        assert got.keys() == want.keys() and got
        for name, tensor in want.items():
            assert tensor.dtype == torch.float32  # a checkpoint loses nothing
            assert torch.equal(got[name], tensor.to(models.head_of(model).dtype))
            got[name].mul_(2)  # as vLLM does, with B and alpha / r
        for name, tensor in engines.adapter_copy(model).items():
            assert torch.equal(tensor, want[name].to(tensor.dtype))


@pytest.mark.skipif(not installed("vllm"), reason="vLLM is not installed")
def test_vllm_is_lent_the_adapter_and_what_it_cannot_take_is_named() -> None:
    model, s = fresh_model()
    worker = lora_worker(s.lora_r, "qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    engines.lend_adapter(worker, model)
    lora = worker.model_runner.lora_manager._load_adapter(SimpleNamespace(lora_int_id=1))
    mine = engines.adapter_copy(model)
    assert len(lora.loras) == len(mine) / 2 and lora.rank == s.lora_r
    for name, layer in lora.loras.items():
        assert torch.equal(layer.lora_a, mine[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(layer.lora_b, mine[f"base_model.model.{name}.lora_B.weight"])
        assert layer.scaling == s.lora_alpha / s.lora_r

    fewer = lora_worker(s.lora_r, "qkv_proj", "o_proj")
    engines.lend_adapter(fewer, model)
    with pytest.raises(SystemExit, match="takes no adapter.*down_proj, gate_proj, up_proj"):
        fewer.model_runner.lora_manager._load_adapter(SimpleNamespace(lora_int_id=1))


def lora_worker(rank: int, *modules: str) -> SimpleNamespace:
    """What lend_adapter sees of vLLM: an engine that is its own worker, with these layers."""
    from vllm.config.lora import LoRAConfig

    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    layers = SimpleNamespace(
        supported_lora_modules=modules, packed_modules_mapping=packed, model=torch.nn.Module()
    )
    config = LoRAConfig(max_lora_rank=rank, lora_dtype=torch.float32)
    manager = SimpleNamespace(_adapter_manager=layers, lora_config=config)
    worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))
    worker.collective_rpc = lambda work: [work(worker)]
    return worker


def probe(noise: float, follows: bool, *options: object) -> None:
    """guards.probe_engine with an engine that is the trainer, or its base, and rounds coarsely."""
    model, s = fresh_model(*options, b=0.0)
    rows = [{"prompt_ids": [3, 5, 7, 9 + i]} for i in range(8)]
    rounding = torch.Generator().manual_seed(0)

    def logp_of(rollouts: list[dict]) -> torch.Tensor:
        return egrsd.score_completions(model, rollouts, "prompt_ids", s)[0]

    def sample(prompts, seeds, **_):
        for i, prompt in enumerate(prompts):
            r = {"prompt_ids": prompt, "completion_ids": list(range(3, 19))}
            with contextlib.nullcontext() if follows else egrsd.as_teacher(model):
                logps = logp_of([r])
            logps = logps + noise * torch.randn(len(logps), generator=rounding)
            yield i, r["completion_ids"], logps.tolist()

    adapter = egrsd.trainable(model)
    before = {name: p.detach().clone() for name, p in adapter.items()}
    try:
        guards.probe_engine(
            sample, lambda: None, model, adapter, egrsd.as_teacher, logp_of, rows, 0
        )
    finally:
        for name, p in egrsd.trainable(model).items():
            assert torch.equal(p, before[name])  # the adapter is as it was


@pytest.mark.parametrize("options", [(), ("--lora_r", 1), ("--lora_alpha", 1), ("--lora_r", 64)])
def test_the_probe_is_above_bfloat16s_noise_at_any_rank_and_alpha(options) -> None:
    probe(0.04, True, *options)  # the noise that others see between engine and trainer
    with pytest.raises(SystemExit, match="does not use the adapter"):
        probe(0.04, False, *options)


def test_the_canary_lets_the_published_noise_pass_and_stops_at_lost_weights() -> None:
    model = bfloat16_model(1)
    for normal in (0.011, 0.036, 0.064):
        guards.check_canary(normal, model, 0)
    for wrong in (0.2, math.nan):
        with pytest.raises(SystemExit, match="it runs other weights"):
            guards.check_canary(wrong, model, 0)


@pytest.mark.skipif(not egrsd.console.installed("vllm"), reason="vLLM is not installed")
def test_vllm_wraps_the_adapted_layers_alone_and_computes_its_head_in_float32(tmp_path) -> None:
    script = tmp_path / "layers.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(egrsd.ROOT)!r}]
import egrsd
real = egrsd.start_vllm
def start_vllm(*args, **options):
    llm = real(*args, **options)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    config = runner.vllm_config
    wrapped = runner.lora_manager._adapter_manager.modules
    print("wrapped", sorted({{name.split(".")[-1] for name in wrapped}}))
    print("head", config.model_config.head_dtype, "tokens",
          config.scheduler_config.max_num_batched_tokens)
    return llm
egrsd.start_vllm = start_vllm
egrsd.train(egrsd.parse_settings(sys.argv[1:]))
""")
    attention = "q_proj,k_proj,v_proj,o_proj"
    options = ("--steps", 2, "--engine", "vllm", "--lora_targets", attention)
    output = run(str(script), *SMALL, *options, "--out", tmp_path / "out")
    assert "wrapped ['o_proj', 'qkv_proj']" in output  # neither the MLP nor the head
    assert "head torch.float32 tokens 8192" in output
    assert all(row["canary"] < 1e-5 for row in read_log(tmp_path / "out"))


@pytest.mark.parametrize("phase", ["load_base", "completion_hidden"])
def test_one_rank_that_dies_ends_all_of_them_in_seconds(phase, tmp_path) -> None:
    script = tmp_path / "victim.py"
    script.write_text(f"""
import os, signal, sys
sys.path[:0] = [{str(egrsd.ROOT)!r}]
import egrsd
place = egrsd.models if {phase!r} == "load_base" else egrsd
real = getattr(place, {phase!r})
def dies(*args):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(place, {phase!r}, dies)
with egrsd.processes.ending_together():
    egrsd.train(egrsd.parse_settings(sys.argv[1:]))
""")
    began = time.monotonic()
    output = run(str(script), *SMALL, "--out", tmp_path / "out", nproc=2, code=1)
    assert "SIGKILL" in output
    assert time.monotonic() - began < 60  # start included; not the day of the process group
