"""Adaptation of timm's Swin transformers to detection: any image size, and normalised feature maps."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

PATCH = 4


def is_swin(name: str) -> bool:
    """Whether the timm model of this name is a Swin transformer (version 1)."""
    return name.startswith("swin_")


def creation_options() -> dict[str, bool]:
    """timm arguments that let a Swin transformer accept images of any size."""
    return {"strict_img_size": False, "always_partition": True}


def adapt(body: nn.Module) -> None:
    """Replace the padding of a timm Swin transformer by that of published detectors, in place.

    Weights and their names do not change.
    """
    for module in body.modules():
        if isinstance(module, SwinTransformerBlock):
            module.__class__ = DetectionBlock
            module.register_buffer("attn_mask", None, persistent=False)


class DetectionBlock(SwinTransformerBlock):
    """A Swin block that pads the map to a multiple of the window size before it shifts it.

    timm shifts first, so its padding has another position; without padding the results are equal. The published
    detectors with Swin backbones (Swin Transformer for object detection, Sparse DETR) pad first.
    """

    def _attn(self, x_BHWC: Tensor) -> Tensor:
        height, width = x_BHWC.shape[1:3]
        window_height, window_width = self.window_size
        below, right = -height % window_height, -width % window_width
        padded = F.pad(x_BHWC, (0, 0, 0, right, 0, below))
        shift = tuple(self.shift_size)
        is_shifted = any(shift)
        if is_shifted:
            padded = padded.roll((-shift[0], -shift[1]), dims=(1, 2))
        windows = window_partition(padded, self.window_size).flatten(1, 2)
        mask = self._neighbour_mask(padded) if is_shifted else None
        windows = self.attn(windows, mask=mask).unflatten(1, (window_height, window_width))
        padded = window_reverse(windows, self.window_size, *padded.shape[1:3])
        if is_shifted:
            padded = padded.roll(shift, dims=(1, 2))
        return padded[:, :height, :width]

    def _neighbour_mask(self, padded_BHWC: Tensor) -> Tensor:
        """Additive attention mask [windows, tokens, tokens]: -100 between tokens not adjacent in the image."""
        height, width = padded_BHWC.shape[1:3]
        region = padded_BHWC.new_zeros(1, height, width, 1)
        parts = [
            (slice(-window), slice(-window, -shift), slice(-shift, None))
            for window, shift in zip(self.window_size, self.shift_size, strict=True)
        ]
        for number, (rows, columns) in enumerate(itertools.product(*parts)):
            region[:, rows, columns] = number
        region = window_partition(region, self.window_size).flatten(1)  # [windows, tokens]
        apart = region[:, None, :] != region[:, :, None]
        return torch.zeros_like(apart, dtype=padded_BHWC.dtype).masked_fill(apart, -100.0)


def output_norms(num_channels: list[int]) -> nn.ModuleList:
    """One LayerNorm per feature map, as in the published detectors with Swin backbones."""
    return nn.ModuleList(nn.LayerNorm(channels) for channels in num_channels)


def pad_to_patches(images_B3HW: Tensor) -> Tensor:
    """Images zero-padded at the bottom and right to a multiple of the patch size."""
    height, width = images_B3HW.shape[-2:]
    return F.pad(images_B3HW, (0, -width % PATCH, 0, -height % PATCH))
