"""No shell, no pickles, no evaluated text: what this package starts are programs with lists of arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("hybrimoe", "tools", "native")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Modules and functions of which one use would be a way from data to code.
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "os.spawnl", "os.spawnv", "commands.getoutput",
    "subprocess.getoutput", "subprocess.getstatusoutput", "pickle.load", "pickle.loads", "marshal.loads",
    "shelve.open", "yaml.load", "torch.load",
}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "yaml"}
STARTS = {"run", "Popen", "call", "check_call", "check_output"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: imports {n}" for n in names if n.split(".")[0] in FORBIDDEN_IMPORTS)
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: calls {name}"
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        if "shell" in named and not (isinstance(named["shell"], ast.Constant) and named["shell"].value is False):
            yield f"line {node.lineno}: {name} with shell"
        if "allow_pickle" in named and not (
            isinstance(named["allow_pickle"], ast.Constant) and named["allow_pickle"].value is False
        ):
            yield f"line {node.lineno}: {name} with pickles"
        started = name.startswith("subprocess.") and name.split(".")[1] in STARTS
        if started and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
            yield f"line {node.lineno}: {name} with a text for a command"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source(path: Path) -> None:
    assert list(faults(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_the_check_itself() -> None:
    text = "import pickle\nsubprocess.run('ls', shell=True)\neval(x)\nos.system('ls')\nnp.load(f, allow_pickle=True)\n"
    assert len(list(faults(ast.parse(text)))) == 6
    assert not list(faults(ast.parse("subprocess.run(['ls'], shell=False)\nnp.load(f, allow_pickle=False)")))
