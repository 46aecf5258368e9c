"""Boxes that cannot be what they should be, by the sizes of their images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ats_detr.data.annotations import CocoAnnotations
from ats_detr.data.findings import Findings

_TOLERATED_EXCESS = 0.05
"""Boxes may exceed their image by this share of its side plus one pixel: annotators draw them so, and they are
clipped."""


def check_boxes(annotations: CocoAnnotations, findings: Findings, *, need_objects: bool) -> CocoAnnotations:
    """Find boxes that cannot be what they should be, by the sizes of their images; the result is without them.

    Args:
        need_objects: the images are to be trained on, so that there must be objects.
    """
    index = annotations.image_of_annotation()
    sides = annotations.sizes[index][:, ::-1].astype(np.float64)
    start, size = annotations.boxes_xywh[:, :2], annotations.boxes_xywh[:, 2:]
    counted = ~annotations.crowd
    tolerance = 1 + _TOLERATED_EXCESS * sides
    excess = np.maximum(-start, start + size - sides)
    flat = (size <= 0).any(1)
    outside = counted & ~flat & ((start >= sides) | (start + size <= 0)).any(1)
    beyond = counted & ~outside & (excess > tolerance).any(1)
    clipped = counted & ~outside & ~beyond & (excess > 1).any(1)

    def places(rows: np.ndarray) -> Iterable[str]:
        for row in np.flatnonzero(rows):
            box, (width, height) = annotations.boxes_xywh[row].tolist(), sides[row]
            yield f"{annotations.file_name(index[row])}: bbox {box} in {width:.0f} x {height:.0f} pixels"

    objects = counted & ~flat
    small = objects & (annotations.boxes_xywh <= 1 + _TOLERATED_EXCESS).all(1)
    tiny = objects & (size < 1).all(1)
    corners = objects & (start >= 0).all(1) & (size >= start).all(1) & (size <= sides + tolerance).all(1)
    num_objects, is_implausible = int(objects.sum()), True
    if num_objects and 2 * small.sum() >= num_objects:
        fix = "multiply them by width and height of the image"
        findings.add(
            "error", "boxes within 0..1, which are normalised; pixels are needed", places(small), fix
        )
    elif num_objects and tiny.sum() == num_objects:
        findings.add(
            "error", "boxes smaller than one pixel, which is all of them", places(tiny), "give pixels"
        )
    elif num_objects and corners.sum() == num_objects and 20 * (outside | beyond).sum() >= num_objects:
        fix = "write width and height, not the second corner"
        what = "boxes beyond their image that look like corners [x1, y1, x2, y2] (xyxy)"
        findings.add("error", what, places(outside | beyond), fix)
    else:
        is_implausible = False
        findings.add("warning", "boxes smaller than one pixel", places(tiny))
        for place in places(outside):
            findings.bad("boxes outside their image", place)
        for place in places(beyond):
            findings.bad("boxes that reach far beyond their image", place)
    findings.add("warning", "boxes that exceed their image (clipped)", places(clipped))
    findings.add("warning", "boxes without area (not trained on)", places(counted & flat))
    zero = objects & (annotations.areas == 0)
    findings.add(
        "warning", "objects of area 0 with a box (they count as small in APs, APm, APl)", places(zero)
    )
    omitted = outside | beyond
    is_explained = is_implausible or (omitted.any() and not findings.skip_bad)
    if not (objects & ~omitted).any() and not is_explained:
        counts = (
            f"{int(annotations.crowd.sum())} crowds (iscrowd=1), {int((counted & flat).sum())} boxes without area,"
            f" {int(omitted.sum())} boxes outside their image"
        )
        purpose = "train" if need_objects else "evaluate"
        findings.add(
            "error" if need_objects else "warning",
            f"annotation file without any object to {purpose} on",
            [f"{len(index)} usable annotations: {counts}"],
        )
    return annotations.without(omitted)
