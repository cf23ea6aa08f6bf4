"""Untrusted files load with equal values or are refused by name. Their code never runs."""

from __future__ import annotations

import builtins
import copyreg
import importlib
import io
import os
import pickle
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_test_loader
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mask_head_plugin import ConfigError, load_config
from mask_head_plugin.checkpoint.proposal_files import read_proposals
from mask_head_plugin.engine import Trainer
from mask_head_plugin.weight_files import read_checkpoint

CANARY = "executed"


class Call:
    """Calls a function when unpickled."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


@pytest.fixture(autouse=True)
def _canary(tmp_path, monkeypatch):
    """Fails the test if loading a file has created the canary in the current folder."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / CANARY).exists()


def touch():
    return Call(os.system, f"touch {CANARY}")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def array_parts(dtype="f4") -> tuple[bytes, bytes]:
    """Returns the pickle instructions of an array of two numbers, before and after its shape."""
    start = b"\x80\x02}" + text("w") + b"cnumpy.core.multiarray\n_reconstruct\n"
    start += b"cnumpy\nndarray\nK\x00\x85c_codecs\nencode\n" + text("b") + text("latin1")
    start += b"\x86R\x87R(K\x01"
    end = b"cnumpy\ndtype\n" + text(dtype) + b"K\x00K\x01\x87R(K\x03" + text("<") + b"NNN"
    end += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89c_codecs\nencode\n" + text("\0" * 8)
    return start, end + text("latin1") + b"\x86Rtbs."


def arrays_with(shape: bytes, dtype="f4") -> bytes:
    start, end = array_parts(dtype)
    return start + shape + end


def tuples_in_tuples(number: int) -> bytes:
    """Returns instructions for a tuple of 2 ** number objects, with five bytes per doubling."""
    doubled = [b"h%c\x86q%c" % (k, k + 1) for k in range(number)]
    return b"K\x01\x85q\x00" + b"".join(doubled)


def arrays_of_one_memory(number: int, size: int) -> bytes:
    """Returns a pickle whose arrays all share the same bytes."""
    content = b"\x80\x03}"
    for k in range(number):
        content += text(f"w{k}") + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00"
        content += b"\x85C\x01b\x87R(K\x01J" + struct.pack("<i", size) + b"\x85cnumpy\ndtype\n"
        content += text("u1") + b"K\x00K\x01\x87R\x89"
        content += b"h\x02" if k else b"B" + struct.pack("<i", size) + bytes(size) + b"q\x02"
        content += b"tbs"
    return content + b"."


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_a_key_that_would_take_forever_to_hash_is_refused(tmp_path, suffix):
    content = b"\x80\x02}" + tuples_in_tuples(60) + b"K\x01s."
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content if suffix == "pkl" else torch_archive(content))
    with pytest.raises(ConfigError, match=rf"a\.{suffix} .*tuples of \d+ objects in a file of"):
        read_checkpoint(path)


