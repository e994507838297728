"""Drawing completions: which engine, how many share it, and transformers' generate.

Both engines have one interface, and vLLM's half of it is in egrsd.py:

    generate(prompts, seeds, temperature=, top_p=, top_k=, max_new=)
        yields (index, completion ids, log-probabilities) as completions end

Token ids and seeds go in; the log-probabilities (nats) are those that the model gave its tokens at
temperature 1, whatever the sampling.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from support.shared.console import fail, installed
from support.shared.models import autocast, head_of, heads_of
from support.shared.processes import note_progress, rank_and_world, ranks_here, reduce_

AT_ONCE = 128  # ours: prompts of transformers' generate side by side
Completion = tuple[int, list[int], list[float]]
Generate = Callable[..., Iterator[Completion]]


def choose_engine(wanted: str, device: torch.device) -> tuple[str, str]:
    """-> "vllm" or "hf", and why: vLLM where there is a GPU and vLLM, unless told otherwise."""
    there = installed("vllm")
    if wanted == "vllm" and not there:
        fail(
            "vLLM is asked for and not installed (pip install -r requirements.txt); the engine hf "
            "does without it"
        )
    if wanted != "auto":
        return wanted, "asked for"
    if device.type == "cpu":
        return "hf", "there is no GPU"
    if there:
        return "vllm", "there is a GPU and vLLM is installed"
    return "hf", "vLLM is not installed"


def tensor_parallel(wanted: int, config) -> int:
    """Ranks that share one engine; 0: the largest divisor of this machine's that the heads allow.

    Decoding a few sequences is bound by reading the weights, of which each of the ranks then reads
    only its part. More than one machine's ranks share an engine only where that is asked for.
    """
    here = ranks_here()
    machines = rank_and_world()[1] // here
    heads, kv_heads, _ = heads_of(config)
    possible = [n for n in range(1, here + 1) if here % n == 0]
    possible += [n * here for n in range(2, machines + 1) if machines % n == 0]
    fits = []
    for n in possible:
        shares_kv = kv_heads % n == 0 or n % kv_heads == 0
        if heads % n == 0 and shares_kv:
            fits.append(n)
    if wanted and wanted not in fits:
        of_others = f", {machines} machines" if machines > 1 else ""
        fail(
            f"{wanted} processes cannot share one vLLM engine: the {here} of this machine"
            f"{of_others} and the model's heads allow {' or '.join(map(str, fits))}"
        )
    return wanted or max(n for n in fits if n <= here)


def kv_cache_bytes(config, device: torch.device, tp: int, tokens: int) -> int:
    """Room in one rank's cache for that many tokens and a tenth more."""
    _, kv_heads, head_dim = heads_of(config)
    heads = math.ceil(kv_heads / tp)  # of this rank
    width = 2 if device.type == "cuda" else 4
    per_token = 2 * config.num_hidden_layers * heads * head_dim * width
    return int(1.1 * per_token * tokens) + (64 << 20)


