"""Stopping, killing and going on; files that are damaged, disks that are full."""

import dataclasses
import functools
import hashlib
import json
import math
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    SMALL,
    TINY,
    columns_of,
    figures_of,
    fresh_model,
    lines,
    load,
    read_log,
    run,
    start,
    tiny_settings,
    wait_for,
)

import egrsd
from baselines import parse_comparison
from egrsd import (
    RewardStats,
)
from support.shared import models
from support.shared.files import read_json
from support.training import journal, run_folder

STEPS = ("--steps", 6, "--save_every", 2)


def assert_same_run(out: Path, whole: Path) -> None:
    assert read_log(out) == read_log(whole) and [row["step"] for row in read_log(out)] == list(
        range(6)
    )
    assert (out / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    for name in ("adapter_model.safetensors", "trainer.safetensors"):
        assert (out / "step_6" / name).read_bytes() == (whole / "step_6" / name).read_bytes()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "moment", ["before a checkpoint", "writing a checkpoint", "after a checkpoint", "at the end"]
)
def test_a_run_killed_at_any_point_goes_on_exactly(moment, uninterrupted, tmp_path) -> None:
    out = tmp_path / "run"
    process = start(*SMALL, *STEPS, "--out", out)
    wait_for(
        {
            "before a checkpoint": lambda: lines(out / "log.jsonl") >= 1,
            "writing a checkpoint": lambda: any(out.glob(".step_*")) or (out / "step_4").exists(),
            "after a checkpoint": lambda: lines(out / "log.jsonl") >= 3,
            "at the end": lambda: lines(out / "rollouts.jsonl") >= 48,
        }[moment],
        process,
    )
    process.kill()
    process.wait()
    if moment == "writing a checkpoint":  # whether or not the kill was quick enough to leave one
        (out / ".step_4").mkdir(exist_ok=True)
        (out / ".step_4" / "adapter_model.safetensors").write_bytes(b"half of it")
    if moment == "after a checkpoint":
        with (out / "log.jsonl").open("a") as file:
            file.write('{"step": 3, "rew')  # half a line, as a kill may leave
    run("--resume", "--out", out)  # its settings come from the run
    assert_same_run(out, uninterrupted)
    assert "is finished" in run("--resume", "--out", out)


@pytest.mark.parametrize(
    "number, nproc", [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 2)]
)
def test_ctrl_c_and_sigterm_save_and_the_run_goes_on_exactly(
    number, nproc, uninterrupted, tmp_path
) -> None:
    out = tmp_path / "run"
    process = start(*SMALL, *STEPS, "--save_every", 100, "--out", out, nproc=nproc)
    wait_for(lambda: lines(out / "log.jsonl") >= 1, process)  # no checkpoint yet
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert (
        "stopped and saved after step" in output
        and "Traceback" not in output.split("stopped and saved")[0]
    )
    if not nproc:  # torchrun itself reports the signal with a status of its own
        assert process.returncode == 0
    step = lines(out / "log.jsonl")
    assert 1 <= step < 6 and (out / f"step_{step}").is_dir()
    run("--resume", "--out", out)
    if nproc:
        assert [row["step"] for row in read_log(out)] == list(range(6))
        for row, want in zip(read_log(out), read_log(uninterrupted)):
            assert figures_of(row) == pytest.approx(figures_of(want), rel=1e-3, abs=1e-5)
    else:
        assert_same_run(out, uninterrupted)


def test_held_out_problems_that_do_not_fit_are_refused_before_a_model_is_loaded(
    tokenizer, tmp_path
) -> None:
    rows = [json.loads(line) for line in (TINY / "test.jsonl").read_text().splitlines()[:3]]
    rows[1] |= {"id": "much", "problem": " ".join(["1 +2"] * 120)}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s = tiny_settings("--eval_data", tmp_path / "x.jsonl")
    with pytest.raises(SystemExit, match=r"1 problems \(the first: much\).*--max_length 256"):
        egrsd.load_held_out(tokenizer, columns_of(s), s)


