"""The pages of diagnostics.py: a report with all figures and tables, and the microscope.

Neither needs a network.
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import numpy as np

from support.diagnosis.figures import label
from support.diagnosis.token_stats import REGIMES
from support.shared.files import write_text


def microscope(one: dict, number: int, problem: str, sliders: dict[str, float]) -> str:
    """microscope.html with the numbers of one rollout.

    `sliders` are gamma, W, eps, tau_low and tau_high. The page's JSON cannot leave its <script>,
    and no other script may run.
    """
    data = {"rollout": number, "problem": problem, **sliders}
    data["text"] = one["text"]
    data["token_id"] = one["token_id"].tolist()
    for name in ("teacher_logp", "student_logp", "entropy"):
        data[name] = exact(one[name])
    for name in ("advantage", "max_entropy"):  # the same for all tokens
        data[name] = exact(one[name])[0]
    text = json.dumps(data, allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    page = Path(__file__).with_name("microscope.html").read_text()
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.replace("SCRIPT_HASH", f"'sha256-{digest}'").replace("DATA", text, 1)


def exact(values: np.ndarray) -> list[float]:
    """Nine digits give float32 back."""
    return [float(f"{value:.9g}") for value in values.tolist()]


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>What the gate does</title><style>
body{font:17px/1.5 sans-serif;max-width:70rem;margin:auto;padding:1rem}
img{max-width:100%}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:16px;margin:.5rem 0}
td,th{padding:.2rem .6rem;text-align:left;border-bottom:1px solid #ccc;vertical-align:top}
.verdict{border-left:.4rem solid #0072B2;padding:.5rem 1rem;background:#eef4f8}
</style><h1>What the gate does</h1>"""


def shorten(value: object) -> str:
    """A number in four digits, or whole; {"mean", "low", "high"} with its interval."""
    if isinstance(value, dict):
        return f"{shorten(value['mean'])} ({shorten(value['low'])} to {shorten(value['high'])})"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "\u2013" if value is None else str(value)


def table(head: list[str], rows: list[list]) -> str:
    text = "<div class=wide><table>" + table_row("th", head)
    for row in rows:
        text += table_row("td", row)
    return text + "</table></div>"


def table_row(tag: str, cells: list) -> str:
    text = ""
    for cell in cells:
        text += f"<{tag}>{html.escape(shorten(cell))}</{tag}>"
    return f"<tr>{text}</tr>"


# --------------------------------------------------------------------------------------------------
# The report


def write_report(
    out: Path, summary: dict, context: dict, pictures: list[tuple], settings: str
) -> None:
    """report.html: the verdict first, then where the numbers come from, then figures and tables.

    `settings` says gamma, W and eps.
    """
    control = context.get("control", {})
    tables = {"deciles.png": deciles_text(summary), "regimes.png": regimes_text(summary)}
    rows = []
    for name, row in control.get("table", {}).items():
        rows.append([name, row["tokens"], row["own"], row["other"], row])
    head = ["\u03b4 on", "tokens", "own reference", "another problem's", "difference (95 %)"]
    parts = [
        PAGE,
        "<h2>Does the teacher read the reference?</h2><p class=verdict>",
        html.escape(verdict_of(context)),
        "</p>",
        table(head, rows),
        "<h2>What was measured</h2><p>",
        html.escape(context.get("note", "")),
        "</p>",
        table(["what", "value"], facts(summary, context, settings)),
        "<p><a href=microscope.html>The microscope: one rollout, token by token</a></p>",
    ]
    for name, title, words, _ in pictures:
        image = base64.b64encode((out / name).read_bytes()).decode()
        title = html.escape(title)
        parts.append(
            f"<h2>{title}</h2><p>{html.escape(words)}</p>"
            f'<img alt="{title}" src="data:image/png;base64,{image}">{tables.get(name, "")}'
        )
    parts.append("</html>\n")
    write_text(out / "report.html", "\n".join(parts))


def verdict_of(context: dict) -> str:
    control = context.get("control", {})
    return control.get("verdict", "NOT MEASURED: no context.json lies beside these arrays.")


def facts(summary: dict, context: dict, settings: str) -> list[list]:
    """What was looked at, and where it comes from."""
    rows = [
        ["completions", summary["completions"]],
        ["tokens", summary["tokens"]],
        ["result tokens", summary["result_tokens"]],
        ["mean teacher entropy (nats)", summary["mean_entropy"]],
    ]
    for name in ("source", "model", "student", "advantages"):
        if name in context:
            rows.append([name, str(context[name])])
    kinds = [f"{kind}: {n:,}" for kind, n in context.get("references", {}).items()]
    rows.append(["references", ", ".join(kinds)])
    rows.append(["\u03b3, W, \u03b5", settings])
    return rows


def deciles_text(summary: dict) -> str:
    head = [
        "decile",
        "tokens",
        "mean |\u03b4| (95 %)",
        "\u03c9 (95 %)",
        "\u03c9_CL (95 %)",
        "w (95 %)",
    ]
    text = ""
    for kind, name in (("decile", "All "), ("result decile", "Result ")):
        if kind not in summary:
            continue
        d = summary[kind]
        rows = []
        for g in range(10):
            row = [g + 1, d["count"][g]]
            for quantity in ("gap", "gate", "gate_CL", "w"):
                of = d[quantity]
                row.append({"mean": of["mean"][g], "low": of["low"][g], "high": of["high"][g]})
            rows.append(row)
        text += f"<p>{name}tokens{trend_of(d)}.</p>" + table(head, rows)
    return text


def trend_of(d: dict) -> str:
    """How the gap moves over the deciles; nothing of a few tokens, which leave some empty."""
    if min(d["count"]) == 0:
        return ""
    return (
        f", top to bottom decile: {shorten(d['top_to_bottom'])}. The gap is "
        f"{'' if d['monotone'] else 'not '}monotone in the entropy, and highest in decile "
        f"{d['highest']}. (Paper, Qwen3-8B: ratio 139, highest in decile 10)"
    )


def regimes_text(summary: dict) -> str:
    head = ["regime", "share", "\u03c9_CL \u2212 \u03c9 (95 %)", "\u03c9", "\u03c9_CL"]
    head += ["mean |\u03b4|", "commonest tokens"]
    rows = []
    for name, r in summary["regimes"].items():
        tokens = ", ".join(f"{label(text)} {n:,}" for text, n in r["tokens"])
        rows.append([name, f"{r['share']:.1%}", r, r["gate"], r["gate_CL"], r["gap"], tokens])
    text = f"<p>Selectivity, pivot to fork: {shorten(summary['selectivity'])}. "
    text += "(Paper, Qwen3-8B: 2.1.)</p>" + table(head, rows)
    shares = []
    for r in summary["sensitivity"]:
        row = [r["tau_low"], r["tau_high"]]
        for name in REGIMES:
            row.append(f"{r[name]:.1%}")
        shares.append(row)
    return text + table(["\u03c4_low", "\u03c4_high", *REGIMES], shares)
