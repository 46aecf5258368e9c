"""ATS-DETR: an object detector that decides, image by image, how many feature tokens it needs."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["Detector", "Result"]

if TYPE_CHECKING:
    from ats_detr.detector import Detector, Result


def __getattr__(name: str) -> Any:
    """`from ats_detr import Detector`, without loading torch for those who import something else."""
    if name in __all__:
        from ats_detr import detector

        return getattr(detector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
