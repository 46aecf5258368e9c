"""The detector as a torch module. Imports configs and kernels, but neither data sets nor training.

Names of tensors end in their shape, one letter for each axis: B images, S all tokens, K kept tokens packed, Q
queries, L levels, P points, H heads, D channels of a head, C channels, N objects, T classes, R prediction rows, M
matched pairs, F output features. HW next to each other are the height and width of an image or a map; a digit is a
size, such as 4 box coordinates.
"""

from ats_detr.model.compiled import CompiledDetr
from ats_detr.model.detr import Detr, build_model, build_without_fetching
from ats_detr.model.output import Detections, DetectorOutput, Prediction, TokenScores, top_detections

__all__ = [
    "CompiledDetr",
    "Detections",
    "DetectorOutput",
    "Detr",
    "Prediction",
    "TokenScores",
    "build_model",
    "build_without_fetching",
    "top_detections",
]
