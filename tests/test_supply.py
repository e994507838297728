"""What is installed is pinned with hashes; nothing that is read may execute."""

import ast
import re

import pytest
from helpers import ROOT

LOCKS = {"requirements-cpu.lock": "requirements-cpu.txt", "requirements.lock": "requirements.txt"}
# Modules that unpickle or run what they read, and calls that do.
MODULES = {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "marshal", "shelve", "runpy"}
CALLS = {"torch.load", "np.load", "numpy.load", "os.system", "os.popen", "pandas.read_pickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def pins(name: str) -> dict[str, str]:
    """package -> version, as a file of requirements names them."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)==([^ ;\\]+)", line)
        if match:
            found[match[1].lower()] = match[2]
        if line.startswith("-r "):
            found.update(pins(line[3:].strip()))
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_what_the_requirements_pin_each_with_its_hashes(lock) -> None:
    locked = pins(lock)
    for package, version in pins(LOCKS[lock]).items():
        assert locked[package] == version, package
    text = (ROOT / lock).read_text()
    assert "://" not in text and "index-url" not in text.replace("--no-emit-index-url", "")
    for requirement in re.findall(r"^[a-z0-9].*?(?=^[a-z0-9]|\Z)", text, re.MULTILINE | re.DOTALL):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", requirement), requirement[:60]


def dangers(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name in BUILTINS:
                found.append(name)
            for keyword in node.keywords:
                asked = keyword.arg in ("trust_remote_code", "shell", "allow_pickle")
                if asked and getattr(keyword.value, "value", False) is True:
                    found.append(keyword.arg)
    return found


def test_the_search_finds_what_it_is_for() -> None:
    for line in (
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "read(path, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
    ):
        assert dangers(line), line
    assert not dangers("model.eval(); re.compile('x'); f(trust_remote_code=s.trust_remote_code)")


def test_nothing_that_is_read_may_execute() -> None:
    files = [*ROOT.glob("*.py"), *(ROOT / "support").rglob("*.py")]
    files += [*(ROOT / "tiny").glob("*.py"), *(ROOT / "bench").glob("*.py")]
    files += (ROOT / "faults").glob("*.py")
    assert len(files) > 40
    for path in files:
        assert not dangers(path.read_text()), path


def test_weights_come_from_safetensors_alone() -> None:
    loads = []
    engines = []  # vLLM has a loader of its own
    for name in ("support/shared/models.py", "eval.py", "egrsd.py", "diagnostics.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Call) and "AutoModel" in ast.unparse(node.func):
                loads.append(ast.unparse(node))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "LLM":
                engines.append(ast.unparse(node))
    weights = [call for call in loads if ".from_pretrained(" in call]
    assert weights and all("use_safetensors=True" in call for call in weights)
    assert engines and all("load_format='safetensors'" in call for call in engines)
