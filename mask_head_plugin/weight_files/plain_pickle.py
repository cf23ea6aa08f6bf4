r"""Pickles of arrays and plain containers, read so that nothing can run or fill the memory.

Needs NumPy only. What such a pickle holds comes out as it is:

>>> import io, pickle
>>> import numpy as np
>>> weights = {"conv1": np.arange(3.0), "names": ["cat", "dog"]}
>>> read_plain_pickle(io.BytesIO(pickle.dumps(weights)))
{'conv1': array([0., 1., 2.]), 'names': ['cat', 'dog']}

A pickle is a program, and this one tells a shell to say hello: push the function that the global
``os.system`` names, push a tuple of a text, call the one with the other, stop. ``pickle.load``
would do so. Here the first instruction is the last:

>>> program = b"cos\nsystem\n" + b"(S'echo hello'\nt" + b"R" + b"."
>>> read_plain_pickle(io.BytesIO(program))  # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
_pickle.UnpicklingError: it names os.system, which is not part of weights or arrays; ...

How: ``scan_pickle`` goes through the instructions without following any and refuses what would
exhaust memory, stack or time; then an unpickler that knows substitutes for NumPy's functions, and
nothing else, follows them; then arrays and plain containers are made of what that gave.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

MAX_DEPTH = 100
"""Containers within containers: comparing deeper ones can overflow the interpreter's stack."""
MOST_REPEATS = 10
"""How often, on average, a pickle may use what it holds, where each use takes memory or time."""
SPARE_BYTES = 1 << 20
"""What it may use in addition, however small the file."""
DISTRUST = "do not trust it, get the weights or arrays alone"

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")
_OF_NUMBERS = (None, None, None, -1, -1, 0)
"""State of NumPy's types of numbers except the order of bytes: no subarray, fields nor flags."""
_MOST_SIDES = 64  # of NumPy's arrays
_INSTRUCTIONS = {
    *("MARK", "STOP", "PROTO", "FRAME", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND"),
    *("APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "BINPERSID"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    # What these name is checked when it is looked up.
    *("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"),
}
"""Of a pickle. Left out are those of registered extensions and of tricks with the stack."""
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD"}
_SPARE_HANDED = 16 << 20
"""Bytes that functions may get in addition: most of them copy nothing."""
_SPARE_NUMBERS = 1000  # not all picklers number their objects without gaps


def read_plain_pickle(file: BinaryIO) -> Any:
    """Reads a pickle of NumPy arrays, numbers, text, bytes, lists, tuples and dictionaries.

    Arrays come in this machine's order of bytes and can be written to; an OrderedDict comes as a
    dict. Text of Python 2 is read as latin1, as detectron2 does.

    Args:
        file: a binary file that can seek; the pickle is at its start.

    Raises:
        pickle.UnpicklingError: if it holds or names anything else, is truncated or corrupt, or
            would take far more memory, stack or time than a pickle of its size.
    """
    size = file.seek(0, 2)
    file.seek(0)
    try:
        scan_pickle(file, size, _refuse_keys)
        file.seek(0)
        return _Plain(size).of(_ArrayUnpickler(file, encoding="latin1").load())
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(_one_line(str(error))) from error
    except Exception as error:  # bytes of no format are taken for any instruction
        detail = _one_line(f"{type(error).__name__}: {error}")
        raise pickle.UnpicklingError(
            f"it is truncated or corrupt ({detail}); get it again"
        ) from error


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _refuse_keys(name: str, argument: Any, taken: Sequence[Seen]) -> bool:
    """Refuses every odd key; returns whether an object would be one."""
    if any(key.described for key in keys_of(name, taken)):
        raise _odd_key()
    return name.startswith("TUPLE") or is_odd_number(argument)


def _odd_key() -> pickle.UnpicklingError:
    return pickle.UnpicklingError(
        f"its pickle has a key that is neither text nor a usual number; {DISTRUST}"
    )


def is_odd_number(value: Any) -> bool:
    """Whether others can be made to have its hash, so that a dictionary of them takes forever.

    Numbers that are their own hash cannot, nor can text: its hash depends on a secret of the
    process. Tuples can.
    """
    return isinstance(value, int) and abs(value) >= sys.hash_info.modulus


def keys_of(name: str, taken: Sequence[Seen]) -> Sequence[Seen]:
    """Returns what an instruction makes keys of a dictionary, of the objects that it takes."""
    return taken[::2] if name == "DICT" else taken[1::2] if name.startswith("SETITEM") else ()


def refused_name(name: str) -> str:
    """Returns the words for a pickle that names what may run."""
    return f"it names {name}, which is not part of weights or arrays; {DISTRUST}"


@dataclass(slots=True)
class Seen:
    """What a scan knows about an object; one that is remembered and filled later is the same one.

    Attributes:
        depth: of the containers in it.
        weight: objects, and bytes of text and numbers, in it; what is held twice counts twice.
        described: what the caller's ``describe`` has made of it.
        is_held: whether it is in another, or was handed to a function.
    """

    depth: int
    weight: int
    described: Any
    is_held: bool = False


def scan_pickle(
    file: BinaryIO | IO[bytes],
    size: int,
    describe: Callable[[str, Any, Sequence[Seen]], Any] = lambda *_: None,
) -> None:
    """Goes through the instructions of one pickle without following any.

    Refuses what would let a small file fill the memory, overflow the stack or never end: lengths
    beyond the file, gaps in the table of remembered objects (it is made as long as the largest
    number in it), containers nested without end or filled when others hold them already (so that
    their size is not known yet), tuples that hold each other many times over (to be a key, each is
    counted through), and functions called many times with the same large argument (each call may
    copy it).

    Args:
        file: read from its position to the end of the pickle.
        size: bytes of the file.
        describe: called for each instruction but those for marks and remembered objects with its
            name, its argument and the objects that it takes; returns what describes the object that
            it gives, or raises an UnpicklingError.

    Raises:
        pickle.UnpicklingError: for what is refused.
        Exception: of any kind, if it is truncated or corrupt.
    """
    stack: list[Seen] = []
    marks: list[int] = []
    remembered: dict[int, Seen] = {}
    handed, most = 0, size * MOST_REPEATS + _SPARE_HANDED
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        _check_instruction(name, argument, size)
        if name == "MARK":
            marks.append(len(stack))
        elif name in _PUTS:
            remembered[_number(argument, len(remembered))] = stack[-1]
        elif name in _GETS:
            stack.append(remembered[int(argument or 0)])
        else:
            under, marked, gives = _EFFECTS[name]
            start = (marks.pop() if marked else len(stack)) - under
            if start < 0:
                raise IndexError(f"nothing for {name} to take")
            taken = stack[start:]
            del stack[start:]
            described = describe(name, argument, taken)
            if name in _CALLS:
                handed += sum(seen.weight for seen in taken)
            if gives:
                stack.append(_result(name, argument, taken, described))
                _check_result(name, stack[-1], size)
            if handed > most:
                raise pickle.UnpicklingError(
                    f"its pickle hands {handed} bytes to functions in a file of {size}; {DISTRUST}"
                )


def _check_instruction(name: str, argument: Any, size: int) -> None:
    if name not in _INSTRUCTIONS:
        raise pickle.UnpicklingError(
            f"its pickle has the instruction {name}, which arrays do without; {DISTRUST}"
        )
    if name == "FRAME" and argument > size:
        raise EOFError(f"a part of {argument} bytes in a file of {size}")


def _number(argument: Any, num_remembered: int) -> int:
    """Returns the number under which an object is remembered; some instructions give none."""
    number = num_remembered if argument is None else int(argument)
    if number > num_remembered + _SPARE_NUMBERS:
        raise pickle.UnpicklingError(
            f"its pickle numbers {num_remembered} objects up to {number}; {DISTRUST}"
        )
    return number


def _result(name: str, argument: Any, taken: Sequence[Seen], described: Any) -> Seen:
    """Returns what an instruction gives: the first that it takes, filled, or a new object."""
    into = taken[0] if name in FILLS else Seen(0, 1, described)
    inside = taken[1:] if name in FILLS else taken
    if into.is_held:
        raise pickle.UnpicklingError(
            f"its pickle fills a container that another already holds; {DISTRUST}"
        )
    into.depth = max([into.depth, *(seen.depth + 1 for seen in inside)])
    into.weight += sum(seen.weight for seen in inside)
    if isinstance(argument, str | bytes | bytearray):
        into.weight += len(argument)
    elif isinstance(argument, int):
        into.weight += argument.bit_length() // 8
    for seen in inside:
        seen.is_held = True
    return into


def _check_result(name: str, seen: Seen, size: int) -> None:
    if seen.depth > MAX_DEPTH:
        raise pickle.UnpicklingError(f"its pickle nests over {MAX_DEPTH} containers; {DISTRUST}")
    if seen.weight > max(size, 1) * MOST_REPEATS and name.startswith("TUPLE"):
        raise pickle.UnpicklingError(
            f"its pickle holds tuples of {seen.weight} objects in a file of {size} bytes; "
            f"{DISTRUST}"
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
            raise pickle.UnpicklingError(f"it has an array of {name!r}, which are not numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[2:] != _OF_NUMBERS:
            raise pickle.UnpicklingError("it has an array of a type with fields, no numbers")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array on its way out of a pickle.

    NumPy's own would take shapes beyond its data, and objects instead of numbers.
    """

    value: npt.NDArray[Any] | np.generic | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, is_fortran, data = state[-4:]  # after a version, if any
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(
    data: bytes | bytearray | str, dtype: _Dtype, shape: tuple[int, ...], order: str
) -> npt.NDArray[Any]:
    content = data.encode("latin1") if isinstance(data, str) else data  # a str of Python 2
    if len(shape) > _MOST_SIDES or not all(0 <= side <= sys.maxsize for side in shape):
        raise pickle.UnpicklingError(
            "it has an array of a shape that none has; the file is corrupt"
        )
    if math.prod(shape) * dtype.dtype.itemsize != len(content):
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


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> _Array:
    """Takes only what NumPy's arrays are pickled with: its own would make one of any shape."""
    if kind is not _NDARRAY or shape != (0,) or dtype not in ("b", b"b"):
        raise pickle.UnpicklingError(f"it makes an array in a way that NumPy does not; {DISTRUST}")
    return _Array()


def _refuse_call(*_: Any) -> Any:
    raise pickle.UnpicklingError(
        f"it calls numpy.ndarray, which makes memory of any size; {DISTRUST}"
    )


def _ordered(pairs: Sequence[tuple[Any, Any]] = ()) -> _Ordered:
    if any(isinstance(key, tuple) or is_odd_number(key) for key, _ in pairs):
        raise _odd_key()
    return _Ordered(pairs)


class _Ordered(dict[Any, Any]):
    """An OrderedDict; attributes that a pickle gives it are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


def _encode(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise pickle.UnpicklingError(f"it encodes with {codec!r}; arrays need latin1 only")
    return text.encode(codec)


_NDARRAY = _Function(_refuse_call)
_STAND_INS: dict[tuple[str, str], _Function] = {
    **{
        (f"numpy.{core}.{module}", name): _Function(call)
        for core in ("core", "_core")
        for module, name, call in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _filled),
        )
    },
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Function(_Dtype),
    ("_codecs", "encode"): _Function(_encode),
    ("collections", "OrderedDict"): _Function(_ordered),
    # Empty bytes of Python 3 in a pickle for Python 2.
    ("__builtin__", "bytes"): _Function(lambda: b""),
    ("builtins", "bytes"): _Function(lambda: b""),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Makes substitutes of arrays, and refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(refused_name(f"{module}.{name}"))
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
        self._done: dict[int, Any] = {}  # what was made of objects met before, by id

    def of(self, value: Any) -> Any:
        """Returns the value with arrays instead of their substitutes."""
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
