"""bench/: the scripts run, and their figures are those of what they say they measure."""

import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, ROOT, SMALL, alive, run

import egrsd
from bench import gpu, limits, rollout, shapes, update
from support.training import journal


def rehearsal(tmp_path, part: str = "") -> gpu.Options:
    return gpu.Options(rehearse=True, out=str(tmp_path), part=part)


def test_the_rollout_of_a_step_is_measured_with_random_weights(tmp_path) -> None:
    options = ("--shapes", "rehearsal", "--engines", "hf", "--ranks", 8)
    work = ("--new", 8, "--sequences", "1,4", "--repeats", 1, "--json", tmp_path / "found.json")
    output = run(str(ROOT / "bench" / "rollout.py"), *options, *work)
    found = json.loads((tmp_path / "found.json").read_text())["results"][0]
    assert found["decode"].keys() == {"1, seeds", "4, seeds"}  # generate cannot do without
    assert all(seconds > 0 for seconds in found["decode"].values())
    row = re.search(r"^\| rehearsal \| hf \| 8 \| 1 \| ([\d.]+) ms, (\d+)/s \|", output, re.M)
    assert float(row[1]) == pytest.approx(1000 * found["decode"]["1, seeds"] / 8, abs=0.06)
    hidden, mlp = shapes.SHAPES["rehearsal"][:2]
    pairs = 2 * (hidden + 128) + 2 * (hidden + 64) + 3 * (hidden + mlp)
    assert found["adapter_mb"] == pytest.approx(4 * 8 * 2 * pairs / 1e6)


def test_the_parts_of_a_step_add_up(tmp_path) -> None:
    output = run(str(ROOT / "bench" / "overheads.py"), *SMALL, "--steps", 3)
    shares = dict(re.findall(r"^\| (\w+) \| .* \| ([\d.]+)% \|$", output, re.MULTILINE))
    assert {"decode", "passes", "grading", "plots", "log", "rest"} <= shares.keys()
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=1)
    assert all(float(shares[name]) > 1 for name in ("decode", "passes"))
    beside = float(re.search(r"beside the model: ([\d.]+)%", output)[1])
    model = sum(float(shares[name]) for name in ("decode", "passes", "update"))
    assert beside == pytest.approx(100 - model, abs=1)


def test_parts_of_the_first_hour_are_rehearsed(tmp_path) -> None:
    for part in ("passes", "compile"):
        gpu.run_part(rehearsal(tmp_path, part))
        result = json.loads((tmp_path / "results" / f"{part}.json").read_text())
        assert result["status"] == "done" and result["device"] == "CPU"
    name, figure = result["rows"][0]
    assert "64 tokens" in name and float(figure.split()[-2]) < 1e-4  # compiled and plain agree


def test_what_is_missing_or_fails_is_named_and_the_rest_is_in_the_table(
    tmp_path, monkeypatch, capsys
) -> None:
    def broken(o: gpu.Options) -> gpu.Rows:
        raise RuntimeError("it broke")

    monkeypatch.setitem(gpu.PARTS, "loop", broken)
    monkeypatch.setitem(gpu.PARTS, "sweep", lambda o: [("a tile", "1 ms")])
    monkeypatch.setattr(gpu.console, "installed", lambda package: False)
    for part in ("canary", "sweep"):
        gpu.run_part(rehearsal(tmp_path, part))
    with pytest.raises(SystemExit):
        gpu.run_part(rehearsal(tmp_path, "loop"))
    gpu.show_table(rehearsal(tmp_path))
    table = capsys.readouterr().out
    assert "A REHEARSAL" in table
    assert "| canary | skipped | vLLM is not installed |" in table
    assert "| loop | failed | RuntimeError: it broke |" in table
    assert "| sweep | a tile | 1 ms |" in table
    assert "| tests | failed | it left no result" in table  # of a part that was killed