def test_arrays_of_the_same_bytes_cannot_fill_the_memory(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(arrays_of_one_memory(2, 1000))
    assert [x.sum() for x in read_checkpoint(path)["model"].values()] == [0, 0]
    path.write_bytes(arrays_of_one_memory(40, 1 << 17))
    with pytest.raises(
        ConfigError, match=r"a\.pkl .*its arrays have at least \d+ bytes in a file of"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "called",
    [
        *("builtins bytearray", "torch Tensor", "torch.storage UntypedStorage"),
        *("torch FloatTensor", "torch DoubleStorage"),
    ],
)
def test_a_torch_file_cannot_allocate_more_memory_than_its_size(tmp_path, called):
    path = tmp_path / "a.pth"
    call = b"c" + called.replace(" ", "\n").encode() + b"\nJ" + struct.pack("<i", 1 << 30)
    path.write_bytes(torch_archive(b"\x80\x02}" + text("model") + call + b"\x85Rs."))
    with pytest.raises(
        ConfigError, match=rf"a\.pth .*calls {called.split()[1]}, which can allocate any amount"
    ):
        read_checkpoint(path)


def test_a_torch_file_cannot_copy_a_text_repeatedly(tmp_path):
    path = tmp_path / "a.pth"
    start = b"\x80\x02}" + text("model") + b"c_codecs\nencode\nq\x00" + text("a" * 10**6)
    calls = text("latin1") + b"\x86q\x01](" + b"h\x00h\x01R" * 3000 + b"es."
    path.write_bytes(torch_archive(start + calls))
    with pytest.raises(ConfigError, match=r"a\.pth .*passes \d+ bytes to functions, but has only"):
        read_checkpoint(path)


def test_a_tensor_that_repeats_its_storage_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": {"w": torch.zeros(1).expand(10_000, 10_000)}}, path)
    with pytest.raises(ConfigError, match=r"'w' of shape \(10000, 10000\) repeats its storage"):
        read_checkpoint(path)
    torch.save({"model": {"w": torch.arange(3).expand(2, 3)}}, path)
    assert read_checkpoint(path)["model"]["w"].tolist() == [[0, 1, 2]] * 2


def doubled(number: int) -> list:
    value = [1]
    for _ in range(number):
        value = [value, value]
    return value


@pytest.mark.parametrize("changed", ["zip64", "zip"])
def test_a_file_that_torch_and_zipfile_would_read_differently_is_refused(tmp_path, changed):
    """The file consists of two archives of equal length; torch would read only the first, and
    zipfile only the second."""
    good = torch_bytes({"model": WEIGHTS}) if changed == "zip64" else torch_archive_of(WEIGHTS)
    (tmp_path / "good.pth").write_bytes(good)
    assert torch.equal(read_checkpoint(tmp_path / "good.pth")["model"]["w"], WEIGHTS["w"])
    with zipfile.ZipFile(io.BytesIO(good)) as file:
        content = file.read("archive/data.pkl")
    evil = b"\x80\x02}" + text("model") + b"}" + text("x") + b"cbuiltins\nbytearray\nM\xff\xff"
    evil = (evil + b"\x85Rss.").ljust(len(content), b"\0")
    (tmp_path / "two.pth").write_bytes(good.replace(content, evil) + good)
    with pytest.raises(ConfigError, match=r"two\.pth .*its list of records is not where the end"):
        read_checkpoint(tmp_path / "two.pth")


def torch_archive_of(weights) -> bytes:
    return changed_record(torch_bytes({"model": weights}), lambda content: content)


@pytest.mark.parametrize("ending", [b"more", b"PK\5\6" + bytes(16) + b"\4\0more"])
def test_data_after_the_directory_of_a_torch_archive_is_refused(tmp_path, ending):
    (tmp_path / "a.pth").write_bytes(torch_bytes({"model": WEIGHTS}) + ending)
    with pytest.raises(ConfigError, match=r"a\.pth was not loaded"):
        read_checkpoint(tmp_path / "a.pth")


def sharing_a_hash(number: int) -> list[int]:
    return [k * (2**61 - 1) for k in range(1, number + 1)]


ODD_KEYS = {
    "numbers": lambda n: {key: 0 for key in sharing_a_hash(n)},
    "tuples": lambda n: {(key, 1): 0 for key in sharing_a_hash(n)},
    "sizes": lambda n: {torch.Size([key, 1]): 0 for key in range(n)},
    "set": lambda n: set(sharing_a_hash(n)),
    "counts": lambda n: Counter(sharing_a_hash(n)),
    "pairs": lambda n: Call(OrderedDict, [[key, 0] for key in sharing_a_hash(n)]),
    "complex": lambda n: {complex(1000003 * k, -k): 0 for k in range(n)},
}


@pytest.mark.parametrize("kind", ODD_KEYS)
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_torch_file_with_many_possible_hash_collisions_is_refused(tmp_path, kind, new_format):
    path = tmp_path / "a.pth"
    for number in (100, 4000):
        content = {"model": WEIGHTS, "keys": ODD_KEYS[kind](number)}
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        if number == 100:
            assert len(read_checkpoint(path)["keys"]) == number
    with pytest.raises(ConfigError, match=r"a\.pth .*dictionary or set with \d+ keys that are"):
        read_checkpoint(path)


def test_ordinary_keys_in_a_torch_file_are_not_limited(tmp_path):
    tensors = {f"w{k}": torch.zeros(2) for k in range(300)}
    content = {
        "model": tensors,
        "numbers": dict.fromkeys(range(3000)),
        "bytes": dict.fromkeys(b"%d" % k for k in range(1500)),
        "tuples": [{(k, k): (k, k)} for k in range(1500)],
        "old": Call(OrderedDict, [[name, x] for name, x in tensors.items()]),
    }
    torch.save(content, tmp_path / "a.pth")
    assert list(read_checkpoint(tmp_path / "a.pth")["old"]) == list(tensors)


def test_errors_do_not_print_nested_lists_in_full(tmp_path):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(proposals(bbox_mode=doubled(12))))
    with pytest.raises(ConfigError, match=r"bbox_mode \[+\.\.\."):
        read_proposals(tmp_path / "p.pkl")


