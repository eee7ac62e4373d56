"""Spoils the content of files, at random but by a seed: any bytes, and what the formats of this project are made of."""

import gzip
import itertools
import json
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any, TypeVar

import google_crc32c

# (generator, valid content) -> other content.
Spoil = Callable[[Random, bytes], bytes]
T = TypeVar("T")

_NUMBERS = (0, 1, 2, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "0", "..", "/", "\0", "\x1b[2J", "\ud800", "é", "x" * 2000, "uint8", "float64", "O", "natural"),
    *([], {}, [[]], [0], [None], [1, 2, 3], {"a": {}}, {"": 0}, [[[[[[[[]]]]]]]]),
)


def spoil_bytes(rng: Random, content: bytes) -> bytes:
    """Up to four changes to any bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        # Headers are short and say most.
        at = rng.randrange(min(at + 1, 64)) if rng.random() < 0.3 else at
        length = rng.choice((1, 2, 4, 8, 16, 100))
        match rng.randrange(9):
            case 0 | 1 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at : at + length] = rng.randbytes(length)
            case 3:
                del changed[at:]
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = rng.choice((rng.randbytes(length), bytes(length), changed[at : at + length]))
            case 6:
                changed[at:at] = changed[rng.randrange(len(changed) + 1) :][: 10 * length]
            case 7:
                size, order = rng.choice((1, 2, 4, 8)), rng.choice("<>")
                number = rng.choice(_NUMBERS) % 256**size
                changed[at : at + size] = struct.pack(f"{order}{'xBHxIxxxQ'[size]}", number)
            case _:
                changed[at : at + 1] = rng.choice((bytes([rng.choice(b'\0\xff"-.[{,\n')]), b"9" * 30))
    return bytes(changed)


def spoil_value(rng: Random, value: Any) -> Any:
    """A JSON value with up to three changes: other values and types, lost and renamed keys, exchanged parts."""
    root = [json.loads(json.dumps(value))]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        waiting: list[Any] = [root]
        while waiting:
            block = waiting.pop()
            keys = list(block) if isinstance(block, dict) else range(len(block))
            places += [(block, key) for key in keys]
            waiting += [block[key] for key in keys if isinstance(block[key], dict | list)]
        block, key = rng.choice(places)
        other, other_key = rng.choice(places)
        match rng.randrange(7):
            case 0 | 1 | 2:
                block[key] = deepcopy(rng.choice(_VALUES))
            case 3 if block is not root:
                del block[key]
            case 4 if isinstance(block, dict):
                block[rng.choice(("", "x", f"{key} ", "name", "shape", "codecs", "0"))] = block.pop(key)
            case 5:
                # A copy: nothing may contain itself.
                block[key] = json.loads(json.dumps(other[other_key]))
            case _:
                block[key] = rng.choice(([block[key]], {"x": block[key]}, str(block[key])[:100], [block[key], 0]))
    return root[0]


def spoil_json(rng: Random, content: bytes) -> bytes:
    """JSON with other values in it, or other bytes, as it may stand within another file."""
    match rng.randrange(20):
        case 0:
            return spoil_bytes(rng, content)
        case 1:
            return rng.choice(
                (b"[" * 10**5, b'{"a":' * 10**5, b"1" * 5000, b"NaN", b'"\\ud800"', b"\xef\xbb\xbf" + content)
            )
        case 2:  # a key twice
            return content.replace(b"{", b'{"shape": null, ', 1)
    return json.dumps(spoil_value(rng, json.loads(content))).encode()


_CELLS = ("", "nan", "NA", "inf", "-1", "1e400", "9" * 30, "1.5", "x", '"', "True", "0x1", "\0", "natural", "2.0")


def spoil_csv(rng: Random, content: bytes) -> bytes:
    """A table with other cells, rows or columns."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    if rng.random() < 0.1:
        column = rng.randrange(len(rows[0]))
        rows = [row[:column] + row[column + 1 :] for row in rows]

    def other(row: list[str]) -> list[str]:
        at = rng.randrange(len(row))
        cell = rng.choice((rng.choice(_CELLS), rng.choice(rng.choice(rows)), rng.choice(rows)[at % len(rows[0])]))
        return [*row[:at], cell, *row[at + rng.choice((0, 1, 1, 1)) :]]

    return "\n".join(map(",".join, _spoil_parts(rng, rows, other))).encode() + b"\n"