def test_the_script_goes_on_after_a_part_that_takes_too_long(tmp_path) -> None:
    env = {**os.environ, "PARTS": "loop sweep", "LIMIT": "1", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
    script = [str(ROOT / "bench" / "gpu.sh"), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "failed: loop sweep" in done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "| sweep | failed | it left no result" in table and "| tests |" not in table


# What a part runs. `timeout`, whose process group this is, takes SIGTERM as the end of the time.
PROGRAM = """
import os, signal, subprocess, sys, time
how, file = sys.argv[1:]
if how == "parent":  # as pytest or bench/rollout.py: it ends, and what it has started does not
    subprocess.run([sys.executable, __file__, "deaf", file], capture_output=True)
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if how == "polite":  # as egrsd.py, which saves and ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open(file, "w").write(str(os.getpid()))
os.kill(os.getpgrp(), signal.SIGTERM)
time.sleep(1_000)
"""
WITH_PARTS = """
import sys
sys.path.insert(0, {root!r})
from bench import gpu

def part_of(how):
    def part(o):
        gpu.call(o, {program!r}, how, o.out + "/" + how)
        yield "and then", "it went on"
    return part

gpu.PARTS = {{how: part_of(how) for how in ("deaf", "parent", "polite")}}
gpu.main()
"""


def test_what_a_part_has_started_is_gone_at_the_end_of_its_time(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    driver = tmp_path / "driver.py"
    driver.write_text(WITH_PARTS.format(root=str(ROOT), program=str(program)))
    python = tmp_path / "bin" / "python"  # in the place of `python bench/gpu.py`
    python.parent.mkdir()
    python.write_text(f'#!/bin/bash\nshift\nexec {sys.executable} {driver} "$@"\n')
    python.chmod(0o755)
    env = {**os.environ, "GRACE": "3", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    script = [str(ROOT / "bench" / "gpu.sh"), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "failed: deaf parent polite" in done.stderr
    for how in ("deaf", "parent", "polite"):
        until = time.monotonic() + 5  # SIGKILL takes a moment
        while alive(int((tmp_path / how).read_text())):
            assert time.monotonic() < until, how
            time.sleep(0.05)
        result = json.loads((tmp_path / "results" / f"{how}.json").read_text())
        assert result["status"] == "failed" and "time limit" in result["why"], result
        assert not result["rows"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_is_skipped_by_name(tmp_path) -> None:
    for part in gpu.PARTS:
        gpu.run_part(gpu.Options(part=part, out=str(tmp_path)))
        result = json.loads((tmp_path / "results" / f"{part}.json").read_text())
        assert (result["status"], result["why"]) == ("skipped", "there is no GPU")


def test_a_random_model_is_made_once_and_is_the_limits_shape(tmp_path) -> None:
    folder = shapes.make_folder("rehearsal", tmp_path / "model", CPU)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert shapes.make_folder("rehearsal", tmp_path / "model", CPU) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    model = egrsd.models.load_base(str(folder), CPU)
    tokenizer = egrsd.models.load_tokenizer(str(folder))
    assert egrsd.engines.end_tokens(model, tokenizer) == [2, 999]
    assert sum(p.numel() for p in egrsd.models.load_skeleton(str(folder)).parameters()) == sum(
        p.numel() for p in model.parameters()
    )


def test_random_models_are_made_by_another_process(tmp_path, monkeypatch) -> None:
    """This one would keep the GPU's memory while others need it."""
    monkeypatch.setattr(shapes, "random_model", lambda *_: pytest.fail("made in this process"))
    folder = gpu.model_folder("rehearsal", rehearsal(tmp_path))
    assert (folder / "model.safetensors").exists()
    commands = []

    def note(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.setattr(gpu, "call", lambda *_: pytest.fail("made again"))
    assert gpu.model_folder("rehearsal", rehearsal(tmp_path)) == folder
    rollout.make_model("rehearsal", folder)
    assert not commands
    rollout.make_model("rehearsal", tmp_path / "other")
    assert commands[0][-4:] == ["--shape", "rehearsal", "--out", str(tmp_path / "other")]
    with pytest.raises(SystemExit, match="rehearsal could not be made"):
        rollout.make_model("rehearsal", tmp_path / "other")


def test_each_case_of_an_update_sees_one_gpu(monkeypatch) -> None:
    seen = []

    def note(command, env, **_):
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(returncode=0, stdout='"done"')

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    update.start("trl", update.Options())
    for visible in ("3,1", "GPU-1a,GPU-2b", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        update.start("trl", update.Options())
    assert seen == ["0", "3", "GPU-1a", ""]


def test_of_a_gpu_without_a_data_sheet_all_is_measured_but_the_share_of_its_peak(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(gpu, "card_options", lambda o: limits.Options(tflops=o.tflops))
    monkeypatch.setattr(gpu, "call", lambda *_, **__: "")  # the loop has run:
    out = tmp_path / "run-rehearsal"
    out.mkdir()
    row = {"seconds": {"rollout": 1, "passes": 2, "update": 3}, "memory_gib": 0.5, "canary": 1e-6}
    (out / "log.jsonl").write_text(json.dumps(row))
    (out / "versions.json").write_text('{"engine": "hf", "device": "NVIDIA GH200 480GB"}')
    rows = {}
    for part in ("passes", "loop"):
        gpu.run_part(rehearsal(tmp_path, part))
        result = json.loads((tmp_path / "results" / f"{part}.json").read_text())
        assert result["status"] == "done"
        rows[part] = dict(result["rows"])
        assert "no data sheet" in rows[part]["rehearsal: MFU"]
    assert f"limits.py --run {out} --tflops X --gbps Y" in rows["loop"]["rehearsal: MFU"]
    assert rows["loop"]["rehearsal: passes"] == "2.000 s"
    assert "GiB" in rows["passes"]["rehearsal, checkpointing: peak"]


def test_curves_take_a_fiftieth_of_the_time_and_are_drawn_at_the_end(tmp_path, monkeypatch) -> None:
    now = 0.0
    drawn = []

    def draw(path, rows, norm) -> None:
        nonlocal now
        now += 2.0  # seconds: of a slow machine
        drawn.append(len(rows["step"]))

    monkeypatch.setattr(journal, "draw_curves", draw)
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now)
    settings = {"steps": 400, "max_grad_norm": 0.1, "max_length": 256}
    settings.update(wandb="", curves=True)
    notebook = journal.open_journal(tmp_path, [], settings, 0)
    row = dict.fromkeys(notebook.curves, 1.0)
    row.update(skipped_prompts=[], seconds=dict.fromkeys(journal.PHASES, 0.1))
    rollout = dict.fromkeys(journal.ROLLOUT_KEYS, 1)
    for step in range(400):
        now += 1.0
        journal.record_step(notebook, {**row, "step": step}, [rollout], redraw=step == 399)
    notebook.bar.close()
    assert 90 < drawn[0] < 110 and drawn[-1] == 400  # the last whatever it costs
    assert len(drawn) == 4  # 2 s each of 400, the last one included
