"""Other people's pickles: arrays are read as they are, code is never run, damage is told."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from ferkd.errors import InputError
from ferkd.interop.pickles import Array, CodeInFile, DamagedFile, read_torch_file


def saved(content: object, **options: object) -> bytes:
    box = io.BytesIO()
    torch.save(content, box, **options)  # type: ignore[arg-type]
    return box.getvalue()


def zipped(text: bytes, **records: bytes) -> bytes:
    """A file as torch.save makes them, of a pickle of one's own."""
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive:
        archive.writestr("archive/data.pkl", text)
        for key, content in records.items():
            archive.writestr(f"archive/data/{key}", content)
    return box.getvalue()


ARRAYS = [
    np.random.default_rng(0).random((6, 4)).astype(np.float32),
    np.array([True, False, True]),
    np.random.default_rng(1).random((3, 2, 5)).astype(np.float16),
    np.arange(7),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.empty((0, 4), np.float32),
    np.array(3.0),
]


@pytest.mark.parametrize(
    "options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}], ids=["zip", "protocol 4", "old"]
)
def test_numpy_arrays_are_read_as_they_are(options: dict[str, object]) -> None:
    found = read_torch_file(saved(ARRAYS, **options), "x")
    for array, wanted in zip(found, ARRAYS, strict=True):
        assert isinstance(array, Array)
        assert array.values.dtype == wanted.dtype
        np.testing.assert_array_equal(array.values, wanted)


