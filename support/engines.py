"""Drawing completions with transformers' generate or with vLLM, which have one interface:

    generate(prompts, seeds, temperature=, top_p=, top_k=, max_new=)   yields (index, completion ids, log-probabilities)

Token ids and seeds go in; out come completions as they end, each with the log-probabilities (nats) that the model gave
its tokens at temperature 1, whatever the sampling.
"""
from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from support.basics import fail, gather, installed, rank_and_world
from support.models import autocast

if TYPE_CHECKING:
    from egrsd import Settings

Completion = tuple[int, list[int], list[float]]
Generate = Callable[..., Iterator[Completion]]
Draw = Callable[..., list[tuple[list[int], list[float]]]]  # sample() of one engine, see below


def rollout_seed(seed: int, step: int | str, index: int) -> int:
    """Depends on the run's seed, the step and the index in the global batch, not on the rank or batch that draws it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()[:4], "big") >> 1


def end_tokens(model, tokenizer) -> list[int]:
    """Ids that end a completion: the tokenizer's, then those of the model's generation config."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return list(dict.fromkeys(i for i in ids if i is not None))


@torch.no_grad()
def hf_generate(model, ends: list[int], prompts: list[list[int]], seeds: list[int], *, temperature: float, top_p: float,
                top_k: int, max_new: int, batch: int = 128) -> Iterator[Completion]:
    """transformers' generate, greedy over logits + Gumbel noise of one generator a row: no row depends on its batch."""
    from transformers import GenerationConfig
    from transformers.generation import logits_process as warp
    device = model.device
    config = GenerationConfig(max_new_tokens=max_new, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
    warpers = [warp.TemperatureLogitsWarper(float(temperature))] if temperature not in (0, 1) else []
    warpers += [warp.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [warp.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in rows], device=device)  # (b, width), left-padded
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=device)
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds[start : start + batch]]
        raw_logps = []  # of each position: (b,)

        def add_noise(so_far: Tensor, z: Tensor) -> Tensor:
            raw = z.log_softmax(-1)  # (b, V)
            if temperature > 0:
                for warper in warpers:
                    z = warper(so_far, z)
                noise = torch.empty_like(z)
                for row, generator in zip(noise, generators):
                    row.exponential_(generator=generator)
                z = z - noise.log()  # argmax(z + Gumbel noise) is a sample of softmax(z)
            raw_logps.append(raw.gather(1, z.argmax(-1, keepdim=True)).squeeze(1))
            return z

        with autocast(device):
            out = model.generate(input_ids=ids, attention_mask=real, generation_config=config,
                                 logits_processor=[add_noise])
        logps = torch.stack(raw_logps, 1).tolist()
        for i, row in enumerate(out[:, width:].tolist()):
            n = next((k + 1 for k, token in enumerate(row) if token in ends), len(row))  # [D9] the end token counts
            yield start + i, row[:n], logps[i][:n]


def vllm_generate(llm, lora, ends: list[int], prompts: list[list[int]], seeds: list[int], *, temperature: float,
                  top_p: float, top_k: int, max_new: int) -> Iterator[Completion]:
    """vLLM, which sees the whole work list at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
        how = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k or -1, max_tokens=max_new, seed=seed,
                             logprobs=0, stop_token_ids=ends, detokenize=False,
                             output_kind=RequestOutputKind.FINAL_ONLY)
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, how, lora_request=lora)
    while llm.llm_engine.has_unfinished_requests():
        for done in llm.llm_engine.step():
            ids = list(done.outputs[0].token_ids)
            yield int(done.request_id), ids, [at[token].logprob for at, token in zip(done.outputs[0].logprobs, ids)]


def start_vllm(model: str, device: torch.device, tp: int, max_length: int, lora_r: int = 0, **options: object):
    """A vLLM engine inside this process (colocated), tensor-parallel over `tp` of torchrun's ranks."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of what we ask for
    if device.type == "cpu":
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # which takes longer than it saves
    from vllm import LLM
    if lora_r:  # vLLM takes only these as the largest rank
        options |= {"enable_lora": True, "max_loras": 1,
                   "max_lora_rank": next((r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= lora_r), lora_r)}
    if rank_and_world()[1] > 1:
        options |= {"distributed_executor_backend": "external_launcher"}
    return LLM(model=model, skip_tokenizer_init=True, dtype="bfloat16" if device.type == "cuda" else "float32", seed=0,
               tensor_parallel_size=tp, max_model_len=max_length, enforce_eager=device.type == "cpu",
               logprobs_mode="raw_logprobs", **options)  # comparable with the trainer's, whatever the sampling


def choose_engine(s: Settings, device: torch.device) -> tuple[str, str]:
    """-> "vllm" or "hf", and why: vLLM where there is a GPU and vLLM, unless told otherwise."""
    there = installed("vllm")
    if s.rollout == "vllm" and not there:
        fail("vLLM is asked for and not installed (pip install -r requirements.txt); the engine hf does without it")
    if s.rollout != "auto":
        return s.rollout, "asked for"
    if device.type == "cuda" and there:
        return "vllm", "there is a GPU and vLLM is installed"
    return "hf", "there is no GPU" if device.type == "cpu" else "vLLM is not installed"


def tensor_parallel(s: Settings, config) -> int:
    """Ranks that share one engine: by default the largest divisor of this machine's ranks that the model's heads allow.

    Decoding a few sequences is bound by reading the weights, of which each of the ranks then reads only its part.
    """
    here, heads, kv = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), config.num_attention_heads, config.num_key_value_heads
    fits = [n for n in range(1, here + 1) if here % n == 0 and heads % n == 0 and (kv % n == 0 or n % kv == 0)]
    if s.rollout_tp and s.rollout_tp not in fits:
        fail(f"{s.rollout_tp} processes cannot share one vLLM engine: the {here} of this machine and the model's heads "
             f"allow {' or '.join(map(str, fits))}")
    return s.rollout_tp or max(fits)


def kv_cache_bytes(s: Settings, config, device: torch.device, tp: int) -> int:
    """Room for the step's rollouts and for one sequence of full length, and no more, since training needs the rest."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = math.ceil(config.num_key_value_heads / tp)  # of this rank
    per_token = 2 * config.num_hidden_layers * heads * head_dim * (2 if device.type == "cuda" else 4)
    in_flight = s.batch_size * tp // rank_and_world()[1] * 2 * s.max_completion  # as much again for the prompts
    return int(1.1 * per_token * max(s.max_length, in_flight)) + (64 << 20)


def sample(generate: Generate, tp: int, prompts: list[list[int]], seeds: list[int],
           **how: object) -> list[tuple[list[int], list[float]]]:
    """(completion ids, log-probabilities) of all prompts, on every rank. The ranks of one engine draw the same ones."""
    rank, world = rank_and_world()
    mine = list(range(rank // tp, len(prompts), world // tp))
    completions = generate([prompts[j] for j in mine], [seeds[j] for j in mine], **how)
    drawn = [(mine[i], ids, logps) for i, ids, logps in completions]
    return [(ids, logps) for _, ids, logps in sorted(gather(drawn if rank % tp == 0 else []))]
