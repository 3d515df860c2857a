"""The house rules that a script can check (docs/architecture.md)."""

import ast
import inspect
import typing
from pathlib import Path

import pytest

import ldmkit
from ldmkit.cli import COMMANDS, function_name

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src/ldmkit").rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_RECIPE, MAX_PARAMETERS, MAX_NESTING = 350, 60, 130, 8, 3


def functions(file):
    tree = ast.parse(file.read_text())
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def nesting(node, depth=0):
    """How deep blocks stand in one another; `elif` is not deeper than its `if`."""
    depths = [depth]
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.FunctionDef | ast.ClassDef):
                continue
            block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try)
            elif_ = name == "orelse" and isinstance(child, ast.If) and isinstance(node, ast.If)
            depths.append(nesting(child, depth + (block and not elif_)))
    return max(depths)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_budgets(file):
    lines = len(file.read_text().splitlines())
    assert lines <= MAX_FILE
    allowed = MAX_RECIPE if file.parent.name == "recipes" else MAX_FUNCTION
    for function in functions(file):
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < allowed, function.name
        arguments = function.args.args + function.args.kwonlyargs
        assert len([a for a in arguments if a.arg != "self"]) <= MAX_PARAMETERS, function.name
        if file.parent.name != "recipes":
            assert nesting(function) <= MAX_NESTING, function.name


def test_no_drawers():
    names = {file.stem for file in SOURCES}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_command_equals_function_equals_config():
    for command, config in COMMANDS.items():
        name = function_name(command)
        function = getattr(ldmkit, name)
        assert function.__module__ == f"ldmkit.recipes.{name}"
        hints = typing.get_type_hints(inspect.unwrap(function))
        assert hints["config"] is config
        assert config.__doc__


def test_the_public_names_are_the_lazy_ones():
    for name in ldmkit.__all__:
        assert getattr(ldmkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ldmkit.nonsense  # pyright: ignore[reportAttributeAccessIssue]


def test_nothing_in_the_package_unpickles_evaluates_or_starts_a_shell():
    modules = {"pickle", "subprocess", "shelve", "dill", "marshal"}
    calls = {
        "eval(",
        "exec(",
        "os.system(",
        "os.popen(",
        "torch.load(",
        "torch.save(",
        "yaml.load(",
    }
    for file in SOURCES:
        if file.name == "unpickling.py":  # whose reading process is torch's restricted one
            text = file.read_text()
            assert text.count("torch.load(") == text.count("weights_only=True") == 1
            assert "shell=" not in text
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert f"{ast.unparse(node.func)}(" not in calls, f"{file}:{node.lineno}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] not in modules, f"{file}:{node.lineno}"