def test_files_of_an_older_numpy_are_read() -> None:
    data = saved(ARRAYS[:2])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        text = archive.read("archive/data.pkl")
    assert b"numpy._core.multiarray" in text
    found = read_torch_file(zipped(text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")), "x")
    np.testing.assert_array_equal(found[0].values, ARRAYS[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_tensors_are_read_as_they_are(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    for wanted in (tensor, tensor.transpose(0, 2), tensor[1:, ::2], tensor[:0]):
        (found,) = read_torch_file(saved([wanted]), "x")
        np.testing.assert_array_equal(found.values, wanted.numpy())


def test_plain_values_are_read_as_they_are() -> None:
    content = (7, [{"params": [(1, 70_000, -3, 4), True], "prob": ([0.5, 1e-9], [3, 999])}], {"a": None, "b": "é", 2: b"\xff"}, [], ())
    for protocol in (2, 3, 4, 5):
        assert read_torch_file(saved(content, pickle_protocol=protocol), "x") == content


class Hostile:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return self.call[0], self.call[1:]


def test_code_is_never_run(tmp_path: object, capfd: pytest.CaptureFixture[str]) -> None:
    witness = f"{tmp_path}/was-run"
    calls = [
        Hostile(os.system, f"touch {witness}"),
        Hostile(subprocess.Popen, ["touch", witness]),
        Hostile(eval, f"open({witness!r}, 'w')"),
        Hostile(exec, f"open({witness!r}, 'w')"),
        Hostile(open, witness, "w"),
        Hostile(getattr, 1, "real"),
        Hostile(torch.load, witness),
        Hostile(np.load, witness),
        Hostile(pickle.loads, pickle.dumps(Hostile(os.system, f"touch {witness}"))),
    ]
    for call in calls:
        for content in (call, [ARRAYS[0], call, ARRAYS[1]], {"a": (call,)}):
            for options in ({}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}):
                with pytest.raises(
                    CodeInFile, match=r"^labels.tar: its pickle wants .* imported; ferkd reads arrays only and has run"
                ) as error:
                    read_torch_file(saved(content, **options), "labels.tar")
                assert "\n" not in str(error.value)
    assert not os.path.exists(witness)
    assert capfd.readouterr().out == ""


def test_pickles_written_by_hand_run_nothing_either(tmp_path: object) -> None:
    witness = f"{tmp_path}/was-run".encode()
    command = b"X" + struct.pack("<I", len(witness) + 6) + b"touch " + witness
    texts = {
        "global": b"cos\nsystem\n(" + command + b"tR.",
        "inst": b"(" + command + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + command + b"o.",
        "newobj": b"\x80\x04cos\nsystem\n(" + command + b"t\x81.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + command + b"tR.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93)R.",
        "extension": b"\x80\x02\x82\x01.",
        "dunder": b"c__builtin__\neval\n(" + command + b"tR.",
        "build on a name": b"cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb.",
        "call of a string": command + b")R.",
        "call of ndarray": b"cnumpy\nndarray\n(K\x01tR.",
        "persistent name": b"Pos\n.",
    }
    for name, text in texts.items():
        with pytest.raises(InputError, match=r"^x: ") as error:
            read_torch_file(zipped(text), "x")
        assert isinstance(error.value, (CodeInFile, DamagedFile)), name
        assert "\n" not in str(error.value), name
    assert not os.path.exists(witness)


def test_a_small_file_cannot_become_large() -> None:
    million = b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000
    latin = b"X\x06\x00\x00\x00latin1"
    encode = b"c_codecs\nencode\n"
    unfolding = b"(" + million + b"q\x00" + b"".join(encode + b"h\x00" + latin + b"\x86R" for _ in range(50)) + b"t."
    shared = b"\x80\x02]q\x00" + b"h\x00a" * 10 + b"."  # a list that holds itself
    memo = b"N" + b"r" + struct.pack("<I", 0xFFFFFFF0) + b"."  # CPython's own unpickler makes a table of 64 GB for this
    long = b"\x8e" + struct.pack("<Q", 1 << 60) + b"a."
    key = b"}" + b"(" * 1 + b")" + b"\x85" * 200_000 + b"K\x01u."  # a dict key so deep that hashing it would overflow the stack
    with pytest.raises(DamagedFile, match="unfolds to more bytes than the file has"):
        read_torch_file(zipped(unfolding), "x")
    with pytest.raises(DamagedFile, match="keys are neither strings nor numbers"):
        read_torch_file(zipped(key), "x")
    with pytest.raises(DamagedFile, match="cut short"):
        read_torch_file(zipped(long), "x")
    assert read_torch_file(zipped(memo), "x") is None
    assert len(read_torch_file(zipped(shared), "x")) == 10
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N" * 10_000_000)
    with pytest.raises(DamagedFile, match="compressed, too large or there twice"):
        read_torch_file(box.getvalue(), "x")


def test_tensors_and_arrays_cannot_reach_outside_their_bytes() -> None:
    data = saved([torch.zeros(4)])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        text, record = archive.read("archive/data.pkl"), archive.read("archive/data/0")
    assert text.count(b"K\x04\x85") == 1
    assert len(read_torch_file(zipped(text, **{"0": record}), "x")) == 1
    for changed in (
        text.replace(b"K\x04\x85", b"K\x05\x85"),
        text.replace(b"K\x01\x85", b"K\x09\x85"),
        text.replace(b"K\x01\x85", b"J\xff\xff\xff\xff\x85"),
    ):
        assert changed != text
        with pytest.raises(DamagedFile):
            read_torch_file(zipped(changed, **{"0": record}), "x")
    with pytest.raises(DamagedFile):
        read_torch_file(zipped(text), "x")
    with zipfile.ZipFile(io.BytesIO(saved([np.zeros((2, 4), np.float32)]))) as archive:
        text = archive.read("archive/data.pkl")
    with pytest.raises(DamagedFile, match="does not fit"):
        read_torch_file(zipped(text.replace(b"K\x02K\x04\x86", b"K\x03K\x04\x86")), "x")
    with pytest.raises(DamagedFile, match="structures or of big-endian"):
        read_torch_file(saved([np.zeros(2, ">f4")]), "x")
    for odd in (
        np.array([{}, []], object),
        np.zeros(2, [("a", "f4")]),
        np.array(["text"]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, np.complex64),
    ):
        with pytest.raises(DamagedFile):
            read_torch_file(saved([odd]), "x")


def test_damage_is_told_with_the_files_name() -> None:
    data = bytearray(saved(ARRAYS[:3]))
    at = data.index(b"latin1") - 60  # within the array's bytes
    data[at] ^= 1
    with pytest.raises(DamagedFile, match=r"^train/a/x.tar: is a damaged zip file \(Bad CRC-32"):
        read_torch_file(bytes(data), "train/a/x.tar")
    for cut in (b"", b"\x80", b"PK\x03\x04", saved(ARRAYS[:3])[:-30], saved(ARRAYS[:3])[:300], b"not a label", b"\x1f\x8b\x08gzip"):
        with pytest.raises(DamagedFile, match=r"^x: "):
            read_torch_file(cut, "x")


def test_whatever_is_damaged_nothing_but_an_input_error_comes_out() -> None:
    random = np.random.default_rng(0)
    with zipfile.ZipFile(io.BytesIO(saved([ARRAYS[0], torch.zeros(3, 4)]))) as archive:
        text, record = archive.read("archive/data.pkl"), archive.read("archive/data/0")
    whole = saved([ARRAYS[0], torch.zeros(3, 4)])
    refused = 0
    for trial in range(3000):
        changed = bytearray(text if trial % 3 else whole)
        for place in random.integers(0, len(changed), random.integers(1, 4)):
            changed[place] = random.integers(256)
        try:
            read_torch_file(zipped(bytes(changed), **{"0": record}) if trial % 3 else bytes(changed), "x")
        except (CodeInFile, DamagedFile):
            refused += 1
    assert refused > 1000
