"""Division of one annotation file into training and validation images, stratified by class and reproducible."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ats_detr.data.annotations import CONVERTED, parse_annotations
from ats_detr.data.conversion import is_current, relative_name, write_coco
from ats_detr.data.locate import locate_images
from ats_detr.data.records import image_key
from ats_detr.errors import UserError

VERSION = 2
"""Part of the digest of a written file; must be raised when the same file is divided differently."""
_AUGMENTED = re.compile(r"\.rf\.[0-9a-zA-Z]+(?=\.|$)")
"""Roboflow names the augmented versions of an image `NAME.rf.HASH.jpg`."""


def split_file(
    annotations: Path,
    images: Path | None,
    share: float,
    seed: int,
    train: Path,
    val: Path,
    *,
    images_from: Path | None = None,
) -> Path:
    """Write the annotation files of both parts, unless they are there already for the same file and settings.

    The result is the folder that their file names are relative to. Records are unchanged, except for the names
    of images, which are those of the files found.

    Args:
        annotations: a COCO instances file.
        images: the folder of its images. None: the folders that exporters use are tried.
        share: of the images that are validated on, in (0, 1).
        images_from: the folder that file names are relative to. None: that of the images.

    Raises UserError where a part would be empty.
    """
    content = parse_annotations(annotations)
    records = [record for record in content["images"] if isinstance(record, dict)]
    names = [str(record.get("file_name")) for record in records]
    found = locate_images(names, annotations, images)
    images_from = images_from or found.folder
    state = [VERSION, share, seed, os.path.realpath(images_from), [os.fsdecode(path) for path in found.paths]]
    sha = hashlib.sha256(json.dumps(state).encode())
    sha.update(annotations.read_bytes())
    digest = sha.hexdigest()[:32]
    if is_current(train, digest) and is_current(val, digest):
        return images_from
    keys = [image_key(record.get("id")) for record in records]
    chosen = _choose(keys, names, content["annotations"], share, seed)
    if not chosen or len(chosen) == len(set(keys)):
        side = "validation" if not chosen else "training"
        raise UserError(
            f"{annotations}: a share of {share} of its {len(records)} images leaves none for {side}; choose another one"
        )
    located = {
        id(record): relative_name(found.folder / os.fsdecode(path), images_from)
        for record, path in zip(records, found.paths, strict=True)
        if path
    }
    info = content["info"] if isinstance(content.get("info"), dict) else {}
    known = info[CONVERTED] if isinstance(info.get(CONVERTED), dict) else {}
    known = {key: known[key] for key in ("notes", "upright") if key in known}
    about = {"digest": digest, "source": str(annotations), "share": share, "seed": seed, **known}
    for path, is_val in ((train, False), (val, True)):
        part = {
            "info": {CONVERTED: about, **{key: value for key, value in info.items() if key != CONVERTED}},
            **{key: value for key, value in content.items() if key != "info"},
            "images": [
                {**record, "file_name": located[id(record)]} if id(record) in located else record
                for record in content["images"]
                if (_key(record, "id") in chosen) is is_val
            ],
            "annotations": [
                record for record in content["annotations"] if (_key(record, "image_id") in chosen) is is_val
            ],
        }
        write_coco(part, path)
    return images_from


def _key(record: Any, field: str) -> Any:
    """What identifies the image of a record; records that cannot be used have None and stay in the training part."""
    return image_key(record.get(field)) if isinstance(record, dict) else None


def _choose(
    keys: Sequence[Any], names: Sequence[str], annotations: Sequence[Any], share: float, seed: int
) -> set[Any]:
    """The images of the validation part: of each class, rarest first, its share of the images.

    Augmented versions of one image stay together.
    """
    group_of: dict[Any, str] = {}
    members: dict[str, set[Any]] = defaultdict(set)
    for key, name in zip(keys, names, strict=True):
        if key is not None:
            stem = _AUGMENTED.sub("", name) if _AUGMENTED.search(name) else f"{name}\0{key}"
            members[group_of.setdefault(key, stem)].add(key)
    classes: dict[str, set[str]] = {group: set() for group in members}
    for record in annotations:
        key = _key(record, "image_id")
        if key in group_of:
            classes[group_of[key]].add(str(record.get("category_id")))
    by_class: dict[str, list[str]] = defaultdict(list)
    for group, found in classes.items():
        for name in found or {""}:
            by_class[name].append(group)
    order = random.Random(seed)
    decided: dict[str, bool] = {}
    for name in sorted(by_class, key=lambda name: (len(by_class[name]), name)):
        groups = sorted(by_class[name])
        open_groups = [group for group in groups if group not in decided]
        order.shuffle(open_groups)
        wanted = round(share * len(groups)) - sum(decided.get(group, False) for group in groups)
        for place, group in enumerate(open_groups):
            decided[group] = place < wanted
    if not any(decided.values()) and len(decided) > 1:  # every class is rare
        decided[order.choice(sorted(decided))] = True
    return set().union(*(members[group] for group, is_val in decided.items() if is_val))
