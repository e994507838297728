"""Options, presets, models that are refused."""

import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import (
    CPU,
    ROOT,
    base_of,
    tiny_settings,
)

import egrsd
from support.shared.models import (
    check_head,
    context_of,
    load_base,
    load_skeleton,
    load_tokenizer,
    refuse_big_model_on_cpu,
    refuse_other_decoders,
)


def test_defaults_are_table_a1_and_presets_set_what_goes_with_the_model() -> None:
    s = egrsd.parse_settings([])
    assert (s.model, s.lr, s.batch_size, s.steps, s.save_every) == (
        "Qwen/Qwen3-8B",
        5e-6,
        32,
        100,
        25,
    )
    assert (s.temperature, s.top_p, s.top_k, s.max_completion, s.max_length) == (
        1.1,
        0.95,
        20,
        1024,
        20_000,
    )
    assert (s.eps, s.beta_L, s.max_grad_norm, s.lora_r, s.lora_alpha, s.gamma, s.W) == (
        0.2,
        0.5,
        0.1,
        64,
        128,
        0.3,
        0,
    )
    assert egrsd.parse_settings(["--preset", "qwen3-4b", "--W", "3"]).model == "Qwen/Qwen3-4B"
    source = (ROOT / "egrsd.py").read_text()
    fields = source[source.index("class Settings:") : source.index("FREE_ON_RESUME =")]
    assert (
        len(re.findall(r"\)  # (Table|section|D\d|ours)", fields))
        >= len(dataclasses.fields(egrsd.Settings)) - 4
    )


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--gama", "1"], "unrecognized arguments"),
        (["--gamma", "-1"], "--gamma and --W"),
        (["--W", "1.5"], "invalid"),
        (["--preset", "huge"], "invalid choice"),
        (["--top_p", "0"], "--top_p"),
        (["--steps", "-1"], "--steps"),
        (["--engine", "tgi"], "invalid choice"),
        (["--max_completion", "20000"], "leave room"),
        (["--batch_size", "7", "--rollouts_per_prompt", "2"], "multiple of"),
        (["--batch_size", "0"], "sizes"),
        (["--student_prompt", "hello"], "must hold"),
        (["--resume", "--overwrite"], "choose one"),
        (["--lr", "nan"], "finite"),
        (["--lr", "-1"], "--lr"),
        (["--max_grad_norm", "-1"], "--max_grad_norm"),
        (["--seed", "-1"], "--seed"),
        (["--lora_alpha", "0"], "sizes"),
        (["--temperature", "inf"], "finite"),
    ],
)
def test_bad_options_end_with_a_sentence(options, sentence, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        egrsd.parse_settings(options)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        egrsd.parse_settings([])
    assert "multiple of the 3 processes" in capsys.readouterr().err


def test_bad_models_end_with_a_sentence(tmp_path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a GPU.*--preset tiny"):
            load_base(egrsd.parse_settings([]).model, CPU)
    with pytest.raises(SystemExit, match="there is no such folder"):
        load_base(str(tmp_path / "nowhere"), CPU)
    with pytest.raises(SystemExit, match="cannot be loaded.*--preset tiny"):
        load_base(str(tmp_path), CPU)
    with pytest.raises(SystemExit, match="tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(5 << 30)  # five sparse GiB: as big as a model of 2.7 billion parameters
    with pytest.raises(SystemExit, match="needs a GPU"):
        refuse_big_model_on_cpu(str(tmp_path), CPU)
    transformers.GPT2Config(n_layer=2).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="no layers.*built like those of Llama"):
        refuse_other_decoders(load_skeleton(str(tmp_path)), str(tmp_path))
    transformers.Gemma3Config().save_pretrained(tmp_path)  # with images
    with pytest.raises(SystemExit, match="no num_hidden_layers.*built like those of Llama"):
        refuse_other_decoders(load_skeleton(str(tmp_path)), str(tmp_path))


def test_yarn_lengthens_the_context() -> None:
    config = transformers.Qwen3Config(max_position_embeddings=40_960)
    assert context_of(config) == 40_960
    config.rope_parameters.update(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768
    )
    assert context_of(config) == 131_072
    assert context_of(SimpleNamespace(max_position_embeddings=None)) == math.inf


def test_targets_that_match_nothing_are_named() -> None:
    for targets in ("q_proj,c_attn", "q_proj,", "self_attn", "lm_head"):
        s = tiny_settings("--lora_targets", targets)
        with pytest.raises(
            SystemExit, match=r"\['(c_attn|self_attn|lm_head|)'\] match nothing.*down_proj"
        ):
            egrsd.add_adapter(base_of(s), s)


def test_a_model_that_reads_too_little_or_does_not_end_is_refused(tmp_path, monkeypatch) -> None:
    too_long = tiny_settings("--max_length", 100_000, "--out", tmp_path / "run")
    with pytest.raises(SystemExit, match="--max_length 100000: --model .* reads [0-9]+ tokens"):
        egrsd.estimate_memory(too_long, CPU)
    monkeypatch.setattr(egrsd.engines, "end_tokens", lambda model, tokenizer: [])
    with pytest.raises(SystemExit, match="no end token"):
        egrsd.load_run(tiny_settings("--eval_data=", "--out", tmp_path / "run"))


def test_a_head_that_is_not_a_plain_product_is_refused() -> None:
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    s = tiny_settings()
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.1)),
        GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0)),
    ):
        with pytest.raises(SystemExit, match="not hidden @ U.T"):
            check_head(model, s.model, egrsd.hidden_states)
    check_head(LlamaForCausalLM(LlamaConfig(**sizes)), s.model, egrsd.hidden_states)


def test_held_out_problems_have_a_split_of_their_own(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(egrsd.data, "load_problems", lambda *of: asked.append(of) or [])
    egrsd.load_held_out(None, {}, tiny_settings("--eval_data", "on/hub"))
    egrsd.load_held_out(None, {}, tiny_settings("--eval_data", "on/hub", "--eval_split", "dev"))
    assert [of[0::2] for of in asked] == [("on/hub", "test"), ("on/hub", "dev")]
