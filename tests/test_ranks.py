"""A rank that dies or hangs is named and ends all; torchrun's end is theirs; NaN on one rank."""

import json
import math
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import (
    ROOT,
    SMALL,
    alive,
    figures_of,
    lines,
    read_log,
    run,
    start,
    tiny_settings,
    wait_for,
)

import egrsd
from support.shared import files, processes
from support.training import guards

sys.path.append(str(ROOT / "faults"))
import not_finite  # noqa: E402

RANKS = """
import os, resource, signal, sys, time
sys.path[:0] = [{root!r}]
from support.shared import processes
import torch
with processes.ending_together():
    processes.start_processes(rank_timeout=5)
    processes.enter({phase!r})
    time.sleep(1.5)
    if os.environ["RANK"] in {ranks!r}:
        {fault}
    processes.barrier()
    print("all came")
"""
STOPPED = "os.kill(os.getpid(), signal.SIGSTOP)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HANGS = "time.sleep(100)"
NO_MEMORY = "resource.setrlimit(resource.RLIMIT_AS, (1 << 31,) * 2); torch.ones(1 << 30)"
SLOW = "time.sleep(8)"
WORKS = "[(time.sleep(0.5), processes.note_progress()) for _ in range(24)]"  # longer than 5 s


@pytest.mark.parametrize(
    "fault, phase, message",
    [
        (KILLED, "passes", "rank 1 died in the phase 'passes': killed"),
        (
            STOPPED,
            "grading",
            "rank 1 has given no sign of life for [0-9]+ s in the phase 'grading'",
        ),
        (
            HANGS,
            "rollout",
            "rank 1 has not left the phase 'rollout' while the others waited [0-9]+ s",
        ),
        (NO_MEMORY, "update", "rank 1 ended in the phase 'update': .*memory"),
        (SLOW, "loading", "all came"),
        (WORKS, "rollout", "all came"),
    ],
)
def test_who_dies_or_hangs_is_named_with_its_phase(fault, phase, message, tmp_path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), phase=phase, fault=fault, ranks="1"))
    began = time.monotonic()
    env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}  # then SIGKILL for who is stopped
    ends = fault not in (SLOW, WORKS)
    output = run(str(script), nproc=2, code=int(ends), **env)
    assert re.search(message, output), output
    assert ("rank 1 " in output) == ends  # loading has a limit of its own
    assert "rank 0 died" not in output and "rank 0 has" not in output
    assert time.monotonic() - began < 60


def test_ranks_that_all_hang_where_no_collective_of_ours_is_end(tmp_path) -> None:
    script = tmp_path / "ranks.py"
    hang = "processes.GRACE = 1; time.sleep(100)"
    script.write_text(RANKS.format(root=str(ROOT), phase="rollout", fault=hang, ranks="01"))
    began = time.monotonic()
    output = run(str(script), nproc=2, code=1)
    found = re.findall("rank ([01]) has not moved for ([0-9]+) s in the phase 'rollout'", output)
    assert len(found) == 1 and found[0][0] == "1" and 5 < int(found[0][1]) < 12, output
    assert time.monotonic() - began < 40


def test_a_phase_that_moves_is_no_hang(monkeypatch) -> None:
    state = {"phase": "rollout", "ended": None, "machine": "elsewhere", "pid": 0}
    assert "has not moved for 20 s" in processes.find_fault(state, 0.0, 0.0, 20.5, 10.0)
    assert processes.find_fault(state, 0.0, 0.0, 19.0, 10.0) == ""
    assert processes.find_fault(state, 0.0, 0.0, 20.5, 0) == ""
    assert processes.find_fault({**state, "phase": "loading"}, 0.0, 0.0, 20.5, 10.0) == ""
    monkeypatch.setenv("LOCAL_RANK", "1")  # rank 0 says it
    assert processes.find_fault(state, 0.0, 0.0, 20.5, 10.0) == ""

    # What this rank says of itself while it draws tokens, and when it has stopped.
    told = []
    monkeypatch.setattr(processes, "rank_and_world", lambda: (0, 1))
    monkeypatch.setattr(processes, "read_states", lambda store, ranks: {})
    monkeypatch.setattr(processes.time, "monotonic", lambda: float(len(told)))
    monkeypatch.setattr(processes._parted, "is_set", lambda: len(told) == 9)
    moving = lambda seconds: len(told) < 5 and processes.note_progress()  # noqa: E731
    monkeypatch.setattr(processes._parted, "wait", moving)
    store = SimpleNamespace(set=lambda rank, text: told.append(json.loads(text)["still"]))
    processes.watch(store, 5.0)
    assert told == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]


