"""What reading a dataset finds wrong, collected so that training and `datasets check` report the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from ats_detr.errors import UserError

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
_MAX_PLACES = 1000


class AnnotationError(UserError):
    """The annotation file cannot be used. The message names the file, the problem and how to fix it."""


@dataclass
class Finding:
    """One kind of problem and where it was found."""

    level: Level
    """error: the dataset is rejected; warning: probably not intended, or repaired; note: worth knowing."""
    what: str
    fix: str = ""
    count: int = 0
    places: list[str] = field(default_factory=list)
    """The first 1000 places."""

    def __str__(self) -> str:
        more = "" if self.count <= 1 else f" and {self.count - 1} more"
        fix = f" ({self.fix})" if self.fix else ""
        return f"{self.count} {self.what}: {self.places[0]}{more}{fix}"


class Findings:
    """The findings about one annotation file and its images.

    Args:
        source: the annotation file, which messages name.
        skip_bad: records that cannot be used are omitted with a warning instead of being errors.
    """

    def __init__(self, source: object, *, skip_bad: bool = False) -> None:
        self.source, self.skip_bad = source, skip_bad
        self._by_what: dict[str, Finding] = {}

    def __iter__(self) -> Iterator[Finding]:
        """The worst first."""
        return iter(sorted(self._by_what.values(), key=lambda finding: LEVELS.index(finding.level)))

    def add(self, level: Level, what: str, places: Iterable[object], fix: str = "") -> None:
        """Add places to the finding `what`; without any place nothing is added."""
        for place in places:
            finding = self._by_what.setdefault(what, Finding(level, what, fix))
            finding.count += 1
            if finding.count <= _MAX_PLACES:
                finding.places.append(str(place))

    def warn(self, what: str, place: object) -> None:
        self.add("warning", what, [place])

    def bad(self, what: str, place: object) -> None:
        """A record that cannot be used."""
        if self.skip_bad:
            self.warn(f"{what} (omitted)", place)
        else:
            self.add("error", what, [place], "data.on_bad_annotation=skip omits them")

    def of(self, level: Level) -> list[Finding]:
        return [finding for finding in self if finding.level == level]

    def settle(self, logger: logging.Logger) -> None:
        """Log the warnings, one line each. Raises AnnotationError with the first error, if there is any."""
        errors = self.of("error")
        if errors:
            others = sum(finding.count for finding in errors[1:])
            more = f"; {others} further errors, `datasets check` lists all" if others else ""
            raise AnnotationError(f"{self.source}: {errors[0]}{more}")
        for finding in self.of("warning"):
            logger.warning("%s: %s", self.source, finding)
