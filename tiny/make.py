r"""Make the embedded tiny default from nothing: a 1 MB Qwen3, its tokenizer and its problems.

    python tiny/make.py [--seed 0] [--steps 1500]        # the embedded default, into tiny/
    python tiny/make.py --regime h1 --seed 3 --out DIR   # a harder one, into DIR
    python tiny/measure.py DIR --max_completion 128      # how good are its base and its teacher?
    python egrsd.py --preset tiny --model DIR --data DIR/train.jsonl --eval_data DIR/test.jsonl \
        --max_completion 128 --lr 3e-4 --batch_size 32

In two minutes on one core (h1, h2: about 4). Same seed and same machine give the same bytes.

The task: `Compute 1 #1 +6 #2 -3 .` is a chain of 2 to 4 distinct operations from +-1 .. +-6. True
values stay within 0..9, wrong ones wrap modulo 10. A solution writes one step per operation and
boxes the last value:
    <think> hmm okay . then #1 1 +6 = 7 wait check yes so #2 7 -3 = 4 </think>
    \boxed{ 4 } <|im_end|>
Each kind of token that a reasoning model produces is there on purpose:
    lock    label, operand, "=" and digit: nearly deterministic, and a wrong digit loses the answer
    pivot   step marker (then / next / so / now) and "wait": one token that decides what follows
    fork    run of filler words before a step: high entropy, no consequence

The noise in the pre-training solutions, which leaves the base model right on about 60 %: a hard
step (big operand, |b| >= 4) comes out off by one with probability 0.62, always in the same
direction, so there is a habit to unlearn; any other step slips with 0.03; redundant checks and
fillers make the text longer than it needs to be.

Every second sequence shows a reference in its prompt (the teacher's context) and follows it while
it stands on the reference's path. THAT REFERENCE IS ITSELF WRONG on half of its hard steps. With
clean ones the model learned only that a reference was there: it became accurate whatever the
reference said, and another problem's reference gave the same log p_T - log p_S. Under noise the one
way to predict the solution is to READ the reference. The references in train.jsonl and test.jsonl
are right, and the problems of test.jsonl never occur in pre-training.

That task saturates, so it demonstrates but does not compare. Harder regimes do; they also have
validation.jsonl, to choose learning rates on, whose problems occur nowhere else either:
    h1      5 to 7 operations; each hard fact (value, operation) has a direction of error and an
            error probability of its own, from 0.5 to 0.9, drawn from the seed: as many habits to
            unlearn as facts. Made for --max_completion 128 and --lr 3e-4
    h2      h1 with more and longer fillers, a teacher that looks away more often, and references
            that open with three words of style, which the teacher's fillers then repeat: a
            difference of the two contexts that has no consequence. For 160 and 8e-4
    h3      h1 with 8 to 10 operations, habits that err with probability 0.3 to 0.7, and a model of
            7 million parameters, 29 times as many, for a GPU: --device cuda. For --max_completion
            192 --max_length 384
Seeds 0, 1, 2 by measure.py, alone and with the reference (+- 0.5 to 1.6, one sample a problem):
    h1      32.1, 36.1, 31.0 % at 60 tokens; 91.5, 97.7, 92.6 % at 51
    h2      31.3, 34.5, 32.8 % at 74 tokens; 51.7, 88.7, 80.4 % at 51: how well a teacher has
            learned to read depends on the seed, so measure it before a comparison
All that differs between regimes is in Regime; each of its numbers is an option, too.
"""

import argparse
import dataclasses
import json
import math
import random
import sys
from collections.abc import Container, Iterator
from itertools import accumulate
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from egrsd import PRESETS  # noqa: E402  the very prompts of training and evaluation
from support.shared.data import encode_prompt, fill  # noqa: E402
from support.shared.options import check_rules, make_parser, opt  # noqa: E402

OPERATIONS = [sign + str(b) for sign in "+-" for b in range(1, 7)]
LABELS = [f"#{k}" for k in range(1, 11)]
MARKERS = ["then", "next", "so", "now"]
FILLERS = "hmm okay let me see well now think about this problem first please right maybe".split()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
# <think> is no special token: decoding must keep it.
PLAIN = (
    "<think> </think> \\boxed{ } = wait check yes no redo Compute . Reference : ; Solve it in your "
    "own way system user assistant"
).split()
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{%- endif %}"
)

P_CHECK_MISS = 0.80  # a check where it differs from the reference  # ours
P_OPENER = 0.80  # fillers at the very start  # ours
WITH_REFERENCE = (0.20, 0.10, 0.25)  # a check; fillers before a step; their end  # ours