def torch_archive(content: bytes) -> bytes:
    """Returns a torch file with the given pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
    return file.getvalue()


def test_the_synthetic_array_is_valid(tmp_path):
    (tmp_path / "a.pkl").write_bytes(arrays_with(b"K\x02\x85"))
    assert read_checkpoint(tmp_path / "a.pkl")["model"]["w"].tolist() == [0, 0]


EXECUTED = f"open({CANARY!r}, 'w')"
DEEP_KEY = b"\x80\x02})" + b"\x85" * 400_000 + b"K\x01s."
PICKLES = {
    "command": (lambda: pickle.dumps(touch()), "posix.system"),
    "command of python 2": (lambda: pickle.dumps(touch(), 0), "posix.system"),
    "eval": (lambda: pickle.dumps(Call(builtins.eval, EXECUTED), 2), "__builtin__.eval"),
    "eval in a zoo file": (
        lambda: pickle.dumps({"model": {"w": Call(eval, EXECUTED)}, "__author__": "zoo"}),
        "builtins.eval",
    ),
    "chain": (
        lambda: pickle.dumps(
            Call(map, Call(getattr, Call(importlib.import_module, "os"), "mkdir"), [CANARY])
        ),
        "builtins.map",
    ),
    "getattr": (lambda: pickle.dumps(Call(getattr, np.ndarray, "tofile")), "builtins.getattr"),
    "apply": (lambda: pickle.dumps(Call(np.load, CANARY)), "numpy.load"),
    "code runner of numpy": (
        lambda: b"cnumpy.testing._private.utils\nrunstring\n(S'x'\n}tR.",
        "numpy.testing._private.utils.runstring",
    ),
    "instance": (lambda: f"(S'touch {CANARY}'\nios\nsystem\n.".encode(), "os.system"),
    "object": (lambda: f"(cos\nsystem\nS'touch {CANARY}'\no.".encode(), "os.system"),
    "class": (lambda: pickle.dumps(nn.Identity()), "torch.nn.modules.linear.Identity"),
    "extension": (lambda: b"\x80\x02\x82\xf0" + text(f"touch {CANARY}") + b"\x85R.", "EXT1"),
    "persistent id": (lambda: b"\x80\x02" + text("id") + b"Q.", "persistent"),
    "old persistent id": (lambda: b"Pid\n.", "PERSID"),
    "other codec": (
        lambda: b"\x80\x02c_codecs\nencode\n" + text("cnffjq") + text("rot13") + b"\x86R.",
        "uses the encoding 'rot13'",
    ),
    "attributes of a function": (
        lambda: b"\x80\x02c_codecs\nencode\n}" + text("__code__") + b"Nsb.",
        "sets attributes",
    ),
    "large shape": (
        lambda: arrays_with(b"\x8a\x06" + struct.pack("<q", 10**12)[:6] + b"\x85"),
        "shape",
    ),
    "negative shape": (lambda: arrays_with(b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86"), "shape"),
    "objects": (lambda: pickle.dumps({"w": np.array([{}, []], object)}), "'O8'"),
    "forged objects": (lambda: arrays_with(b"K\x01\x85", "O8"), "'O8'"),
    "records": (lambda: pickle.dumps({"w": np.zeros(2, [("a", "f4")])}), "'V4'"),
    "no state": (lambda: b"\x80\x02}" + text("w") + b"cnumpy\nndarray\n)Rs.", "calls numpy.nd"),
    "claim of bytes": (lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.", "truncated"),
    "claim of more bytes": (
        lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.",
        "truncated",
    ),
    "claim of a frame": (lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"N.", "truncated"),
    "claim of a number": (lambda: b"\x80\x02\x8b\xff\xff\xff\x7fx.", "truncated"),
    "long number": (lambda: b"L" + b"9" * 10**5 + b"L\n.", "truncated or corrupt"),
    "table of objects": (lambda: b"\x80\x02}r\xff\xff\xff\x7f.", "2147483647 to an object"),
    "deep key": (lambda: DEEP_KEY, "nests more than 100"),
    "deep list": (
        lambda: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        "nests more than 100",
    ),
    "list containing itself": (lambda: b"\x80\x02]q\x00h\x00a.", "no weights"),
    "set": (lambda: pickle.dumps({"w": {1, 2}}, 2), "set"),
    "no stack": (lambda: b"\x80\x02s.", "truncated or corrupt"),
    "no end": (lambda: b"\x80\x02}", "truncated or corrupt"),
    "number": (lambda: pickle.dumps(3), "no weights"),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["evil.pkl", "evil"])
def test_a_pickle_with_anything_but_arrays_is_refused(tmp_path, kind, name):
    make, offence = PICKLES[kind]
    content = make()
    (tmp_path / name).write_bytes(content)
    if kind == "extension":
        copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(ConfigError) as caught:
            read_checkpoint(tmp_path / name)
    finally:
        if kind == "extension":
            copyreg.remove_extension("os", "system", 240)
    told = str(caught.value)
    binary = content[:1] == b"\x80" or name == "evil.pkl"
    assert f"{name} was not loaded" in told
    assert (offence if binary else "not a torch file") in told
    assert "\n" not in told and len(told) < 600


def archive(folder, records) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data, compression in records:
            file.writestr(f"archive/{name}", data, compression)
    return content.getvalue()


def torch_bytes(value, **kwargs) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, **kwargs)
    return content.getvalue()


def changed_record(content: bytes, change) -> bytes:
    """Returns a copy of a torch file whose pickle has been passed through ``change``."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        records = [(x.filename.partition("/")[2], file.read(x)) for x in file.infolist()]
    return archive(
        None, [(n, change(x) if n == "data.pkl" else x, zipfile.ZIP_STORED) for n, x in records]
    )


