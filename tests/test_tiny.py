"""The embedded default and its harder regimes: what they are, what is learned; real problems."""

import json
import math
import random
import statistics

import pytest
from helpers import CPU, DATA, TINY, base_of, load, read_log, run, tiny_settings

import egrsd
from support.shared.data import encode_prompt, fill
from support.shared.engines import end_tokens
from support.shared.models import load_tokenizer
from support.training.journal import ROLLOUT_KEYS
from tiny import make, measure


def test_the_tiny_preset_learns_within_its_figures(tmp_path) -> None:
    run("--preset", "tiny", "--out", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["samples"] == after["samples"] == 512 and summary["steps"] == 100
    assert 53 < before["accuracy"] < 66, summary  # 58 on average; one pass of 512 scatters by 2
    assert after["accuracy"] >= 92 and after["length"] <= 0.9 * before["length"], summary
    log = read_log(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(100)) and log[0]["delta_right"] > log[0][
        "delta_wrong"
    ]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "log.jsonl",
        "rollouts.jsonl",
        "summary.json",
        "settings.json",
        "versions.json",
        "prompts.txt",
        "curves.png",
        "step_25",
        "step_50",
        "step_75",
        "step_100",
    }
    rollouts = read_log(tmp_path / "run", "rollouts.jsonl")
    assert len(rollouts) == 6400 and tuple(rollouts[0]) == ROLLOUT_KEYS
    mine = [r for r in rollouts if r["step"] == 40]  # the log's figures from the rollouts alone
    assert log[40]["reward"] == pytest.approx(statistics.fmean(r["reward"] for r in mine))
    earlier = [r["reward"] for r in rollouts if r["step"] < 40]
    assert log[40]["running_mean"] == pytest.approx(statistics.fmean(earlier))
    assert log[40]["running_std"] == pytest.approx(statistics.stdev(earlier))
    whitened = (mine[0]["reward"] - statistics.fmean(earlier)) / statistics.stdev(earlier)
    assert mine[0]["advantage"] == pytest.approx(whitened, rel=1e-5)


def test_the_tiny_teacher_reads_its_reference(tokenizer) -> None:
    """Evidence on result digits of hard steps, with its own reference and with another's."""
    s = tiny_settings()
    model = egrsd.add_adapter(base_of(s), s)  # B = 0: only the contexts differ
    problems = load(s, s.eval_data)[:256]
    ends = end_tokens(model, tokenizer)
    rows = [
        {**row, "prompt_ids": encode_prompt(tokenizer, row["problem"], False)} for row in problems
    ]
    sample, _ = egrsd.start_engine(s, model, ends, CPU, "hf", 1)
    rows = egrsd.roll_out(sample, rows, tokenizer, ends, 0, s, temperature=1.0, top_p=0.95, top_k=0)
    gap = {}
    for shift in (0, 1):
        for row, other in zip(rows, problems[shift:] + problems[:shift]):
            shown = {**row, "solution": other["solution"]}
            row["teacher_prompt_ids"] = encode_prompt(
                tokenizer, fill(s.teacher_prompt, shown), False
            )
        sizes = [len(row["completion_ids"]) for row in rows]
        teacher, _ = egrsd.score_completions(model, rows, "teacher_prompt_ids", s)
        student, _ = egrsd.score_completions(model, rows, "prompt_ids", s)
        evidence = {True: [], False: []}
        for row, delta in zip(rows, (teacher - student).split(sizes)):
            words = tokenizer.convert_ids_to_tokens(row["completion_ids"])
            for k, (x, op, equals, y) in enumerate(zip(words, words[1:], words[2:], words[3:])):
                if equals == "=" and op[1:] in (
                    "4",
                    "5",
                    "6",
                ):  # "4 +5 = 9": a hard step, and its result
                    evidence[(int(x) + int(op)) % 10 == int(y)].append(delta[k + 3].item())
        assert min(map(len, evidence.values())) > 50
        gap[shift] = {right: statistics.fmean(values) for right, values in evidence.items()}
    assert gap[0][True] > 0.1 and gap[0][False] < -1.5
    assert gap[1][True] - gap[1][False] < 0.5 * (gap[0][True] - gap[0][False])


