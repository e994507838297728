"""What changed behind the back of a run, a checkpoint, an adapter or an evaluation is named."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import CPU, TINY
from safetensors.torch import load_file, save_file

import egrsd
from baselines import parse_comparison
from support.evaluation import benchmarks
from support.shared import adapters
from support.shared.files import read_json
from support.shared.models import load_base, load_skeleton
from support.training import run_folder


@pytest.fixture
def run(uninterrupted, tmp_path) -> Path:
    return shutil.copytree(uninterrupted, tmp_path / "run")


def model_copy(tmp_path: Path) -> Path:
    names = ("config.json", "generation_config.json", "model.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (*names, "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


ROWS = {"--data": [{"id": "0", "problem": "p", "solution": "s", "answer": "1", "prompt_ids": [1]}]}


@pytest.mark.parametrize(
    "name, told",
    [
        ("config.json", "the model's config"),
        ("generation_config.json", "the model's config"),
        ("tokenizer.json", "its tokenizer"),
        ("model.safetensors", "its weights"),
        ("--data", "the rows of --data"),
    ],
)
def test_a_resume_with_other_data_model_or_tokenizer_is_refused(name, told, tmp_path) -> None:
    folder = model_copy(tmp_path)
    before = run_folder.fingerprints(ROWS, str(folder))
    (tmp_path / "trainer.json").write_text(json.dumps({"fingerprints": before}))
    run_folder.check_fingerprints(tmp_path, run_folder.fingerprints(ROWS, str(folder)))
    rows = {"--data": [{**ROWS["--data"][0], "answer": "2"}]} if name == "--data" else ROWS
    if name != "--data":
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{told} changed since .* new run in another --out"):
        run_folder.check_fingerprints(tmp_path, run_folder.fingerprints(rows, str(folder)))


@pytest.mark.parametrize("how", ["missing", "another shape", "cut"])
def test_a_model_without_some_of_its_weights_is_refused(how, tmp_path) -> None:
    folder = model_copy(tmp_path)
    path = folder / "model.safetensors"
    name = "model.layers.1.self_attn.q_proj.weight"
    weights = load_file(path)
    whole = weights.pop(name)
    if how == "another shape":
        weights[name] = whole[:-1].clone()
    save_file(weights, path, {"format": "pt"})
    if how == "cut":
        path.write_bytes(path.read_bytes()[:5_000])
    with pytest.raises(SystemExit, match=name if how == "missing" else "--model"):
        load_base(str(folder), CPU)


def test_a_run_goes_on_with_its_own_method_and_with_no_trust_of_its_folders(run) -> None:
    goes_on = ["--resume", "--out", str(run)]
    assert parse_comparison(goes_on).method == "egrsd"
    for option in (["--method", "opsd"], ["--control", "inverted"]):
        with pytest.raises(SystemExit):
            parse_comparison([*goes_on, *option])
    settings = read_json(run / "settings.json")
    (run / "settings.json").write_text(json.dumps({**settings, "trust_remote_code": True}))
    assert not egrsd.parse_settings(goes_on).trust_remote_code
    assert egrsd.parse_settings([*goes_on, "--trust_remote_code"]).trust_remote_code


def test_a_folder_in_a_checkpoint_is_no_damage(run) -> None:
    (run / "step_6" / ".cache").mkdir()
    assert run_folder.find_damage(run / "step_6") == ""


def test_ranks_that_see_another_checkpoint_or_other_data_are_refused(run, monkeypatch) -> None:
    checkpoint = run / "step_6"
    views = []
    monkeypatch.setattr(run_folder, "gather", lambda mine: views or mine)
    run_folder.compare_ranks(run, checkpoint, {})
    monkeypatch.setattr(run_folder, "gather", lambda mine: [*views, *mine])
    views.append(("step_6 (12345678)", {}))  # of the same name
    with pytest.raises(SystemExit, match=r"rank 0 sees step_6 \(12345678\).*rank 1 step_6 \("):
        run_folder.compare_ranks(run, checkpoint, {})
    views[:] = [{"its weights": "a"}]
    run_folder.compare_fingerprints({"its weights": "a"})
    with pytest.raises(SystemExit, match="rank 1 has not what rank 0 has: its weights"):
        run_folder.compare_fingerprints({"its weights": "b"})


def test_an_old_checkpoint_without_fingerprints_goes_on_and_says_so(run, capsys) -> None:
    path = run / "step_6" / "trainer.json"
    state = json.loads(path.read_text())
    assert len(state.pop("fingerprints")) == 5 and len(state.pop("files")) == 3
    assert state.pop("sum")
    path.write_text(json.dumps(state))
    assert run_folder.whole_checkpoint(run) == run / "step_6"
    run_folder.check_fingerprints(run / "step_6", {"the rows of --data": "x"})
    assert "could not be checked" in capsys.readouterr().out


def damage(path: Path, how: str, other: Path) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "another's content":
        path.write_bytes(other.read_bytes())
    elif how == "one bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


HOW = ("cut", "emptied", "another's content", "one bit", "deleted")
CHECKPOINT = ("trainer.json", "trainer.safetensors", *adapters.ADAPTER_FILES)


@pytest.mark.parametrize("name", CHECKPOINT)
@pytest.mark.parametrize("how", HOW)
def test_the_checkpoint_before_a_damaged_one_is_used_and_said(name, how, run, capsys) -> None:
    other = run / "step_4" / name.replace("adapter_config", "trainer")
    damage(run / "step_6" / name, how, other)
    assert run_folder.whole_checkpoint(run) == run / "step_4"
    said = capsys.readouterr().out
    assert "step_6 IS DAMAGED" in said and name in said and "goes on from" in said
    assert (run / "damaged_step_6").is_dir() and not (run / "step_6").exists()
    for folder in run.glob("step_*"):
        damage(folder / name, how, run / "log.jsonl")
    with pytest.raises(SystemExit, match=r"no checkpoint that is whole.*step_4, step_2.*over"):
        run_folder.whole_checkpoint(run)


@pytest.mark.parametrize("how", ["cut", "emptied", "another's content", "deleted"])
def test_without_its_settings_a_run_goes_on_with_those_of_its_checkpoint(how, run, capsys) -> None:
    damage(run / "settings.json", how, run / "versions.json")
    s = egrsd.parse_settings(["--resume", "--out", str(run)])
    assert (s.lr, s.batch_size, s.preset) == (0.002, 8, "tiny")
    settings = {**json.loads((run / "step_6" / "trainer.json").read_text())["settings"]}
    (run / "settings.json").write_text(json.dumps({**settings, "lr": 0.1, "steps": 9}))
    s = egrsd.parse_settings(["--resume", "--out", str(run)])
    assert (s.lr, s.steps) == (0.002, 9)
    assert "settings.json is not that of its checkpoint (lr)" in capsys.readouterr().out
    (run / "settings.json").write_text(json.dumps({**settings, "curves": "no"}))
    with pytest.raises(SystemExit, match="settings.json: curves is 'no', which is no bool"):
        egrsd.parse_settings(["--resume", "--out", str(run)])


@pytest.mark.parametrize("name", ["log.jsonl", "rollouts.jsonl"])
def test_a_log_that_is_cut_or_anothers_is_named(name, run, capsys) -> None:
    path = run / name
    damage(path, "cut", path)
    run_folder.clear_run(run, run / "step_6", 6, {})
    said = capsys.readouterr().out
    assert f"{name} HAS ONLY" in said and "OF THE 6 STEPS" in said
    other = {"log.jsonl": "rollouts.jsonl", "rollouts.jsonl": "log.jsonl"}[name]
    for content in ((run / other).read_bytes(), b"\xff\xfe\n", b"[1]\n", b"{}\n"):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=f"{name} is damaged.*Mend or delete it"):
            run_folder.cut_log(path, 6, "seconds" if name == "log.jsonl" else "completion_ids")


@pytest.mark.parametrize("name", adapters.ADAPTER_FILES)
@pytest.mark.parametrize("how", ["cut", "emptied", "another's content", "deleted"])
def test_a_damaged_adapter_is_refused_before_anything_is_sampled(name, how, run) -> None:
    folder = run / "step_6"
    other = "trainer.json" if name.endswith(".json") else "trainer.safetensors"
    damage(folder / name, how, folder / other)
    with pytest.raises(SystemExit, match="adapter"):
        adapters.check_adapter(str(folder), str(TINY), load_skeleton(str(TINY)))


def test_files_of_an_evaluation_that_are_not_its_own_are_named(tmp_path) -> None:
    row = {"benchmark": "x", "id": "1", "run": 0, "sample": 0, "seed": 5, "gold": "4"}
    work = [{**row, "prompt_ids": []}]
    lines = [json.dumps(row), json.dumps({**row, "seed": 6}), '{"step": 0}', "[]", "\xff"]
    for number, line in enumerate(lines):
        (tmp_path / "samples.jsonl").write_bytes(line.encode("latin-1") + b"\n")
        if number == 0:
            benchmarks.refuse_other_samples(tmp_path, benchmarks.read_samples(tmp_path), work)
            continue
        with pytest.raises(SystemExit, match=r"samples.jsonl.*(line 1 is damaged|of other work)"):
            benchmarks.refuse_other_samples(tmp_path, benchmarks.read_samples(tmp_path), work)
    for content in ("", "{", "[]", "\udcff"):
        (tmp_path / "settings.json").write_text(content, errors="surrogateescape")
        with pytest.raises(SystemExit, match="settings.json is damaged.*Put a copy"):
            read_json(tmp_path / "settings.json")