def compressed_bomb() -> bytes:
    stored, deflated = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    weights = torch_bytes({"w": torch.zeros(1)})
    with zipfile.ZipFile(io.BytesIO(weights)) as file:
        records = {x.filename.partition("/")[2]: file.read(x) for x in file.infolist()}
    records["data/0"] = bytes(30_000_000)
    kinds = {name: deflated if name == "data/0" else stored for name in records}
    return archive(None, [(name, data, kinds[name]) for name, data in records.items()])


def lie_about_size() -> bytes:
    content = torch_bytes({"w": torch.arange(4.0)})
    # Change the two sizes that the central directory, at the end of the file, has for the storage.
    at = content.rindex(b"archive/data/0") - 46
    claim = struct.pack("<II", 2_000_000_000, 2_000_000_000)
    assert content[at : at + 4] == b"PK\x01\x02"
    return content[: at + 20] + claim + content[at + 28 :]


def longer_storage(content: bytes) -> bytes:
    more = struct.pack("<i", 10**8)
    changed = content.replace(b"K\x04tq", b"J" + more + b"tq").replace(
        b"K\x04\x85", b"J" + more + b"\x85"
    )
    assert changed != content
    return changed


def with_pickle_changed(old: bytes, new: bytes):
    """Returns a function that makes a torch file with some pickle instructions replaced."""

    def change(content: bytes) -> bytes:
        assert content.count(old) == 1
        return content.replace(old, new)

    return lambda: changed_record(torch_bytes(WEIGHTS), change)


