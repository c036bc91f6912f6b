"""Check a ``.pth`` file before torch.load opens it: only a dict of dense tensors passes.

torch.save writes a zip archive (PKWARE's APPNOTE.TXT, section 4.3) of stored members: one pickle,
and the data of each tensor. ``torch.load(weights_only=True)`` runs no untrusted code, but it
allocates what the pickle asks for, hashes keys of any size, and ignores case in member names. So
the archive must be unambiguous, and its pickle must have only the opcodes of a dict of tensors.
"""

import pickletools
import struct
import zipfile
from typing import Any, BinaryIO, NamedTuple

import torch

from llama.files import escaped

_LARGEST_PICKLE = 2**20  # 405B's has 0.14 MB per shard
_LARGEST_DIRECTORY = 2**21
_LARGEST_ITEM = 1000  # items of a tuple or call, including nested ones; a tensor's call has 25

# Records of APPNOTE.TXT, sections 4.3.16, 4.3.15, 4.3.14, 4.3.12 and 4.3.7, little-endian.
_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

# The callables in the pickle of a dict of dense tensors; it also names storages and dtypes.
_ORDERED_DICT = "collections OrderedDict"
_CALLABLES = {
    _ORDERED_DICT,
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
}
_ATOMS = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"} | {
    *("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT")
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class UnsafeFileError(Exception):
    """The file isn't a dict of tensors written by torch.save, and damage doesn't explain that."""


class Member(NamedTuple):
    """A member of an archive: the start, size and CRC-32 of its bytes."""

    name: str
    start: int
    size: int
    crc: int


def check(file: BinaryIO) -> str:
    """Check an archive before torch.load opens it.

    Returns:
        The byte order; files from before torch recorded it are little-endian.

    Raises:
        UnsafeFileError: it holds more than tensors, or is ambiguous.
        zipfile.BadZipFile, ValueError: it is damaged, or not an archive.
    """
    inside = {}
    folders = set()
    for member in members(file):
        folder, _, name = member.name.casefold().partition("/")
        folders.add(folder)
        inside[name] = member
    if len(folders) != 1:
        raise UnsafeFileError(f"its archive has {len(folders)} top-level folders")
    pickles = [name for name in inside if name.endswith(".pkl")]
    if pickles != ["data.pkl"]:
        raise UnsafeFileError(f"its archive has the pickles {pickles!s:.200}, not one data.pkl")
    size = inside["data.pkl"].size
    if size > _LARGEST_PICKLE:
        raise UnsafeFileError(f"its data.pkl has {size:,} bytes")
    _check_pickle(_read(file, inside["data.pkl"].start, size))
    if "byteorder" not in inside:
        return "little"
    order = inside["byteorder"]
    return _read(file, order.start, min(order.size, 16)).decode(errors="replace")


def members(file: BinaryIO) -> list[Member]:
    """The members of an archive in file order, checked not to overlap; raises as ``check`` does.
    zipfile isn't used: it and torch's reader can read ambiguous archives differently."""
    start, stop, n_entries = _directory(file)
    if stop - start > _LARGEST_DIRECTORY:
        raise UnsafeFileError("the directory of its archive is too long")
    directory = _read(file, start, stop - start)
    found: list[Member] = []
    names = set()
    end_before = at = 0
    while at < len(directory):
        fields = _unpack(_ENTRY, directory, at, b"PK\1\2")
        flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
        n_name, n_extra, n_comment, offset = *fields[10:13], fields[16]
        at += _ENTRY.size
        raw_name = directory[at : at + n_name]
        extra = directory[at + n_name : at + n_name + n_extra]
        at += n_name + n_extra + n_comment
        size, packed, offset = _long_sizes(extra, [size, packed, offset])
        name = _decoded(raw_name)
        if method != zipfile.ZIP_STORED or flags & 1 or size != packed:
            raise UnsafeFileError(f"{name!r:.80} in it is compressed or encrypted")
        if name.casefold() in names:
            raise UnsafeFileError(f"{name!r:.80} is in it twice")
        names.add(name.casefold())
        if offset < end_before or offset > start:
            raise UnsafeFileError(f"{name!r:.80} in it overlaps another member")
        local = _unpack(_LOCAL, _read(file, offset, _LOCAL.size), 0, b"PK\3\4")
        first = offset + _LOCAL.size + local[9] + local[10]
        if _read(file, offset + _LOCAL.size, local[9]) != raw_name:
            raise UnsafeFileError(f"{name!r:.80} in it has two names")
        end_before = first + size
        if end_before > start:
            raise UnsafeFileError(f"{name!r:.80} in it is larger than the file")
        found.append(Member(name, first, size, crc))
    if at != len(directory) or len(found) != n_entries:
        raise zipfile.BadZipFile("the central directory is damaged")
    return found


