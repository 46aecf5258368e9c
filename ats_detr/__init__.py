"""ATS-DETR: an object detector that decides, image by image, how many feature tokens it needs."""

__version__ = "0.1.0"