def record_twice(name: str) -> bytes:
    content = io.BytesIO(torch_bytes(WEIGHTS))
    with warnings.catch_warnings(), zipfile.ZipFile(content, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr(name, b"x")
    return content.getvalue()


WEIGHTS = {"w": torch.arange(4.0)}
LENGTH, STORAGE_END, TENSOR_END = b"K\x04t", b"tq\x07Q", b"Rq\rs."
OLD = {"_use_new_zipfile_serialization": False}
TORCH_FILES = {
    "code": (lambda: torch_bytes({"model": WEIGHTS, "x": touch()}), "posix.system"),
    "code in the old format": (lambda: torch_bytes({"model": touch()}, **OLD), "posix.system"),
    "eval": (lambda: torch_bytes({"model_state": Call(eval, EXECUTED)}), "eval"),
    "module": (lambda: torch_bytes(nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    "plain pickle": (lambda: pickle.dumps(touch()), "posix.system"),
    "other protocol": (
        lambda: torch_bytes(touch(), pickle_protocol=4),
        "with the default pickle_protocol",
    ),
    "script": (lambda: script(), "TorchScript"),
    "compressed": (compressed_bomb, "claim 30"),
    "claim of size": (lie_about_size, "claim 2000"),
    "other zip": (
        lambda: archive(None, [("x.npy", b"x", zipfile.ZIP_STORED)]),
        "not one that torch",
    ),
    "longer storage": (lambda: changed_record(torch_bytes(WEIGHTS), longer_storage), "corrupt"),
    "longer storage in the old format": (lambda: longer_storage_of_old(), "corrupt"),
    "storage of negative length": (
        with_pickle_changed(LENGTH, b"J\xff\xff\xff\xfft"),
        "claims -4 bytes",
    ),
    "storage with an extra element": (with_pickle_changed(LENGTH, b"K\x05t"), "claims 20 bytes"),
    "storage with more bits": (with_pickle_changed(b"FloatS", b"DoubleS"), "claims 32 bytes"),
    "missing storage": (
        with_pickle_changed(text("0"), text("7")),
        "but the file has 0",
    ),
    "storage without a length": (with_pickle_changed(LENGTH, b"Nt"), "does not identify a storage"),
    "storage of a module": (
        with_pickle_changed(b"FloatStorage", b"nn"),
        "does not identify a storage",
    ),
    "other persistent id": (
        with_pickle_changed(STORAGE_END, b"tNQ"),
        "does not identify a storage",
    ),
    "item of a tensor": (with_pickle_changed(TENSOR_END, b"RK\x00K\x05ss."), "sets items"),
    "items of a tensor": (with_pickle_changed(TENSOR_END, b"R(K\x00K\x05us."), "sets items"),
    "record twice": (lambda: record_twice("archive/data/0"), "several records with the same name"),
    "record twice except for case": (
        lambda: record_twice("archive/DATA.pkl"),
        "several records with the same name",
    ),
    "deep key": (
        lambda: changed_record(torch_bytes(WEIGHTS), lambda _: DEEP_KEY),
        "nests more than 100",
    ),
    "large bytes": (
        lambda: torch_bytes(Call(bytearray, 2**62)),
        "calls bytearray",
    ),
    "sparse": (lambda: torch_bytes({"w": torch.eye(2).to_sparse()}), "sparse"),
    "numbers": (
        lambda: torch_bytes({"epoch": 3, "state_dict": WEIGHTS}),
        "save only its 'state_dict'",
    ),
    "tensor": (lambda: torch_bytes(torch.ones(2)), "no weights"),
    "tar": (lambda: b"x" * 257 + b"ustar\x00", "before 0.1.10"),
}


def script() -> bytes:
    content = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Identity(), torch.ones(1)), content)
    return content.getvalue()


def longer_storage_of_old() -> bytes:
    content = torch_bytes(WEIGHTS, **OLD)
    claim = b"\x8a\x06" + struct.pack("<q", 10**13)[:6]
    changed = content.replace(b"K\x04Ntq", claim + b"Ntq")
    assert changed != content
    return changed


@pytest.mark.parametrize("kind", TORCH_FILES)
@pytest.mark.parametrize("name", ["evil.pth", "evil.pyth", "evil.pkl", "evil"])
def test_a_torch_file_with_anything_but_weights_is_refused(tmp_path, kind, name):
    make, offence = TORCH_FILES[kind]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(tmp_path / name)
    told = str(caught.value)
    assert f"{name} was not loaded" in told
    assert offence in told
    assert "\n" not in told and "weights_only" not in told, (
        "the error must not advise running the code"
    )


def safetensors_bytes(header: bytes, length: int | None = None, data=bytes(16)) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


ENTRY = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
SAFETENSORS = {
    "header beyond the file": safetensors_bytes(ENTRY % (4, 16), 2**40),
    "data beyond the file": safetensors_bytes(ENTRY % (400, 1600)),
    "shape beyond its data": safetensors_bytes(ENTRY % (10**12, 16)),
    "overflow": safetensors_bytes(ENTRY % (2**62, 16)),
    "nested header": safetensors_bytes(b'{"w":' + b"[" * 10**5),
    "no header": safetensors_bytes(b""),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors_with_wrong_sizes_are_refused(tmp_path, kind):
    (tmp_path / "evil.safetensors").write_bytes(SAFETENSORS[kind])
    with pytest.raises(ConfigError, match=r"evil\.safetensors was not loaded: it is truncated"):
        read_checkpoint(tmp_path / "evil.safetensors")


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "x.safetensors", "x"])
@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"", "empty: download or copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"  <html>404</html>", "web page"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x80\x04 nonsense", "was not loaded"),
        (b"plain text", "was not loaded"),
    ],
    ids=["empty", "lfs", "page", "indented", "gzip", "nonsense", "text"],
)
def test_files_without_weights_are_reported(tmp_path, name, content, advice):
    (tmp_path / name).write_bytes(content)
    for read in (read_checkpoint, read_proposals):
        with pytest.raises(ConfigError, match=rf"{name} was not loaded.*") as caught:
            read(tmp_path / name)
        assert advice in str(caught.value)


