"""bench/: the scripts run, and their figures are those of what they say they measure."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import CPU, ROOT, SMALL, run

import egrsd
from bench import gpu, shapes
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
    assert "| sweep | failed | it left no result" in (tmp_path / "table.md").read_text()


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


def test_curves_take_a_fiftieth_of_the_time_and_are_drawn_at_the_end(tmp_path, monkeypatch) -> None:
    now = 0.0
    drawn = []

    def draw(path, rows, norm) -> None:
        nonlocal now
        now += 2.0  # seconds: of a slow machine
        drawn.append(len(rows["step"]))

    monkeypatch.setattr(journal, "draw_curves", draw)
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now)
    settings = {"steps": 400, "wandb": "", "max_grad_norm": 0.1, "max_length": 256}
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