def spoil_gzip(rng: Random, content: bytes, spoil: Spoil = spoil_bytes) -> bytes:
    """A .gz whose content is spoiled."""
    return gzip.compress(rng.choice((spoil_bytes, spoil, spoil))(rng, gzip.decompress(content)), 1)


_PAX = (
    *(("size", "99999999999"), ("size", "-1"), ("size", "x"), ("path", "/tmp/evil"), ("hdrcharset", "x")),
    *(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")),
    *(("GNU.sparse.size", "9999999999"), ("GNU.sparse.map", "0,x")),
)


def spoil_tar(rng: Random, content: bytes) -> bytes:
    """A .tar with other fields in a header, its checksum right again."""
    changed = bytearray(content)
    headers = [at for at in range(0, len(changed), 512) if changed[at + 257 : at + 262] == b"ustar"]
    for at in rng.sample(headers, rng.choice((1, 1, 2))):
        match rng.randrange(5):
            case 0 | 1:
                changed[at + 156] = rng.choice(b"\x000123456789xgLKSVDMN~\xff")
            case 2:  # the size, in octal or in base 256
                size = rng.choice((0, 1, 511, 512, 513, 8**11 - 1, 2**62, 2**90))
                octal = b"%011o\0" % size
                changed[at + 124 : at + 136] = octal if len(octal) == 12 else (size | 1 << 95).to_bytes(12, "big")
            case 3:
                name = rng.choice((b"../evil", b"/tmp/evil", b"\xff" * 100, b"", b"a" * 100, b"GNUSparseFile.0/x"))
                changed[at : at + 100] = name.ljust(100, b"\0")
            case _:
                changed[at : at + 512] = spoil_bytes(rng, bytes(changed[at : at + 512])).ljust(512, b"\0")[:512]
        if rng.random() < 0.9:
            _correct_checksum(changed, at)
    if rng.random() < 0.2:  # what a pax header may say
        header = bytearray(tarfile.TarInfo.create_pax_global_header(dict(rng.sample(_PAX, 2))))
        header[156] = rng.choice(b"xg")
        _correct_checksum(header, 0)
        changed[:0] = header
    return bytes(changed)


def spoil_tgz(rng: Random, content: bytes) -> bytes:
    """A .tar.gz with other fields in a header, or other bytes."""
    return spoil_gzip(rng, content, spoil_tar)


def _correct_checksum(tar: bytearray, at: int) -> None:
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])


_CHUNKS = (b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"zTXt", b"sBIT", b"xxxx")


def spoil_png(rng: Random, content: bytes) -> bytes:
    """A PNG with other chunks, their checksums right again."""
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length

    def other(chunk: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        kind, data = chunk
        match rng.randrange(5):
            case 0:
                return kind, spoil_bytes(rng, data)
            case 1 | 2 if kind == b"IDAT" and data[:1] == b"x":
                return kind, zlib.compress(spoil_bytes(rng, zlib.decompressobj().decompress(data)), 1)
            case 1 | 2 if kind == b"IHDR":  # depth, colour type, compression, filter, interlacing
                return kind, data[:8] + bytes(rng.choice((0, 1, 2, 3, 4, 6, 8, 16)) for _ in range(5)) + data[13:]
        bomb, exif = b"x\0\0" + zlib.compress(bytes(10**6)), b"II*\0\x08\0\0\0" + rng.randbytes(20)
        said = rng.choice((rng.randbytes(rng.choice((0, 1, 8, 26, 768))), bomb, exif, b"\xff" * 26))
        return rng.choice(_CHUNKS), said

    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in _spoil_parts(rng, chunks, other)
    )
    return content[:8] + b"".join(packed)