def test_a_run_is_not_overwritten_and_resume_keeps_its_settings(
    uninterrupted, tmp_path, capsys
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    assert "already holds a run. --resume" in run(*SMALL, "--out", out, code=1)
    assert read_log(out) == read_log(uninterrupted)
    with pytest.raises(SystemExit):
        egrsd.parse_settings(["--resume", "--out", str(out), "--lr", "0.1"])
    assert "--lr 0.1 (it has 0.002)" in capsys.readouterr().err
    assert egrsd.parse_settings(["--resume", "--out", str(out), "--steps", "9"]).steps == 9
    for folder in out.glob(
        "step_*"
    ):  # with no checkpoint there is nothing to go on from: what is said now counts
        shutil.move(folder, tmp_path)
    assert egrsd.parse_settings(["--resume", "--out", str(out), "--lr", "0.1"]).lr == 0.1
    shutil.move(tmp_path / "step_6", out)
    output = run(*SMALL, "--steps", 1, "--out", out, "--overwrite")
    assert len(read_log(out)) == 1 and (out / "step_1").is_dir() and not (out / "step_6").exists()
    assert "student prompt" in output


def test_a_run_is_refused_where_there_is_anything_of_a_run_or_where_another_process_writes(
    tmp_path,
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text('{"benchmarks": 1}')  # eval.py's, for example
    assert "already holds a run" in run(*SMALL, "--out", tmp_path / "a", code=1)
    process = start(*SMALL, "--steps", 500, "--out", tmp_path / "b")
    wait_for(lambda: lines(tmp_path / "b" / "log.jsonl") >= 1, process)
    for how in ("--resume", "--overwrite"):
        assert "another process is writing to" in run(
            *SMALL, "--steps", 500, "--out", tmp_path / "b", how, code=1
        )
    process.kill()
    process.wait()
    assert len({row["step"] for row in read_log(tmp_path / "b")}) == lines(
        tmp_path / "b" / "log.jsonl"
    )


def test_a_run_that_ends_before_its_engine_stands_is_resumed_with_its_settings(tmp_path) -> None:
    run(
        *SMALL,
        "--steps",
        1,
        "--lr",
        1e-3,
        "--lora_targets",
        "c_attn",
        "--out",
        tmp_path / "run",
        code=1,
    )
    assert lines(tmp_path / "run" / "log.jsonl") == 0
    output = run("--resume", "--lora_targets", "q_proj", "--out", tmp_path / "run")
    assert "holds no checkpoint" in output and "preset=tiny" in output and "lr=0.001" in output
    assert len(read_log(tmp_path / "run")) == 1


def test_before_and_after_are_those_of_the_run_however_often_it_is_resumed(tmp_path) -> None:
    held_out, out = tmp_path / "few.jsonl", tmp_path / "run"
    held_out.write_text("".join((TINY / "test.jsonl").read_text().splitlines(keepends=True)[:8]))
    run(
        *SMALL[:2],
        *SMALL[3:],
        "--eval_data",
        held_out,
        "--steps",
        2,
        "--save_every",
        1,
        "--out",
        out,
    )
    summary = json.loads((out / "summary.json").read_text())
    assert "is finished" in run("--resume", "--out", out)
    # killed between its last checkpoint and the evaluation: the summary is an older, shorter run's
    (out / "summary.json").write_text(
        json.dumps({**summary, "steps": 1, "after": {"accuracy": -1, "length": -1}})
    )
    run("--resume", "--out", out)
    again = json.loads((out / "summary.json").read_text())
    assert again["after"] == summary["after"] and again["steps"] == 2
    (
        out / "summary.json"
    ).unlink()  # "before" is lost: it is left out, and not measured with the trained adapter
    run("--resume", "--out", out)
    last = json.loads((out / "summary.json").read_text())
    assert "before" not in last and last["after"] == summary["after"]


def test_overwrite_deletes_nothing_until_the_new_run_can_start(uninterrupted, tmp_path) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    for wrong in (("--data", "nowhere.jsonl"), ("--lora_targets", "c_attn")):
        run(*SMALL, *wrong, "--out", out, "--overwrite", code=1)
    run(
        *SMALL,
        "--lora_targets",
        "q_proj",
        "--engine",
        "vllm",
        "--rollout_tp",
        7,
        "--out",
        out,
        "--overwrite",
        code=1,
    )
    assert_same_run(out, uninterrupted)


def test_a_damaged_line_of_the_log_and_settings_that_are_no_settings_are_named(
    uninterrupted, tmp_path
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    (out / "log.jsonl").write_text("{oops\n" + (out / "log.jsonl").read_text())
    assert "log.jsonl is damaged" in run("--resume", "--steps", 8, "--out", out, code=1)
    (out / "settings.json").write_text("[]")
    (out / "step_6").rename(tmp_path / "step_6")
    for name in ("step_2", "step_4"):
        shutil.rmtree(out / name)
    assert "settings.json is damaged" in run("--resume", "--out", out, code=1)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_the_run_is_the_same(
    uninterrupted, tmp_path
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    path = out / "step_6" / "trainer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (out / "settings.json").write_text("{")
    output = run("--resume", "--out", out)
    assert "settings.json is damaged" in output and "of the last checkpoint" in output
    assert "step_6 IS DAMAGED: trainer.safetensors is not as it was written" in output
    assert "goes on from" in output and (out / "damaged_step_6").is_dir()
    assert_same_run(out, uninterrupted)


def test_a_full_disk_in_the_middle_of_the_log_ends_with_a_sentence(tmp_path) -> None:
    from support.shared.files import appender

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"log.jsonl could not be written.*--resume"):
            appender(tmp_path / "log.jsonl")([{"step": 1, "text": "x" * 2_000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_log_that_somebody_deletes_or_changes_ends_the_run(tmp_path) -> None:
    from support.shared.files import appender

    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n')
    append = appender(path)  # goes on with what is there
    append([{"step": 1}])
    append([{"text": "é"}])
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        {"step": 1},
        {"text": "é"},
    ]
    other = appender(path)
    other([{"step": 3}])
    with pytest.raises(SystemExit, match="log.jsonl was changed by another program"):
        append([{"step": 3}])
    path.unlink()
    with pytest.raises(SystemExit, match="log.jsonl could not be written .No such file"):
        other([{"step": 4}])
    assert not path.exists()


def test_an_output_folder_that_cannot_be_made_and_a_missing_gpu_are_said_at_once(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in run(*SMALL, "--out", tmp_path / "file" / "run", code=1)
    if not torch.cuda.is_available():
        assert "needs a GPU, and none was found. Without one: --preset tiny" in run(
            "--out", tmp_path / "run", code=1
        )
        assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path) -> None:
    model, s = fresh_model("--out", tmp_path)
    optimizer, stats = torch.optim.AdamW(egrsd.trainable(model).values()), RewardStats()
    state = stats.state_dict(), dataclasses.asdict(s), {}
    parts = {"parameters": egrsd.trainable(model), "optimizer": optimizer, "others": {}}
    parts["save_student"] = functools.partial(egrsd.save_student, model)
    run_folder.save_checkpoint(tmp_path, 1, 8, *state, **parts)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limits[1])
    )  # no file may grow beyond this, as on a full disk
    try:
        with pytest.raises(SystemExit, match=r"step_2 could not be written.*--resume.*step_1"):
            run_folder.save_checkpoint(tmp_path, 2, 16, *state, **parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    load_student = functools.partial(egrsd.load_student, model)
    found = run_folder.load_checkpoint(
        tmp_path / "step_1", egrsd.trainable(model), optimizer, {}, load_student
    )
    assert found == (1, 8, stats.state_dict())


def test_the_checkpoint_is_a_plain_peft_adapter_without_pickle_and_the_base_stays_as_it_was(
    uninterrupted,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = uninterrupted / "step_6"
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".md"}
    base = AutoModelForCausalLM.from_pretrained(TINY)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = PeftModel.from_pretrained(base, folder)
    deltas = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(deltas) == 14 and all(
        p.abs().max() > 0 for p in deltas
    )  # 2 layers x 7 projections, all of them trained
    shipped = AutoModelForCausalLM.from_pretrained(TINY)
    assert all(torch.equal(before[name], p) for name, p in shipped.named_parameters())


def test_the_frozen_teacher_is_bit_identical_after_training(tmp_path, monkeypatch) -> None:
    kept, real = {}, models.load_base

    def fingerprint(model) -> str:
        tensors = [p for name, p in sorted(model.named_parameters()) if "lora_" not in name]
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in tensors)).hexdigest()

    def load_base(*args):
        kept["model"] = real(*args)
        kept["before"] = fingerprint(kept["model"])
        return kept["model"]

    monkeypatch.setattr(egrsd.models, "load_base", load_base)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        egrsd.train(tiny_settings(*SMALL[2:], "--steps", 3, "--out", tmp_path / "run"))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert fingerprint(kept["model"]) == kept["before"]
    assert any(
        p.abs().max() > 0 for name, p in kept["model"].named_parameters() if "lora_B" in name
    )


def test_a_canary_that_is_nan_stops_the_run_too(tmp_path, monkeypatch) -> None:
    real = journal.step_figures
    monkeypatch.setattr(
        egrsd.journal, "step_figures", lambda *args: {**real(*args), "canary": math.nan}
    )
    monkeypatch.setattr(egrsd.processes, "stop_on_signals", lambda: [])
    with pytest.raises(SystemExit, match="it runs other weights"):
        egrsd.train(tiny_settings(*SMALL[2:], "--steps", 2, "--out", tmp_path / "run"))


def test_a_run_that_is_stopped_in_its_last_step_is_summed_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(egrsd.processes, "stop_on_signals", lambda: [0.0])  # one has come
    out = tmp_path / "run"
    egrsd.train(tiny_settings(*SMALL[2:], "--steps", 1, "--out", out))
    assert read_json(out / "summary.json")["steps"] == 1
    (out / "summary.json").unlink()  # as after a kill
    egrsd.train(tiny_settings(*SMALL[2:], "--steps", 1, "--out", out, "--resume"))
    assert read_json(out / "summary.json")["steps"] == 1


def test_a_run_that_is_stopped_in_its_last_evaluation_begins_it_again(
    tmp_path, monkeypatch, capsys
) -> None:
    runs = []
    batches = []
    enter = egrsd.processes.enter

    def stop_there(phase: str) -> float:
        batches.append(phase == "evaluation")
        if sum(batches) == 2:
            runs[0].stopped.append(0.0)
        return enter(phase)

    monkeypatch.setattr(egrsd.processes, "enter", stop_there)
    monkeypatch.setattr(egrsd, "EVALUATED_AT_ONCE", 2)
    held_out = tmp_path / "few.jsonl"
    held_out.write_text("".join((TINY / "test.jsonl").read_text().splitlines(keepends=True)[:4]))
    options = (*SMALL[2:], "--steps", 1, "--out", tmp_path / "run", "--no-eval_before")
    s = tiny_settings(*options, "--eval_data", held_out)
    egrsd.train(s, lambda run, _: runs.append(run))
    assert "stopped in the last evaluation" in capsys.readouterr().out
    assert "after" not in read_json(tmp_path / "run" / "summary.json", {})
    monkeypatch.setattr(egrsd.processes, "enter", enter)
    egrsd.train(dataclasses.replace(s, resume=True))
    assert read_json(tmp_path / "run" / "summary.json")["after"]["samples"] == 4


def test_weights_and_biases_that_do_not_start_cost_no_earlier_run(
    uninterrupted, tmp_path, monkeypatch
) -> None:
    def init(**_):
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    s = tiny_settings(*SMALL[2:], "--out", out, "--overwrite", "--wandb", "here")
    with pytest.raises(SystemExit, match="--wandb here .*api_key.*wandb login"):
        egrsd.train(s)
    assert_same_run(out, uninterrupted)


def test_a_run_of_another_program_is_not_resumed(tmp_path) -> None:
    settings = {**dataclasses.asdict(tiny_settings()), "method": "opsd"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="another program.*no setting .method."):
        egrsd.parse_settings(["--resume", "--out", str(tmp_path)])
    assert parse_comparison(["--resume", "--out", str(tmp_path)]).method == "opsd"


def test_nan_stops_the_run_names_the_culprits_and_saves_the_state(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tok = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    bad = tok.convert_tokens_to_ids(
        "#3"
    )  # a label that only the problems with three operations or more hold
    head = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.model.embed_tokens.weight.data[bad] = math.nan
    model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    output = run(
        *SMALL, "--steps", 2, "--model", tmp_path / "model", "--out", tmp_path / "run", code=1
    )
    assert "not finite" in output and (tmp_path / "run" / "step_0").is_dir()
    named = set(re.findall(r"rollout (\d+) of problem", output))
    s = tiny_settings(*SMALL[2:])
    batch, _, _ = egrsd.next_problems(load(s), tok, s, 0)
    assert named == {str(i) for i, row in enumerate(batch) if "#3" in row["problem"]}
