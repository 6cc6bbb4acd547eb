"""Reads other people's label files, which are pickles, without Python's unpickler: numbers, strings, lists, tuples, dicts and arrays.

A pickle is a program, and any unpickler that looks names up and calls what it finds can be made to run code. The interpreter below knows
no import and calls nothing: the few names that arrays are written with (NumPy's, torch's) stand for the array-making steps of this file,
and every other name ends the reading. What it builds is never larger than the file by more than a constant factor.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd.errors import InputError


class DamagedFile(InputError):
    """A file that cannot be read as numbers and arrays: cut short, flipped bits, another format."""


class CodeInFile(InputError):
    """A pickle that names something to be imported and called, and not just what arrays need."""


class Array:
    """An array as it lies in a file: `values`, read-only. It is filled in while its pickle is being read."""

    def __init__(self) -> None:
        self.values: npt.NDArray[Any] = np.empty(0)


def read_torch_file(data: bytes, name: str) -> Any:
    """What torch.save wrote, from the file's bytes: plain values, and an Array for every NumPy array or tensor.

    Reads torch's zip files, whose CRC32s are checked, and its older files if they hold NumPy arrays but no tensor. `name` is what
    errors call the file. Raises CodeInFile for a pickle that wants something imported, DamagedFile for all else that cannot be read.
    """
    try:
        if data[:2] == b"PK":
            return _read_zip(data)
        return _read_old(data)
    except CodeInFile as error:
        raise CodeInFile(f"{name}: {error}; ferkd reads arrays only and has run nothing of it: do not open it with torch.load") from None
    except DamagedFile as error:
        raise DamagedFile(f"{name}: {error}; fetch it again") from None


def _read_zip(data: bytes) -> Any:
    """torch's format since 1.6: a zip of a pickle, `NAME/data.pkl`, and of each tensor's bytes, `NAME/data/KEY`; nothing is compressed."""
    records: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                place = info.filename.partition("/")[2]
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data) or place in records:
                    raise DamagedFile(
                        f"its record {info.filename[:60]!r} is compressed, too large or there twice: torch.save wrote no such file"
                    )
                records[place] = archive.read(info)  # checks the CRC32, which torch.load does not
    except InputError:
        raise
    except Exception as error:  # besides BadZipFile, zipfile raises what its fields lead to: OverflowError, RuntimeError, struct.error ...
        raise DamagedFile(f"is a damaged zip file ({error})") from None
    if "data.pkl" not in records:
        raise DamagedFile("is a zip file without data.pkl, so torch.save did not write it")
    if records.get("byteorder", b"little") != b"little":
        raise DamagedFile("was written on a big-endian machine, which ferkd does not read")
    return _Interpreter(records["data.pkl"], records).run()


_OLD_MAGIC = 0x1950A86A20F9469CFC6C


def _read_old(data: bytes) -> Any:
    """torch's format before 1.6: pickles of a magic number, a version and the machine's sizes, and then of the content."""
    interpreter = _Interpreter(data, None)
    if not data.startswith(b"\x80") or interpreter.run() != _OLD_MAGIC:
        raise DamagedFile(f"is no file that torch.save wrote ({len(data):,} bytes)")
    interpreter.run()
    interpreter.run()
    return interpreter.run()


# ---- The interpreter -----------------------------------------------------------------------------------------------------------


class _Name(str):
    """One of the names that arrays are written with."""


class _Dtype:
    def __init__(self, code: str) -> None:
        self.code = code


class _Storage:
    """A tensor's bytes as elements."""

    def __init__(self, elements: npt.NDArray[Any]) -> None:
        self.elements = elements


