"""Datasets and loaders: COCO-format folders, the published transforms, the synthetic dataset."""

from ats_detr.data.coco import ClassMap, CocoDetection
from ats_detr.data.loader import EvaluationLoader, TrainingLoader
from ats_detr.data.synthetic import synthetic_dataset
from ats_detr.data.transforms import evaluation_transform, training_transform

__all__ = [
    "ClassMap",
    "CocoDetection",
    "EvaluationLoader",
    "TrainingLoader",
    "evaluation_transform",
    "synthetic_dataset",
    "training_transform",
]
