"""ATESD: what the teacher sees of a reference, and the controller that learns how much."""

import math
import statistics

import pytest

from support.comparison import exposure

BOX = "\\boxed{6}"
LINES = f"Let x = 2.\nThen y = 3.\n\nSo xy = 6.\nThe answer is {BOX}."


def test_a_reference_is_split_into_lines_or_else_into_sentences() -> None:
    sentences = f"First add 1.5 and 2. Then halve; that is {BOX}"
    for text, m in ((LINES, 4), (sentences, 3), ("one segment", 1)):
        parts = exposure.split_reference(text)
        assert "".join(parts) == text and len(parts) == m
    assert exposure.split_reference(sentences)[1].strip() == "Then halve;"


@pytest.mark.parametrize("text", ["a\r\n\r\nb\r\nc", "a\n \nb\n  c"])
def test_a_blank_line_is_no_segment(text) -> None:
    assert len(exposure.split_reference(text)) == 3


def test_the_teacher_sees_the_first_segments_and_always_the_boxed_answer() -> None:
    parts = LINES.replace("\n\n", "\n").split("\n")
    for share in (0.0, 0.1, 0.25, 0.49, 0.5, 0.74, 0.75, 0.99, 1.0):
        shown = exposure.expose(LINES, "6", share)
        assert shown.count(BOX) == 1
        assert [part in shown for part in parts] == [k < math.floor(share * 4) for k in range(4)]
    assert exposure.expose(LINES, "6", 0.0) == BOX
    assert exposure.expose(LINES, "6", 1.0) == LINES
    assert exposure.expose("Hence 6", "6", 0.9) == BOX  # a single segment, without a box
    assert exposure.expose("Hence 6", "6", 1.0) == f"Hence 6 {BOX}"
    half = "\\boxed{\\frac{1}{2}}"
    assert exposure.expose(f"first\n{BOX}\nthen {half}", "1/2", 0.0) == half


def learn(controller: dict, step: int, loss: float) -> None:
    means = {"loss": loss, "mismatch": 0.3, "confidence": 0.5}
    if exposure.decides(step + 1):
        means |= {"probe": 2.0, "teacher": -1.0}
    exposure.learn(controller, means, step)


def play(seed: int, level: float, choices: int) -> list[float]:
    """The alphas of a run whose loss falls fastest at 0.8, and is higher the more is shown."""
    controller = exposure.new_controller(seed)
    alphas = []
    loss = 5.0
    for step in range(choices * exposure.HOLD):
        alphas.append(exposure.choose(controller, seed, step))
        if step % 7 == 0:  # a step done again
            assert exposure.choose(controller, seed, step) == alphas[-1]
        learn(controller, step, loss + level * alphas[-1])
        loss -= 0.002 * (1 - abs(alphas[-1] - 0.8))  # what this step's update brings
    return alphas


def test_an_exposure_holds_for_some_steps_and_follows_from_seed_and_step() -> None:
    alphas = play(0, 0.0, 8)
    assert alphas == play(0, 0.0, 8) != play(1, 0.0, 8)
    one = exposure.new_controller(0), exposure.new_controller(0)
    assert exposure.choose(one[0], 0, 0) != exposure.choose(one[1], 1, 0)
    assert all(0 <= alpha <= 1 for alpha in alphas) and len(set(alphas)) == 8
    for start in range(0, len(alphas), exposure.HOLD):
        assert len(set(alphas[start : start + exposure.HOLD])) == 1


@pytest.mark.parametrize("level", [0.0, 0.1])
def test_the_controller_comes_nearer_to_the_best_exposure(level) -> None:
    alphas = [play(seed, level, 400)[:: exposure.HOLD] for seed in range(3)]
    first = statistics.fmean(sum([row[:100] for row in alphas], []))
    last = statistics.fmean(sum([row[-100:] for row in alphas], []))
    assert abs(last - 0.8) < abs(first - 0.8), (first, last)


def test_a_choice_is_not_rewarded_for_what_the_one_before_it_brought(monkeypatch) -> None:
    rewards = []
    monkeypatch.setattr(exposure, "reinforce", lambda controller, reward: rewards.append(reward))
    for before in (3.0, 9.0):  # the loss while the choice before held
        controller = exposure.new_controller(0)
        for step in range(2 * exposure.HOLD):
            exposure.choose(controller, 0, step)
            learn(controller, step, before if step < exposure.HOLD else 2 - 0.1 * step)
    assert rewards[1] == pytest.approx(rewards[3])
