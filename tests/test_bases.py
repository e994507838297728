"""The other bases of the paper, and models that are refused, with random weights of their kinds."""

import json

import pytest
import torch
from helpers import CPU, ROOT, read_log, run

import egrsd
from support.shared import models
from support.shared.data import encode_prompt, read_completion

# What DeepSeek's distilled models come with, and AceReason after them, in short: no way to not
# think, and the thought begins in the prompt.
R1_TEMPLATE = (
    "{{ bos_token }}{%- for m in messages %}{{ '<|User|>' + m['content'] }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{%- endif %}"
)
SHAPE = {
    "hidden_size": 128,  # 32 for each head: vLLM needs that on a CPU
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DATA = ("--data", ROOT / "tiny" / "train.jsonl")
SHORT = ("--eval_data=", "--batch_size", 4, "--max_completion", 12, "--max_length", 1024)
ATTENTION = "q_proj,k_proj,v_proj,o_proj"


def config_of(preset: str, **changes: object):
    from transformers import Olmo3Config, Qwen2Config

    shape = {**SHAPE, **changes}
    if preset == "acereason-7b":
        return Qwen2Config(**shape)
    return Olmo3Config(**shape, sliding_window=16)  # three of four layers see 4,096, here 16


@pytest.fixture(scope="session", params=["acereason-7b", "olmo3-7b"])
def base(request, qwen_like, tmp_path_factory):
    """(preset, folder with a random model of its kind and a tokenizer that behaves like its own)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen_like)
    tokenizer.chat_template = R1_TEMPLATE if request.param == "acereason-7b" else None
    tokenizer.bos_token = "<|endoftext|>"
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = config_of(request.param, vocab_size=len(tokenizer), num_hidden_layers=4, **ends)
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return request.param, folder


def test_presets_are_the_papers_settings_and_name_what_is_ours() -> None:
    ace = egrsd.parse_settings(["--preset", "acereason-7b"])
    olmo = egrsd.parse_settings(["--preset", "olmo3-7b"])
    assert (ace.model, ace.gamma, ace.W) == ("nvidia/AceReason-Nemotron-7B", 0.5, 5)
    assert (olmo.model, olmo.gamma, olmo.W) == ("allenai/Olmo-3-1025-7B", 1.0, 5)
    default = vars(egrsd.parse_settings([]))
    for s in (ace, olmo):  # Table A1 for all else
        changed = {name for name, value in vars(s).items() if value != default[name]}
        assert changed == {"preset", "out", "model", "gamma", "W"}


def test_prompts_are_those_of_the_template_or_plain_text(base) -> None:
    preset, folder = base
    tokenizer = models.load_tokenizer(str(folder))
    ids = encode_prompt(tokenizer, "Problem: 1 + 1", False)
    text = tokenizer.decode(ids)
    if preset == "olmo3-7b":
        assert text == "<|endoftext|>Problem: 1 + 1\n"
        return
    assert text == "<|endoftext|><|User|>Problem: 1 + 1<|Assistant|><think>\n"
    assert encode_prompt(tokenizer, "Problem: 1 + 1", True) == ids  # it cannot be told not to think
    cut = tokenizer("first, \\boxed{2}", add_special_tokens=False).input_ids
    graded = read_completion(tokenizer, ids, cut, [tokenizer.eos_token_id])
    assert graded["truncated"] and graded["graded_text"].startswith("<think>")  # earns 0: D12


def test_head_targets_and_padded_rows(base) -> None:
    preset, folder = base
    s = egrsd.parse_settings(["--preset", preset, "--model", str(folder)])
    model = models.load_base(str(folder), CPU)
    models.check_head(model, preset, egrsd.hidden_states)
    student = egrsd.add_adapter(model, s)
    adapted = {name.split(".lora_")[0] for name in egrsd.trainable(student)}
    assert len(adapted) == 4 * 7  # all seven layers of each block
    rows = [torch.randint(0, 2000, (n,)) for n in (40, 25, 3)]  # longer than the window of 16
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = egrsd.hidden_states(student, ids)
    for h, row in zip(hidden, rows):
        alone = egrsd.hidden_states(student, row[None])[0]
        torch.testing.assert_close(h[: len(row)], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_step_of_each_base(base, engine, tmp_path) -> None:
    if engine == "vllm" and not egrsd.console.installed("vllm"):
        pytest.skip("vLLM is not installed")
    preset, folder = base
    out = tmp_path / "run"
    options = (*DATA, *SHORT, "--steps", 2, "--engine", engine, "--out", out)
    output = run("--preset", preset, "--model", folder, *options)
    rows = read_log(out)
    assert len(rows) == 2 and all(row["canary"] < 1e-4 for row in rows)
    assert "--- student prompt" in output
    config = json.loads((out / "step_2" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 7


def random_model(kind: str, **changes: object):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, **{**SHAPE, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def test_a_capped_or_scaled_head_is_refused_by_its_configuration() -> None:
    """With small random weights the numbers alone would let it pass, as they once did."""
    gemma = random_model("Gemma2", head_dim=32)
    assert gemma.config.final_logit_softcapping == 30
    with pytest.raises(SystemExit, match="final_logit_softcapping is 30.*Take another model"):
        models.check_head(gemma, "gemma", egrsd.hidden_states)
    gemma.config.final_logit_softcapping = None  # what its numbers alone say
    models.check_head(gemma, "gemma", egrsd.hidden_states)
    for kind, changes, key in (
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling is 8"),
        ("Cohere", {"logit_scale": 0.0625}, "logit_scale is 0.0625"),
    ):
        with pytest.raises(SystemExit, match=key):
            models.check_head(random_model(kind, **changes), "x", egrsd.hidden_states)
    neutral = random_model("Granite", logits_scaling=1.0)
    models.check_head(neutral, "granite", egrsd.hidden_states)


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    "kind, changes, complaint",
    [
        ("Qwen3Moe", {}, r"\['gate_proj', 'up_proj', 'down_proj'\] match nothing"),
        ("Olmoe", {}, "match nothing"),
        ("Qwen3Moe", {"mlp_only_layers": [0]}, "match only a part"),  # one dense layer, one mixture
        ("Qwen2Moe", {"shared_expert_intermediate_size": 32}, "match only a part"),
    ],
)
def test_a_mixture_of_experts_is_told_what_to_give_instead(kind, changes, complaint) -> None:
    model = random_model(kind, **MIXTURE, **changes)
    s = egrsd.parse_settings([])
    with pytest.raises(SystemExit, match=f"{complaint}.*--lora_targets {ATTENTION}[.]"):
        egrsd.add_adapter(model, s)
    s = egrsd.parse_settings(["--lora_targets", ATTENTION])
    student = egrsd.add_adapter(model, s)
    adapted = {name.split(".lora_")[0] for name in egrsd.trainable(student)}
    assert len(adapted) == 2 * 4
    assert egrsd.hidden_states(student, torch.tensor([[1, 2, 3]])).shape == (1, 3, 128)


def test_layers_beside_the_experts_can_be_named_in_full() -> None:
    model = random_model("Qwen2Moe", **MIXTURE, shared_expert_intermediate_size=32)
    targets = "q_proj,shared_expert.gate_proj"
    student = egrsd.add_adapter(model, egrsd.parse_settings(["--lora_targets", targets]))
    adapted = {name.split(".")[-4] + "." + name.split(".")[-3] for name in egrsd.trainable(student)}
    assert {"q_proj.lora_A", "gate_proj.lora_B"} <= adapted
