"""The detector as a torch module. Knows configs and kernels; nothing of data sets or training."""

from ats_detr.model.compiled import CompiledDetr
from ats_detr.model.detr import Detr, build_model
from ats_detr.model.output import Detections, DetectorOutput, Prediction, TokenScores, top_detections

__all__ = [
    "CompiledDetr",
    "Detections",
    "DetectorOutput",
    "Detr",
    "Prediction",
    "TokenScores",
    "build_model",
    "top_detections",
]