def test_who_waits_for_others_that_still_draw_is_no_fault(monkeypatch) -> None:
    """Rank 0 and rank 1 have come to a collective; rank 2 draws tokens, and then no more."""
    looks = []
    told = []
    state = {"ended": None, "machine": "elsewhere", "pid": 0, "came": 1}
    monkeypatch.setattr(processes, "rank_and_world", lambda: (0, 3))
    monkeypatch.setattr(processes.time, "monotonic", lambda: float(len(looks)))
    monkeypatch.setattr(processes, "tell", told.append)
    monkeypatch.setattr(processes._parted, "wait", lambda seconds: None)
    monkeypatch.setattr(processes._parted, "is_set", lambda: len(looks) > 60 or bool(told))
    here = {**processes._here, "came": 1, "waits": True, "phase": "grading"}
    monkeypatch.setattr(processes, "_here", here)

    def read_states(store, ranks):
        looks.append(0)
        now = len(looks)
        moves = min(now, 40)
        one = {**state, "phase": "grading", "moves": 9, "still": float(now), "beat": now}
        two = {**state, "phase": "rollout", "moves": moves, "still": float(now - moves), "came": 0}
        return {1: one, 2: {**two, "beat": now}}

    monkeypatch.setattr(processes, "read_states", read_states)
    processes.watch(SimpleNamespace(set=lambda *_: None), 10.0)
    assert told and 50 <= len(looks) <= 53  # ten seconds after its last token
    assert "rank 2 has not left the phase 'rollout'" in told[0][2] and 1 not in told[0]


def test_a_rank_of_another_machine_is_not_looked_up_here(monkeypatch) -> None:
    here = processes.this_machine()
    monkeypatch.setitem(processes._here, "machine", here)
    state = {"phase": "rollout", "ended": None, "machine": here, "pid": 1 << 30}
    assert "died" in processes.find_fault(state, 0.0, 0.0, 0.0, 10.0)
    assert processes.find_fault({**state, "machine": "node2 " + here}, 0.0, 0.0, 0.0, 10.0) == ""
    killed = []
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: killed.append(pid))
    processes.end_here({**state, "machine": "node2"})
    assert not killed


def test_a_wrong_option_ends_with_status_2_on_any_rank() -> None:
    output = run("--gama", 1, code=2, RANK="1", WORLD_SIZE="2")
    assert "unrecognized arguments" in output and not re.search("^2$", output, re.MULTILINE)


