"""What a step spends beside the model: seconds and shares of each part of the real loop.

    python bench/overheads.py --preset tiny                    # any options of egrsd.py
    python bench/overheads.py --preset tiny --engine vllm --steps 40

It runs egrsd.train with a clock around its parts, without the evaluations (which would share the
engine's clock), and prints a table of rank 0. Each part's time is its own: what is measured inside
of it is taken off.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import egrsd  # noqa: E402
from support.shared import data, processes  # noqa: E402
from support.training import guards, journal  # noqa: E402

# Part: what is called, whether that is model work.
PARTS = {
    "decode": ("the engine draws completions", True),
    "passes": ("teacher, gate, student", True),
    "update": ("clipping, AdamW", True),
    "data": ("problems, prompts", False),
    "texts": ("completions decoded to text", False),
    "grading": ("compute_rewards", False),
    "figures": ("step_figures, canary", False),
    "push": ("the adapter to the engine", False),
    "log": ("log.jsonl, rollouts.jsonl", False),
    "plots": ("curves.png", False),
    "checkpoint": ("save_run", False),
}


class Clock:
    """Seconds of each part; of parts within parts, each second counts for the innermost."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.open = []  # the parts that have begun
        self.since = time.perf_counter()

    def turn(self) -> None:
        """What has passed belongs to the innermost open part."""
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, work: Callable) -> Callable:
        def measured(*args, **options):
            self.turn()
            self.open.append(part)
            try:
                return work(*args, **options)
            finally:
                self.turn()
                self.open.pop()

        return measured

    def restart(self) -> None:
        self.turn()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.began = self.since


def put_clocks(clock: Clock) -> None:
    """Around everything that train() calls by the name of a module or of the run."""
    egrsd.next_problems = clock.timed("data", egrsd.next_problems)
    egrsd.compute_rewards = clock.timed("grading", egrsd.compute_rewards)
    egrsd.save_run = clock.timed("checkpoint", egrsd.save_run)
    data.read_completion = clock.timed("texts", data.read_completion)
    journal.step_figures = clock.timed("figures", journal.step_figures)
    guards.check_canary = clock.timed("figures", guards.check_canary)
    journal.record_step = clock.timed("log", journal.record_step)
    journal.draw_curves = clock.timed("plots", journal.draw_curves)
    clip = egrsd.torch.nn.utils.clip_grad_norm_
    egrsd.torch.nn.utils.clip_grad_norm_ = clock.timed("update", clip)
    set_up = egrsd.set_up

    def set_up_and_restart(run: SimpleNamespace, s: egrsd.Settings) -> None:
        set_up(run, s)
        sample = run.sample
        # A generator does its work where it is consumed: here, as in roll_out, at once.
        run.sample = clock.timed("decode", lambda *args, **how: list(sample(*args, **how)))
        run.push = clock.timed("push", run.push)
        run.accumulate_gradient = clock.timed("passes", run.accumulate_gradient)
        run.optimizer.step = clock.timed("update", run.optimizer.step)
        clock.restart()

    egrsd.set_up = set_up_and_restart


def show(clock: Clock, total: float, steps: int) -> None:
    print(f"\n{steps} steps, {total:.1f} s, {1000 * total / steps:.0f} ms a step\n")
    print("| part | | ms a step | share |")
    print("|---|---|---|---|")
    rest = total
    beside = 0.0
    for name, (meaning, model_work) in PARTS.items():
        seconds = clock.seconds[name]
        rest -= seconds
        if not model_work:
            beside += seconds
        print(f"| {name} | {meaning} | {1000 * seconds / steps:.1f} | {seconds / total:.1%} |")
    print(f"| rest | waiting for ranks, Python | {1000 * rest / steps:.1f} | {rest / total:.1%} |")
    print(f"\nbeside the model: {(beside + rest) / total:.1%} of a step")


def main() -> None:
    argv = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, processes.ending_together():
        out = str(Path(folder) / "run")
        s = egrsd.parse_settings([*argv, "--eval_data=", "--out", out])
        clock = Clock()
        put_clocks(clock)
        egrsd.train(s)
        clock.turn()
        steps = len((Path(out) / "log.jsonl").read_text().splitlines())  # a signal may end it
        if processes.rank_and_world()[0] == 0:
            show(clock, clock.since - clock.began, steps)


if __name__ == "__main__":
    main()
