"""Reads weights from untrusted sources without running code or exhausting memory.

Torch files are read with ``weights_only=True``, pickles with plain_pickle, and safetensors files
with their library. A file whose name ends in ``.safetensors`` is always read as a safetensors file.
For other files, the content determines the format. Pickles of protocol 0 or 1 need the ending
``.pkl``.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..config import ConfigError
from ..image_files import LFS_POINTER
from ..messages import one_line
from .plain_pickle import (
    DISTRUST,
    FILLS,
    MOST_REPEATS,
    SPARE_BYTES,
    Seen,
    is_odd_number,
    keys_of,
    read_plain_pickle,
    refused_name,
    scan_pickle,
)

_ZIP = b"PK\x03\x04"
_TORCH_BEFORE_ZIP = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_PICKLES_BEFORE_ZIP = 5  # magic number, version, system, the object, keys of its storages
_NOT_WEIGHTS = (
    (LFS_POINTER, "it is a Git LFS pointer: fetch the file with 'git lfs pull'"),
    (b"<", "it is a web page or XML: download the file itself"),
    (b"\x1f\x8b", "it is compressed with gzip: unpack it"),
    (b"\x89HDF", "it is an HDF5 file: save its weights with torch"),
)

_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
_SIZED = ("bytearray", "Tensor", "Storage")
"""Endings of the names of types that torch allows a pickle to call, although such a call can
allocate any amount of memory.
"""
_DICTS = ("OrderedDict", "Counter", "defaultdict")
_HASHED = (*_DICTS, "set")
_SPARE_COMPARED = 1 << 24
"""Weight of the keys that may be compared, on top of the file's size; enough for a thousand unsafe
keys.
"""
_LONGEST_NAME = 1000
_ELEMENT_BYTES = {
    **dict.fromkeys(
        ("Byte", "Bool", "Char", "Untyped", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1
    ),
    **dict.fromkeys(("BFloat16", "Half", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("ComplexFloat", "Double", "Long"), 8),
    "ComplexDouble": 16,
}
"""Bytes per element by name of the storage type, without "Storage"."""
_STORAGE_ID = (5, 6)
"""Possible lengths of the tuple that identifies a storage: "storage", type, key, device, number of
elements and, in old files, a view.
"""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads weights in the form that detectron2's DetectionCheckpointer uses.

    Args:
        path: a torch file, a pickle from the model zoo of detectron2, Detectron or pycls, or
            a safetensors file.

    Returns:
        A dict with ``model``, which contains tensors or arrays by name. If ``matching_heuristics``
        is set, names must be matched by their endings. The dict also contains ``class_names`` if
        the file has them, and all other content of a torch file.

    Raises:
        ConfigError: if the file is missing or corrupt, refers to code, or contains no weights.
    """
    with file_errors(path):
        head = check_head(path)
        if path.suffix == ".safetensors" or _is_safetensors(head):
            return _checked(_read_safetensors(path))
        with path.open("rb") as file:
            if head.startswith((_ZIP, _TORCH_BEFORE_ZIP)):
                return _checked(_torch_checkpoint(_read_torch(file)))
            if head[257:262] == b"ustar":
                raise pickle.UnpicklingError(
                    "it was written by torch before 0.1.10: if you trust it, load it with a later "
                    "version and save it again"
                )
            if head[:1] != b"\x80" and path.suffix != ".pkl":
                raise pickle.UnpicklingError(
                    "it is not a torch file, a pickle or a safetensors file"
                )
            return _checked(_zoo_checkpoint(read_plain_pickle(file)))


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns any error caused by an untrusted file into a ConfigError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path} was not loaded: {one_line(error, 300)}") from error
    except Exception as error:  # arbitrary bytes can cause any error
        detail = f"{type(error).__name__}: {one_line(error, 300)}"
        raise ConfigError(
            f"{path} was not loaded: it is truncated or corrupt ({detail}); download or copy it "
            "again"
        ) from error


def check_head(path: Path) -> bytes:
    """Returns the start of a file; refuses files that are often downloaded instead of weights."""
    if path.is_dir():
        raise pickle.UnpicklingError("it is a folder: choose a file in it")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise pickle.UnpicklingError("it is empty: download or copy it again")
    for start, advice in _NOT_WEIGHTS:
        if head.lstrip().startswith(start):
            raise pickle.UnpicklingError(advice)
    return head


def _is_safetensors(head: bytes) -> bool:
    """Returns whether the file starts with the length of a header, followed by JSON.

    The library limits the length to 100 MB.
    """
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def _read_safetensors(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"model": load_file(path)}
    with safe_open(path, framework="pt") as file:
        names = (file.metadata() or {}).get("class_names")
    if names is not None:
        checkpoint["class_names"] = json.loads(names)
    return checkpoint


