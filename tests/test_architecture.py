"""Who may import whom, read from the sources without running them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import visualcloze_deft

ROOT = Path(visualcloze_deft.__file__).parent
PACKAGE = ROOT.name


def dotted(path: Path) -> str:
    return ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts))


MODULES = {dotted(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Our modules that `module` imports anywhere, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} line {node.lineno}: a relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
            found.add(str(node.module))
    return found & set(MODULES)


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("errors", set()),
        ("folders", set()),
        ("cells", set()),
        ("prompt", set()),
        ("grid", {"cells", "errors"}),
        ("flow", set()),
        ("data.render", set()),
    ],
)
def test_the_lowest_modules_stand_alone(module: str, allowed: set[str]) -> None:
    assert imports(f"{PACKAGE}.{module}") <= {f"{PACKAGE}.{name}" for name in allowed}


def test_nothing_but_main_imports_the_command_line() -> None:
    importers = {module for module in MODULES if f"{PACKAGE}.cli" in imports(module)}
    assert importers == {f"{PACKAGE}.__main__"}


def test_data_sources_do_not_import_each_other() -> None:
    names = ("folder", "graph200k", "dreambooth", "dreambench_plus", "insdet", "scenes")
    sources = {f"{PACKAGE}.data.{name}" for name in names}
    assert [pair for name in sources for pair in imports(name) & sources if pair] == []


def test_no_module_is_called_utils() -> None:
    assert {module for module in MODULES if "util" in module or "helper" in module} == set()