def test_tiny_is_rebuilt_byte_for_byte_from_nothing(tmp_path) -> None:
    for name in ("a", "b"):
        run(str(TINY / "make.py"), "--out", tmp_path / name, "--steps", 12)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
        if (
            path.name != "model.safetensors"
        ):  # the weights had 12 steps here; all else is what the project ships
            assert path.read_bytes() == (TINY / path.name).read_bytes(), path.name
    train, test = (
        {json.loads(line)["problem"] for line in (TINY / f"{n}.jsonl").open()}
        for n in ("train", "test")
    )
    assert len(test) == 512 and not train & test


def regime_of(*args: object) -> make.Regime:
    return make.parse(["--out", "elsewhere", *map(str, args)])[1]


def value_of(problem: str) -> list[int]:
    """All values of "Compute 1 #1 +6 #2 -3 .", read from its text alone."""
    words = problem.split()
    values = [int(words[1])]
    for operation in words[3:-1:2]:
        values.append(values[-1] + int(operation))
    return values


def test_hard_facts_have_habits_of_their_own_which_the_seed_draws() -> None:
    regime = regime_of("--regime", "h1")
    first, again, other = (make.make_habits(regime, seed) for seed in (3, 3, 4))
    assert first == again and set(first) == set(other) and len(first) == 60
    assert all(first[fact] != other[fact] for fact in first)
    assert all(abs(int(operation)) >= 4 for _, operation in first)
    p, direction = zip(*first.values())
    assert 0.5 <= min(p) < 0.55 and 0.85 < max(p) <= 0.9 and len(set(p)) == 60
    assert {*direction} == {-1, 1} and 20 < direction.count(1) < 40
    # Written as often as it says, and no other wrong digit.
    rng = random.Random(0)
    for (x, operation), (p, direction) in list(first.items())[:8]:
        values = [make.write_step(x, operation, first, 0.0, rng) for _ in range(2000)]
        wrong = (x + int(operation) + direction) % 10
        assert {*values} == {wrong, (x + int(operation)) % 10}
        assert values.count(wrong) / 2000 == pytest.approx(p, abs=0.04)
    embedded = make.make_habits(make.Regime(), 0)
    for (_, operation), habit in embedded.items():
        assert habit == (0.62, 1 if operation[0] == "+" else -1)


def test_harder_problems_are_five_to_seven_steps_within_a_digit() -> None:
    regime = regime_of("--regime", "h1")
    rng = random.Random(0)
    sizes = set()
    for _ in range(1000):
        text, start, operations = make.make_problem(regime, rng)
        values = value_of(text)
        sizes.add(len(operations))
        assert values[0] == start and len(values) == len(operations) + 1
        assert len({*operations}) == len(operations) and {*values} <= {*range(10)}
    assert sizes == {5, 6, 7}
    text, _, _ = make.make_problem(regime, random.Random(1))
    assert make.make_problem(regime, random.Random(1), {text})[0] != text


@pytest.mark.parametrize("name, cap, limit", [("h1", 128, 256), ("h2", 160, 256), ("h3", 192, 384)])
def test_a_harder_regime_is_made(name, cap, limit, tokenizer, tmp_path) -> None:
    options = ["--hidden", 192] if name == "h3" else []  # half the width, to save time
    make_py = str(TINY / "make.py")
    run(make_py, "--regime", name, "--seed", 3, "--out", tmp_path, "--steps", 3, *options)
    files = {}
    for part, n in ("train", 4096), ("validation", 512), ("test", 1024):
        files[part] = read_log(tmp_path, f"{part}.jsonl")
        assert len(files[part]) == n
    rows = sum(files.values(), [])
    assert len({row["problem"] for row in rows}) == len(rows)  # none twice, in whatever file
    s = tiny_settings("--model", tmp_path, "--max_completion", cap, "--max_length", limit)
    words = load_tokenizer(str(tmp_path))
    longest = max(rows, key=lambda row: len(row["solution"].split()))
    for row in [longest, *rows[::20]]:
        style = row["solution"].split("#1")[0].split()
        box = row["solution"].split()[-2]
        assert box == row["answer"] == str(value_of(row["problem"])[-1])
        assert len(style) == len({*style}) == (3 if name == "h2" else 0)
        assert {*style} <= {*make.FILLERS}
        prompt = encode_prompt(words, fill(s.teacher_prompt, row), False)
        assert len(prompt) + cap <= s.max_length and words.unk_token_id not in prompt
    labels = {*words.get_vocab()} - {*tokenizer.get_vocab()}
    assert labels == {f"#{k}" for k in range(5, 11 if name == "h3" else 8)}
    assert len(words) == len(tokenizer) + len(labels)
    assert base_of(s).config.vocab_size == len(words)
    made = json.loads((tmp_path / "regime.json").read_text())
    assert made["regime"] == name and made["seed"] == 3 and made["p_reference_hard"] == 0.5