def _read_torch(file: BinaryIO) -> Any:
    is_archive = file.read(4) == _ZIP
    size = file.seek(0, 2)
    if is_archive:
        _check_archive(file, size)
    else:
        file.seek(0)
        for _ in range(_PICKLES_BEFORE_ZIP):
            scan_pickle(file, size, _TorchPickle(size).describe)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message would suggest allowing code
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise pickle.UnpicklingError(refused_name(named[1])) from error
        reason = "it contains more than weights: save only its state_dict()"
        if "Unsupported operand" in str(error):
            reason += ", with the default pickle_protocol"
        raise pickle.UnpicklingError(reason) from error


def _check_archive(file: BinaryIO, size: int) -> None:
    """Refuses a torch archive that would be larger in memory than on disk."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    _check_directory(file, size)
    files = [record.filename.partition("/")[2] for record in records]
    if "constants.pkl" in files:
        raise pickle.UnpicklingError(
            "it is a TorchScript archive, which contains code: save the model's state_dict() "
            "instead"
        )
    if "data.pkl" not in files:
        raise pickle.UnpicklingError("it is a zip archive, but not one that torch wrote")
    if len({name.casefold() for name in files}) < len(files):
        raise pickle.UnpicklingError(f"it has several records with the same name; {DISTRUST}")
    declared = sum(record.file_size for record in records)
    if declared > size or any(x.compress_type != zipfile.ZIP_STORED for x in records):
        raise pickle.UnpicklingError(
            f"its records claim {declared} bytes in a file of {size} bytes, but torch does not "
            f"compress files; {DISTRUST}"
        )
    sizes = dict(zip(files, (x.file_size for x in records), strict=True))
    file.seek(0)
    content = torch._C.PyTorchFileReader(file).get_record("data.pkl")  # what torch.load reads
    scan_pickle(io.BytesIO(content), size, _TorchPickle(size, sizes).describe)


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuses an archive in which torch and zipfile would find different lists of records.

    Torch reads the list at the offset given by the end record, but zipfile reads it directly before
    the end record, which has 22 bytes. In a zip64 archive, which torch writes, two more records
    precede the end record: one of 56 bytes, and one of 20 bytes with the offset of the first.
    """
    file.seek(max(size - 98, 0))
    end = file.read()
    is_zip64 = end[56:60] == b"PK\6\7"
    if is_zip64:
        start = size - 98
        (told,) = struct.unpack_from("<Q", end, 64)
        length, offset = struct.unpack_from("<QQ", end, 40)
    else:
        start = told = size - 22
        length, offset = struct.unpack_from("<LL", end, 88)
    signatures = end[76:80] == b"PK\5\6" and (not is_zip64 or end[:4] == b"PK\6\6")
    if not signatures or end[-2:] != b"\0\0" or told != start or offset + length != start:
        raise pickle.UnpicklingError(
            f"its list of records is not where the end of the file says it is; {DISTRUST}"
        )


@dataclass(slots=True)
class _Described:
    """Facts about an object in a torch file's pickle.

    Attributes:
        name: name of a global, without its module.
        is_dict: whether the object is a dictionary of some kind.
        value: for a number or a short string, the object itself. For a global, its name. For a
            tuple that may identify a storage (see _STORAGE_ID), the values of its items. Otherwise
            None.
        is_odd: whether the hash of the object can be forged.
        num_odd: number of objects inside this object whose hash can be forged. In a dictionary,
            only the keys count.
    """

    name: str = ""
    is_dict: bool = False
    value: Any = None
    is_odd: bool = False
    num_odd: int = 0


class _TorchPickle:
    """Refuses pickles that torch accepts although they exhaust memory or access memory illegally.

    Torch accepts calls that create objects of any size. Older versions (seen in 2.6) also
    accept storages that are longer than their bytes in the file, and set items of objects that are
    not dictionaries.
    """

    def __init__(self, size: int, records: Mapping[str, int] | None = None) -> None:
        """
        Args:
            size: size of the file in bytes.
            records: if the pickle is in an archive, the size of each record in bytes.
        """
        self._size, self._records = size, records
        self._compared = 0  # weight of the keys compared so far

    def describe(self, name: str, argument: Any, taken: Sequence[Seen]) -> _Described:
        """See scan_pickle."""
        first = taken[0].described if taken else _Described()
        called = first.name if name in _CALLS else ""
        if called.endswith(_SIZED):
            raise pickle.UnpicklingError(
                f"its pickle calls {called}, which can allocate any amount of memory; {DISTRUST}"
            )
        if name in ("SETITEM", "SETITEMS") and not first.is_dict:
            raise pickle.UnpicklingError(
                f"its pickle sets items of something other than a dictionary; {DISTRUST}"
            )
        if name == "BINPERSID":
            _check_storage(first.value, self._size, self._records)
        if name in ("GLOBAL", "STACK_GLOBAL"):
            last = (
                str(argument).rpartition(" ")[2]
                if name == "GLOBAL"
                else str(taken[1].described.value)
            )
            return _Described(name=last, value=last)
        result = _Described(
            is_dict=name in ("EMPTY_DICT", "DICT") or called in _DICTS,
            value=_value(argument, [x.described for x in taken]),
            is_odd=_is_odd(name, argument, called),
        )
        self._count_odd(first if name in FILLS else result, name, called, taken)
        return result

    def _count_odd(self, into: _Described, name: str, called: str, taken: Sequence[Seen]) -> None:
        """Counts objects with unsafe hashes inside another object; refuses too many such keys.

        Keys with equal hashes are compared with each other, which takes time in proportion to their
        size.
        """
        if called and called not in _HASHED:
            return
        is_keyed = name in ("DICT", "SETITEM", "SETITEMS")
        inside = keys_of(name, taken) if is_keyed else taken[name in FILLS :]
        num_odd = sum(x.described.num_odd + (x.described.is_odd and not called) for x in inside)
        into.num_odd += num_odd
        if num_odd and (is_keyed or called or name == "BUILD"):
            self._compared += into.num_odd * sum(x.weight for x in inside)
        if self._compared > self._size + _SPARE_COMPARED:
            raise pickle.UnpicklingError(
                f"its pickle has a dictionary or set with {into.num_odd} keys that are neither "
                f"text nor ordinary numbers; {DISTRUST}"
            )