def lend_adapter(llm, model) -> None:
    """vLLM's add_lora takes the model's adapter from memory from now on, whatever path it is told.

    Engine and trainer are one process on one device, so that no file needs to lie between them:
    that of Qwen3-4B, written, read and copied back to its GPU, took a third of a second of each
    step. vLLM has no door for this; what loads its adapters is replaced, and no more.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    def replace(worker) -> None:
        manager = worker.model_runner.lora_manager
        adapters = manager._adapter_manager
        known = set()
        for module in adapters.supported_lora_modules:
            known.update(adapters.packed_modules_mapping.get(module, [module]))
        renamed = getattr(adapters.model, "hf_to_vllm_mapper", None)
        if renamed is not None:
            renamed = renamed.get_rename_mapper()

        def load(request) -> LoRAModel:
            config = PEFTHelper.from_dict(model.peft_config["default"].to_dict())
            config.validate_legal(manager.lora_config)
            lora = LoRAModel.from_lora_tensors(
                request.lora_int_id,
                adapter_copy(model),
                config,
                device=str(model.device),
                dtype=manager.lora_config.lora_dtype,
                weights_mapper=renamed,
            )
            unknown = {name.rpartition(".")[2] for name in lora.loras} - known
            if unknown:
                fail(
                    f"vLLM takes no adapter for this model's {', '.join(sorted(unknown))}: leave "
                    "them out of --lora_targets, or --engine hf"
                )
            return lora

        manager._load_adapter = load

    llm.collective_rpc(replace)


def adapter_copy(model) -> dict[str, Tensor]:
    """The adapter as a file would hold it, in the base's dtype, to which vLLM rounds it.

    A copy: vLLM multiplies B by alpha / r where it lies.
    """
    from peft import get_peft_model_state_dict

    dtype = head_of(model).dtype
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state[name] = p.detach().to(dtype, copy=True)
    return get_peft_model_state_dict(model, state, save_embedding_layers=False)


def rollout_seed(seed: int, step: int | str, index: int) -> int:
    """Depends on the run's seed, the step and the index in the global batch, not on the rank."""
    digest = hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def end_tokens(model, tokenizer) -> list[int]:
    """Ids that end a completion: the tokenizer's, then those of the model's generation config."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    if not isinstance(listed, list):
        listed = [listed]
    ids = [i for i in (tokenizer.eos_token_id, *listed) if i is not None]
    return list(dict.fromkeys(ids))  # each once


@torch.inference_mode()  # 11 to 18 % faster than no_grad for the tiny model, and bit-equal
def hf_generate(
    model,
    eos_ids: list[int],
    prompts: list[list[int]],
    seeds: list[int],
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new: int,
    batch: int = AT_ONCE,
    together: bool = False,
) -> Iterator[Completion]:
    """transformers' generate, `batch` prompts at a time. A row depends on its seed alone.

    `together`: the ranks share the layers of a sharded base, so that all go on until all are done.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new, do_sample=False, eos_token_id=eos_ids, pad_token_id=eos_ids[0]
    )
    warpers = sampling_warpers(temperature, top_p, top_k)
    end = torch.tensor(len(prompts))
    if together:
        end = reduce_(end, "MAX")
    for start in range(0, end.item(), batch):
        # A rank without a prompt of its own keeps the others company.
        rows = prompts[start : start + batch] or [eos_ids[:1]]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), eos_ids[0], device=model.device)  # (b, width)
        real = torch.zeros_like(ids)
        for row, prompt in enumerate(rows):  # left-padded
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            real[row, width - len(prompt) :] = 1
        row_seeds = seeds[start : start + batch] or [0]
        sampler = GumbelSampler(row_seeds, model.device, temperature, warpers)
        with autocast(model.device), counting_passes(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=real,
                generation_config=config,
                logits_processor=[sampler],
                synced_gpus=together,
            )
        logps = torch.stack(sampler.raw_logps, 1).tolist()
        for row, tokens in enumerate(out[: len(prompts) - start, width:].tolist()):
            n = completion_length(tokens, eos_ids)
            yield start + row, tokens[:n], logps[row][:n]


@contextlib.contextmanager
def counting_passes(model) -> Iterator[None]:
    """Each forward pass is progress, also those of a rank that only keeps the others company."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = base.register_forward_pre_hook(lambda *_: note_progress())
    try:
        yield
    finally:
        hook.remove()


def completion_length(tokens: list[int], eos_ids: list[int]) -> int:
    """Tokens up to the first end token, which counts. [D9]"""
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return position + 1
    return len(tokens)


def sampling_warpers(temperature: float, top_p: float, top_k: int) -> list:
    """What sampling does to the logits before it draws, in transformers' own order."""
    from transformers.generation import logits_process

    warpers = []
    if temperature not in (0, 1):
        warpers.append(logits_process.TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(top_p))
    return warpers


class GumbelSampler:
    """A logits processor that makes greedy decoding sample, and keeps the raw log-probabilities.

    argmax(z + Gumbel noise) is a sample of softmax(z). Each row has a generator of its own, so that
    no row depends on the batch around it. A class, since generate looks up the signature of
    `__call__` at each token: of a plain function that took a seventh of the tiny model's decoding.
    """

    def __init__(
        self, seeds: list[int], device: torch.device, temperature: float, warpers: list
    ) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.warpers = warpers
        self.raw_logps: list[Tensor] = []  # of each position: (b,), at temperature 1

    def __call__(self, so_far: Tensor, z: Tensor) -> Tensor:
        raw = z.log_softmax(-1)  # (b, V)
        if self.temperature > 0:
            for warper in self.warpers:
                z = warper(so_far, z)
            noise = torch.empty_like(z)
            for row, generator in zip(noise, self.generators):
                row.exponential_(generator=generator)
            z = z - noise.log()
        chosen = z.argmax(-1, keepdim=True)  # (b, 1)
        self.raw_logps.append(raw.gather(1, chosen).squeeze(1))
        return z
