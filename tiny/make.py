r"""Make the embedded tiny default from nothing: a 1 MB Qwen3, its tokenizer and its problems.

    python tiny/make.py [--out DIR] [--seed 0] [--steps 1500]

In 100 s on one core; same seed and same machine give the same bytes.

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
"""

import argparse
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

OPERATIONS = [sign + str(b) for sign in "+-" for b in range(1, 7)]
LABELS = ["#1", "#2", "#3", "#4"]
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

P_HARD, P_SLIP = 0.62, 0.03  # a wrong step: because of a big operand, or for no reason
P_REFERENCE_HARD = 0.50  # a wrong hard step in a pre-training reference
P_MISS = 0.06  # a step written without a look at the reference
P_CHECK_MISS = 0.80  # a check where it then differs
P_OPENER = 0.80  # fillers at the very start
ALONE = (0.35, 0.15, 0.20)  # a check; fillers before a step; their end
WITH_REFERENCE = (0.20, 0.10, 0.25)


def make_problem(rng: random.Random, excluded: Container[str] = ()) -> tuple[str, int, list[str]]:
    """A problem outside `excluded`: text, start digit, 2 to 4 distinct operations.

    Its true values stay within 0..9.
    """
    while True:
        start, operations = rng.randrange(10), rng.sample(OPERATIONS, rng.randint(2, 4))
        text = f"Compute {start} {' '.join(map(' '.join, zip(LABELS, operations)))} ."
        if text not in excluded and all(
            0 <= x <= 9 for x in accumulate(map(int, operations), initial=start)
        ):
            return text, start, operations


def write_step(x: int, operation: str, p_hard: float, p_slip: float, rng: random.Random) -> int:
    """The value written after x: right, or off by one."""
    y = x + int(operation)
    if abs(int(operation)) >= 4 and rng.random() < p_hard:
        y += 1 if operation[0] == "+" else -1
    elif rng.random() < p_slip:
        y += rng.choice((-1, 1))
    return y % 10


def make_path(start: int, operations: list[str], p_hard: float, rng: random.Random) -> list[int]:
    """The values of a reference, the start included; p_hard = 0 gives the right ones."""
    path = [start]
    for operation in operations:
        path.append(write_step(path[-1], operation, p_hard, 0.0, rng))
    return path


def reference_text(operations: list[str], path: list[int]) -> str:
    steps = [
        f"{label} {x} {operation} = {y} ;"
        for label, operation, x, y in zip(LABELS, operations, path, path[1:])
    ]
    return " ".join(steps) + f" \\boxed{{ {path[-1]} }}"


def solution_text(
    start: int, operations: list[str], path: list[int] | None, rng: random.Random
) -> str:
    """A noisy worked solution; `path`: the values of the reference in view, if there is one."""
    p_check, p_fill, p_stop = WITH_REFERENCE if path else ALONE
    text, x = "<think>", start
    for k, (label, operation) in enumerate(zip(LABELS, operations)):
        for p in (P_OPENER, p_fill) if k == 0 else (p_fill,):
            if rng.random() < p:
                text += " " + rng.choice(FILLERS)
                while rng.random() > p_stop:
                    text += " " + rng.choice(FILLERS)
                text += " ."
        y = write_step(x, operation, P_HARD, P_SLIP, rng)
        believed = (x + int(operation)) % 10
        # Still on the reference's path: what it says counts, right or wrong.
        if path and x == path[k]:
            believed = path[k + 1]
            if rng.random() >= P_MISS:
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


def make_rows(n: int, excluded: Container[str], rng: random.Random) -> list[dict[str, str]]:
    """n distinct problems outside `excluded`, each with its right reference and its answer."""
    rows = {}
    while len(rows) < n:
        text, start, operations = make_problem(rng, excluded)
        path = make_path(start, operations, 0.0, rng)
        rows[text] = {
            "problem": text,
            "solution": reference_text(operations, path),
            "answer": str(path[-1]),
        }
    return list(rows.values())


def save_tokenizer(out: Path) -> None:
    """Word level: one token a word, and decoded words are joined by single spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys(
        [*SPECIAL, *"0123456789", *OPERATIONS, *LABELS, *MARKERS, *FILLERS, *PLAIN]
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
    tokenizer, excluded: Container[str], rng: random.Random, n: int = 24
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Fresh sequences without end, every second one with a reference: ids and labels (n, T).

    Labels are -100 but on the solution, where the loss is. Padded on the right, which needs no mask
    in a causal model.

    Four batches are drawn at once and sorted by length: fewer pads, a quarter of the time less.
    """
    while True:
        pool = []
        for k in range(4 * n):
            problem, start, operations = make_problem(rng, excluded)
            path = make_path(start, operations, P_REFERENCE_HARD, rng) if k % 2 else None
            row = {"problem": problem, "solution": reference_text(operations, path or [0])}
            template = PRESETS["tiny"]["teacher_prompt" if path else "student_prompt"]
            prompt = fill(template, row)
            prompt_ids = encode_prompt(tokenizer, prompt, False)
            solution_ids = tokenizer(solution_text(start, operations, path, rng)).input_ids
            pool.append((prompt_ids + solution_ids, [-100] * len(prompt_ids) + solution_ids))
        pool.sort(key=lambda pair: len(pair[0]))
        for i in rng.sample(range(0, 4 * n, n), 4):
            ids, labels = zip(*pool[i : i + n])
            T = len(ids[-1])
            yield (
                torch.tensor([row + [tokenizer.pad_token_id] * (T - len(row)) for row in ids]),
                torch.tensor([row + [-100] * (T - len(row)) for row in labels]),
            )


def pretrain(tokenizer, excluded: Container[str], steps: int, rng: random.Random):
    """A Qwen3 with 247k parameters after `steps` steps of AdamW.

    Linear warm-up, cosine decay to 2 % of the peak.
    """
    from tqdm import tqdm
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    bar = tqdm(range(steps), desc="pre-training")
    for i, (ids, labels) in zip(bar, batches(tokenizer, excluded, rng)):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(
            (i + 1) / 60, 0.51 + 0.49 * math.cos(math.pi * i / steps)
        )
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if i % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="pre-training steps")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    torch.set_num_threads(1)  # more are slower at this size, and one repeats its bytes
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    test = make_rows(512, (), rng)
    excluded = {row["problem"] for row in test}
    for name, rows in ("test", test), ("train", make_rows(2048, excluded, rng)):
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(args.out)
    model = pretrain(AutoTokenizer.from_pretrained(args.out), excluded, args.steps, rng)
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
