"""plain_pickle stands alone, its examples are true, and a small pickle stays small in memory."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from mask_head_plugin.checkpoint import plain_pickle
from mask_head_plugin.checkpoint.plain_pickle import read_plain_pickle

ENCODE = b"c_codecs\nencode\n"
ORDERED = b"ccollections\nOrderedDict\n"


def text(length: int) -> bytes:
    return b"X" + struct.pack("<I", length) + b"a" * length


def test_it_needs_neither_torch_nor_detectron2_and_its_examples_are_true():
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
    # each call copies a text of a million bytes
    "encoded text": b"\x80\x02" + ENCODE + b"q\0" + text(10**6) + b"\x8c\x06latin1\x86q\1]("
    + b"h\0h\1R" * 3000 + b"e.",
    # as many references as are in the list of pairs
    "dictionaries": b"\x80\x02" + ORDERED + b"q\0](" + b"".join(
        b"]M%ba" % struct.pack("<H", k) + b"Na" for k in range(5_000)
    ) + b"eq\1\x85q\2](" + b"h\0h\2R" * 3000 + b"e.",
    "a list that is filled once it is remembered": b"\x80\x02" + ORDERED + b"q\0]q\1(" + b"".join(
        b"]M%ba" % struct.pack("<H", k) + b"Na" for k in range(5_000)
    ) + b"e0](".replace(b"0", b"\x85q\2") + b"h\0h\2R" * 3000 + b"e.",
}  # fmt: skip


@pytest.mark.parametrize("kind", REPEATED)
def test_functions_are_not_handed_the_same_large_argument_again_and_again(kind):
    with pytest.raises(pickle.UnpicklingError, match=r"hands \d+ bytes to functions in a file of"):
        read_plain_pickle(io.BytesIO(REPEATED[kind]))


def test_what_numpy_itself_pickles_twice_is_read():
    array = np.arange(10**5)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = [array, array, {"again": array}, (array, [array])]
        found = read_plain_pickle(io.BytesIO(pickle.dumps(content, protocol)))
        assert found[0] is found[1] is found[2]["again"] and (found[0] == array).all()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"\x80\x02]", b"a.", b"\x80\x02(."])
def test_half_a_pickle_is_told(content):
    with pytest.raises(pickle.UnpicklingError, match="truncated or corrupt"):
        read_plain_pickle(io.BytesIO(content))


def test_errors_are_one_line():
    with pytest.raises(pickle.UnpicklingError, match="persistent") as caught:
        read_plain_pickle(io.BytesIO(b"\x80\x02K\x01Q."))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [0, -1, 2**60, "a", b"a", True])
def test_usual_keys_are_read(key):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps({key: 1, "other": {key: 2}}, protocol)
        assert read_plain_pickle(io.BytesIO(content)) == {key: 1, "other": {key: 2}}


@pytest.mark.parametrize("key", [2**61 - 1, -(2**61), 10 * (2**61 - 1), (1, 2), ()])
@pytest.mark.parametrize("as_other", [False, True])
def test_keys_that_could_share_a_hash_are_refused(key, as_other):
    content = {"a": {"b": 1, key: 2}} if as_other else {key: 1}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(pickle.UnpicklingError, match=r"a key that is neither|key of type"):
            read_plain_pickle(io.BytesIO(pickle.dumps(content, protocol)))
