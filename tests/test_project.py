"""The files around the package agree with it: version, changelog, citation, table of contents of the documentation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import ats_detr

ROOT = Path(__file__).parents[1]


def test_changelog_and_citation_name_the_version_of_the_package() -> None:
    versions = re.findall(
        r"^## \[(\d[\d.]*)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert versions[0] == (ats_detr.__version__, str(citation["date-released"]))
    assert citation["version"] == ats_detr.__version__


def pages_of(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(part)


def test_the_documentation_site_has_every_page_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages_of(site["nav"])) == pages


def documented_functions(tree: ast.AST) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The docstring of each function and class, with the function whose parameters it describes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield ast.get_docstring(node) or "", node
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    yield ast.get_docstring(node) or "", part


def test_docstrings_describe_parameters_that_exist() -> None:
    """Otherwise a renamed parameter keeps its old name in the docstring."""
    for path in sorted((ROOT / "ats_detr").rglob("*.py")):
        for text, function in documented_functions(ast.parse(path.read_text())):
            section = re.split(r"\n(?=\S)", text.partition("Args:\n")[2])[0]
            described = set(
                ", ".join(re.findall(r"^    (\S[^:\n]*):", section, re.MULTILINE)).split(", ")
            ) - {""}
            parameters = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
            assert described <= parameters, f"{path}:{function.lineno}: {described - parameters}"
