r"""Reads pickles of arrays and plain containers without running code or exhausting memory.

Needs only NumPy. The result is the content of the pickle:

>>> import io, pickle
>>> import numpy as np
>>> weights = {"conv1": np.arange(3.0), "names": ["cat", "dog"]}
>>> read_plain_pickle(io.BytesIO(pickle.dumps(weights)))
{'conv1': array([0., 1., 2.]), 'names': ['cat', 'dog']}

A pickle is a program. The following one pushes the function ``os.system``, pushes a tuple with a
string, calls the function with the tuple, and stops. With ``pickle.load``, it would run a shell
command. Here, it is refused at the first instruction:

>>> program = b"cos\nsystem\n" + b"(S'echo hello'\nt" + b"R" + b"."
>>> read_plain_pickle(io.BytesIO(program))  # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
_pickle.UnpicklingError: it refers to os.system, which is not part of weights or arrays; ...

How it works: ``scan_pickle`` checks the instructions without executing them, and refuses pickles
that would exhaust memory, stack or time. Then an unpickler executes the instructions. The only
functions that it can call are substitutes for NumPy's. Its result is converted to arrays and plain
containers.
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
"""Nesting limit for containers; comparing deeper ones can overflow the interpreter's stack."""
MOST_REPEATS = 10
"""Limit on memory and time, as a multiple of the file's size."""
SPARE_BYTES = 1 << 20
"""Additional bytes that a pickle of any size may use."""
DISTRUST = "do not trust it, and ask its author for a file with only weights or arrays"

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")
_OF_NUMBERS = (None, None, None, -1, -1, 0)
"""Pickled state of NumPy's number types after the byte order: no subarray, fields or flags."""
_MOST_SIDES = 64  # NumPy's limit for the number of dimensions
_INSTRUCTIONS = {
    *("MARK", "STOP", "PROTO", "FRAME", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND"),
    *("APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "BINPERSID"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    # The names that these refer to are checked when they are looked up.
    *("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"),
}
"""Allowed instructions; all others are refused, because pickles of weights do not need them."""
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD"}
_SPARE_HANDED = 16 << 20
"""Additional bytes that may be passed to functions; most functions do not copy their arguments."""
_SPARE_NUMBERS = 1000  # some picklers leave gaps when they number objects


def read_plain_pickle(file: BinaryIO) -> Any:
    """Reads a pickle of NumPy arrays, numbers, text, bytes, lists, tuples and dictionaries.

    Arrays are writable and have this machine's byte order. An OrderedDict becomes a dict. Strings
    from Python 2 are decoded as latin1, as in detectron2.

    Args:
        file: a seekable binary file with the pickle at its start.

    Raises:
        pickle.UnpicklingError: if the pickle contains or refers to anything else, is truncated or
            corrupt, or would need far more memory, stack or time than is usual for its size.
    """
    size = file.seek(0, 2)
    file.seek(0)
    try:
        scan_pickle(file, size, _refuse_keys)
        file.seek(0)
        return _Plain(size).of(_ArrayUnpickler(file, encoding="latin1").load())
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(_one_line(str(error))) from error
    except Exception as error:  # random bytes can look like any instruction
        detail = _one_line(f"{type(error).__name__}: {error}")
        raise pickle.UnpicklingError(
            f"it is truncated or corrupt ({detail}); download or copy it again"
        ) from error


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _refuse_keys(name: str, argument: Any, taken: Sequence[Seen]) -> bool:
    """Refuses unsafe keys; returns whether the resulting object would be unsafe as a key."""
    if any(key.described for key in keys_of(name, taken)):
        raise _odd_key()
    return name.startswith("TUPLE") or is_odd_number(argument)


def _odd_key() -> pickle.UnpicklingError:
    return pickle.UnpicklingError(
        f"its pickle has a dictionary key that is neither text nor an ordinary number; {DISTRUST}"
    )


def is_odd_number(value: Any) -> bool:
    """Returns whether a value is a number whose hash can be forged.

    Building a dictionary with many keys of equal hash takes forever. Hashes of tuples can be forged
    as well. Small numbers are safe, because they equal their hash. Text is safe, because its hash
    depends on a secret of the process.
    """
    return isinstance(value, int) and abs(value) >= sys.hash_info.modulus


def keys_of(name: str, taken: Sequence[Seen]) -> Sequence[Seen]:
    """Returns the objects that an instruction uses as keys of a dictionary."""
    return taken[::2] if name == "DICT" else taken[1::2] if name.startswith("SETITEM") else ()


def refused_name(name: str) -> str:
    """Returns the message for a pickle that refers to code."""
    return f"it refers to {name}, which is not part of weights or arrays; {DISTRUST}"


@dataclass(slots=True)
class Seen:
    """Facts that a scan collects about an object, updated when the object is filled later.

    Attributes:
        depth: nesting depth of the containers in the object.
        weight: number of objects in the object, plus its bytes of text and numbers. Content that
            occurs twice counts twice.
        described: description that the caller's ``describe`` returned for the object.
        is_held: whether another object contains it, or it was passed to a function.
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
    """Checks the instructions of one pickle without executing them.

    Refuses tricks by which a small file could exhaust memory, overflow the stack or run forever:

    - lengths beyond the end of the file,
    - gaps in the numbers of memoized objects, because the memo grows to the largest number,
    - deeply nested containers,
    - containers that grow when they are already inside another one, whose size was counted before,
    - nested tuples that repeat an inner tuple, because hashing them visits every repetition,
    - functions called many times with the same large argument, because each call may copy it.

    Args:
        file: read from its current position to the end of the pickle.
        size: size of the file in bytes.
        describe: function that returns a description of an instruction's result or raises an
            UnpicklingError. It is called with the instruction's name, its argument and the objects
            that it takes from the stack, but not for marks and remembered objects.

    Raises:
        pickle.UnpicklingError: if the pickle is refused.
        Exception: of any type, if the pickle is truncated or corrupt.
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
                    f"its pickle passes {handed} bytes to functions, but has only {size} bytes; "
                    + DISTRUST
                )


def _check_instruction(name: str, argument: Any, size: int) -> None:
    if name not in _INSTRUCTIONS:
        raise pickle.UnpicklingError(
            f"its pickle has the instruction {name}, which arrays do not need; {DISTRUST}"
        )
    if name == "FRAME" and argument > size:
        raise EOFError(f"a part has {argument} bytes, but the file has {size}")


def _number(argument: Any, num_remembered: int) -> int:
    """Returns the number under which an object is remembered: the argument or the next number."""
    number = num_remembered if argument is None else int(argument)
    if number > num_remembered + _SPARE_NUMBERS:
        raise pickle.UnpicklingError(
            f"its pickle assigns the number {number} to an object after only {num_remembered} "
            f"others; {DISTRUST}"
        )
    return number


def _result(name: str, argument: Any, taken: Sequence[Seen], described: Any) -> Seen:
    """Returns the result of an instruction: a new object, or the container that was filled."""
    into = taken[0] if name in FILLS else Seen(0, 1, described)
    inside = taken[1:] if name in FILLS else taken
    if into.is_held:
        raise pickle.UnpicklingError(
            f"its pickle fills a container that is already inside another one; {DISTRUST}"
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
        raise pickle.UnpicklingError(
            f"its pickle nests more than {MAX_DEPTH} containers; {DISTRUST}"
        )
    if seen.weight > max(size, 1) * MOST_REPEATS and name.startswith("TUPLE"):
        raise pickle.UnpicklingError(
            f"its pickle has tuples of {seen.weight} objects in a file of {size} bytes; {DISTRUST}"
        )


def _effects() -> dict[str, tuple[int, bool, bool]]:
    """Returns the effects of each instruction on the stack.

    The three entries are the number of objects that the instruction takes below the mark, whether
    it takes a mark, and whether it pushes an object.
    """
    effects = {}
    for opcode in pickletools.opcodes:
        before = opcode.stack_before
        marked = pickletools.markobject in before
        under = before.index(pickletools.markobject) if marked else len(before)
        effects[opcode.name] = (under, marked, bool(opcode.stack_after))
    return effects


_EFFECTS = _effects()


class _Function:
    """A function that a pickle may call; it has no attributes that a pickle could change."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it sets attributes of a function; {DISTRUST}")


class _Dtype:
    """A number type while it is being unpickled."""

    def __init__(self, name: Any, *_flags: Any) -> None:
        if not (isinstance(name, str) and _DTYPE.fullmatch(name)):
            raise pickle.UnpicklingError(
                f"it has an array of type {name!r}, which is not a numeric type"
            )
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[2:] != _OF_NUMBERS:
            raise pickle.UnpicklingError(
                "it has an array whose type has fields instead of plain numbers"
            )
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array while it is being unpickled.

    NumPy's own class would accept shapes beyond the data, and objects instead of numbers.
    """

    value: npt.NDArray[Any] | np.generic | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, is_fortran, data = state[-4:]  # a version may precede these
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(
    data: bytes | bytearray | str, dtype: _Dtype, shape: tuple[int, ...], order: str
) -> npt.NDArray[Any]:
    content = data.encode("latin1") if isinstance(data, str) else data  # str from Python 2
    if len(shape) > _MOST_SIDES or not all(0 <= side <= sys.maxsize for side in shape):
        raise pickle.UnpicklingError(
            "it has an array with an impossible shape; the file is corrupt"
        )
    if math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise pickle.UnpicklingError(
            f"it has an array of shape {shape} and type {dtype.dtype} with {len(content)} bytes of "
            "data; the file is corrupt"
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
    """Accepts only arguments that NumPy writes; NumPy's function would allocate any shape."""
    if kind is not _NDARRAY or shape != (0,) or dtype not in ("b", b"b"):
        raise pickle.UnpicklingError(
            f"it creates an array in a way that NumPy does not; {DISTRUST}"
        )
    return _Array()


def _refuse_call(*_: Any) -> Any:
    raise pickle.UnpicklingError(
        f"it calls numpy.ndarray, which can allocate any amount of memory; {DISTRUST}"
    )


def _ordered(pairs: Sequence[tuple[Any, Any]] = ()) -> _Ordered:
    if any(isinstance(key, tuple) or is_odd_number(key) for key, _ in pairs):
        raise _odd_key()
    return _Ordered(pairs)


class _Ordered(dict[Any, Any]):
    """An OrderedDict that drops attributes set by a pickle."""

    def __setstate__(self, state: Any) -> None:
        pass


def _encode(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise pickle.UnpicklingError(f"it uses the encoding {codec!r}; arrays need only latin1")
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
    # Python 3 writes empty bytes like this in a pickle for Python 2.
    ("__builtin__", "bytes"): _Function(lambda: b""),
    ("builtins", "bytes"): _Function(lambda: b""),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles substitutes for arrays, and refuses all other globals."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(refused_name(f"{module}.{name}"))
        return _STAND_INS[module, name]


class _Plain:
    """Converts the result of an _ArrayUnpickler to plain containers and arrays.

    The unpickler's arrays are views, because a pickle can use the same bytes any number of times.
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: size of the file in bytes.
        """
        self._size, self._copied = size, 0
        self._done: dict[int, Any] = {}  # results for objects that were already converted, by id

    def of(self, value: Any) -> Any:
        """Returns the value with arrays in place of their substitutes."""
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
                    raise pickle.UnpicklingError(
                        f"it has a dictionary key of type {type(key).__name__}; keys must be text, "
                        "whole numbers or bytes"
                    )
                result[key] = self.of(item)
            return result
        if isinstance(value, list):
            result = self._done.setdefault(id(value), [])
            result.extend(self.of(item) for item in value)
            return result
        if isinstance(value, tuple):
            return self._done.setdefault(id(value), tuple(self.of(item) for item in value))
        raise pickle.UnpicklingError(
            f"it has an empty object of type {type(value).__name__.strip('_')}"
        )

    def _copy(self, view: npt.NDArray[Any] | np.generic) -> npt.NDArray[Any] | np.generic:
        """Returns a writable array in this machine's byte order."""
        self._copied += view.nbytes
        if self._copied > self._size + SPARE_BYTES:
            raise pickle.UnpicklingError(
                f"its arrays have at least {self._copied} bytes in a file of {self._size} bytes; "
                f"{DISTRUST}"
            )
        return view.astype(view.dtype.newbyteorder("="), order="K")
