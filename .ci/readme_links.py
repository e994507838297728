"""README's table of Algorithm 1 names the function that carries each line's tag in egrsd.py.

python .ci/readme_links.py            # exits with status 1 and the rows that are wrong
python .ci/readme_links.py --write    # puts them right
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| (\d+) \|(.*)\| \[`.*?`\]\(egrsd\.py\) \|$", re.MULTILINE)
TAG = re.compile(r"Alg\. 1, line ([\d, ]+)")


def functions(source: str) -> list[tuple[str, int, int]]:
    """(name, first line, last line) of each function and method, inner ones after outer ones."""
    found = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}".strip(".")
                if isinstance(child, ast.FunctionDef):
                    found.append((name, child.lineno, child.end_lineno))
            walk(child, name)

    walk(ast.parse(source), "")
    return found


def places(source: str) -> dict[int, str]:
    """Line of Algorithm 1 -> the function with its tag."""
    where = {}
    for number, line in enumerate(source.splitlines(), 1):
        for tags in TAG.findall(line):
            for tag in re.findall(r"\d+", tags):
                inside = [name for name, a, b in functions(source) if a <= number <= b]
                where[int(tag)] = inside[-1]
    return where


def rewritten(readme: str, source: str) -> str:
    where = places(source)

    def row(match: re.Match) -> str:
        return f"| {match[1]} |{match[2]}| [`{where[int(match[1])]}`](egrsd.py) |"

    return ROW.sub(row, readme)


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text()
    right = rewritten(readme, (ROOT / "egrsd.py").read_text())
    if "--write" in sys.argv:
        path.write_text(right)
    elif right != readme:
        for old, new in zip(readme.splitlines(), right.splitlines()):
            if old != new:
                print(f"is      {old}\nshould  {new}")
        raise SystemExit("README.md: python .ci/readme_links.py --write puts these rows right")


if __name__ == "__main__":
    main()
