"""Compilation of the kernels of a configuration before its first pass, in parallel processes.

Compiled at their first launches, kernels take seconds each, sequentially. Passes over tensors without contents
find the kernels; see `kernels.gpu.compilation`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import yaml
from torch import Tensor, nn

from ats_detr.batch import bucket_size
from ats_detr.config import Config, config_to_dict
from ats_detr.data.transforms import resized_size
from ats_detr.kernels import TokenPlan, select_tokens
from ats_detr.kernels.dispatch import HAS_TRITON
from ats_detr.model import Detr, build_without_fetching, selector
from ats_detr.model.compiled import freeze_weights

logger = logging.getLogger(__name__)

Mode = Literal["predict", "compile", "train"]
MODES: tuple[Mode, ...] = ("predict", "compile", "train")
"""Passes of `Detector.predict`; of `Detector.compile`, with weights in another dtype; of training."""
COCO_CLASSES, COMMON_SIZE = 91, (480, 640)
"""Class indices and (height, width) of the images where nothing else is known."""
_TIMEOUT_S = 900
"""Less than processes of a training wait for each other."""


def find_variants(
    config: Config,
    modes: Sequence[Mode],
    *,
    dtype: torch.dtype,
    image_sizes: Sequence[tuple[int, int]] = (COMMON_SIZE,),
    num_classes: int = COCO_CLASSES,
    gpu: str | None = None,
) -> list[Any]:
    """The kernel variants that passes over images of these (height, width) launch. Needs no GPU.

    Changes PyTorch and Triton for the whole process while it runs.

    Args:
        dtype: of the weights with `compile`. Training has that of the configuration.
        gpu: name of the GPU, whose tuning results are used; see `compilation.recorded`.
    """
    from ats_detr.kernels.gpu import compilation  # Triton is optional

    data, precision = config.data, getattr(torch, config.train.precision)

    def build() -> Detr:
        return build_without_fetching(config, num_classes).eval()

    passes: list[tuple[Detr, torch.dtype, int]] = []
    """Model, dtype of the images, and number of images."""
    if "predict" in modes:
        passes.append((build(), torch.float32, 1))
    if "compile" in modes:
        passes.append((freeze_weights(build(), dtype), dtype, 1))
    if "train" in modes:  # the model itself, its evaluation, and a teacher
        passes.append((build().train(), precision, data.batch_size))
        passes.append((build(), torch.float32, data.eval_batch_size))
        passes.append((freeze_weights(build(), precision), precision, data.batch_size))
    backend = patch.dict(os.environ, {"ATS_DETR_BACKEND": ""})
    select = patch.object(selector, "select_tokens", functools.partial(select_share, share=1 / 3))
    with backend, select, compilation.recorded(gpu) as variants:
        for model, image_dtype, num_images in passes:
            remove_contents(model)
            for size in image_sizes:
                resized = resized_size(size, data.short_side, data.long_side)
                images_B3HW = torch.empty(num_images, 3, *bucket_size(resized, data.size_multiple))
                sizes_B2 = torch.empty(num_images, 2, dtype=torch.int64)
                if model.training:
                    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                        output = model.detect(images_B3HW, sizes_B2)
                    leaves = [tensor for tensor in _tensors(output) if tensor.requires_grad]
                    torch.autograd.backward(leaves, [torch.empty_like(tensor) for tensor in leaves])
                    continue
                images_B3HW = images_B3HW.to(image_dtype, memory_format=torch.channels_last)
                with torch.no_grad():
                    model.detect(images_B3HW, sizes_B2, supervision=False)
    return list(variants)


def remove_contents(model: nn.Module, device: str = "cpu") -> None:
    """Replace all tensors of a model by tensors without contents."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new: Any = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
                    tensors[name] = new.requires_grad_(old.requires_grad)


def select_share(
    scores_BS: Tensor, num_keep_B: Tensor, mask_BS: Tensor, *, capacity: int | None, share: float
) -> TokenPlan:
    """`select_tokens`; an exact plan keeps this share of the tokens, since it is not known without contents."""
    batch, num_tokens = scores_BS.shape
    num_kept = int(num_tokens * share) + 1
    plan = select_tokens(scores_BS, num_keep_B, mask_BS, capacity=capacity or batch * num_kept)
    starts = tuple(range(0, batch * num_kept + 1, num_kept))
    return plan if capacity else replace(plan, exact=True, row_starts=starts)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(list(vars(value).values()))


# ----------------------------------------------------------------------------------------- before the first pass
def compile_kernels(
    config: Config,
    device: torch.device,
    modes: Sequence[Mode],
    *,
    dtype: torch.dtype = torch.float32,
    num_classes: int,
) -> None:
    """Compile the kernels of these passes on a CUDA device in other processes, unless they are compiled already.

    Raises no error: kernels that are not compiled now are compiled at their first launch.
    """
    if device.type != "cuda" or not HAS_TRITON or os.environ.get("ATS_DETR_BACKEND") == "reference":
        return
    import triton

    from ats_detr.kernels.gpu import tuning

    if tuning.INTERPRETING:
        return
    major, minor = torch.cuda.get_device_capability(device)
    gpu, dtype_name = torch.cuda.get_device_name(device), str(dtype).removeprefix("torch.")
    options = ["--arch", f"{major}{minor}", "--gpu", gpu, "--dtype", dtype_name]
    options += ["--num-classes", str(num_classes), "--modes", *modes]
    data = config.data
    sizes = (data.short_side, data.long_side, data.size_multiple, data.batch_size, data.eval_batch_size)
    facts = (config.model, sizes, config.train.precision, options, torch.__version__, tuning.versions())
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    done = Path(triton.knobs.cache.dir) / f"ats_detr-{digest}"  # deleted with the compiled kernels
    if done.exists():
        return
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
        command = [sys.executable, "-m", "ats_detr", "kernels", "compile", str(file), *options]
        try:
            status = _run(command, {**os.environ, "PYTHONPATH": path})
        except (OSError, subprocess.TimeoutExpired) as error:
            status = error
    if status == 0:
        with contextlib.suppress(OSError):
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()
    else:
        logger.warning(
            "the kernels could not be compiled in advance (%s); each is compiled when needed", status
        )


def _run(command: Sequence[str], environment: dict[str, str]) -> Any:
    """The exit code of a command, whose processes end with this function."""
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            return process.wait(_TIMEOUT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
