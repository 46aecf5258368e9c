"""Data sets that training tests share with those of the data package."""

from tests.data.conftest import coco_tiny

__all__ = ["coco_tiny"]