def _is_odd(name: str, argument: Any, called: str) -> bool:
    """Returns whether an object's hash can be forged; hashes of tensors and bytes are safe."""
    if called:
        return not called.startswith(("_rebuild", "encode", "Parameter"))
    return name.startswith("TUPLE") or is_odd_number(argument)


def _value(argument: Any, taken: Sequence[_Described]) -> Any:
    if isinstance(argument, int):
        return argument
    if isinstance(argument, str) and len(argument) <= _LONGEST_NAME:
        return argument
    return tuple(x.value for x in taken) if len(taken) in _STORAGE_ID else None


def _check_storage(identity: Any, size: int, records: Mapping[str, int] | None) -> None:
    """Refuses a tensor's storage that is longer than its bytes in the file.

    Args:
        identity: the tuple that identifies a storage in torch's pickles; see _Described.value.
        size: size of the file in bytes.
        records: as in _TorchPickle.
    """
    try:
        kind, type_name, key, _, num_elements = identity[: min(_STORAGE_ID)]
        num_bytes = num_elements * _ELEMENT_BYTES[type_name.removesuffix("Storage")]
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise pickle.UnpicklingError(
            f"its pickle has a persistent id that does not identify a storage; {DISTRUST}"
        ) from error
    available = size if records is None else records.get(f"data/{key}", 0)
    if kind != "storage" or not 0 <= num_bytes <= available:
        raise pickle.UnpicklingError(
            f"its pickle claims {num_bytes} bytes for a storage, but the file has {available}; "
            "it is truncated or corrupt: download or copy it again"
        )


def _zoo_checkpoint(content: Any) -> Any:
    """Converts a model zoo's pickle to a checkpoint; its names may need matching by endings."""
    if not isinstance(content, dict) or ("model" in content and "__author__" in content):
        return content
    blobs = content.get("blobs", content)  # backbone files have no "blobs"
    weights = {name: x for name, x in blobs.items() if not str(name).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _torch_checkpoint(content: Any) -> Any:
    """Converts the content of a torch file to the form of a checkpoint."""
    if not isinstance(content, dict) or "model" in content:
        return content
    if "model_state" in content:  # written by pycls
        weights = content["model_state"].items()
        kept = {name: x for name, x in weights if not name.endswith("num_batches_tracked")}
        return {"model": kept, "__author__": "pycls", "matching_heuristics": True}
    return {"model": content}


def _checked(checkpoint: Any) -> dict[str, Any]:
    """Returns the checkpoint; raises UnpicklingError unless its model has only named tensors."""
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not model:
        raise pickle.UnpicklingError(
            "it contains no weights, neither as named tensors nor under the key 'model'"
        )
    for name, value in model.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor | np.ndarray)):
            inner = next((k for k, v in model.items() if _is_weights(v)), None)
            raise pickle.UnpicklingError(
                f"it contains more than named tensors: {name!r} is of type {type(value).__name__}"
                + (f"; save only its {inner!r}" if inner else "")
            )
        if isinstance(value, torch.Tensor) and (
            value.layout != torch.strided or value.is_quantized or value.is_meta
        ):
            raise pickle.UnpicklingError(
                f"{name!r} is sparse, is quantized or has no data; save it as a plain tensor"
            )
        if isinstance(value, torch.Tensor) and value.nbytes > MOST_REPEATS * (
            value.untyped_storage().nbytes() + SPARE_BYTES
        ):
            raise pickle.UnpicklingError(
                f"{name!r} of shape {tuple(value.shape)} repeats its storage; save a "
                "contiguous copy"
            )
    return checkpoint


def _is_weights(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(x, torch.Tensor | np.ndarray) for x in value.values())
    )