_MARK = object()
_NOTHING = object()  # stands for the empty OrderedDict that every tensor's pickle carries
_DTYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})
_STORAGES = {
    "torch HalfStorage": "<f2",
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
    "torch CharStorage": "<i1",
    "torch ShortStorage": "<i2",
    "torch IntStorage": "<i4",
    "torch LongStorage": "<i8",
    "torch ByteStorage": "<u1",
    "torch BoolStorage": "|b1",
}
_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NAMES = {"numpy ndarray", "numpy dtype", "_codecs encode", "torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
_NAMES |= {*_RECONSTRUCT, *_STORAGES, "__builtin__ bytes"}  # bytes() is how protocol 2 says b""

_MEMOIZE, _BINPUT, _LONG_BINPUT, _BINGET, _LONG_BINGET = (
    code[0] for code in (pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET)
)
_BINFLOAT, _BININT, _BININT1, _BININT2, _LONG1 = (
    code[0] for code in (pickle.BINFLOAT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1)
)
_MARK_OP, _APPEND, _APPENDS, _SETITEM, _SETITEMS = (
    code[0] for code in (pickle.MARK, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS)
)
_TUPLE, _STOP, _PROTO, _FRAME, _GLOBAL, _STACK_GLOBAL, _REDUCE, _BUILD, _BINPERSID = (
    code[0]
    for code in (
        pickle.TUPLE, pickle.STOP, pickle.PROTO, pickle.FRAME,
        pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID,
    )
)  # fmt: skip
_SHORT_TUPLES = {pickle.EMPTY_TUPLE[0]: 0, pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3}
_CONSTANTS = {pickle.NONE[0]: None, pickle.NEWTRUE[0]: True, pickle.NEWFALSE[0]: False}
_EMPTY = {pickle.EMPTY_LIST[0]: list, pickle.EMPTY_DICT[0]: dict}
_TEXTS = {pickle.SHORT_BINUNICODE[0]: "<B", pickle.BINUNICODE[0]: "<I", pickle.BINUNICODE8[0]: "<Q"}
_BYTES = {pickle.SHORT_BINBYTES[0]: "<B", pickle.BINBYTES[0]: "<I", pickle.BINBYTES8[0]: "<Q"}


class _Interpreter:
    """Runs the pickles in `data`, one at each call of run(). `records`: the bytes of tensors, None where tensors are not supported."""

    def __init__(self, data: bytes, records: dict[str, bytes] | None) -> None:
        self.data, self.records = data, records
        self.at = 0
        self.budget = len(data)  # bytes that encode() may still make: an honest file makes each of its bytes once

    def run(self) -> Any:
        try:
            return self._run()
        except InputError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise DamagedFile(f"its pickle of {len(self.data):,} bytes is damaged or cut short") from error

    def _run(self) -> Any:
        data, at = self.data, self.at
        stack: list[Any] = []
        push = stack.append
        memo: dict[int, Any] = {}
        unpack = struct.unpack_from
        while True:  # the most frequent operations come first
            op = data[at]
            at += 1
            if op == _BINFLOAT:
                push(unpack(">d", data, at)[0])
                at += 8
            elif op == _BININT2:
                push(unpack("<H", data, at)[0])
                at += 2
            elif op == _BININT1:
                push(data[at])
                at += 1
            elif op == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif op == _BINPUT:
                memo[data[at]] = stack[-1]
                at += 1
            elif op == _BINGET:
                push(memo[data[at]])
                at += 1
            elif op == _MARK_OP:
                push(_MARK)
            elif op in _SHORT_TUPLES:
                size = _SHORT_TUPLES[op]
                items = tuple(_popped(stack, size))
                push(items)
            elif op in _CONSTANTS:
                push(_CONSTANTS[op])
            elif op in _EMPTY:
                push(_EMPTY[op]())
            elif op == _APPENDS:
                found = _to_mark(stack)
                _checked(stack[-1], list).extend(found)
            elif op == _APPEND:
                value = stack.pop()
                _checked(stack[-1], list).append(value)
            elif op in _TEXTS or op in _BYTES:
                head = _TEXTS.get(op) or _BYTES[op]
                size = unpack(head, data, at)[0]
                at += struct.calcsize(head)
                piece = data[at : at + size]
                if len(piece) != size:
                    raise DamagedFile("its pickle was cut short")
                push(piece.decode("utf-8", "surrogatepass") if op in _TEXTS else piece)
                at += size
            elif op == _TUPLE:
                push(tuple(_to_mark(stack)))
            elif op == _SETITEMS:
                found = _to_mark(stack)
                _set_items(stack[-1], found)
            elif op == _SETITEM:
                found = _popped(stack, 2)
                _set_items(stack[-1], found)
            elif op == _BININT:
                push(unpack("<i", data, at)[0])
                at += 4
            elif op == _LONG_BINPUT:
                memo[unpack("<I", data, at)[0]] = stack[-1]
                at += 4
            elif op == _LONG_BINGET:
                push(memo[unpack("<I", data, at)[0]])
                at += 4
            elif op == _LONG1:
                size = data[at]
                push(int.from_bytes(data[at + 1 : at + 1 + size], "little", signed=True))
                at += 1 + size
            elif op == _GLOBAL:
                middle = data.index(b"\n", at, at + 200)
                end = data.index(b"\n", middle + 1, middle + 200)
                push(_known(data[at:middle].decode(), data[middle + 1 : end].decode()))
                at = end + 1
            elif op == _STACK_GLOBAL:
                module, name = _popped(stack, 2)
                push(_known(_checked(module, str), _checked(name, str)))
            elif op == _REDUCE:
                function, arguments = _popped(stack, 2)
                push(self._made(function, _checked(arguments, tuple)))
            elif op == _BUILD:
                state = stack.pop()
                _fill(stack[-1], state)
            elif op == _BINPERSID:
                push(self._storage(stack.pop()))
            elif op == _PROTO:
                if data[at] > 5:
                    raise DamagedFile(f"its pickle has protocol {data[at]}")
                at += 1
            elif op == _FRAME:
                at += 8
            elif op == _STOP:
                self.at = at
                result = stack.pop()
                if result is _MARK or stack:
                    raise DamagedFile("its pickle is damaged: it leaves more than one value")
                return result
            else:
                raise CodeInFile(f"its pickle uses operation {bytes([op])!r}, which numbers and arrays do not need")

    def _made(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """What a name of arrays makes of its arguments."""
        if not isinstance(function, _Name):
            raise CodeInFile("its pickle calls what is no name")
        if function == "_codecs encode":
            text, encoding = _two(arguments)
            if not (isinstance(encoding, str) and encoding == "latin1"):
                raise DamagedFile("its pickle has bytes in an unknown encoding")
            made = _checked(text, str).encode("latin1")
            self.budget -= len(made)
            if self.budget < 0:
                raise DamagedFile("its pickle unfolds to more bytes than the file has")
            return made
        if function in _RECONSTRUCT:
            return Array()
        if function == "numpy dtype":
            code = arguments[0]
            if not (isinstance(code, str) and code in _DTYPES):
                raise DamagedFile(f"holds an array of {code[:40] if isinstance(code, str) else 'unknown elements'!r}; numbers are expected")
            return _Dtype(code)
        if function == "__builtin__ bytes" and not arguments:
            return b""
        if function == "collections OrderedDict":
            return _NOTHING
        if function == "torch._utils _rebuild_tensor_v2":
            return self._tensor(arguments)
        raise CodeInFile(f"its pickle calls {function}")

    def _storage(self, key: Any) -> _Storage:
        """The storage that a persistent id names: ("storage", type, key, device, number of elements)."""
        if self.records is None:
            raise DamagedFile("holds tensors in torch's format from before 1.6; load it with that torch and save it again")
        parts = _checked(key, tuple)
        if len(parts) != 5 or not isinstance(parts[1], _Name) or parts[1] not in _STORAGES or not isinstance(parts[2], str):
            raise DamagedFile("holds a tensor of an unknown kind; numbers are expected")
        dtype = np.dtype(_STORAGES[parts[1]])
        record = self.records[f"data/{parts[2]}"]
        return _Storage(np.frombuffer(record, dtype, len(record) // dtype.itemsize))

    def _tensor(self, arguments: tuple[Any, ...]) -> Array:
        storage, offset, size, stride = arguments[:4]
        elements = _checked(storage, _Storage).elements
        shape, steps = _whole(size), _whole(stride)
        first = _checked(offset, int)
        count = math.prod(shape)
        last = first + sum((n - 1) * step for n, step in zip(shape, steps, strict=False))
        if len(shape) != len(steps) or len(shape) > 4 or first < 0 or count > len(elements) or (count and last >= len(elements)):
            raise DamagedFile(f"holds a tensor of {len(shape)} dimensions that does not fit its {len(elements):,} elements")
        array = Array()
        array.values = np.lib.stride_tricks.as_strided(
            elements[first:], shape, tuple(step * elements.itemsize for step in steps), writeable=False
        )
        return array


def _known(module: str, name: str) -> _Name:
    full = f"{module} {name}"
    if full not in _NAMES:
        raise CodeInFile(f"its pickle wants {f'{module}.{name}'[:80]!r} imported")
    return _Name(full)


def _fill(made: Any, state: Any) -> None:
    """Gives an array its shape, dtype and bytes, or a dtype its byte order."""
    parts = _checked(state, tuple)
    if isinstance(made, _Dtype):
        if len(parts) < 5 or parts[1] not in ("<", "|") or parts[2:5] != (None, None, None):
            raise DamagedFile("holds an array of structures or of big-endian numbers; plain little-endian numbers are expected")
        return
    array = _checked(made, Array)
    if len(parts) != 5:
        raise DamagedFile("holds an array without shape")
    shape, dtype, in_columns, content = _whole(parts[1]), _checked(parts[2], _Dtype).code, parts[3], _checked(parts[4], bytes)
    elements = np.frombuffer(content, f"<{dtype}")
    if len(shape) > 4 or math.prod(shape) != len(elements):
        raise DamagedFile(f"holds an array of {len(shape)} dimensions that does not fit its {len(elements):,} elements")
    array.values = elements.reshape(shape, order="F" if in_columns is True else "C")


def _set_items(target: Any, items: list[Any]) -> None:
    made = _checked(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int)):
            raise DamagedFile("holds a dict whose keys are neither strings nor numbers")
        made[key] = value


def _whole(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or not all(isinstance(n, int) and 0 <= n < 1 << 40 for n in sizes):
        raise DamagedFile("holds an array whose shape is no tuple of whole numbers")
    return sizes


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise DamagedFile(f"its pickle is damaged: {type(value).__name__.strip('_')} where {kind.__name__.strip('_')} is expected")
    return value


def _two(items: tuple[Any, ...]) -> tuple[Any, Any]:
    if len(items) != 2:
        raise DamagedFile("its pickle is damaged")
    return items[0], items[1]


def _popped(stack: list[Any], count: int) -> list[Any]:
    """The last `count` values, taken off the stack."""
    if len(stack) < count or any(value is _MARK for value in stack[len(stack) - count :]):
        raise DamagedFile("its pickle is damaged: a value is missing")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return items


def _to_mark(stack: list[Any]) -> list[Any]:
    """What was pushed since the last mark, taken off the stack with it."""
    at = len(stack) - 1
    while at >= 0 and stack[at] is not _MARK:
        at -= 1
    if at < 0:
        raise DamagedFile("its pickle is damaged: a mark is missing")
    items = stack[at + 1 :]
    del stack[at:]
    return items
