"""Weights and proposals from elsewhere, read so that nothing in a file can run or fill the memory.

Torch files are read with ``weights_only=True``, pickles by an unpickler that makes arrays and plain
containers only, safetensors by their library. What a file is, is judged by its content.
"""

from __future__ import annotations

import json
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from safetensors import safe_open
from safetensors.torch import load_file

from ..config import ConfigError
from ..image_files import LFS_POINTER
from ..messages import one_line

MAX_DEPTH = 100
"""Containers within containers: comparing deeper ones can overflow the interpreter's stack."""
DISTRUST = "do not trust it, get the weights or arrays alone"

_ZIP = b"PK\x03\x04"
_TORCH_BEFORE_ZIP = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_PICKLES_BEFORE_ZIP = 5  # magic number, version, system, the object, names of its storages
_NOT_WEIGHTS = (
    (LFS_POINTER, "it is a Git LFS pointer: fetch the file with 'git lfs pull'"),
    (b"<", "it is a web page or XML: download the file itself"),
    (b"\x1f\x8b", "it is compressed with gzip: unpack it"),
    (b"\x89HDF", "it is an HDF5 file: save its weights with torch"),
)
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")

SPARE_BYTES = 1 << 20
"""That arrays may share: Python has each byte once."""
_INSTRUCTIONS = {
    *("MARK", "STOP", "PROTO", "FRAME", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND"),
    *("APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "BINPERSID"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    # What these name is judged when it is looked up.
    *("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"),
}
"""Of a pickle. Left out are those of registered extensions and of tricks with the stack."""
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_SETS = {"SETITEM", "SETITEMS"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "REDUCE", "BUILD", "NEWOBJ"}
_SPARE_NUMBERS = 1000  # not all picklers number their objects without gaps
_MOST_REPEATS = 10
"""Objects in a tuple for each byte of the file."""
_CALLED = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
_SIZED = ("bytearray", "Tensor", "Storage")
"""Ends of names of types that torch admits; called with a number, each takes as much memory."""
_DICTS = ("OrderedDict", "Counter", "defaultdict")
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
"""By the name of a type of storage, without "Storage"."""
_STORAGE_ID = (5, 6)  # values: "storage", type, key, device, number of elements, old ones a view


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads weights as detectron2's DetectionCheckpointer hands them on.

    Args:
        path: a torch file, a pickle of detectron2's, Detectron's or pycls' model zoo, or
            safetensors, under whatever name.

    Returns:
        ``model``: tensors or arrays by name. With ``matching_heuristics`` their names are to be
        matched by their ends. ``class_names`` where the file has them, and what else a torch file
        holds.

    Raises:
        ConfigError: if the file is missing or corrupt, names anything that could run, or holds no
            weights.
    """
    with _named(path):
        head = _head(path)
        if path.suffix == ".safetensors" or _is_safetensors(head):
            return _checked(_read_safetensors(path))
        with path.open("rb") as file:
            if head.startswith((_ZIP, _TORCH_BEFORE_ZIP)):
                return _checked(_torch_checkpoint(_read_torch(file)))
            if head[257:262] == b"ustar":
                raise pickle.UnpicklingError(
                    "it is of torch before 0.1.10: load it there and save it again"
                )
            if head[:1] != b"\x80" and path.suffix != ".pkl":
                raise pickle.UnpicklingError(
                    "it is neither a torch file, nor a pickle, nor safetensors"
                )
            return _checked(_zoo_checkpoint(_read_pickle(file)))


def read_proposals(path: Path) -> dict[str, Any]:
    """Reads precomputed proposals as detectron2's ``load_proposals_into_dataset`` expects them.

    Args:
        path: a pickle.

    Returns:
        ``ids`` of N images, ``boxes``: N arrays (R, 4) in the units of ``bbox_mode``,
        ``objectness_logits``: N arrays (R,).

    Raises:
        ConfigError: if the file is missing or corrupt, names anything that could run, or holds
            something else.
    """
    with _named(path):
        _head(path)
        with path.open("rb") as file:
            content = _read_pickle(file)
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, no proposals")
        for old, new in (("indexes", "ids"), ("scores", "objectness_logits")):  # Detectron's
            if old in content:
                content[new] = content.pop(old)
        missing = {"ids", "boxes", "objectness_logits"} - set(content)
        if missing:
            raise pickle.UnpicklingError(f"it has no {', '.join(sorted(missing))}: no proposals")
        _check_proposals(content)
        return content


def check_proposal_files(cfg: CfgNode, split: str) -> None:
    """Reads the proposal files of a config where the model asks for proposals.

    detectron2 unpickles them after that; what passed here is safe for it to read.

    Args:
        cfg: a config.
        split: ``TRAIN`` or ``TEST``.

    Raises:
        ConfigError: naming the first file that is not one of proposals and nothing else.
    """
    for name in cfg.DATASETS[f"PROPOSAL_FILES_{split}"] if cfg.MODEL.LOAD_PROPOSALS else ():
        read_proposals(Path(PathManager.get_local_path(name)))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns whatever a stranger's bytes led to into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path} was not loaded: {one_line(error, 300)}") from error
    except Exception as error:  # bytes of no format are taken for any instruction
        detail = f"{type(error).__name__}: {one_line(error, 300)}"
        raise ConfigError(
            f"{path} was not loaded: it is truncated or corrupt ({detail}); get it again"
        ) from error


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise pickle.UnpicklingError("it is a folder: name a file in it")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise pickle.UnpicklingError("it is empty: get it again")
    for start, advice in _NOT_WEIGHTS:
        if head.lstrip().startswith(start):
            raise pickle.UnpicklingError(advice)
    return head


def _is_safetensors(head: bytes) -> bool:
    """Whether a JSON header stands behind its length, which the library limits to 100 MB."""
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
            _scan(file, size)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to allow code
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise pickle.UnpicklingError(_code(named[1])) from error
        reason = "it holds more than weights: save its state_dict() alone"
        if "Unsupported operand" in str(error):
            reason += ", without a pickle_protocol of your own"
        raise pickle.UnpicklingError(reason) from error


def _check_archive(file: BinaryIO, size: int) -> None:
    """Refuses a torch archive that would be larger in memory than on disk."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        files = [record.filename.partition("/")[2] for record in records]
        if "constants.pkl" in files:
            raise pickle.UnpicklingError(
                "it is a TorchScript archive, which is code: save its state_dict()"
            )
        if "data.pkl" not in files:
            raise pickle.UnpicklingError("it is a zip archive, but not of torch's")
        if len({name.casefold() for name in files}) < len(files):
            raise pickle.UnpicklingError(f"it has records of the same name; {DISTRUST}")
        declared = sum(record.file_size for record in records)
        if declared > size or any(x.compress_type != zipfile.ZIP_STORED for x in records):
            raise pickle.UnpicklingError(
                f"its records claim {declared} bytes in a file of {size}, but torch compresses "
                f"nothing; {DISTRUST}"
            )
        with archive.open(records[files.index("data.pkl")]) as content:
            _scan(content, size, dict(zip(files, (x.file_size for x in records), strict=True)))


def _read_pickle(file: BinaryIO) -> Any:
    size = file.seek(0, 2)
    file.seek(0)
    _scan(file, size)
    file.seek(0)
    return _Plain(size).of(_ArrayUnpickler(file, encoding="latin1").load())


def _code(name: str) -> str:
    return f"it names {name}, which is not part of weights or arrays; {DISTRUST}"


class _Seen(NamedTuple):
    """What a scan knows of an object.

    Attributes:
        depth: of the containers in it.
        objects: how many are in it; one that is held twice counts twice.
        name: if it is a global, without its module.
        is_dict: whether it is a dictionary of some kind.
        value: of a number, a short text or a global's name; of these in a tuple, if it has as many
            as name a storage.
    """

    depth: int
    objects: int
    name: str
    is_dict: bool
    value: Any


def _scan(file: BinaryIO | IO[bytes], size: int, records: Mapping[str, int] | None = None) -> None:
    """Goes through the instructions of one pickle without following any.

    Refuses what would let a small file fill the memory, overflow the stack or never end: lengths
    beyond the file, gaps in the table of remembered objects (it is made as long as the largest
    number in it), calls that make objects of a given size, containers nested without end, and
    tuples that hold each other many times over (to be a key, each is counted through). Refuses
    also what older versions of torch (seen: 2.6) take, and then read or write beyond a tensor's
    memory: storages longer than their bytes in the file, and items set in anything but
    dictionaries.

    Args:
        file: read from where it stands to behind the pickle.
        size: bytes of the file.
        records: bytes of each record of the archive that the pickle is in, if it is in one.
    """
    stack: list[_Seen] = []
    marks: list[int] = []
    remembered: dict[int, _Seen] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(
                f"its pickle has the instruction {name}, which arrays do without; {DISTRUST}"
            )
        if name == "FRAME" and int(argument or 0) > size:
            raise EOFError(f"a part of {argument} bytes in a file of {size}")
        if name == "MARK":
            marks.append(len(stack))
        elif name in _PUTS:
            index = len(remembered) if argument is None else int(argument)
            if index > len(remembered) + _SPARE_NUMBERS:
                raise pickle.UnpicklingError(
                    f"its pickle numbers {len(remembered)} objects up to {index}; {DISTRUST}"
                )
            remembered[index] = stack[-1]
        elif name in _GETS:
            stack.append(remembered[int(argument or 0)])
        else:
            under, marked, pushed = _EFFECTS[name]
            start = (marks.pop() if marked else len(stack)) - under
            if start < 0:
                raise IndexError(f"nothing for {name} to take")
            taken = stack[start:]
            del stack[start:]
            if name in _CALLED and taken and taken[0].name.endswith(_SIZED):
                raise pickle.UnpicklingError(
                    f"its pickle calls {taken[0].name}, which makes memory of any size; {DISTRUST}"
                )
            if name in _SETS and not taken[0].is_dict:
                raise pickle.UnpicklingError(
                    f"its pickle sets items of what is no dictionary; {DISTRUST}"
                )
            if name == "BINPERSID":
                _check_storage(taken[0].value, size, records)
            if pushed:
                into = taken[:1] if name in _FILLS else []  # fills what is there
                rest = taken[len(into) :]
                deepest = max(
                    chain((x.depth for x in into), (x.depth + 1 for x in rest)), default=0
                )
                if deepest > MAX_DEPTH:
                    raise pickle.UnpicklingError(
                        f"its pickle nests over {MAX_DEPTH} containers; {DISTRUST}"
                    )
                count = 1 + sum(x.objects for x in taken)
                if count > max(size, 1) * _MOST_REPEATS and name.startswith("TUPLE"):
                    raise pickle.UnpicklingError(
                        f"its pickle holds tuples of {count} objects in a file of {size} bytes; "
                        f"{DISTRUST}"
                    )
                called = str(argument).rpartition(" ")[2] if name == "GLOBAL" else ""
                if name == "STACK_GLOBAL":
                    called = str(taken[1].value)
                is_dict = name in ("EMPTY_DICT", "DICT") or (
                    name == "REDUCE" and taken[0].name in _DICTS
                )
                is_dict |= bool(into) and into[0].is_dict
                stack.append(
                    _Seen(deepest, count, called, is_dict, _value(argument, called, taken))
                )


def _value(argument: Any, called: str, taken: Sequence[_Seen]) -> Any:
    if called or isinstance(argument, int):
        return called or argument
    if isinstance(argument, str) and len(argument) <= _LONGEST_NAME:
        return argument
    return tuple(x.value for x in taken) if len(taken) in _STORAGE_ID else None


def _check_storage(identity: Any, size: int, records: Mapping[str, int] | None) -> None:
    """Refuses a tensor's storage that is longer than what the file has of it.

    Args:
        identity: the tuple by which a pickle of torch's names a storage, as _Seen has it.
        size: bytes of the file.
        records: as in _scan.
    """
    try:
        kind, type_name, key, _, num_elements = identity[: min(_STORAGE_ID)]
        num_bytes = num_elements * _ELEMENT_BYTES[type_name.removesuffix("Storage")]
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise pickle.UnpicklingError(
            f"its pickle has a persistent id that names no storage; {DISTRUST}"
        ) from error
    available = size if records is None else records.get(f"data/{key}", 0)
    if kind != "storage" or not 0 <= num_bytes <= available:
        raise pickle.UnpicklingError(
            f"its pickle claims {num_bytes} bytes for a storage of which the file has {available}; "
            "it is truncated or corrupt: get it again"
        )


def _effects() -> dict[str, tuple[int, bool, bool]]:
    """Returns per instruction: objects taken below the mark, to a mark or not, whether it gives."""
    effects = {}
    for opcode in pickletools.opcodes:
        before = opcode.stack_before
        marked = pickletools.markobject in before
        under = before.index(pickletools.markobject) if marked else len(before)
        effects[opcode.name] = (under, marked, bool(opcode.stack_after))
    return effects


_EFFECTS = _effects()


class _Function:
    """What a pickle may call; without attributes, so that it can change none."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it sets attributes of a function; {DISTRUST}")


class _Dtype:
    """A type of numbers on its way out of a pickle."""

    def __init__(self, name: Any, *_flags: Any) -> None:
        if not (isinstance(name, str) and _DTYPE.fullmatch(name)):
            raise pickle.UnpicklingError(f"it has an array of {name!r}, which are no numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array on its way out of a pickle.

    NumPy's own would take shapes beyond its data, and objects in the place of numbers.
    """

    value: npt.NDArray[Any] | np.generic | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, is_fortran, data = state[-4:]  # behind a version, if any
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(
    data: bytes | bytearray | str, dtype: _Dtype, shape: tuple[int, ...], order: str
) -> npt.NDArray[Any]:
    content = data.encode("latin1") if isinstance(data, str) else data  # a str of Python 2
    declared = math.prod(shape) * dtype.dtype.itemsize
    if declared != len(content) or any(side < 0 for side in shape):
        raise pickle.UnpicklingError(
            f"it has an array of shape {shape} and type {dtype.dtype}, but {len(content)} bytes of "
            "it; the file is corrupt"
        )
    return np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _filled(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, shape, order)
    return array


def _scalar(dtype: _Dtype, data: Any) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, (), "C")[()]
    return array


class _Ordered(dict[Any, Any]):
    """An OrderedDict; attributes that a pickle gives it are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


def _encode(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise pickle.UnpicklingError(f"it encodes with {codec!r}; arrays need latin1 only")
    return text.encode(codec)


_STAND_INS: dict[tuple[str, str], _Function] = {
    **{
        (f"numpy.{core}.{module}", name): _Function(call)
        for core in ("core", "_core")
        for module, name, call in (
            ("multiarray", "_reconstruct", lambda *_: _Array()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _filled),
        )
    },
    ("numpy", "ndarray"): _Function(lambda *_: _Array()),
    ("numpy", "dtype"): _Function(_Dtype),
    ("_codecs", "encode"): _Function(_encode),
    ("collections", "OrderedDict"): _Function(_Ordered),
    # Empty bytes of Python 3 in a pickle for Python 2.
    ("__builtin__", "bytes"): _Function(lambda: b""),
    ("builtins", "bytes"): _Function(lambda: b""),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Makes stand-ins of arrays, and refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(_code(f"{module}.{name}"))
        return _STAND_INS[module, name]


class _Plain:
    """Makes plain containers and arrays of what an _ArrayUnpickler made.

    Its arrays are views: a pickle can name the same bytes any number of times.
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: bytes of the file.
        """
        self._size, self._copied = size, 0
        self._done: dict[int, Any] = {}  # what became of what was met before, by id

    def of(self, value: Any) -> Any:
        """Returns the value with arrays in the place of their stand-ins."""
        if value is None or isinstance(value, bool | int | float | str | bytes | bytearray):
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, _Array) and value.value is not None:
            return self._done.setdefault(id(value), self._copy(value.value))
        if isinstance(value, dict):
            result: Any = self._done.setdefault(id(value), {})
            for key, item in value.items():
                if not isinstance(key, str | int | bytes):
                    raise pickle.UnpicklingError(f"it has a key of type {type(key).__name__}")
                result[key] = self.of(item)
            return result
        if isinstance(value, list):
            result = self._done.setdefault(id(value), [])
            result.extend(self.of(item) for item in value)
            return result
        if isinstance(value, tuple):
            return self._done.setdefault(id(value), tuple(self.of(item) for item in value))
        raise pickle.UnpicklingError(f"it has a {type(value).__name__.strip('_')} without content")

    def _copy(self, view: npt.NDArray[Any] | np.generic) -> npt.NDArray[Any] | np.generic:
        """Returns what can be written, in this machine's order of bytes."""
        self._copied += view.nbytes
        if self._copied > self._size + SPARE_BYTES:
            raise pickle.UnpicklingError(
                f"its arrays have over {self._copied} bytes in a file of {self._size}; {DISTRUST}"
            )
        return view.astype(view.dtype.newbyteorder("="), order="K")


def _zoo_checkpoint(content: Any) -> Any:
    """Returns a model zoo's pickle in the form of a checkpoint; Detectron's have other names."""
    if not isinstance(content, dict) or ("model" in content and "__author__" in content):
        return content
    blobs = content.get("blobs", content)  # backbones have none around them
    weights = {name: x for name, x in blobs.items() if not str(name).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _torch_checkpoint(content: Any) -> Any:
    """Returns the content of a torch file in the form of a checkpoint."""
    if not isinstance(content, dict) or "model" in content:
        return content
    if "model_state" in content:  # pycls'
        weights = content["model_state"].items()
        kept = {name: x for name, x in weights if not name.endswith("num_batches_tracked")}
        return {"model": kept, "__author__": "pycls", "matching_heuristics": True}
    return {"model": content}


def _checked(checkpoint: Any) -> dict[str, Any]:
    """Returns a checkpoint if its model is tensors and arrays by name."""
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not model:
        raise pickle.UnpicklingError("it holds no weights: no tensors by name, nor under 'model'")
    for name, value in model.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor | np.ndarray)):
            inner = next((k for k, v in model.items() if _is_weights(v)), None)
            raise pickle.UnpicklingError(
                f"it holds no weights: {name!r} is of type {type(value).__name__}"
                + (f"; save its {inner!r} alone" if inner else "")
            )
        if isinstance(value, torch.Tensor) and (
            value.layout != torch.strided or value.is_quantized or value.is_meta
        ):
            raise pickle.UnpicklingError(
                f"{name!r} is sparse, quantized or without data; save it as a plain tensor"
            )
        if isinstance(value, torch.Tensor) and value.nbytes > _MOST_REPEATS * (
            value.untyped_storage().nbytes() + SPARE_BYTES
        ):
            raise pickle.UnpicklingError(
                f"{name!r} of shape {tuple(value.shape)} repeats what it stores; save it contiguous"
            )
    return checkpoint


def _is_weights(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(x, torch.Tensor | np.ndarray) for x in value.values())
    )


def _check_proposals(content: dict[str, Any]) -> None:
    ids, boxes, scores = (content[key] for key in ("ids", "boxes", "objectness_logits"))
    lengths = [len(x) if isinstance(x, list | np.ndarray) else None for x in (ids, boxes, scores)]
    if len(set(lengths)) > 1 or None in lengths:
        raise pickle.UnpicklingError(
            f"ids, boxes and objectness_logits have lengths {lengths}; make them equal"
        )
    for image_id, box, score in zip(ids, boxes, scores, strict=True):
        shapes = [getattr(x, "shape", None) for x in (box, score)]
        num_boxes = np.size(score)
        if shapes != [(num_boxes, 4), (num_boxes,)]:
            raise pickle.UnpicklingError(
                f"image {image_id}: boxes and objectness_logits have shapes {shapes[0]} and "
                f"{shapes[1]}; make them (R, 4) and (R,)"
            )
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if mode not in list(BoxMode):
        raise pickle.UnpicklingError(
            f"bbox_mode {mode!r} is not one of {[int(x) for x in BoxMode]}"
        )
