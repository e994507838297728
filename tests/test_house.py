"""What keeps the house readable: one idea a line, nothing below that names what is above, links."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from helpers import ROOT, run

SKIPPED = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def sources() -> list[Path]:
    """Every Python file but the tests."""
    files = [*ROOT.glob("*.py"), *(ROOT / "support").rglob("*.py"), *(ROOT / "tiny").glob("*.py")]
    for folder in (".ci", "bench", "faults"):
        files += (ROOT / folder).glob("*.py")
    return sorted(path for path in files if not path.name.startswith("test_"))


def docstring_lines(tree: ast.Module) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines.update(range(text.lineno, text.end_lineno + 1))
    return lines


def measure(path: Path) -> dict[str, float]:
    """Of the lines of code (no blank line, comment or docstring): length, and comprehensions."""
    source = path.read_text()
    tree = ast.parse(source)
    code = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += token.line.strip().startswith("#")
        elif token.type not in SKIPPED:
            code.update(range(token.start[0], token.end[0] + 1))
    code -= docstring_lines(tree)
    text = source.splitlines()
    lengths = [len(text[number - 1]) for number in code]
    comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(tree))
    return {
        "code": len(code),
        "mean": sum(lengths) / max(1, len(code)),
        "long": 100 * sum(n > 100 for n in lengths) / max(1, len(code)),
        "comprehensions": 100 * comprehensions / max(1, len(code)),
        "comments": comments,
    }


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_one_idea_a_line(path) -> None:
    found = measure(path)
    if found["code"] < 20:
        return
    assert found["mean"] <= 55, found
    assert found["long"] <= 5, found
    assert found["comprehensions"] <= 5, found


def test_the_method_has_its_lecture() -> None:
    assert measure(ROOT / "egrsd.py")["comments"] >= 50


def test_the_head_of_the_file_and_the_loop_fit_on_a_screen() -> None:
    tree = ast.parse((ROOT / "egrsd.py").read_text())
    names = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names += node.names
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            loop = next(part for part in node.body if isinstance(part, ast.For))
    assert len(names) < 30
    assert loop.end_lineno - loop.lineno <= 45


@pytest.mark.parametrize("name", ["eval.py", "diagnostics.py"])
def test_functions_are_split_where_an_idea_ends(name) -> None:
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name


def test_support_knows_nothing_of_who_calls_it() -> None:
    for path in (ROOT / "support").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not {"egrsd", "eval", "diagnostics", "baselines"} & {*names}, path
            if isinstance(node, ast.Name):
                assert not node.id.endswith("Settings"), path


def test_import_does_no_work() -> None:
    heavy = "transformers peft vllm datasets matplotlib math_verify"
    run(str(ROOT / "egrsd.py"), "--help")
    program = f"import sys, egrsd; print([m for m in {heavy.split()} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "[]", loaded.stderr


def test_readme_names_the_function_of_each_line_of_algorithm_1() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(r"^\| \d+ \|.*\]\(egrsd\.py\) \|$", readme, re.MULTILINE)) == 21
    run(str(ROOT / ".ci" / "readme_links.py"))


def test_readme_and_docs_link_to_files_that_are_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_readmes_excerpt_of_the_step_is_the_step() -> None:
    readme = (ROOT / "README.md").read_text()
    source = (ROOT / "egrsd.py").read_text()
    excerpt = readme[readme.index("for part in micro_batches") : readme.index("hidden.backward")]
    for line in excerpt.splitlines():
        code = line.split("  #")[0].strip()
        assert code in source, code
