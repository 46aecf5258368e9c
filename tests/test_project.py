"""The files around the package agree with it: version, changelog, citation, table of contents of the documentation."""

from __future__ import annotations

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
