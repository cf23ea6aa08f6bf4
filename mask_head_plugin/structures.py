"""Instance masks as run lengths: the type of ``instances.pred_masks`` if MASK_OUTPUT is rle.

Shape alphabet: N masks, H and W sides of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils._pytree import tree_map

from .run_lengths import Rle, as_text


def run_lengths(masks: Tensor) -> list[Rle]:
    """Returns the COCO encodings of ``pred_masks``, with counts as text.

    Args:
        masks: RLEMasks, or an (N, H, W) tensor on the CPU.
    """
    if isinstance(masks, RLEMasks):
        rles = masks.rles
    else:
        rles = [coco_mask.encode(np.asarray(mask, np.uint8, order="F")) for mask in masks]
    return [as_text(rle) for rle in rles]


class RLEMasks(Tensor):
    """The masks of one image: detectron2's (N, H, W) bool tensor, stored as run lengths.

    This is a tensor without dense storage. If you select masks, concatenate masks of one image,
    copy masks, or move them to a device, the result is RLEMasks. All other operations of PyTorch or
    NumPy work on the decoded tensor. Loops and integer indices decode one mask at a time; other
    operations temporarily decode all N masks, which takes N * H * W bytes.

    Differs from a dense tensor: operations return copies, never views, and masks cannot be changed
    in place. If your code needs views or in-place changes, set MODEL.MASK_OUTPUT to bitmask.

    Attributes:
        rles: N encodings in COCO's format.
        image_hw: H, W.
    """

    rles: list[Rle]
    image_hw: tuple[int, int]

    # Disabled so that results are not wrapped as RLEMasks; __torch_dispatch__ handles all calls.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls, rles: Sequence[Rle], image_hw: tuple[int, int], device: torch.device | str = "cpu"
    ) -> RLEMasks:
        """
        Args:
            rles: N encodings.
            image_hw: H, W; required even if N is 0.
            device: device of the decoded masks. The encodings stay on the CPU.

        Raises:
            ValueError: if a mask has a different size.
        """
        hw = int(image_hw[0]), int(image_hw[1])
        for index, rle in enumerate(rles):
            if tuple(rle["size"]) != hw:
                raise ValueError(f"mask {index} has the size {rle['size']}, but the image has {hw}")
        masks: RLEMasks = Tensor._make_wrapper_subclass(
            cls, (len(rles), *hw), dtype=torch.bool, device=torch.device(device)
        )
        masks.rles, masks.image_hw = list(rles), hw
        return masks

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs a PyTorch operator on the encodings if possible, otherwise on the decoded masks."""
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        for position, argument in enumerate(func._schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(given, RLEMasks):
                given._refuse(name)
        if name in _KEEP_ENCODINGS and kwargs.get("dtype") in (None, torch.bool):
            return args[0]._of(args[0].rles, kwargs.get("device"))
        if name == "cat" and _are_of_one_image(*args, **kwargs):
            return args[0][0]._of([rle for part in args[0] for rle in part.rles])
        args, kwargs = tree_map(_dense, (args, kwargs))
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """Returns the (N, H, W) bool tensor."""
        return torch.from_numpy(self.numpy()).to(self.device)

    def __getitem__(self, item: Any) -> Tensor:
        """Selects masks or pixels with any index that a tensor accepts.

        Returns:
            RLEMasks if the index is a slice, N bools, or a list, array or tensor of integers. An
            (H, W) bool tensor if it is an integer. A dense tensor if it selects pixels or adds
            axes.

        Raises:
            IndexError: if the index is out of range or not valid for a tensor.
        """
        if isinstance(item, slice):
            return self._of(self.rles[item])
        if isinstance(item, tuple) or item is None or item is Ellipsis or np.ndim(item) > 1:
            return self.dense()[item]
        rows = torch.arange(len(self))[item.cpu() if isinstance(item, Tensor) else item]
        if rows.ndim == 0:
            return self._of([self.rles[int(rows)]]).dense()[0]
        return self._of([self.rles[k] for k in rows.tolist()])

    def __setitem__(self, item: Any, value: Any) -> NoReturn:
        self._refuse("assignment")

    def __iter__(self) -> Iterator[Tensor]:
        """Yields (H, W) bool tensors, one at a time."""
        return (self[k] for k in range(len(self)))

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """Returns the (N, H, W) array, bool by default."""
        if copy is False:
            raise ValueError("masks are decoded into a new array, so copy cannot be False")
        return self.numpy().astype(dtype or bool, copy=False)

    def numpy(self, *, force: bool = True) -> npt.NDArray[np.bool_]:  # noqa: ARG002  # Tensor's
        """Returns the (N, H, W) bool array, regardless of the device."""
        masks = np.zeros(self.shape, bool)
        for out, rle in zip(masks, self.rles, strict=True):
            out[...] = coco_mask.decode(rle)
        return masks

    def tolist(self) -> list[Any]:
        return self.numpy().tolist()

    def area(self) -> Tensor:
        """Returns the (N,) pixel counts, as in PolygonMasks.area, without decoding masks."""
        return torch.tensor([int(coco_mask.area(x)) for x in self.rles], device=self.device).long()

    @staticmethod
    def cat(masks: Sequence[Tensor]) -> Tensor:
        """Concatenates masks of one image, like torch.cat.

        Raises:
            ValueError: if the sequence is empty.
            RuntimeError: if sizes differ.
        """
        if not masks:
            raise ValueError("no masks to concatenate")
        return torch.cat(list(masks))

    def data_ptr(self) -> NoReturn:
        self._refuse("data_ptr()")

    def untyped_storage(self) -> NoReturn:
        self._refuse("untyped_storage()")

    def __dlpack__(self, **options: Any) -> Any:
        return self.dense().__dlpack__(**options)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return RLEMasks, (self.rles, self.image_hw, str(self.device))

    def __deepcopy__(self, memo: dict[int, Any]) -> RLEMasks:
        return memo.setdefault(id(self), self._of(self.rles))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RLEMasks({len(self)} masks of {self.image_hw[0]} x {self.image_hw[1]})"

    def _of(self, rles: Sequence[Rle], device: torch.device | None = None) -> RLEMasks:
        return RLEMasks(rles, self.image_hw, device or self.device)

    def _refuse(self, what: str) -> NoReturn:
        # Not a TypeError, after which Python would try another method for operators such as &=.
        raise RuntimeError(
            f"{what} needs masks in memory, but pred_masks is an RLEMasks, which stores run "
            "lengths; use the copy that pred_masks.dense() returns, or set MODEL.MASK_OUTPUT to "
            "bitmask"
        )


_KEEP_ENCODINGS = ("_to_copy", "alias", "clone", "detach")


def _are_of_one_image(masks: Sequence[Any], dim: int = 0) -> bool:
    """Returns whether all masks are RLEMasks of one image, and are concatenated as a list."""
    are_rles = all(isinstance(x, RLEMasks) for x in masks)
    return dim in (0, -3) and are_rles and len({x.image_hw for x in masks}) == 1


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, RLEMasks) else value
