"""Hostile completions, and pairs made from rules: small versions of two scripts in faults/."""

from helpers import ROOT

from faults import fuzz_grader, grader_pairs
from support.shared import grading


def test_three_hundred_hostile_completions_break_nothing(monkeypatch) -> None:
    monkeypatch.setattr(grading, "ALARM_SECONDS", 1)
    found = fuzz_grader.fuzz(300, seed=2, slow=False, show=lambda _: None)
    assert not found["broken"]
    assert sum(found["kinds"].values()) > 280 and len(found["kinds"]) >= 9
    assert found["statuses"]["ok"] > 200


def test_pairs_made_from_rules_are_told_apart() -> None:
    pairs = grader_pairs.make_pairs(100, seed=3)
    assert len({pair for _, _, pair in pairs}) > 190
    table, wrong = grader_pairs.measure(pairs)
    assert not wrong
    assert len(table) == len(grader_pairs.RULES) >= 30


def test_the_scripts_are_told_of() -> None:
    told = (ROOT / "docs" / "faults.md").read_text()
    for path in (ROOT / "faults").glob("*.py"):
        assert f"faults/{path.name}" in told, path.name
