"""eval.py: data and bad input, the whole path on the tiny model, comparison, other processes."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as ev
from egrsd import PRESETS, ROOT, Settings, add_adapter
from support.evaluation import benchmarks, compare, plots
from support.evaluation.benchmarks import load_benchmark
from support.shared.models import load_base, load_tokenizer

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY = ["--preset", "tiny", "--limit", "8", "--K", "3"]

# --- data and bad input ---------------------------------------------------------------------------


def write_lines(path: Path, rows: list) -> None:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )


def test_hub_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    tables = {
        "openai/gsm8k": [{"question": "q?", "answer": "3 * 400 = <<1>>1,200\n#### 1,200"}],
        "MathArena/hmmt_feb_2025": [
            {"problem_idx": 1, "problem": "p", "answer": "\\frac{1}{2}", "type": []}
        ],
        "HuggingFaceH4/aime_2024": [
            {"id": 60, "problem": "p", "solution": "s", "answer": 204, "year": "2024"}
        ],
        "math-ai/minervamath": [
            {"question": "q", "answer": "4.5e33"},
            {"question": "r", "answer": 0},
        ],
    }
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *of, split: asked.append((*of, split)) or tables[of[0]]
    )
    load = lambda name: load_benchmark(name, "", 0)  # noqa: E731
    assert load("gsm8k")[0] == {
        "id": "0",
        "problem": "q?",
        "solution": "3 * 400 = <<1>>1,200\n",
        "answer": "1200",
    }
    assert load("hmmt25")[0] == {
        "id": "1",
        "problem": "p",
        "solution": "",
        "answer": "\\frac{1}{2}",
    }
    assert load("aime24")[0] == {"id": "60", "problem": "p", "solution": "s", "answer": "204"}
    assert [p["answer"] for p in load("minerva")] == ["4.5e33", "0"]
    assert asked[0] == ("openai/gsm8k", "main", "test")


def test_work_list_has_a_distinct_seed_for_each_sample() -> None:
    tokenizer = load_tokenizer(PRESETS["tiny"]["model"])
    problems = [
        {"id": str(n), "problem": "Compute 1 #1 +1 .", "answer": "2", "solution": ""}
        for n in range(30)
    ]
    how = {
        "tokenizer": tokenizer,
        "student_prompt": "{problem}",
        "thinking": True,
        "aime24_runs": 5,
        "seed": 0,
    }
    work = benchmarks.work_list({"aime24": problems, "aime25": problems}, K=4, **how)
    assert len(work) == 30 * 4 * 5 + 30 * 4 and len({item["seed"] for item in work}) == len(work)
    assert len({benchmarks.sample_key(item) for item in work}) == len(work)
    fewer = benchmarks.work_list({"aime25": problems[7:9]}, K=2, **how)
    seeds = {benchmarks.sample_key(item): item["seed"] for item in work}
    assert all(
        seeds[benchmarks.sample_key(item)] == item["seed"] for item in fewer
    )  # whatever else is evaluated


def test_prompt_that_opens_think_counts() -> None:
    tokenizer = load_tokenizer(PRESETS["tiny"]["model"])
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    item = {"benchmark": "x", "id": "1", "run": 0, "sample": 0, "seed": 0, "gold": "4"}
    texts = (r"\boxed{ 4 } <|im_end|>", r"</think> \boxed{ 4 } <|im_end|>", r"\boxed{ 4 }")
    ends = encode("<|im_end|>")
    rows = [
        benchmarks.finish_sample(
            {**item, "prompt_ids": encode(prompt)}, encode(text), tokenizer, ends, False
        )
        for prompt in ("assistant", "assistant <think>")
        for text in texts
    ]
    benchmarks.grade(rows, "ours")
    assert [(row["correct"], row["status"], row["tokens"], row["finish"]) for row in rows] == [
        (True, "ok", 4, "stop"),
        (True, "ok", 5, "stop"),
        (False, "ok", 3, "length"),
        (False, "unfinished", 4, "stop"),
        (True, "ok", 5, "stop"),
        (False, "unfinished", 3, "length"),
    ]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (
            ["--benchmarks", "aime24,aime23"],
            "no 'aime23' among aime24, aime25, hmmt25, math500, minerva, gsm8k, tiny",
        ),
        (["--benchmarks", "tiny,tiny"], "names one twice"),
        (["--data_dir", "no/such/folder"], "no .jsonl file"),
        (["--K", "0"], "--K, --aime24_runs, --max_new, --tp and --batch must be at least 1"),
        (["--max_new", "0"], "must be at least 1"),
        (["--top_p", "0"], "--top_p and --gpu_memory in"),
        (["--temperature", "0"], "goes with --K 1"),
        (["--engine", "llamacpp"], "invalid choice"),
        (["--grader", "mine"], "invalid choice"),
        (["--preset", "qwen9"], "invalid choice"),
        (["--student_prompt", "Solve it"], "must hold {problem}"),
        (["--paper", "qwen3-8b"], "--paper goes with --compare"),
        (["--regrade", "--out", "no/such/folder"], "holds no evaluation"),
        (["--ad", "x"], "unrecognized arguments"),
    ],
)
def test_bad_options(argv: list[str], sentence: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        ev.main(argv)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def evaluate_file(folder: Path, name: str, *argv: str) -> str:
    """Evaluate folder/NAME.jsonl into folder/out. -> its table"""
    ev.main(
        [
            "--preset",
            "tiny",
            "--data_dir",
            str(folder),
            "--benchmarks",
            name,
            "--out",
            str(folder / "out"),
            *argv,
        ]
    )
    return (folder / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ([{"problem": "p"}], "1 rows, 1 of them without problem or answer"),
        (
            [{"problem": "p", "answer": "1"}, {"id": "b", "problem": "p", "answer": None}],
            r"1 of them .* \(b\)",
        ),
        (
            [
                {"id": "a", "problem": "p", "answer": "1"},
                {"id": "a", "problem": "q", "answer": "2"},
            ],
            "no id twice",
        ),
        ([], "0 rows"),
        ([{"problem": "p", "answer": ["1"]}], r"row 0: the answer is \['1'\], not text"),
        (["{not json"], "line 1 cannot be read .no JSON"),
        (["[1, 2]"], r"row 0 is '1', no object"),
    ],
)
def test_bad_data(rows: list, sentence: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "mine.jsonl", rows)
    with pytest.raises(SystemExit, match=sentence):
        evaluate_file(tmp_path, "mine")
    assert not (tmp_path / "out").exists()


def test_context_too_short(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"--max_new 4000 are \d+ tokens; .* a context of 512. --max_new \d+ fits"
    ):
        ev.main([*TINY, "--max_new", "4000", "--out", str(tmp_path / "out")])


# --- the whole path on the tiny model -------------------------------------------------------------


def make_adapter(folder: Path, scale: float, gamma: float = 1.0, W: int = 5, seed: int = 0) -> Path:
    """A random adapter, saved as a training run saves it. After a small one the model answers."""
    s = dataclasses.replace(Settings(), **PRESETS["tiny"], seed=seed)
    model = add_adapter(load_base(s.model, torch.device("cpu")), s)
    noise = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=noise) * scale
    model.save_pretrained(folder)
    (folder.parent / "settings.json").write_text(json.dumps({"gamma": gamma, "W": W}))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("runs") / "a" / "step_25", 0.03)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evals") / "base"
    ev.main([*TINY, "--out", str(out), "--save_ids"])
    return out


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Path:
    out = tmp_path_factory.mktemp("evals") / "a-step_25"
    ev.main([*TINY, "--out", str(out), "--adapter", str(adapter)])
    return out


def rows_of(out: Path) -> dict[tuple, dict]:
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len({benchmarks.sample_key(row) for row in rows}) == len(rows)
    return {benchmarks.sample_key(row): row for row in rows}


def test_base_run(base_run: Path) -> None:
    rows, summary = rows_of(base_run), json.loads((base_run / "summary.json").read_text())
    assert len(rows) == 8 * 3
    row = next(iter(rows.values()))
    assert set(row) == {
        "benchmark",
        "id",
        "run",
        "sample",
        "seed",
        "text",
        "tokens",
        "finish",
        "extracted",
        "gold",
        "correct",
        "status",
        "problem",
        "solution",
        "prompt_ids",
        "completion_ids",
    }
    assert all(len(row["completion_ids"]) == row["tokens"] <= 96 for row in rows.values())
    right = np.array([row["correct"] for row in rows.values()]).reshape(8, 3)
    assert 0 < right.mean() < 1
    b = summary["benchmarks"]["tiny"]
    assert b["accuracy"] == pytest.approx(100 * right.mean())
    assert b["se"] == pytest.approx(100 * right.mean(1).std(ddof=1) / 8**0.5)
    text = (base_run / "table.md").read_text()
    assert f"{100 * right.mean():.2f} +- " in text and "avg@3" in text and "Eff" in text
    assert "engine" in json.loads((base_run / "versions.json").read_text())
    for row in rows.values():  # an independent grade: the word after \boxed{ in the tiny language
        boxed = re.findall(r"\\boxed\{ (\S+) \}", row["text"].rpartition("</think>")[2])
        assert row["correct"] == (row["finish"] == "stop" and boxed[-1:] == [row["gold"]])


def test_adapter_changes_the_samples(base_run: Path, adapter_run: Path) -> None:
    a, b = rows_of(base_run), rows_of(adapter_run)
    assert a.keys() == b.keys() and [r["seed"] for r in a.values()] == [b[k]["seed"] for k in a]
    assert any(a[k]["text"] != b[k]["text"] for k in a)
    assert json.loads((adapter_run / "settings.json").read_text())["training"] | {"run": ""} == {
        "method": "CL-EGRSD",
        "gamma": 1.0,
        "W": 5,
        "step": 25,
        "run": "",
    }


def test_killed_run_goes_on_and_ends_with_the_same_samples(tmp_path: Path, base_run: Path) -> None:
    out, samples = tmp_path / "out", tmp_path / "out" / "samples.jsonl"
    command = [
        sys.executable,
        str(ROOT / "eval.py"),
        *TINY,
        "--save_ids",
        "--batch",
        "3",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not samples.exists() or samples.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = samples.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    n = kept.count(b"\n")
    assert 4 <= n < 24 and not (out / "summary.json").exists()
    cut = kept[: len(kept) - 40]  # and its last line half-written
    samples.write_bytes(cut)
    ev.main([*TINY, "--save_ids", "--batch", "64", "--out", str(out)])
    assert samples.read_bytes().startswith(cut[: cut.rfind(b"\n") + 1])  # only that line was lost
    assert rows_of(out) == rows_of(base_run)
    assert (out / "table.md").read_text() == (base_run / "table.md").read_text()
    assert (out / "summary.json").read_text() == (base_run / "summary.json").read_text()


def test_finished_run_loads_no_model(base_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev.models, "load_base", lambda *_: pytest.fail("a model was loaded"))
    before = (base_run / "samples.jsonl").read_bytes()
    ev.main([*TINY, "--save_ids", "--out", str(base_run)])
    assert (base_run / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--temperature", "0.7"], "temperature 1.0 .now 0.7"),
        (["--K", "2"], "K 3 .now 2"),
        (["--seed", "1"], "seed 0"),
        (["--max_new", "50"], "max_new 96"),
        (["--no-thinking"], "thinking True"),
        (["--limit", "5"], "limit 8"),
        (["--grader", "paper"], "grader 'ours'"),
        (["--student_prompt", "{problem} ."], "student_prompt"),
    ],
)
def test_changed_setting_is_refused(argv: list[str], name: str, base_run: Path) -> None:
    with pytest.raises(SystemExit, match=f"other settings: .*{name}"):
        ev.main([*TINY, "--save_ids", "--out", str(base_run), *argv])


def test_changed_adapter_or_data_is_refused(
    tmp_path: Path, adapter_run: Path, adapter: Path
) -> None:
    other = make_adapter(tmp_path / "a" / "step_25", 0.02, seed=1)
    with pytest.raises(SystemExit, match="adapter_weights"):
        ev.main([*TINY, "--out", str(adapter_run), "--adapter", str(other)])
    with pytest.raises(SystemExit, match="adapter_weights"):
        ev.main([*TINY, "--out", str(adapter_run)])
    moved = shutil.copytree(adapter, tmp_path / "moved")
    ev.main(
        [*TINY, "--out", str(adapter_run), "--adapter", str(moved)]
    )  # the same weights in another folder
    write_lines(
        tmp_path / "tiny.jsonl",
        [{"problem": f"Compute {n} #1 +1 .", "answer": str(n + 1)} for n in range(8)],
    )
    with pytest.raises(SystemExit, match="problems"):
        ev.main(
            [
                *TINY,
                "--out",
                str(adapter_run),
                "--adapter",
                str(adapter),
                "--data_dir",
                str(tmp_path),
            ]
        )


def test_damaged_line_is_named(tmp_path: Path, base_run: Path) -> None:
    out = shutil.copytree(base_run, tmp_path / "out")
    lines = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join([*lines[:2], "{oops\n", *lines[3:]]))
    with pytest.raises(SystemExit, match="line 3 is damaged"):
        ev.main([*TINY, "--save_ids", "--out", str(out)])


def test_samples_without_settings_or_fewer_than_the_summary_says_are_refused(
    base_run: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(base_run, tmp_path / "out")
    write_lines(out / "samples.jsonl", [*rows_of(out).values()][:10])
    with pytest.raises(SystemExit, match="14 samples are missing"):
        ev.main(["--compare", str(out), "--out", str(tmp_path / "compare")])
    ev.main(["--regrade", "--out", str(out)])
    assert not (out / "summary.json").exists() and not (out / "table.md").exists()
    (out / "settings.json").unlink()
    with pytest.raises(SystemExit, match="no settings.json"):
        ev.main([*TINY, "--out", str(out)])


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda f: shutil.rmtree(f), "are not both in it"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "are not both in it"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
        (
            lambda f: os.truncate(f / "adapter_model.safetensors", 5000),
            "cannot be read .SafetensorError",
        ),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
            "cannot be read .SafetensorError",
        ),
        (lambda f: edit_weights(f, lambda k, t: None), "no LoRA weights"),
        (lambda f: edit_weights(f, lambda k, t: t * 0 if "lora_B" in k else t), "all zeros"),
        (lambda f: edit_weights(f, lambda k, t: t * math.nan), "not finite"),
        (
            lambda f: edit_weights(f, lambda k, t: t[:, :-8].contiguous() if "lora_A" in k else t),
            "of another shape",
        ),
        (
            lambda f: edit_weights(f, lambda k, t: t[:-8] if "lora_B" in k else t),
            "of another shape",
        ),
        (
            lambda f: edit_weights(f, lambda k, t: None if "layers.1" in k else t),
            "layers.1.* is missing",
        ),
        (lambda f: edit_config(f, r=4), "of another shape"),
        (lambda f: edit_config(f, use_dora=True), "no plain LoRA"),
        (lambda f: edit_config(f, peft_type="IA3"), "no plain LoRA"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "is damaged .no JSON object"),
        (lambda f: add_weights(f), "no part of a LoRA adapter"),
        (
            lambda f: edit_config(f, base_model_name_or_path="Qwen/Qwen3-8B"),
            "was trained on Qwen/Qwen3-8B, not on --model",
        ),
    ],
)
def test_bad_adapter_is_fatal(damage, sentence: str, tmp_path: Path, adapter: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "step_25")
    damage(folder)
    with pytest.raises(SystemExit, match=sentence):
        ev.main([*TINY, "--adapter", str(folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def edit_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {k: change(k, t) for k, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(
        {k: t for k, t in tensors.items() if t is not None}, folder / "adapter_model.safetensors"
    )


def add_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.lm_head.weight": torch.ones(3)},
        folder / "adapter_model.safetensors",
    )


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_engine_that_ignores_the_adapter_is_fatal(
    tmp_path: Path, adapter: Path, monkeypatch
) -> None:
    import peft

    def ignore(model, folder: str):
        model.disable_adapter = contextlib.nullcontext
        return model

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", ignore)
    with pytest.raises(SystemExit, match="the engine ignores the adapter"):
        ev.main([*TINY, "--adapter", str(adapter), "--out", str(tmp_path / "out")])


def test_regrade_needs_no_model(
    tmp_path: Path, base_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ev.models, "load_base", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(
        ev.models, "load_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded")
    )
    out = shutil.copytree(base_run, tmp_path / "out")
    spoiled = [
        {**row, "correct": not row["correct"], "status": "timeout"}
        for row in rows_of(base_run).values()
    ]
    write_lines(out / "samples.jsonl", spoiled)
    ev.main(["--regrade", "--out", str(out)])
    assert (
        rows_of(out) == rows_of(base_run)
        and (out / "table.md").read_text() == (base_run / "table.md").read_text()
    )
    write_lines(
        out / "samples.jsonl",
        [{**row, "gold": "2", "text": r"\boxed{2 x^0 \text{ m}}"} for row in spoiled],
    )
    ev.main(["--regrade", "--out", str(out), "--grader", "paper"])
    assert json.loads((out / "settings.json").read_text())["grader"] == "paper"
    assert "grader paper" in (out / "table.md").read_text()


def test_minerva_reports_both_graders(tmp_path: Path) -> None:
    problems = [
        {"question": f"Compute {n} #1 +1 #2 +2 .", "answer": f"{n + 3}e0"} for n in range(4)
    ]
    write_lines(tmp_path / "minerva.jsonl", problems)
    text = evaluate_file(tmp_path, "minerva")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "minerva, grader ours: " in text and "minerva, grader paper: " in text
    assert (
        summary["benchmarks"]["minerva"]["graders"]["ours"][0]
        == summary["benchmarks"]["minerva"]["accuracy"]
        > 0
    )


def test_aime24_reports_the_spread_over_runs(tmp_path: Path) -> None:
    problems = [{"problem": f"Compute {n} #1 +1 #2 +2 .", "answer": f"0{n + 3}"} for n in range(3)]
    write_lines(tmp_path / "aime24.jsonl", problems)
    text = evaluate_file(tmp_path, "aime24", "--K", "2")
    rows = rows_of(tmp_path / "out").values()
    assert len(rows) == 3 * 2 * 5 and len({row["seed"] for row in rows}) == 30
    by_run = [
        np.mean([100 * row["correct"] for row in rows if row["run"] == run]) for run in range(5)
    ]
    assert f"sd between runs {np.std(by_run, ddof=1):.2f}" in text and "5 x 2" in text


# --- comparison -----------------------------------------------------------------------------------


def fake_run(source: Path, folder: Path, training: dict, flips: int) -> Path:
    """A finished evaluation like `source`, of another training, with `flips` more right ones."""
    shutil.copytree(source, folder)
    rows = list(rows_of(folder).values())
    for row in [row for row in rows if not row["correct"]][:flips]:
        row["correct"] = True
    write_lines(folder / "samples.jsonl", rows)
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "training": training}))
    return folder


def test_compare(
    tmp_path: Path, base_run: Path, adapter_run: Path, capsys: pytest.CaptureFixture
) -> None:
    ev.main(
        [
            "--compare",
            str(base_run),
            str(adapter_run),
            "--paper",
            "qwen3-8b",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in capsys.readouterr().out
    a, b = (
        np.array([row["correct"] for row in rows_of(run).values()]).reshape(8, 3).mean(1)
        for run in (adapter_run, base_run)
    )
    d, se = 100 * (a - b).mean(), 100 * (a - b).std(ddof=1) / 8**0.5
    assert f"{d:+.2f} +- {se:.2f}" + (" ~" if abs(d) <= 2 * se else "") in text
    assert "paper, Table 3: CL-EGRSD gamma 1.0 W 5 (its six benchmarks)" in text and "69.32" in text
    assert "12,232" in text and "12,097" in text
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "heatmaps.png").exists()
    json.loads((tmp_path / "out" / "summary.json").read_text())


def test_compare_marks_differences_within_two_standard_errors(
    tmp_path: Path, base_run: Path
) -> None:
    same, far = (
        fake_run(base_run, tmp_path / "same", {}, 0),
        fake_run(base_run, tmp_path / "far", {}, 99),
    )
    ev.main(["--compare", str(base_run), str(same), str(far), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    same_line, far_line = [line for line in text.splitlines() if re.match(r"\| (same|far)", line)][
        -2:
    ]
    assert "+0.00 +- 0.00 ~" in same_line and "~" not in far_line.split("|")[2]


def test_compare_sweeps(tmp_path: Path, base_run: Path) -> None:
    grid = [(g, W, 100) for g in (0.3, 1.0) for W in (0, 5)] + [
        (1.0, 5, step) for step in (25, 50, 75)
    ]
    runs = [
        fake_run(
            base_run,
            tmp_path / f"g{g}W{W}-{step}",
            {"gamma": g, "W": W, "step": step, "run": f"g{g}W{W}"},
            n,
        )
        for n, (g, W, step) in enumerate(grid)
    ]
    ev.main(["--compare", *map(str, runs), "--paper", "qwen3-8b", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    accuracy = {
        run.name: 100 * np.mean([row["correct"] for row in rows_of(run).values()]) for run in runs
    }
    snapshots = next(line for line in text.splitlines() if line.startswith("| gamma 1.0 W 5 "))
    assert re.findall(r"([\d.]+) \+-", snapshots) == [
        f"{accuracy[f'g1.0W5-{step}']:.2f}" for step in (25, 50, 75, 100)
    ]
    assert "S4: 100" in text and "paper, Table 4: EGRSD gamma 0.3 W 0 (its six benchm" in text
    last = next(line for line in text.splitlines() if line.startswith("| gamma 1.0 W 5, step 100"))
    assert (
        f" {accuracy['g1.0W5-100']:.2f} +-" in last
        and "paper, Table 6: CL-EGRSD W 7 (its six benchmarks)" in text
        and "Table A3:" not in text  # it has no average, and none of these benchmarks
    )
    assert (tmp_path / "out" / "heatmaps.png").read_bytes().startswith(b"\x89PNG")


def test_the_paper_is_averaged_over_the_benchmarks_of_the_runs(
    tmp_path: Path, base_run: Path
) -> None:
    run = fake_run(base_run, tmp_path / "run", {}, 0)
    rows = [*rows_of(run).values()]
    for n, row in enumerate(rows):
        row["benchmark"] = ("aime24", "aime25")[n % 2]
    write_lines(run / "samples.jsonl", rows)
    settings = json.loads((run / "settings.json").read_text())
    settings["problems"] = {"aime24": [0, ""], "aime25": [0, ""], **settings["problems"]}
    (run / "settings.json").write_text(json.dumps(settings))
    ev.main(["--compare", str(run), "--paper", "qwen3-8b", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.md").read_text()
    line = next(line for line in text.splitlines() if "Table 3: no-train" in line)
    _, _, aime24, aime25, average, tokens, eff, _ = (cell.strip() for cell in line.split("|"))
    assert (
        float(average) == pytest.approx((float(aime24) + float(aime25)) / 2, abs=0.006)
        and tokens == eff == ""
    )


def test_each_label_of_the_frontier_stands_near_its_point_and_on_no_other(
    tmp_path: Path, monkeypatch
) -> None:
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda path, figure, dpi: drawn.append(figure))
    keys = ("label", "length", "accuracy", "length_se", "se", "ours")
    rows = [(f"run {i}", 28 + i / 3, 97 + i / 2, 0.3, 0.5, True) for i in range(5)] + [
        ("base", 34, 57, 1, 1, True)
    ]
    points = [dict(zip(keys, row)) for row in rows]
    plots.draw_frontier(tmp_path / "x.png", points)
    figure, axis = drawn[0], drawn[0].axes[0]
    figure.draw_without_rendering()
    boxes = [note.get_window_extent() for note in axis.texts]
    assert [note.get_text() for note in axis.texts] == [p["label"] for p in points]
    for box, point in zip(boxes, points):
        x, y = axis.transData.transform((point["length"], point["accuracy"]))
        away = math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0))
        assert away < 60 * figure.dpi / 72
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["no/such/run"], "no finished evaluation"),
        (["{base}", "--paper", "gpt-5"], "no such rows"),
        (["{base}", "{other}"], "no benchmark in common"),
    ],
)
def test_compare_bad_input(argv: list[str], sentence: str, tmp_path: Path, base_run: Path) -> None:
    other = fake_run(base_run, tmp_path / "other", {}, 0)
    write_lines(
        other / "samples.jsonl", [{**row, "benchmark": "gsm8k"} for row in rows_of(other).values()]
    )
    with pytest.raises(SystemExit, match=sentence):
        ev.main(
            [
                "--compare",
                *(a.format(base=base_run, other=other) for a in argv),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    with pytest.raises(SystemExit, match="a comparison needs its own folder"):
        ev.main(["--compare", str(base_run), "--out", str(base_run)])


# --- other processes ------------------------------------------------------------------------------


def test_import_does_no_work() -> None:
    heavy = "{'vllm', 'transformers', 'peft', 'datasets', 'matplotlib'}"
    code = f"import sys, eval; print({heavy} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_two_processes_draw_the_same_samples(tmp_path: Path, base_run: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "eval.py"),
        *TINY,
        "--save_ids",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows_of(tmp_path / "out") == rows_of(base_run)
    assert (tmp_path / "out" / "table.md").read_text() == (base_run / "table.md").read_text()
    assert not list((tmp_path / "out").glob("samples-*"))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_serves_the_adapter(tmp_path: Path, adapter: Path) -> None:
    greedy = [
        "--preset",
        "tiny",
        "--limit",
        "16",
        "--K",
        "1",
        "--temperature",
        "0",
        "--adapter",
        str(adapter),
    ]
    command = [
        sys.executable,
        str(ROOT / "eval.py"),
        *greedy,
        "--engine",
        "vllm",
        "--out",
        str(tmp_path / "vllm"),
    ]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[
        -3000:
    ]  # the engine's end included
    ev.main([*greedy, "--out", str(tmp_path / "hf")])
    ev.main([*greedy[:-2], "--out", str(tmp_path / "base")])
    vllm, hf, base = (rows_of(tmp_path / name) for name in ("vllm", "hf", "base"))
    assert vllm == hf and vllm != base
    with pytest.raises(
        SystemExit, match="engine 'vllm' .now 'hf'"
    ):  # the engines draw differently: no mixing
        ev.main([*greedy, "--out", str(tmp_path / "vllm")])


def test_an_adapter_is_known_by_its_weights_and_scale_not_by_paths_or_the_order_of_a_set(
    tmp_path,
) -> None:
    from support.shared import adapters

    marks = []
    cases = [
        ("/a/tiny", ["q", "k"], 32, b"w"),
        ("/b/tiny", ["k", "q"], 32, b"w"),
        ("/a/tiny", ["q", "k"], 16, b"w"),
        ("/a/tiny", ["q", "k"], 32, b"v"),
    ]
    for n, (base, targets, alpha, weights) in enumerate(cases):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(
            json.dumps(
                {
                    "base_model_name_or_path": base,
                    "target_modules": targets,
                    "r": 8,
                    "lora_alpha": alpha,
                }
            )
        )
        (folder / "adapter_model.safetensors").write_bytes(weights)
        marks.append(adapters.adapter_fingerprint(folder))
    assert marks[0] == marks[1] and len(set(marks)) == 3


def engine_of(shift: float, noise: list[float]):
    """A fake engine: greedy log-probabilities moved by `shift`, rounded otherwise in each call."""

    def generate(prompts: list, seeds: list, **sampling: float):
        off = shift + noise.pop(0)
        for i in range(len(prompts)):
            yield i, [5, 6], [-1.0 + off, -2.0 + off]

    return generate


def test_an_adapter_must_move_more_than_a_second_call_does() -> None:
    prompts = [[1], [2]]
    noise = [1e-3, 1e-5, 2e-5, 3e-6]  # of four calls
    moved, plain = engine_of(0.01, noise), engine_of(0.0, noise)
    ev.check_engine(moved, plain, prompts)
    for noise in ([1e-3, 0.0, 0.0, 0.0], [0.0, 2e-5, 0.0, 1e-5]):
        deaf = engine_of(0.0, noise)
        with pytest.raises(SystemExit, match="ignores the adapter"):
            ev.check_engine(deaf, deaf, prompts)
    parted = [(0, [5, 7, 9], [-1.0, -2.0, -9.0])]  # where texts part, the rest cannot be compared
    assert ev.distance(parted, [(0, [5, 6, 8], [-1.0, -3.0, -1.0])]) == 0.5


def test_prompts_and_end_tokens_count_among_what_samples_depend_on() -> None:
    e = ev.parse_eval(["--preset", "tiny"])
    problems = {"gsm8k": [{"id": "0"}]}
    found = []
    for ids, ends in (([1, 2], [2]), ([1, 3], [2]), ([1, 2], [2, 4])):
        work = [{"benchmark": "gsm8k", "prompt_ids": ids}]
        found.append(ev.what_counts(e, "hf", problems, None, work, ends))
    assert found[0]["prompts"] != found[1]["prompts"]
    assert found[0]["end_tokens"] != found[2]["end_tokens"]
    assert found[0]["prompts"] == found[2]["prompts"]


def test_the_papers_rows_beside_four_benchmarks_and_on_the_frontier() -> None:
    four = list(compare.SIX[:4])
    lines = compare.lines_of_paper(compare.paper_rows("qwen3-8b", ["6", "A3"]), four)
    assert lines and not any("(its six" in line[0] for line in lines)
    (line,) = compare.lines_of_paper([{"label": "x", "avg": 50.0}], four)
    assert line == ["x (its six benchmarks)", "", "", "", "", "50.00", "", ""]
    assert compare.lines_of_paper([{"label": "x", "S1": 50.0}], four) == []
    points = compare.frontier_points([], compare.paper_rows("qwen3-8b", ["6"]), [*compare.SIX])
    labels = [point["label"] for point in points]
    assert "CL-EGRSD W 7 (paper)" in labels and len(set(labels)) == len(labels) > 3


def test_a_difference_of_one_problem_is_not_marked() -> None:
    row = {"id": "1", "gold": "1", "correct": True, "tokens": 5}
    runs = [{"label": name, "samples": {"tiny": [row]}} for name in ("a", "b|c")]
    for run in runs:
        run["benchmarks"] = {"tiny": {"problems": 1}}
    text = compare.difference_text(runs, ["tiny"])
    line = text.splitlines()[-1]
    assert "~" not in line and r"b\|c" in line


def test_an_unfinished_evaluation_goes_on_with_the_grader_of_its_verdicts(
    tmp_path: Path, base_run: Path, capsys: pytest.CaptureFixture
) -> None:
    out = shutil.copytree(base_run, tmp_path / "out")
    write_lines(out / "samples.jsonl", list(rows_of(base_run).values())[:-1])
    ev.main(["--regrade", "--out", str(out), "--grader", "paper"])
    assert "goes on, with --grader paper" in capsys.readouterr().out


def test_other_seeds_of_a_setting_are_averaged_and_told_apart() -> None:
    last = {}
    for seed, accuracy in enumerate((80.0, 90.0, 70.0)):
        run = {"gamma": 1.0, "W": 5, "run": f"runs/seed-{seed}", "accuracy": accuracy}
        last[1.0, 5, run["run"]] = {**run, "benchmarks": {"tiny": {"accuracy": accuracy - 1}}}
    assert compare.heatmap_cells(last) == {(1.0, 5): {"tiny": 79.0, "Avg.": 80.0}}
    labels = [compare.unlike(run, last.values()) for run in last.values()]
    assert labels == [f"gamma 1.0 W 5, runs/seed-{seed}" for seed in range(3)]
    one = last[1.0, 5, "runs/seed-0"]
    assert compare.unlike(one, [one]) == "gamma 1.0 W 5"