def test_a_laptop_that_slept_and_a_rank_that_left_raise_no_alarm(monkeypatch) -> None:
    here = {"phase": "rollout", "came": 3, "waits": False, "ended": None}
    state = {**here, "pid": os.getpid(), "machine": "elsewhere", "still": 0.0}
    assert processes.find_fault(state, 9.0, 0.0, 0.0, 10.0) == ""
    assert "no sign of life for 11 s" in processes.find_fault(state, 11.0, 0.0, 0.0, 10.0)
    assert processes.find_fault(state, 11.0, 11.0, 0.0, 0) == ""  # no limit
    assert processes.find_fault({**state, "ended": ""}, 99.0, 0.0, 0.0, 10.0) == ""
    assert processes.find_fault(None, 7_000.0, 0.0, 0.0, 10.0) == ""  # its imports
    assert "has not come" in processes.find_fault(None, 7_300.0, 0.0, 0.0, 10.0)

    # The clock jumps by an hour from look to look, the other's beat comes but every second time.
    looks = []
    monkeypatch.setattr(processes.time, "monotonic", lambda: 3_600.0 * len(looks))
    monkeypatch.setattr(processes, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(processes, "tell", lambda faults: pytest.fail(str(faults)))
    monkeypatch.setattr(processes._parted, "wait", lambda seconds: None)
    monkeypatch.setattr(processes._parted, "is_set", lambda: len(looks) > 20)

    def read_states(store, ranks):
        looks.append(0)
        return {1: {**state, "beat": len(looks) // 2}}

    monkeypatch.setattr(processes, "read_states", read_states)
    processes.watch(SimpleNamespace(set=lambda *_: None), 5.0)
    assert len(looks) > 20


def test_torchruns_end_is_that_of_its_ranks_and_the_run_goes_on_with_fewer(
    uninterrupted, tmp_path
) -> None:
    out = tmp_path / "run"
    steps = ("--steps", 6, "--save_every", 2, "--rank_timeout", 60)
    process = start(*SMALL, *steps, "--out", out, nproc=2)
    wait_for(lambda: lines(out / "log.jsonl") >= 3, process)
    ranks = children(process.pid)
    workers = [pid for rank in ranks for pid in children(rank)]
    process.kill()
    process.wait()
    assert len(ranks) == 2
    until = time.monotonic() + 20
    # A thread may hold the folder for a moment after its process has become a zombie.
    while any(map(alive, [*ranks, *workers])) or not nobody_writes_to(out):
        assert time.monotonic() < until
        time.sleep(0.05)
    run("--resume", "--out", out, "--rank_timeout", 0)
    assert [row["step"] for row in read_log(out)] == list(range(6))
    for row, want in zip(read_log(out), read_log(uninterrupted)):
        assert figures_of(row) == pytest.approx(figures_of(want), rel=1e-3, abs=1e-5)


def nobody_writes_to(out) -> bool:
    try:
        files.lock(out)
    except SystemExit:
        return False
    files.unlock(out)
    return True


def children(pid: int) -> list[int]:
    found = []
    for path in ROOT.__class__("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("kind", ["exp_avg", "gradient"])
def test_nan_on_one_rank_of_two_names_the_rank_and_saves_the_state_before(kind, tmp_path) -> None:
    out = tmp_path / "run"
    output = run(
        str(ROOT / "faults" / "not_finite.py"),
        *("--as_rank", *not_finite.RUN.split(), "--out", out, "--save_every", 2),
        nproc=2,
        code=1,
        HURT_KIND=kind,
        HURT_VALUE="nan",
        HURT_RANK="1",
    )
    assert re.search(f"step 2: not finite: rank 1: .*{not_finite.KINDS[kind]}", output), output
    assert not re.search("not finite: rank 0", output)
    assert [path.name for path in out.glob("step_*")] == ["step_2"]
    assert len(read_log(out)) == 2


@pytest.mark.parametrize(
    "kind, value",
    [
        ("reward", math.inf),
        ("statistics", math.nan),
        ("exp_avg_sq", math.inf),
        ("optimizer's step", math.nan),
        ("adapter while saving", math.nan),
        ("teacher's hidden states", math.nan),
    ],
)
def test_what_is_not_finite_is_named_and_in_no_checkpoint(
    kind, value, tmp_path, monkeypatch
) -> None:
    for name in ("set_up", "compute_rewards", "completion_hidden", "deal_out"):
        monkeypatch.setattr(egrsd, name, getattr(egrsd, name))  # put back what hurt() replaces
    for name in ("enter", "reduce_", "stop_on_signals"):
        monkeypatch.setattr(processes, name, getattr(processes, name))
    monkeypatch.setattr(processes, "stop_on_signals", list)
    monkeypatch.setattr(guards, "_own", {})
    not_finite.hurt(egrsd, kind, value)
    options = not_finite.RUN.split()[3:]
    with pytest.raises(SystemExit, match=not_finite.KINDS[kind]) as stopped:
        egrsd.train(tiny_settings("--eval_data=", *options, "--out", tmp_path / "run"))
    assert ("of problem" in str(stopped.value)) or kind not in not_finite.OF_ROLLOUTS
    assert not (tmp_path / "run" / "step_3").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
