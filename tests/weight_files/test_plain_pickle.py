"""plain_pickle works without torch and detectron2, has correct examples, and limits memory."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest

from mask_head_plugin.weight_files import plain_pickle
from mask_head_plugin.weight_files.plain_pickle import read_plain_pickle

ENCODE = b"c_codecs\nencode\n"
ORDERED = b"ccollections\nOrderedDict\n"


def text(length: int) -> bytes:
    return b"X" + struct.pack("<I", length) + b"a" * length


def test_it_needs_no_torch_or_detectron2_and_its_examples_are_correct():
    code = """
import builtins, doctest, importlib.util, sys
for name in ("torch", "detectron2", "safetensors", "mask_head_plugin"):
    sys.modules[name] = None
spec = importlib.util.spec_from_file_location("plain_pickle", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["plain_pickle"] = module
spec.loader.exec_module(module)
print(doctest.testmod(module))
"""
    command = [sys.executable, "-c", code, plain_pickle.__file__]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "TestResults(failed=0, attempted=6)\n", result.stdout


REPEATED = {
    # every call copies a text of a million bytes
    "encoded text": b"\x80\x02" + ENCODE + b"q\0" + text(10**6) + b"\x8c\x06latin1\x86q\1]("
    + b"h\0h\1R" * 3000 + b"e.",
    # every call creates a dictionary with an entry for each pair in the list
    "dictionaries": b"\x80\x02" + ORDERED + b"q\0](" + b"".join(
        b"]M%ba" % struct.pack("<H", k) + b"Na" for k in range(5_000)
    ) + b"eq\1\x85q\2](" + b"h\0h\2R" * 3000 + b"e.",
    "a list that is filled after it is memoized": b"\x80\x02" + ORDERED + b"q\0]q\1(" + b"".join(
        b"]M%ba" % struct.pack("<H", k) + b"Na" for k in range(5_000)
    ) + b"e0](".replace(b"0", b"\x85q\2") + b"h\0h\2R" * 3000 + b"e.",
}  # fmt: skip


@pytest.mark.parametrize("kind", REPEATED)
def test_functions_cannot_get_the_same_large_argument_repeatedly(kind):
    with pytest.raises(
        pickle.UnpicklingError, match=r"passes \d+ bytes to functions, but has only"
    ):
        read_plain_pickle(io.BytesIO(REPEATED[kind]))


def test_an_array_that_numpy_pickles_twice_can_be_read():
    array = np.arange(10**5)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = [array, array, {"again": array}, (array, [array])]
        found = read_plain_pickle(io.BytesIO(pickle.dumps(content, protocol)))
        assert found[0] is found[1] is found[2]["again"] and (found[0] == array).all()


@pytest.mark.parametrize(
    "content",
    [
        b"]q\0\x85q\1h\0(K\1K\2e.",  # a list in a tuple
        b"]]q\0ah\0K\1a\x86.",  # a list in a list
        b"}q\0\x85q\1h\0K\1Ns.",  # a dictionary
        ORDERED + b")Rq\0\x85h\0}b\x86.",
        ORDERED + b"q\1]q\0\x85Rh\0K\1a\x86.",  # an argument of a function
    ],
)
def test_a_container_within_another_cannot_be_filled(content):
    with pytest.raises(pickle.UnpicklingError, match="fills a container that is already"):
        read_plain_pickle(io.BytesIO(b"\x80\x02" + content))


def test_pickles_filled_in_the_ordinary_way_can_be_read():
    shared = [1, {"a": [2.5] * 3}]
    content = {
        "long": [[k] for k in range(1100)],  # filled in two steps
        "wide": {f"k{k}": shared for k in range(1100)},
        "ordered": OrderedDict(a=shared, b=OrderedDict(c=np.float64(1))),
    }
    for protocol in (0, 2, 4):
        for dumps in (pickle.dumps, pickle._dumps):
            assert read_plain_pickle(io.BytesIO(dumps(content, protocol))) == content


def large_number(length: int) -> bytes:
    return b"\x8b" + struct.pack("<I", length) + b"\1" * length


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
FLOAT = b"cnumpy\ndtype\nU\2f4K\0K\1\x87R"


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (b"](" + large_number(2000) + b"q\1" + b"h\1" * 800 + b"e", r"tuples of \d+ objects"),
        (b"(" + large_number(2000) + b"q\1" + b"h\1" * 800 + b"t", r"tuples of \d+ objects"),
        (b"(" + b"K\1" * 65 + b"t", "an impossible shape"),
        (large_number(2000) + b"\x85", "an impossible shape"),
        (b"J\xff\xff\xff\xff\x85", "an impossible shape"),
    ],
)
def test_a_shape_is_checked_before_it_is_multiplied(shape, told):
    start = b"\x80\x02" + RECONSTRUCT + b"K\0\x85U\1b\x87R(K\1"
    with pytest.raises(pickle.UnpicklingError, match=told):
        read_plain_pickle(io.BytesIO(start + shape + FLOAT + b"\x89U\0tb."))


@pytest.mark.parametrize(
    "made",
    [
        b"cnumpy\nndarray\nJ\0\0\0\2\x85U\1O\x86R",
        b"cnumpy\nndarray\n)R",
        RECONSTRUCT + b"J\0\0\0\2\x85U\1b\x87R",
        RECONSTRUCT + b"K\0\x85U\x0bV2000000000\x87R",
        RECONSTRUCT.replace(b"cnumpy\nndarray", b"cnumpy\ndtype") + b"K\0\x85U\1b\x87R",
    ],
)
def test_arrays_are_only_created_in_the_way_numpy_pickles_them(made):
    """After the check, detectron2 reads proposals with NumPy's functions, which must be safe."""
    state = b"(K\1K\1\x85" + FLOAT + b"\x89U\4\0\0\0\0tb."
    usual = RECONSTRUCT + b"K\0\x85U\1b\x87R"
    assert read_plain_pickle(io.BytesIO(b"\x80\x02" + usual + state)).tolist() == [0]
    with pytest.raises(pickle.UnpicklingError, match=r"calls numpy.ndarray|a way that NumPy does"):
        read_plain_pickle(io.BytesIO(b"\x80\x02" + made + state))


@pytest.mark.parametrize(
    "state", [(("<f4", (2**30,)), None, None, -1, -1, 0), (None,) * 3 + (-1, -1, 1)]
)
def test_a_dtype_with_fields_or_flags_is_refused(state):
    content = b"\x80\x02" + FLOAT + pickle.dumps((3, "<", *state), 2)[2:-1] + b"b."
    with pytest.raises(pickle.UnpicklingError, match="whose type has fields"):
        read_plain_pickle(io.BytesIO(content))


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"\x80\x02]", b"a.", b"\x80\x02(."])
def test_a_truncated_pickle_is_reported(content):
    with pytest.raises(pickle.UnpicklingError, match="truncated or corrupt"):
        read_plain_pickle(io.BytesIO(content))