def test_folders_and_missing_files_are_reported(tmp_path):
    with pytest.raises(ConfigError, match="it is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"none\.pth cannot be read: No such file"):
        read_checkpoint(tmp_path / "none.pth")


@given(share=st.floats(0.0, 0.999), kind=st.sampled_from(["pkl", "pth", "old", "safetensors"]))
def test_truncated_files_are_refused(tmp_path_factory, share, kind):
    weights = {"w": torch.arange(100.0), "b": torch.ones(3)}
    path = tmp_path_factory.mktemp("cut") / f"cut.{kind}"
    match kind:
        case "pkl":
            content = pickle.dumps({name: x.numpy() for name, x in weights.items()})
        case "safetensors":
            save_file(weights, path)
            content = path.read_bytes()
        case _:
            content = torch_bytes(weights, _use_new_zipfile_serialization=kind == "pth")
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ConfigError, match=rf"cut\.{kind} was not loaded"):
        read_checkpoint(path)


@given(
    kind=st.sampled_from(["pkl", "pth", "old", "safetensors"]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_bytes_give_weights_or_an_error_with_the_name(tmp_path_factory, kind, changes):
    path = tmp_path_factory.mktemp("bits") / f"bits.{kind}"
    weights = {"w": torch.arange(4.0), "b": torch.ones(3)}
    if kind == "safetensors":
        save_file(weights, path)
        content = bytearray(path.read_bytes())
    elif kind == "pkl":
        content = bytearray(pickle.dumps({name: x.numpy() for name, x in weights.items()}, 2))
    else:
        content = bytearray(torch_bytes(weights, _use_new_zipfile_serialization=kind == "pth"))
    for share, value in changes:
        content[min(int(share * len(content)), len(content) - 1)] = value
    path.write_bytes(content)
    try:
        model = read_checkpoint(path)["model"]
    except ConfigError as error:
        assert path.name in str(error)
    else:
        assert all(isinstance(x, np.ndarray | torch.Tensor) for x in model.values())


ARRAYS = OrderedDict(
    matrix=np.arange(6, dtype=np.float32).reshape(2, 3),
    columns=np.asfortranarray(np.arange(6.0).reshape(3, 2)),
    big_endian=np.arange(3, dtype=">i4"),
    empty=np.zeros((0, 4), np.float16),
    single=np.array(2, np.uint8),
    truth=np.array([True, False]),
    beyond_ascii=np.array([-1, 255, 128], np.int64),
)


def assert_equal(found):
    assert list(found) == list(ARRAYS)
    for name, expected in ARRAYS.items():
        assert np.array_equal(np.asarray(found[name]), expected), name
        assert np.asarray(found[name]).dtype == expected.dtype.newbyteorder("="), name


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["model_final.pkl", "model_final", "model_final.pth"])
def test_pickles_of_the_zoo_load_with_equal_values(tmp_path, protocol, name):
    content = pickle.dumps({"model": ARRAYS, "__author__": "zoo"}, protocol=protocol)
    # Files of the zoo contain the name that the core module has in NumPy 1.
    if protocol < 2:
        content = content.replace(b"numpy._core", b"numpy.core")
    (tmp_path / name).write_bytes(content)
    if protocol < 2 and name != "model_final.pkl":
        with pytest.raises(ConfigError, match="not a torch file"):
            read_checkpoint(tmp_path / name)
        return
    checkpoint = read_checkpoint(tmp_path / name)
    assert checkpoint["__author__"] == "zoo" and not checkpoint.get("matching_heuristics")
    assert_equal(checkpoint["model"])
    torch.from_numpy(checkpoint["model"]["matrix"]).add_(1)  # must be writable


def test_pickles_of_python_2_load_with_equal_values(tmp_path):
    """In Python 2, bytes were str, which protocol 2 stores with other instructions."""
    start = b"\x80\x02}q\x01U\x07conv1_wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
    start += b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06"
    start += (
        b"U\x02f4K\x00K\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    )
    values = np.array([-1.5, 3e38], np.float32)
    content = start + b"U\x08" + values.tobytes() + b"tbU\x10conv1_w_momentumK\x00u."
    content = content.replace(b"}q\x01U", b"}q\x01(U", 1)
    assert (pickle.loads(content, encoding="latin1")["conv1_w"] == values).all()
    (tmp_path / "R-50.pkl").write_bytes(content)
    checkpoint = read_checkpoint(tmp_path / "R-50.pkl")
    assert checkpoint["matching_heuristics"] and checkpoint["__author__"] == "Caffe2"
    assert list(checkpoint["model"]) == ["conv1_w"]
    assert (checkpoint["model"]["conv1_w"] == values).all()


def test_weights_of_detectron_are_read_from_blobs(tmp_path):
    content = {"blobs": {"conv1_w": np.ones(2), "conv1_w_momentum": np.ones(2)}, "cfg": "A: 1"}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, 2))
    checkpoint = read_checkpoint(tmp_path / "model.pkl")
    assert list(checkpoint["model"]) == ["conv1_w"] and checkpoint["__author__"] == "Caffe2"


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a", "a.pkl", "a.pyth"])
def test_torch_files_load_with_equal_values(tmp_path, new_format, name):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": 3,
        "class_names": ["a", "b"],
        "half": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
    }
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=new_format)
    checkpoint = read_checkpoint(tmp_path / name)
    assert checkpoint["iteration"] == 3 and checkpoint["class_names"] == ["a", "b"]
    assert torch.equal(checkpoint["half"], content["half"])
    for key, value in model.state_dict().items():
        assert torch.equal(checkpoint["model"][key], value)
    momentum = checkpoint["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state_dict()["state"][0]["momentum_buffer"])


def test_bare_weights_and_weights_of_pycls_can_be_loaded(tmp_path):
    torch.save(WEIGHTS, tmp_path / "bare.pth")
    torch.save(
        {"model_state": {**WEIGHTS, "n.num_batches_tracked": WEIGHTS["w"]}}, tmp_path / "x.pyth"
    )
    assert torch.equal(read_checkpoint(tmp_path / "bare.pth")["model"]["w"], WEIGHTS["w"])
    pycls = read_checkpoint(tmp_path / "x.pyth")
    assert list(pycls["model"]) == ["w"] and pycls["matching_heuristics"]


def test_safetensors_load_with_their_class_names(tmp_path):
    save_file(WEIGHTS, tmp_path / "a.safetensors", {"class_names": '["cat", "dog"]'})
    save_file(WEIGHTS, tmp_path / "b")
    for name, classes in (("a.safetensors", ["cat", "dog"]), ("b", None)):
        checkpoint = read_checkpoint(tmp_path / name)
        assert torch.equal(checkpoint["model"]["w"], WEIGHTS["w"])
        assert checkpoint.get("class_names") == classes


def proposals(**changes):
    boxes = [np.arange(8, dtype=np.float32).reshape(2, 4), np.zeros((0, 4), np.float32)]
    scores = [np.array([0.5, 1.5], np.float32), np.zeros(0, np.float32)]
    return {"ids": [7, "8"], "boxes": boxes, "objectness_logits": scores, "bbox_mode": 0, **changes}


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_proposals_load_with_equal_values(tmp_path, protocol):
    old_names = {"ids": "indexes", "objectness_logits": "scores"}
    for names in ({}, old_names):
        content = {names.get(key, key): value for key, value in proposals().items()}
        (tmp_path / "p.pkl").write_bytes(pickle.dumps(content, protocol))
        found = read_proposals(tmp_path / "p.pkl")
        assert found["ids"] == [7, "8"]
        for key in ("boxes", "objectness_logits"):
            for a, b in zip(found[key], proposals()[key], strict=True):
                assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("content", "offence"),
    [
        (lambda: proposals(bbox_mode=touch()), "posix.system"),
        (lambda: proposals(boxes=Call(eval, EXECUTED)), "builtins.eval"),
        (lambda: proposals(ids=[7]), r"lengths \[1, 2, 2\]"),
        (lambda: proposals(ids=7), "lengths"),
        (lambda: proposals(boxes=[np.zeros((2, 5)), np.zeros((0, 4))]), r"image 7: .*\(2, 5\)"),
        (lambda: proposals(objectness_logits=[np.zeros(3), np.zeros(0)]), "image 7"),
        (lambda: proposals(objectness_logits=[np.array(3), np.zeros(0)]), "image 7"),
        (lambda: proposals(bbox_mode=99), "bbox_mode 99"),
        (lambda: {"boxes": []}, "has no ids, objectness_logits"),
        (lambda: [1], "contains a list"),
    ],
)
def test_invalid_proposals_are_refused(tmp_path, content, offence):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(content()))
    with pytest.raises(ConfigError, match=rf"p\.pkl was not loaded: .*{offence}"):
        read_proposals(tmp_path / "p.pkl")


