"""What several test files share: running the programs, reading a run, small models and settings."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import egrsd
from support.shared.data import load_problems
from support.shared.models import load_base

ROOT = Path(egrsd.__file__).parent
TINY = ROOT / "tiny"
DATA = Path(os.environ.get("EGRSD_DATA", ROOT.parent / "shared" / "data"))
MACHINE = ("seconds", "tokens_per_second", "memory_gib")  # of a log line: may differ by machine
SMALL = ("--preset", "tiny", "--eval_data=", "--batch_size", 8, "--max_completion", 40)
CPU = torch.device("cpu")

QWEN_TEMPLATE = (
    "{%- for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def start(*args: object, nproc: int = 0, **env: str) -> subprocess.Popen:
    """egrsd.py on the command line, under torchrun with nproc processes if nproc > 0."""
    launch = [sys.executable]
    if nproc:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(nproc)]
        launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    if not (args and str(args[0]).endswith(".py")):
        launch.append(str(ROOT / "egrsd.py"))
    return subprocess.Popen(
        [*launch, *map(str, args)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def run(*args: object, code: int = 0, nproc: int = 0, **env: str) -> str:
    process = start(*args, nproc=nproc, **env)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == code, output
    return output


def read_log(out: Path, name: str = "log.jsonl") -> list[dict]:
    rows = []
    for line in (out / name).read_text().splitlines():
        row = json.loads(line)
        rows.append({key: value for key, value in row.items() if key not in MACHINE})
    return rows


def figures_of(row: dict) -> dict:
    """The numbers of a log line but for the canary, which measures rounding itself."""
    return {k: value for k, value in row.items() if k not in ("canary", "skipped_prompts")}


def tiny_settings(*args: object) -> egrsd.Settings:
    return egrsd.parse_settings(["--preset", "tiny", *map(str, args)])


def columns_of(s: egrsd.Settings) -> dict[str, str]:
    return {
        "problem": s.problem_column,
        "solution": s.solution_column,
        "answer": s.answer_column,
    }


def load(s: egrsd.Settings, source: str = "") -> list[dict]:
    return load_problems(str(source or s.data), columns_of(s), s.split)


def base_of(s: egrsd.Settings):
    return load_base(s.model, CPU)


def fresh_model(*args: object, b: float = 0.05):
    """The tiny model with an adapter whose B is random, so that student and teacher differ."""
    s = tiny_settings(*args)
    model = egrsd.add_adapter(base_of(s), s)
    noise = torch.Generator().manual_seed(1)
    for name, p in egrsd.trainable(model).items():
        if "lora_B" in name:
            p.data = b * torch.randn(p.shape, generator=noise)
    return model, s


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        if Path("/proc").is_dir():
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
        return True
    except (ProcessLookupError, FileNotFoundError):
        return False