def test_errors_are_one_line():
    with pytest.raises(pickle.UnpicklingError, match="persistent") as caught:
        read_plain_pickle(io.BytesIO(b"\x80\x02K\x01Q."))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [0, -1, 2**60, "a", b"a", True])
def test_ordinary_keys_can_be_read(key):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps({key: 1, "other": {key: 2}}, protocol)
        assert read_plain_pickle(io.BytesIO(content)) == {key: 1, "other": {key: 2}}


@pytest.mark.parametrize("key", [2**61 - 1, -(2**61), 10 * (2**61 - 1), (1, 2), ()])
@pytest.mark.parametrize("as_other", [False, True])
def test_keys_with_a_possible_hash_collision_are_refused(key, as_other):
    content = {"a": {"b": 1, key: 2}} if as_other else {key: 1}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(
            pickle.UnpicklingError, match=r"dictionary key that is neither|key of type"
        ):
            read_plain_pickle(io.BytesIO(pickle.dumps(content, protocol)))


@pytest.mark.parametrize("pair", [list, tuple])
def test_keys_with_a_possible_hash_collision_are_refused_in_ordered_dicts(pair):
    def ordered(*keys):  # as Python 2 pickles an OrderedDict
        pairs = pickle.dumps([pair([key, (1, 2)]) for key in keys], 2)
        return io.BytesIO(b"\x80\x02" + ORDERED + pairs[2:-1] + b"\x85R.")

    assert read_plain_pickle(ordered("a", 3)) == {"a": (1, 2), 3: (1, 2)}
    for key in (2**61 - 1, -(2**61), (1, 2)):
        with pytest.raises(pickle.UnpicklingError, match="a dictionary key that is neither"):
            read_plain_pickle(ordered("a", key))