@dataclasses.dataclass
class Regime:
    """What makes a task easy or hard. The defaults are those of the embedded one; p_ is in 0..1."""

    shortest: int = opt("problems", 2, "fewest operations of a problem")  # ours
    longest: int = opt("problems", 4, "most operations of a problem")  # ours
    train: int = opt("problems", 2048, "problems in train.jsonl")  # ours
    test: int = opt("problems", 512, "problems in test.jsonl")  # ours
    validation: int = opt("problems", 0, "problems in validation.jsonl, 0: no such file")  # ours

    p_hard_low: float = opt("errors", 0.62, "a hard fact is written wrong: at least")  # ours
    p_hard_high: float = opt("errors", 0.62, "and at most; uniform in between, by fact")  # ours
    own_direction: bool = opt("errors", False, "each hard fact errs in its own direction")  # ours
    p_slip: float = opt("errors", 0.03, "any other step is off by one")  # ours

    p_check: float = opt("text alone", 0.35, "a check after a step, halved after each")  # ours
    p_filler: float = opt("text alone", 0.15, "fillers before a step")  # ours
    p_stop: float = opt("text alone", 0.20, "fillers end after a word: 1 / p_stop words")  # ours

    p_reference_hard: float = opt("reference", 0.50, "a hard step of it is wrong")  # ours
    p_miss: float = opt("reference", 0.06, "a step is written without a look at it")  # ours
    style_words: int = opt("reference", 0, "words of style that it opens with")  # ours
    p_style: float = opt("reference", 0.0, "a filler repeats one of them")  # ours

    by_length: bool = opt("batches", True, "alike in length: a quarter less time")  # ours

    hidden: int = opt("model", 96, "width, a multiple of 48")  # ours
    layers: int = opt("model", 2, "its layers")  # ours


H1 = {  # ours, all of it
    "shortest": 5,
    "longest": 7,
    "train": 4096,
    "test": 1024,
    "validation": 512,
    "p_hard_low": 0.5,
    "p_hard_high": 0.9,
    "own_direction": True,
    "p_slip": 0.02,
    # Alike in length is alike in context here: most batches had only problems with a reference, or
    # only without. Seed 0 then named a wrong operation in 35 % of its steps (1,500 steps of
    # pre-training), but in 0.2 % where each batch has both, as here.
    "by_length": False,
}
H2 = {  # ours, all of it
    **H1,
    "p_filler": 0.40,
    "p_stop": 0.15,
    "p_miss": 0.10,
    "style_words": 3,
    "p_style": 0.5,
}
H3 = {  # ours, all of it
    **H1,
    "shortest": 8,
    "longest": 10,
    "p_hard_low": 0.3,
    "p_hard_high": 0.7,
    "hidden": 384,
    "layers": 4,
}
REGIMES = {"embedded": {}, "h1": H1, "h2": H2, "h3": H3}

# Of each hard fact (value, operation): the probability of a wrong digit, and its distance.
Habits = dict[tuple[int, str], tuple[float, int]]


def make_habits(regime: Regime, seed: int) -> Habits:
    """The 60 hard facts (|b| >= 4) and how the pre-training solutions get them wrong."""
    rng = random.Random(f"habits/{seed}")  # its own, so that problems do not depend on it
    habits = {}
    for x in range(10):
        for operation in OPERATIONS:
            p = rng.uniform(regime.p_hard_low, regime.p_hard_high)
            direction = rng.choice((-1, 1))
            if not regime.own_direction:
                direction = 1 if operation[0] == "+" else -1
            if abs(int(operation)) >= 4:
                habits[x, operation] = p, direction
    return habits


def with_probability(habits: Habits, p: float) -> Habits:
    """The same wrong digits, each with probability p; 0 is always right."""
    return {fact: (p, direction) for fact, (_, direction) in habits.items()}


def make_problem(
    regime: Regime, rng: random.Random, excluded: Container[str] = ()
) -> tuple[str, int, list[str]]:
    """A problem outside `excluded`: text, start digit, distinct operations.

    Its true values stay within 0..9. So do those of one draw in 7 with 5 operations and one in 17
    with 7: in h1 that takes 0.15 ms a problem, and 5, 6 and 7 have shares of 48, 31 and 21 %.
    """
    while True:
        start = rng.randrange(10)
        operations = rng.sample(OPERATIONS, rng.randint(regime.shortest, regime.longest))
        values = accumulate(map(int, operations), initial=start)
        if not all(0 <= x <= 9 for x in values):
            continue
        text = f"Compute {start} {' '.join(map(' '.join, zip(LABELS, operations)))} ."
        if text not in excluded:
            return text, start, operations


def write_step(x: int, operation: str, habits: Habits, p_slip: float, rng: random.Random) -> int:
    """The value written after x: right, or off by one."""
    y = x + int(operation)
    habit = habits.get((x, operation))
    if habit and rng.random() < habit[0]:
        y += habit[1]
    elif rng.random() < p_slip:
        y += rng.choice((-1, 1))
    return y % 10