_OPCODES = (
    *(b"\x94", b"q\xff", b"r\xff\xff\xff\xff", b"h\x00", b"j\xff\xff\xff\xff", b"0", b"1", b"2", b"(", b")", b"]"),
    *(b"}", b"N", b"\x85", b"\x86", b"\x87", b"t", b"R", b"b", b"s", b"u", b"e", b"a", b"\x81", b"\x90", b"\x91"),
    *(b"K\x05", b"\x88", b".", b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"),
    *(b"c\n\n", b"\x82\x01", b"Pid\n", b"Q", b"cnumpy.core.multiarray\n_reconstruct\n", b"\x8b\xff\xff\xff\x7f"),
    *(b"Fnan\n", b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 7 + b"\0", b"T\xff\xff\xff\x7f", b"p99999999\n"),
    *(b"L" + b"9" * 5000 + b"L\n", b"I" + b"9" * 20 + b"\n", b"X\x02\0\0\0\xff\xff"),
)


def spoil_pickle(rng: Random, content: bytes) -> bytes:
    """A pickle with other steps."""
    places = [at or 0 for _, _, at in pickletools.genops(content)] + [len(content)]
    steps = [content[start:end] for start, end in itertools.pairwise(places)]

    def other(step: bytes) -> bytes:
        return rng.choice((rng.choice(_OPCODES) * rng.choice((1, 1, 1, 1, 5, 2000)), spoil_bytes(rng, step)))

    spoiled = _spoil_parts(rng, steps, other)
    return b"".join(spoiled)


def spoil_safetensors(rng: Random, content: bytes) -> bytes:
    """Weights with other entries in their header, its length right again."""
    start = content.index(b'{"') - 8  # of a checkpoint, behind its digest
    (length,) = struct.unpack_from("<Q", content, start)
    header = spoil_json(rng, content[start + 8 : start + 8 + length])
    return content[:start] + struct.pack("<Q", len(header)) + header + content[start + 8 + length :]


def spoil_shard(rng: Random, content: bytes) -> bytes:
    """A shard of chunks with CRC-32C that are right for the spoiled content."""
    # The index at the end has as many entries as make its checksum right.
    (checksum,) = struct.unpack("<I", content[-4:])
    indices = (bytearray(content[-4 - 16 * n : -4]) for n in range(1, 1000))
    index = next(index for index in indices if google_crc32c.value(bytes(index)) == checksum)
    start, length = struct.unpack_from("<QQ", index)
    chunk = content[start : start + length - 4]
    if rng.random() < 0.5:
        chunk = (spoil_bytes(rng, chunk) + bytes(length))[: len(chunk)]
    else:
        struct.pack_into("<Q", index, 8 * rng.randrange(len(index) // 8), rng.choice(_NUMBERS))
    body = bytearray(content[: len(content) - 4 - len(index)])
    body[start : start + length] = chunk + struct.pack("<I", google_crc32c.value(chunk))
    return bytes(body) + bytes(index) + struct.pack("<I", google_crc32c.value(bytes(index)))


_YAML = (
    *("&a [*a]", "*a", "<<: *a", "!!python/object/apply:os.getpid []", "!!bool x", "!!int ''", "!!timestamp 1-1-1"),
    *("!!binary '@'", "2004-13-01", "0x" + "F" * 900, "1e400", ".nan", "-.inf", "0o9", "1_000", "~", "? [a]", "- "),
    *("| \n", "> 9\n", "%YAML 1.1\n---\n", "---\n", "...\n", "\t", "{", "[", "}", '"\\ud800"', '"\\0"', "'", "\x85"),
    *("\u2028", "!!set {a}", "!!omap [a: 1]", "!!float x", "="),
)


def spoil_yaml(rng: Random, content: bytes) -> bytes:
    """YAML with other lines or words in it, or things that only YAML has."""
    lines = content.decode().splitlines()

    def other(line: str) -> str:
        words = line.split(" ")
        words[rng.randrange(len(words))] = rng.choice((*_YAML, str(rng.choice(_NUMBERS)), "x", rng.choice(lines)))
        indented, value = rng.choice((" ", "  ", "- ")) + line, rng.choice(_YAML)
        return rng.choice((f"{line.split(':')[0]}: {value}", value, indented, " ".join(words)))

    return "\n".join([*_spoil_parts(rng, lines, other), ""]).encode("utf-8", "surrogatepass")


def _spoil_parts(rng: Random, parts: list[T], other: Callable[[T], T]) -> list[T]:
    """Up to four changes to a list: parts lost, repeated at other places, made into others, or with others before."""
    changed = list(parts)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0 if len(changed) > 1:
                del changed[at]
            case 1:
                changed.insert(at, rng.choice(changed))
            case 2:
                changed.insert(at, other(changed[at]))
            case _:
                changed[at] = other(changed[at])
    return changed