def _directory(file: BinaryIO) -> tuple[int, int, int]:
    """Start, stop and number of entries of the central directory. Only its end records may follow
    it."""
    end_at = file.seek(0, 2) - _END.size
    if end_at < 0:
        raise zipfile.BadZipFile("File is not a zip file")
    end = _unpack(_END, _read(file, end_at, _END.size), 0, b"PK\5\6")
    n_entries, n_bytes, start, n_comment = end[4:]
    stop = end_at
    at = end_at - _LOCATOR64.size - _END64.size
    if at >= 0:
        data = _read(file, at, _END64.size + _LOCATOR64.size)
        if data[_END64.size :].startswith(b"PK\6\7"):
            locator = _unpack(_LOCATOR64, data, _END64.size, b"PK\6\7")
            if locator[2] != at:
                raise UnsafeFileError("its archive has two end records")
            *_, n_entries, n_bytes, start = _unpack(_END64, data, 0, b"PK\6\6")
            stop = at
    if n_comment or start + n_bytes != stop:
        raise UnsafeFileError("the directory of its archive doesn't end at the end record")
    return start, stop, n_entries


def _unpack(record: struct.Struct, data: bytes, at: int, signature: bytes) -> tuple[Any, ...]:
    """The fields of a record; the first is its signature."""
    if len(data) - at < record.size or data[at : at + 4] != signature:
        raise zipfile.BadZipFile("File is not a zip file" if record is _END else "invalid record")
    return record.unpack_from(data, at)


def _read(file: BinaryIO, start: int, n_bytes: int) -> bytes:
    file.seek(start)
    data = file.read(n_bytes)
    if len(data) != n_bytes:
        raise zipfile.BadZipFile("the file ends early")
    return data


def _long_sizes(extra: bytes, values: list[int]) -> list[int]:
    """The 64-bit sizes and offset, where the 32-bit ones are all ones (APPNOTE.TXT, 4.5.3)."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            n_long = sum(value == 2**32 - 1 for value in values)
            if size < 8 * n_long or len(extra) < 4 + 8 * n_long:
                raise zipfile.BadZipFile("a record is truncated")
            longs = iter(struct.unpack_from(f"<{n_long}Q", extra, 4))
            return [next(longs) if value == 2**32 - 1 else value for value in values]
        extra = extra[4 + size :]
    return values


def _decoded(raw_name: bytes) -> str:
    try:
        name = raw_name.decode()
    except UnicodeDecodeError:
        name = ""
    if not name.isprintable() or "/" not in name:
        raise UnsafeFileError(f"its archive has a member named {raw_name!r:.80}")
    return name


class _Item(NamedTuple):
    """An entry of the unpickler's stack.

    Attributes:
        weight: 1 plus the weights of the items of a tuple or of a call's arguments: the cost of
            hashing it, which the memo can double with every opcode. Lists and dicts weigh 1, since
            they can't be hashed.
        name: the name of a callable, else empty.
        is_dict: it is an OrderedDict, whose attributes may be set.
    """

    weight: int = 1
    name: str = ""
    is_dict: bool = False


def _check_pickle(data: bytes) -> None:
    """Interpret the pickle on a stack of weights, without constructing its objects."""
    stack: list[_Item | None] = []  # None: a mark
    memo: dict[Any, _Item] = {}  # by the opcode's argument

    def pop(n: int) -> list[_Item]:
        items = [stack.pop() for _ in range(n)]
        if None in items:
            raise ValueError("its pickle is damaged")
        return [item for item in items if item is not None]

    def pop_to_mark() -> list[_Item]:
        items = []
        while (item := stack.pop()) is not None:
            items.append(item)
        return items

    def push(items: list[_Item], *, is_dict: bool = False) -> None:
        weight = 1 + sum(item.weight for item in items)
        if weight > _LARGEST_ITEM:
            raise UnsafeFileError("its pickle has tuples that are nested too deep")
        stack.append(_Item(weight, is_dict=is_dict))

    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in _ATOMS:
                stack.append(_Item())
            elif name == "MARK":
                stack.append(None)
            elif name in ("BINPUT", "LONG_BINPUT"):
                (memo[argument],) = pop(1)
                stack.append(memo[argument])
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _TUPLES:
                push(pop(_TUPLES[name]))
            elif name == "TUPLE":
                push(pop_to_mark())
            elif name == "BINPERSID":
                push(pop(1))
            elif name == "GLOBAL":
                stack.append(_Item(name=_checked_name(str(argument))))
            elif name == "REDUCE":
                arguments, function = pop(2)
                if not function.name:
                    raise UnsafeFileError("it calls something other than a function")
                push([arguments], is_dict=function.name == _ORDERED_DICT)
            elif name in ("APPEND", "SETITEM"):
                pop(1 if name == "APPEND" else 2)
            elif name in ("APPENDS", "SETITEMS"):
                pop_to_mark()
            elif name == "BUILD":
                pop(1)
                if not (stack[-1] and stack[-1].is_dict):
                    raise UnsafeFileError("it sets the state of something other than a dict")
            elif name not in ("PROTO", "STOP"):
                raise UnsafeFileError(f"it holds a Python object ({name})")
    except (IndexError, KeyError):
        raise ValueError("its pickle is damaged") from None


def _checked_name(name: str) -> str:
    """The name of a callable, empty for that of a storage or dtype."""
    if name in _CALLABLES:
        return name
    module, _, attribute = name.partition(" ")
    found = getattr(torch, attribute, None) if module == "torch" else None
    is_storage = found is not None and attribute.endswith("Storage")
    if name == "torch.storage UntypedStorage" or is_storage or isinstance(found, torch.dtype):
        return ""
    raise UnsafeFileError(escaped(f"it holds {module}.{attribute}".rstrip(".")[:200]))