def make_path(start: int, operations: list[str], habits: Habits, rng: random.Random) -> list[int]:
    """The values of a reference, the start included."""
    path = [start]
    for operation in operations:
        path.append(write_step(path[-1], operation, habits, 0.0, rng))
    return path


def reference_text(operations: list[str], path: list[int], style: list[str]) -> str:
    steps = [
        f"{label} {x} {operation} = {y} ;"
        for label, operation, x, y in zip(LABELS, operations, path, path[1:])
    ]
    return " ".join([*style, *steps, f"\\boxed{{ {path[-1]} }}"])


def filler_run(p_stop: float, style: list[str], p_style: float, rng: random.Random) -> str:
    """At least one word, each of `style` with p_style, and a full stop."""
    words = []
    while not words or rng.random() > p_stop:
        repeats = style and rng.random() < p_style
        words.append(rng.choice(style if repeats else FILLERS))
    return " ".join([*words, "."])


def solution_text(
    start: int,
    operations: list[str],
    path: list[int] | None,
    style: list[str],
    habits: Habits,
    regime: Regime,
    rng: random.Random,
) -> str:
    """A noisy worked solution; `path`, `style`: of the reference in view, if there is one."""
    p_check, p_filler, p_stop = regime.p_check, regime.p_filler, regime.p_stop
    if path:
        p_check, p_filler, p_stop = WITH_REFERENCE
    text, x = "<think>", start
    for k, (label, operation) in enumerate(zip(LABELS, operations)):
        for p in (P_OPENER, p_filler) if k == 0 else (p_filler,):
            if rng.random() < p:
                text += " " + filler_run(p_stop, style if path else [], regime.p_style, rng)
        y = write_step(x, operation, habits, regime.p_slip, rng)
        believed = (x + int(operation)) % 10
        # Still on the reference's path: what it says counts, right or wrong.
        if path and x == path[k]:
            believed = path[k + 1]
            if rng.random() >= regime.p_miss:
                y = believed
        text += f" {rng.choice(MARKERS)} {label} {x} {operation} = {y}"
        p = P_CHECK_MISS if path and y != believed else p_check
        while rng.random() < p:
            if y == believed:
                text += " wait check yes"
            else:
                text += f" wait check no redo {label} {x} {operation} = {believed}"
            y = believed
            p = p / 2
        x = y
    return f"{text} </think> \\boxed{{ {x} }} <|im_end|>"


def make_rows(
    n: int, excluded: Container[str], habits: Habits, regime: Regime, rng: random.Random
) -> list[dict[str, str]]:
    """n distinct problems outside `excluded`, each with its right reference and its answer."""
    never = with_probability(habits, 0.0)
    rows = {}
    while len(rows) < n:
        text, start, operations = make_problem(regime, rng, excluded)
        path = make_path(start, operations, never, rng)
        style = rng.sample(FILLERS, regime.style_words)
        rows[text] = {
            "problem": text,
            "solution": reference_text(operations, path, style),
            "answer": str(path[-1]),
        }
    return list(rows.values())


def save_tokenizer(out: Path, regime: Regime) -> None:
    """Word level: one token a word, and decoded words are joined by single spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    labels = LABELS[: regime.longest]  # so that the embedded one keeps its 71 words
    words = dict.fromkeys(
        [*SPECIAL, *"0123456789", *OPERATIONS, *labels, *MARKERS, *FILLERS, *PLAIN]
    )  # one "now"
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<|im_start|>"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def batches(
    tokenizer,
    excluded: Container[str],
    habits: Habits,
    regime: Regime,
    rng: random.Random,
    n: int = 24,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Fresh sequences without end, every second one with a reference: ids and labels (n, T).

    Labels are -100 but on the solution, where the loss is. Padded on the right, which needs no mask
    in a causal model.

    Four batches are drawn at once and, with `by_length`, sorted: fewer pads.
    """
    misprints = with_probability(habits, regime.p_reference_hard)
    while True:
        pool = []
        for k in range(4 * n):
            problem, start, operations = make_problem(regime, rng, excluded)
            path, style = None, []
            row = {"problem": problem}
            if k % 2:
                path = make_path(start, operations, misprints, rng)
                style = rng.sample(FILLERS, regime.style_words)
                row["solution"] = reference_text(operations, path, style)
            template = PRESETS["tiny"]["teacher_prompt" if path else "student_prompt"]
            prompt_ids = encode_prompt(tokenizer, fill(template, row), False)
            solution = solution_text(start, operations, path, style, habits, regime, rng)
            solution_ids = tokenizer(solution).input_ids
            pool.append((prompt_ids + solution_ids, [-100] * len(prompt_ids) + solution_ids))
        if regime.by_length:
            pool.sort(key=lambda pair: len(pair[0]))
        for i in rng.sample(range(0, 4 * n, n), 4):
            ids, labels = zip(*pool[i : i + n])
            T = max(map(len, ids))
            yield (
                torch.tensor([row + [tokenizer.pad_token_id] * (T - len(row)) for row in ids]),
                torch.tensor([row + [-100] * (T - len(row)) for row in labels]),
            )


