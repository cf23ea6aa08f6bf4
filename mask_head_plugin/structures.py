"""Instance masks kept as run lengths: what ``instances.pred_masks`` holds with MASK_OUTPUT rle.

Shape alphabet: N masks, H and W sides of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from .ops.mask_rle import Rle


def run_lengths(masks: RLEMasks | Tensor) -> list[Rle]:
    """Returns the COCO encodings (counts as text, as in JSON) of what ``pred_masks`` may hold.

    Args:
        masks: RLEMasks, or an (N, H, W) tensor on the CPU.
    """
    if isinstance(masks, RLEMasks):
        rles = masks.rles
    else:
        rles = [coco_mask.encode(np.asarray(mask, np.uint8, order="F")) for mask in masks]
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]


class RLEMasks:
    """The masks of one image, each decoded when it is asked for.

    Stands in for the (N, H, W) bool tensor of detectron2: it has what Instances, Visualizer,
    VideoVisualizer and the COCO, LVIS and Cityscapes evaluators ask of it (its trackers want the
    tensor: MASK_OUTPUT bitmask). Masks are decoded on the CPU, whatever the device.

    Attributes:
        rles: N encodings, for anything that reads COCO's format.
        image_hw: H, W.
    """

    def __init__(self, rles: Sequence[Rle], image_hw: tuple[int, int]) -> None:
        """
        Args:
            rles: N encodings.
            image_hw: H, W; also where N is 0.

        Raises:
            ValueError: if a mask has another size.
        """
        self.rles, self.image_hw = list(rles), (int(image_hw[0]), int(image_hw[1]))
        for index, rle in enumerate(self.rles):
            if tuple(rle["size"]) != self.image_hw:
                raise ValueError(f"mask {index} has size {rle['size']}, the image {self.image_hw}")

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.image_hw))

    def __iter__(self) -> Iterator[npt.NDArray[np.bool_]]:
        """Yields (H, W) bool arrays, one at a time."""
        for rle in self.rles:
            yield coco_mask.decode(rle).astype(bool)

    def __getitem__(self, item: Any) -> Tensor | RLEMasks:
        """
        Args:
            item: an integer; a slice; or, as a tensor, array or list, N bools or any integers. As
                with tensors, uint8 counts as bool.

        Returns:
            For an integer the (H, W) bool tensor, otherwise RLEMasks.

        Raises:
            IndexError: if the index is beyond the masks, there are not N bools, or it is anything
                else: pixels are not to be had so.
        """
        if isinstance(item, slice):
            return RLEMasks(self.rles[item], self.image_hw)
        index = np.asarray(item.cpu() if isinstance(item, Tensor) else item)
        if isinstance(item, list) and not item:
            index = index.astype(int)
        elif index.dtype == np.uint8 and index.ndim:
            index = index.astype(bool)
        is_index = np.issubdtype(index.dtype, np.integer)
        if isinstance(item, tuple) or index.ndim > 1 or not (is_index or index.dtype == bool):
            raise IndexError(f"RLEMasks takes no index {item!r}")
        if index.ndim == 0 and is_index:
            return torch.from_numpy(coco_mask.decode(self.rles[int(index)])).bool()
        if index.dtype == bool and index.shape != (len(self),):
            raise IndexError(f"{index.shape} bools for {len(self)} masks")
        return RLEMasks([self.rles[k] for k in np.arange(len(self))[index]], self.image_hw)

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """Returns the (N, H, W) array, bool unless told."""
        if copy is False:
            raise ValueError("masks are decoded into a new array: copy cannot be False")
        masks = np.zeros(self.shape, dtype or bool)
        for out, mask in zip(masks, self, strict=True):
            out[...] = mask
        return masks

    def numpy(self) -> npt.NDArray[np.bool_]:
        """Returns the (N, H, W) bool array."""
        return self.__array__()

    def any(self, dim: int) -> Tensor:
        """Returns the (H, W) bool tensor of pixels that any mask covers; ``dim`` must be 0."""
        if dim != 0:
            raise ValueError(f"dim is {dim}; masks are joined along dim 0 only")
        if not self.rles:
            return torch.zeros(self.image_hw, dtype=torch.bool)
        return torch.from_numpy(coco_mask.decode(coco_mask.merge(self.rles))).bool()

    def to(self, *args: Any, **kwargs: Any) -> RLEMasks:  # noqa: ARG002  # as Tensor.to
        """Returns itself, whatever the device."""
        return self

    def cpu(self) -> RLEMasks:
        return self

    @staticmethod
    def cat(masks: Sequence[RLEMasks]) -> RLEMasks:
        """Joins the masks of one image; what Instances.cat calls.

        Raises:
            ValueError: if there is nothing to join, or sizes differ.
        """
        if not masks:
            raise ValueError("no masks to join")
        return RLEMasks([rle for part in masks for rle in part.rles], masks[0].image_hw)

    def __repr__(self) -> str:
        return f"RLEMasks({len(self)} masks of {self.image_hw[0]} x {self.image_hw[1]})"