def test_data_loaders_read_proposals_safely(tmp_path):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(proposals(ids=touch())))
    opts = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    opts += ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", "('p.pkl',)"]
    cfg = load_config("", [*opts, "DATASETS.PROPOSAL_FILES_TEST", "('p.pkl',)"])
    with pytest.raises(ConfigError, match=r"p\.pkl was not loaded: it refers to posix\.system"):
        Trainer.build_train_loader(cfg)
    with pytest.raises(ConfigError, match=r"p\.pkl was not loaded: it refers to posix\.system"):
        Trainer.build_test_loader(cfg, "shapes_val")


def test_proposals_cannot_allocate_memory_when_detectron2_reads_them(tmp_path):
    box = np.zeros((2, 4), np.float32)
    made = Call(np.ndarray)
    made.reduced = (np.ndarray, ((10**9,), "O"), box.__reduce__()[2])
    content = proposals(boxes=[made, box[:0]])
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(
        ConfigError, match=r"p\.pkl .*calls numpy\.ndarray, which can allocate any amount"
    ):
        read_proposals(tmp_path / "p.pkl")


def test_detectron2_reads_proposals_that_passed(tmp_path):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(proposals()))
    name = "two_images_with_proposals"
    DatasetCatalog.register(
        name, lambda: [{"image_id": i, "file_name": "x", "annotations": []} for i in (7, 8)]
    )
    try:
        opts = ["DATASETS.TEST", f"('{name}',)", "MODEL.LOAD_PROPOSALS", "True"]
        cfg = load_config("", [*opts, "DATASETS.PROPOSAL_FILES_TEST", "('p.pkl',)"])
        loader = build_detection_test_loader(cfg, name, mapper=DatasetMapper(cfg, False))
        records = [loader.dataset._dataset[i] for i in range(2)]
        assert records[0]["proposal_objectness_logits"].tolist() == [1.5, 0.5]
    finally:
        DatasetCatalog.remove(name)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"MODEL: !!python/object/apply:os.system ['touch {CANARY}']", "python/object/apply:os"),
        (f"MODEL: !!python/object/new:os.system ['touch {CANARY}']", "not plain YAML"),
        ("MODEL: !!python/name:os.system", "not plain YAML"),
        ("_BASE_: https://example.com/a.yaml", "https://example.com/a.yaml is on another machine"),
        ("_BASE_: HTTP://example.com/a.yaml", "HTTP://example.com/a.yaml is on another machine"),
        ("_BASE_: detectron2://a/b.yaml", "detectron2://a/b.yaml is on another machine"),
        ("_BASE_: [catalog://a]", "catalog://a is on another machine"),
        ("_BASE_: [base.yaml]", "http://example.com/b.yaml is on another machine"),
        ("_BASE_: tagged.yaml", "not plain YAML"),
    ],
)
def test_configs_run_no_code_and_download_nothing(tmp_path, monkeypatch, content, told):
    def opened(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.create_connection", opened)
    (tmp_path / "a.yaml").write_text(content)
    (tmp_path / "base.yaml").write_text("_BASE_: http://example.com/b.yaml")
    (tmp_path / "tagged.yaml").write_text(f"A: !!python/object/apply:os.mkdir [{CANARY}]")
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "a.yaml"))
    assert told in str(caught.value) and "a.yaml" in str(caught.value)