def pretrain(
    tokenizer,
    sequences: Iterator[tuple[torch.Tensor, ...]],
    steps: int,
    regime: Regime,
    device: str,
):
    """A Qwen3 (247k parameters by default) after `steps` batches and steps of AdamW.

    Linear warm-up, cosine decay to 2 % of the peak, which falls as the width grows.
    """
    from tqdm import tqdm
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=regime.hidden,
            intermediate_size=3 * regime.hidden,
            num_hidden_layers=regime.layers,
            num_attention_heads=regime.hidden // 24,
            num_key_value_heads=regime.hidden // 48,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    peak = 4e-3 * 96 / regime.hidden
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    bar = tqdm(range(steps), desc="pre-training")
    for i, (ids, labels) in zip(bar, sequences):
        optimizer.param_groups[0]["lr"] = peak * min(
            (i + 1) / 60, 0.51 + 0.49 * math.cos(math.pi * i / steps)
        )
        loss = model(input_ids=ids.to(device), labels=labels.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if i % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Regime]:
    """Our options, and the regime: that of --regime, then the options.

    Exits with status 2 and a sentence where an option is unknown or a value makes no sense.
    """
    parser = make_parser(Regime, "make.py", __doc__)
    add = parser.add_argument
    add("--regime", default="embedded", choices=REGIMES, help="which task")
    add("--out", type=Path, default=HERE, help="folder to write")
    add("--seed", type=int, default=0, help="of habits, problems and weights")
    add("--steps", type=int, default=1500, help="pre-training steps")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="of the pre-training")
    # Twice: the first time tells the regime, whose values are the defaults of the second.
    first = parser.parse_args(argv)
    parser.set_defaults(**REGIMES[first.regime])
    args = parser.parse_args(argv)
    names = [field.name for field in dataclasses.fields(Regime)]
    regime = Regime(**{name: getattr(args, name) for name in names})
    check_rules(broken_rules(regime, args), parser.error)
    return args, regime


def broken_rules(regime: Regime, args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """What makes no sense: (is it so?, the sentence to say then)."""
    for name, value in vars(regime).items():
        if name.startswith("p_"):
            yield not 0 <= value <= 1, f"--{name} is a probability, from 0 to 1"
    yield not regime.p_stop, "--p_stop is above 0: fillers would never end"
    fits = 1 <= regime.shortest <= regime.longest <= len(LABELS)
    yield not fits, f"--shortest is 1 or more, --longest not less, and at most {len(LABELS)}"
    ordered = regime.p_hard_low <= regime.p_hard_high
    yield not ordered, "--p_hard_low is at most --p_hard_high"
    fits = 0 <= regime.style_words <= len(FILLERS)
    yield not fits, f"--style_words is from 0 to {len(FILLERS)}"
    nothing = regime.p_style > 0 and not regime.style_words
    yield nothing, "--p_style has no words to repeat: add --style_words 3"
    uneven = regime.hidden <= 0 or regime.hidden % 48
    yield uneven, "--hidden is a multiple of 48: two heads of 32 for one of keys and values"
    yield regime.layers < 1, "--layers is at least 1"
    shipped = args.out.resolve() == HERE and regime != Regime()
    yield shipped, "tiny/ keeps the embedded default: name another folder with --out"


def main() -> None:
    args, regime = parse()
    from transformers import AutoTokenizer

    torch.set_num_threads(1)  # more are slower at this size, and one repeats its bytes
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    habits = make_habits(regime, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    # What is held out comes first: no later file and no pre-training sequence may have it.
    excluded = set()
    for name in ("test", "validation", "train"):
        rows = make_rows(getattr(regime, name), excluded, habits, regime, rng)
        if name != "train":
            excluded.update(row["problem"] for row in rows)
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (args.out / f"{name}.jsonl").write_text(text)
    if regime != Regime():  # the shipped one has its numbers here
        made = {"regime": args.regime, "seed": args.seed, "steps": args.steps, **vars(regime)}
        (args.out / "regime.json").write_text(json.dumps(made, indent=1) + "\n")
    save_tokenizer(args.out, regime)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    sequences = batches(tokenizer, excluded, habits, regime, rng)
    model = pretrain(tokenizer, sequences, args.steps, regime, args.device)
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
