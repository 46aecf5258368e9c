"""ATS-DETR: an object detector that keeps an adaptive share of its feature tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ats_detr.budgets import MeanBudget
    from ats_detr.config import load_config
    from ats_detr.detector import Detector, Result
    from ats_detr.errors import UserError
    from ats_detr.model import CompiledDetr

__version__ = "0.2.0"
__all__ = ["CompiledDetr", "Detector", "MeanBudget", "Result", "UserError", "load_config"]

_MODULES = {
    "CompiledDetr": "model",
    "Detector": "detector",
    "MeanBudget": "budgets",
    "Result": "detector",
    "UserError": "errors",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import ats_detr` alone does not load torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ats_detr.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
