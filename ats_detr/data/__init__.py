"""Datasets and loaders: COCO-format folders, the published transforms, the synthetic dataset."""
