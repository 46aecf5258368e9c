"""Former name of `ats_detr.kernels.dispatch`."""

from ats_detr.kernels.dispatch import choose_backend, is_exporting, runs_inside_graph

__all__ = ["choose_backend", "is_exporting", "runs_inside_graph"]