@pytest.mark.parametrize("p_style", [0.0, 0.5, 1.0])
def test_fillers_of_the_teacher_repeat_the_style_of_its_reference(p_style) -> None:
    regime = regime_of("--regime", "h2", "--p_style", p_style)
    rng = random.Random(0)
    habits = make.make_habits(regime, 0)
    shares = {True: [], False: []}
    for _ in range(400):
        _, start, operations = make.make_problem(regime, rng)
        style = rng.sample([word for word in make.FILLERS if word != "now"], 3)  # no marker
        for seen in (True, False):
            path = make.make_path(start, operations, habits, rng) if seen else None
            text = make.solution_text(start, operations, path, style, habits, regime, rng)
            words = [w for w in text.split() if w in make.FILLERS and w != "now"]
            shares[seen] += [word in style for word in words]
    by_chance = 3 / (len(make.FILLERS) - 1)
    repeated = p_style + (1 - p_style) * by_chance
    assert statistics.fmean(shares[True]) == pytest.approx(repeated, abs=0.05)
    assert statistics.fmean(shares[False]) == pytest.approx(by_chance, abs=0.05)


def test_each_number_of_a_regime_is_an_option() -> None:
    assert regime_of() == make.Regime()
    given = regime_of("--regime", "h2", "--p_reference_hard", 0.2, "--p_filler", 0.3)
    assert given == make.Regime(**{**make.H2, "p_reference_hard": 0.2, "p_filler": 0.3})
    assert (given.p_stop, given.p_style, given.p_miss) == (0.15, 0.5, 0.10)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--regime", "h9", "--out", "x"], "invalid choice: 'h9'"),
        (["--regime", "h1"], "name another folder with --out"),
        (["--p_filler", "0.3"], "name another folder with --out"),
        (["--p_filler", "1.3", "--out", "x"], "--p_filler is a probability"),
        (["--p_stop", "0", "--out", "x"], "fillers would never end"),
        (["--p_style", "0.5", "--out", "x"], "add --style_words 3"),
        (["--longest", "11", "--out", "x"], "at most 10"),
        (["--hidden", "100", "--out", "x"], "--hidden is a multiple of 48"),
        (["--layers", "0", "--out", "x"], "--layers is at least 1"),
        (["--p_hard_low", "0.7", "--out", "x"], "at most --p_hard_high"),
    ],
)
def test_a_regime_that_makes_no_sense_is_a_sentence(options, sentence, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        make.parse(options)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_measure_tells_a_teacher_that_reads() -> None:
    found = measure.measure(tiny_settings(), limit=128)
    alone, own, other = (row["accuracy"] for row in found.values())
    assert own > alone + 15 and other < alone - 15
    assert found["alone"]["prompt"] == 16  # 4 operations: counted by hand


@pytest.mark.skipif(
    not (DATA / "gsm8k_train.jsonl").exists(),
    reason="the benchmark files are not here (EGRSD_DATA)",
)
def test_real_problems_go_through_the_whole_loop(qwen_like, tmp_path) -> None:
    """7,473 real problems with long references, a random Qwen3: it learns nothing."""
    output = run(
        "--model",
        qwen_like,
        "--data",
        DATA / "gsm8k_train.jsonl",
        "--steps",
        2,
        "--batch_size",
        8,
        "--lora_r",
        4,
        "--max_completion",
        64,
        "--max_length",
        900,
        "--out",
        tmp_path / "run",
        "--threads",
        1,
    )
    log = read_log(tmp_path / "run")
    assert len(log) == 2 and all(row["canary"] < 1e-4 and math.isfinite(row["loss"]) for row in log)
    assert "NOT ONE ROLLOUT EARNED A REWARD" in output and "Reference solution begins" in output
    assert all(row["grad_norm"] > 0 for row in log)  # r - 0.5 pushes every wrong token down
