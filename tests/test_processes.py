"""The step is one function of its rollouts, whatever the ranks and micro-batches."""

import json

import pytest
from helpers import ROOT, fresh_model, run
from safetensors.torch import load_file

import egrsd
from support.training.journal import step_figures
from test_egrsd import assert_same_gradient


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_processes_change_nothing_but_rounding(rollouts, nproc, tmp_path) -> None:
    model, s = fresh_model()
    figures = step_figures(*egrsd.accumulate_gradient(model, rollouts, s), s.eps)
    (tmp_path / "rollouts.json").write_text(json.dumps(rollouts))
    (tmp_path / "worker.py").write_text(f"""
import json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import egrsd, helpers
from safetensors.torch import save_file
from support.shared import processes
from support.training.journal import step_figures
processes.start_processes()
model, s = helpers.fresh_model("--micro_batch_tokens", 150)
rollouts = json.load(open({str(tmp_path / "rollouts.json")!r}))
figures = step_figures(*egrsd.accumulate_gradient(model, rollouts, s), s.eps)
rank = processes.rank_and_world()[0]
grads = {{n: p.grad for n, p in egrsd.trainable(model).items()}}
save_file(grads, {str(tmp_path)!r} + f"/{{rank}}.safetensors")
json.dump(figures, open({str(tmp_path)!r} + f"/{{rank}}.json", "w"))
""")
    run(str(tmp_path / "worker.py"), nproc=nproc)
    want = {name: p.grad for name, p in egrsd.trainable(model).items()}
    for rank in range(nproc):  # every rank ends with the whole step's gradient and figures
        assert_same_gradient(load_file(tmp_path / f"{rank}.safetensors"), want)
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(
            figures, rel=1e-5, abs=1e-6
        )


def test_micro_batches_hold_each_row_once_within_the_budget() -> None:
    lengths = [5, 90, 30, 31, 29, 200, 1]
    rows = [{"prompt_ids": [1] * (n - 1), "completion_ids": [1], "n": n} for n in lengths]
    groups = egrsd.micro_batches(rows, "prompt_ids", 100)
    assert sum(groups, []) == rows  # in order
    for group in groups:
        assert len(group) == 1 or len(group) * max(r["n"] for r in group) <= 100
    assert len(groups) < 7
