"""Rows of the classification head and the categories of annotation files that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ats_detr.errors import UserError

COCO_2017_IDS = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
"""The 80 category ids of COCO 2017. Published models have 91 rows, row = category id; row 0 and ten more are unused."""


MAX_ROWS = 100_000


@dataclass(frozen=True, kw_only=True)
class ClassMap:
    """Mapping between rows of the classification head, category ids and names. Stored in every checkpoint."""

    num_rows: int
    """Rows of the classification head; rows that no category uses stay untrained."""
    rows: tuple[int, ...]
    """Row of each category."""
    category_ids: tuple[int, ...]
    """Id of each category in annotation files."""
    names: tuple[str, ...]
    """Name of each category."""

    @staticmethod
    def from_categories(categories: Mapping[int, str]) -> ClassMap:
        """COCO 2017's 80 ids keep the published 91 rows; other ids get the rows 0..n-1 in ascending order."""
        ids = tuple(sorted(categories))
        is_coco = frozenset(ids) == COCO_2017_IDS
        return ClassMap(
            num_rows=91 if is_coco else len(ids),
            rows=ids if is_coco else tuple(range(len(ids))),
            category_ids=ids,
            names=tuple(categories[i] for i in ids),
        )

    def for_file(self, categories: Mapping[int, str], used: Sequence[int]) -> ClassMap:
        """This map with the category ids of an annotation file.

        Ids and names of the file must agree with this map. Where they do not but all names are unique and known,
        categories are identified by name. Raises UserError where neither holds.

        Args:
            categories: names by id, as the file lists them.
            used: the ids that its annotations have.
        """
        own = dict(zip(self.category_ids, self.names, strict=True))
        if all(own.get(i) == categories[i] for i in used) and all(
            own.get(i, name) == name for i, name in categories.items()
        ):
            return self
        id_of = {name: i for i, name in categories.items()}
        if len(id_of) == len(categories) and len(set(self.names)) == len(self.names):
            missing = [categories[i] for i in used if categories[i] not in self.names]
            if not missing:
                kept = [(row, name) for row, name in zip(self.rows, self.names, strict=True) if name in id_of]
                return replace(
                    self,
                    rows=tuple(row for row, _ in kept),
                    names=tuple(name for _, name in kept),
                    category_ids=tuple(id_of[name] for _, name in kept),
                )
        differing = [f"{i} ({categories[i]}{_but(own.get(i))})" for i in used if own.get(i) != categories[i]]
        listed = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise UserError(
            f"category ids outside the model's {len(self.names)} classes: {listed}; ids and names must be those of the"
            " training annotations"
        )

    def name_of_row(self, row: int) -> str:
        """Category name for pictures and tables; `row N` where no category uses the row."""
        return self._name_by_row.get(row, f"row {row}")

    def rows_of(self, category_ids: np.ndarray) -> np.ndarray:
        """int64 rows of an array of category ids, -1 where the id is not in the map."""
        return _look_up(category_ids, self.category_ids, self.rows)

    def category_ids_of(self, rows: np.ndarray) -> np.ndarray:
        """int64 category ids of an array of rows, -1 where no category uses the row."""
        return _look_up(rows, self.rows, self.category_ids)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for checkpoints."""
        categories = [
            {"row": row, "id": category_id, "name": name}
            for row, category_id, name in zip(self.rows, self.category_ids, self.names, strict=True)
        ]
        return {"num_rows": self.num_rows, "categories": categories}

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> ClassMap:
        """Inverse of `to_dict`. Raises UserError where `state` is not its result; it may come from a file."""
        try:
            entries = [(entry["row"], entry["id"], entry["name"]) for entry in state["categories"]]
            num_rows = state["num_rows"]
        except (KeyError, TypeError):
            raise UserError("must have num_rows and categories, each with row, id and name") from None
        rows, ids, names = zip(*entries, strict=True) if entries else ((), (), ())
        if type(num_rows) is not int or not 0 < num_rows <= MAX_ROWS:
            raise UserError(f"num_rows: must be an integer in 1..{MAX_ROWS}")
        for key, values, allowed in (("row", rows, range(num_rows)), ("id", ids, range(-(2**63), 2**63))):
            if not all(type(value) is int and value in allowed for value in values):
                raise UserError(f"{key}: must be integers in {allowed.start}..{allowed.stop - 1}")
            if len(set(values)) < len(values):
                raise UserError(f"{key}: must differ between categories")
        if not all(isinstance(name, str) for name in names):
            raise UserError("name: must be strings")
        return ClassMap(num_rows=num_rows, rows=rows, category_ids=ids, names=names)

    @cached_property
    def _name_by_row(self) -> dict[int, str]:
        return dict(zip(self.rows, self.names, strict=True))


def _but(name: str | None) -> str:
    return "" if name is None else f", in the model {name}"


def _look_up(values: np.ndarray, keys: Sequence[int], results: Sequence[int]) -> np.ndarray:
    """results[keys.index(v)] of each value, -1 for values that are not among the keys."""
    order = np.argsort(keys)
    keys_array, results_array = np.asarray(keys, np.int64)[order], np.asarray(results, np.int64)[order]
    if not len(keys_array):
        return np.full(len(values), -1, np.int64)
    place = np.searchsorted(keys_array, values).clip(max=len(keys_array) - 1)
    return np.where(keys_array[place] == values, results_array[place], -1)
