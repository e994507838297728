"""The pages of diagnostics.py: a report with all figures and tables, and the microscope. Neither needs a network."""
from __future__ import annotations

import argparse
import base64
import collections
import hashlib
import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from support.figures import label
from support.token_stats import REGIMES

if TYPE_CHECKING:
    from egrsd import Settings


def microscope(one: dict, number: int, problem: str, o: argparse.Namespace, s: Settings) -> str:
    """microscope.html with the numbers of one rollout. Its JSON cannot leave its <script>; no other script may run."""
    exact = lambda values: [float(f"{v:.9g}") for v in values.tolist()]  # noqa: E731  nine digits give float32 back
    data = {"rollout": number, "problem": problem, "text": one["text"], "token_id": one["token_id"].tolist(),
            **{name: getattr(s, name) for name in ("gamma", "W", "eps")}, "tau_low": o.tau_low, "tau_high": o.tau_high,
            **{name: exact(one[name]) for name in ("teacher_logp", "student_logp", "entropy")},
            **{name: exact(one[name][:1])[0] for name in ("advantage", "max_entropy")}}
    text = json.dumps(data, allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    page = Path(__file__).with_name("microscope.html").read_text()
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.replace("SCRIPT_HASH", f"'sha256-{digest}'").replace("DATA", text, 1)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>What the gate does</title><style>body{font:17px/1.5 sans-serif;max-width:70rem;margin:auto;padding:1rem}
img{max-width:100%}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:16px;margin:.5rem 0}
td,th{padding:.2rem .6rem;text-align:left;border-bottom:1px solid #ccc;vertical-align:top}
.verdict{border-left:.4rem solid #0072B2;padding:.5rem 1rem;background:#eef4f8}</style><h1>What the gate does</h1>"""


def shorten(value: object) -> str:
    """A number in four digits, or whole; {"mean", "low", "high"} with its interval."""
    if isinstance(value, dict):
        return f"{shorten(value['mean'])} ({shorten(value['low'])} to {shorten(value['high'])})"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "\u2013" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def table(head: list[str], rows: list[list]) -> str:
    lines = ("".join(f"<{tag}>{html.escape(shorten(cell))}</{tag}>" for cell in row)
             for tag, row in [("th", head), *(("td", row) for row in rows)])
    return "<div class=wide><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def write_report(out: Path, summary: dict, context: dict, pictures: list[tuple], s: Settings) -> None:
    """report.html: the verdict first, then where the numbers come from, then each figure with its table."""
    control, tables = context.get("control", {}), collections.defaultdict(str)
    for kind in ("decile", "result decile") if "result decile" in summary else ("decile",):
        d, quantities = summary[kind], ("gap", "gate", "gate_CL", "w")
        tables["deciles.png"] += (
            f"<p>{kind.replace('decile', '').capitalize() or 'All '}tokens, top to bottom decile: "
            f"{shorten(d['top_to_bottom'])}. The gap is {'' if d['monotone'] else 'not '}monotone in the entropy, and "
            f"highest in decile {d['highest']}. (Paper, Qwen3-8B: ratio 139, highest in decile 10.)</p>") + table(
            ["decile", "tokens", "mean |\u03b4| (95 %)", "\u03c9 (95 %)", "\u03c9_CL (95 %)", "w (95 %)"],
            [[g + 1, d["count"][g], *({key: of[g] for key, of in d[name].items()} for name in quantities)]
             for g in range(10)])
    words = f"<p>Selectivity, pivot to fork: {shorten(summary['selectivity'])}. (Paper, Qwen3-8B: 2.1.)</p>"
    tables["regimes.png"] = words + table(
        ["regime", "share", "\u03c9_CL \u2212 \u03c9 (95 %)", "\u03c9", "\u03c9_CL", "mean |\u03b4|",
         "commonest tokens"],
        [[name, f"{r['share']:.1%}", r, r["gate"], r["gate_CL"], r["gap"],
          ", ".join(f"{label(text)} {n:,}" for text, n in r["tokens"])] for name, r in summary["regimes"].items()])
    tables["regimes.png"] += table(["\u03c4_low", "\u03c4_high", *REGIMES], [
        [r["tau_low"], r["tau_high"], *(f"{r[name]:.1%}" for name in REGIMES)] for r in summary["sensitivity"]])
    facts = [["completions", summary["completions"]], ["tokens", summary["tokens"]],
             ["result tokens", summary["result_tokens"]], ["mean teacher entropy (nats)", summary["mean_entropy"]]]
    context = {**context, "references": ", ".join(f"{k}: {n:,}" for k, n in context.get("references", {}).items())}
    facts += [[name, str(context[name])] for name in ("source", "model", "student", "advantages", "references")
              if name in context] + [["\u03b3, W, \u03b5", f"{s.gamma:g}, {s.W}, {s.eps:g}"]]
    parts = [PAGE, "<h2>Does the teacher read the reference?</h2><p class=verdict>", html.escape(verdict_of(context)),
             "</p>", table(["\u03b4 on", "tokens", "own reference", "another problem's", "difference (95 %)"],
                           [[k, r["tokens"], r["own"], r["other"], r] for k, r in control.get("table", {}).items()]),
             "<h2>What was measured</h2><p>", html.escape(context.get("note", "")), "</p>",
             table(["what", "value"], facts),
             "<p><a href=microscope.html>The microscope: one rollout, token by token</a></p>"]
    for name, title, words, _ in pictures:
        image = base64.b64encode((out / name).read_bytes()).decode()
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(words)}</p><img alt=\"{html.escape(title)}\" "
                     f"src=\"data:image/png;base64,{image}\">{tables[name]}")
    (out / "report.html").write_text("\n".join([*parts, "</html>\n"]))


def verdict_of(context: dict) -> str:
    return context.get("control", {}).get("verdict", "NOT MEASURED: no context.json lies beside these arrays.")