def test_config_files_must_be_local_yaml(tmp_path):
    (tmp_path / "lazy.py").write_text(f"open({CANARY!r}, 'w')")
    with pytest.raises(ConfigError, match=r"lazy\.py is Python code, and reading it"):
        load_config(str(tmp_path / "lazy.py"))
    for address in ("https://example.com/a.yaml", "detectron2://a.yaml"):
        with pytest.raises(ConfigError, match=f"{address} is on another machine; download it"):
            load_config(address)
    assert load_config(str(CONFIGS / "shapes" / "mask_rcnn_shapes.yaml"))


def test_a_config_may_contain_some_aliases(tmp_path):
    """A run's config.yaml contains aliases if keys share a list."""
    (tmp_path / "a.yaml").write_text(
        "INPUT: {MIN_SIZE_TRAIN: &x [5, 6]}\nTEST: {AUG: {MIN_SIZES: *x}}"
    )
    cfg = load_config(str(tmp_path / "a.yaml"))
    assert list(cfg.TEST.AUG.MIN_SIZES) == list(cfg.INPUT.MIN_SIZE_TRAIN) == [5, 6]


@pytest.mark.parametrize(
    "text",
    [
        "B0: &b0 [1]\n" + "".join(f"B{k + 1}: &b{k + 1} [*b{k}, *b{k}]\n" for k in range(60)),
        "A: &a [1, *a]\n",
    ],
    ids=["doubled", "itself"],
)
def test_aliases_in_a_config_cannot_fill_the_memory(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml .*aliases.*use fewer aliases"):
        load_config(str(path))
