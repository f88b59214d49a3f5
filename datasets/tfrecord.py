"""Reader for TFRecord files of tf.train.Example messages, without TensorFlow.

<<<<<<< HEAD
A file is a chain of records: the length of the payload (8 bytes), a checksum of these 8 bytes (4),
the payload, and its checksum (4), all little-endian. A checksum is CRC-32C, rotated by 15 bits and
moved by a constant. The payload is a protocol buffer, a map from names to lists of bytes, of floats
or of integers. TensorFlow's guide "TFRecord and tf.train.Example" describes the format.
=======
A file is a sequence of records: the length of the payload (8 bytes), a checksum of these 8 bytes
(4), the payload, and its checksum (4), all little-endian. A checksum is CRC-32C, rotated by 15 bits
plus a constant. The payload is a protocol buffer, a map from names to lists of bytes, floats or
integers. Both formats are public: TensorFlow's guide "TFRecord and tf.train.Example", and
"Encoding" in the documentation of protocol buffers.
>>>>>>> w_words
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from glua_bench.errors import DataError

<<<<<<< HEAD
# A feature's values; which of the two depends on how it was written.
Values = list[int] | list[bytes]
=======
# Values of a feature: integers or bytes.
Values = list[int] | list[memoryview]
>>>>>>> w_words

_MASK_DELTA = 0xA282EAD8
# tf.train.Example as far as it is read: without lists of floats, and with the map of features as
# the list of entries that it is when stored, whose names may be any bytes.
_SCHEMA = """
    name: "glua_bench/example.proto" package: "glua_bench" syntax: "proto3"
    message_type { name: "Bytes"
        field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
    message_type { name: "Integers"
        field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
    message_type { name: "Feature" oneof_decl { name: "kind" }
        field { name: "bytes" number: 1 type: TYPE_MESSAGE type_name: "Bytes" oneof_index: 0 }
        field { name: "integers" number: 3 type: TYPE_MESSAGE type_name: "Integers"
            oneof_index: 0 } }
    message_type { name: "Entry"
        field { name: "name" number: 1 type: TYPE_BYTES }
        field { name: "feature" number: 2 type: TYPE_MESSAGE type_name: "Feature" } }
    message_type { name: "Features"
        field { name: "entries" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
            type_name: "Entry" } }
    message_type { name: "Example"
        field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
"""
_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
_Example = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("glua_bench.Example"))


def read_examples(path: Path) -> Iterator[dict[str, Values]]:
    """Iterate over the examples of a TFRecord file, checking each one.

<<<<<<< HEAD
    Lists of floats are passed over.
=======
    Lists of floats are skipped. The bytes of a feature are views into the record, not copies.
>>>>>>> w_words

    Args:
        path: an uncompressed TFRecord file.

    Yields:
        One dictionary per record: name of the feature → its values.

    Raises:
        DataError: the file cannot be read, is truncated, has a wrong checksum, or holds other
            messages than examples.
    """
    try:
        with path.open("rb") as stream:
            left = os.fstat(stream.fileno()).st_size
            if not left:
                raise _Damaged("it is empty")
            while left:
                head = stream.read(12)
                if len(head) < 12:
                    raise _Damaged("it ends within the length of a record")
                length, checksum = struct.unpack("<QI", head)
                if _masked(head[:8]) != checksum:
                    raise _Damaged("the checksum of a record's length does not match")
                if length + 16 > left:
                    raise _Damaged("it ends within a record")
                payload = stream.read(length)
                (checksum,) = struct.unpack("<I", stream.read(4))
                if _masked(payload) != checksum:
                    raise _Damaged("the checksum of a record's data does not match")
                left -= length + 16
                yield _values(payload)
    except (_Damaged, DecodeError, struct.error) as error:
        raise DataError(
            f"{path} is not a valid TFRecord file of examples ({error}): unpack or download it "
            "again."
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check the file and its "
            "permissions."
        ) from error


class _Damaged(ValueError):
    """Damage of a file, described without its name."""


<<<<<<< HEAD
def _masked(data: bytes) -> int:
    """The checksum of some bytes as it is stored."""
    checksum = google_crc32c.value(data)
    return (((checksum >> 15) | (checksum << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _values(payload: bytes) -> dict[str, Values]:
    """The features of an Example, by name; of a repeated name the last."""
=======
# -- checksums ------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of some bytes, as defined in RFC 3720.

    A CRC is linear, so a message can be folded in halves: the first half, advanced by the length
    of the second (one multiplication per word), is added to the second. This replaces a loop over
    bytes by a few array operations.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    if len(data) < 64:
        return _advance(0xFFFFFFFF, data) ^ 0xFFFFFFFF
    front = -len(data) % 4  # leading zeros have no effect
    octets = np.zeros(front + len(data), np.uint8)
    octets[front:] = np.frombuffer(data, np.uint8)
    octets[front : front + 4] ^= 0xFF  # equivalent to the initial value of all ones
    words = octets.view("<u4")
    while len(words) > 1:
        power = (len(words) - 1).bit_length() - 1
        low, high = _moved_by(power)
        first, words = words[: -(1 << power)], words[-(1 << power) :]
        words[-len(first) :] ^= low[first & 0xFFFF] ^ high[first >> 16]
    return _advance(int(words[0]), bytes(4)) ^ 0xFFFFFFFF


def _masked(checksum: int) -> int:
    """Return a checksum in its stored form."""
    return (((checksum >> 15) | (checksum << 17)) + _MASK_DELTA) & 0xFFFFFFFF


@lru_cache(1)
def _steps() -> list[int]:
    """Return the CRC table for one byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_CASTAGNOLI if value & 1 else 0)
        table.append(value)
    return table


def _advance(register: int, data: bytes) -> int:
    """Return the register after some bytes, one by one."""
    table = _steps()
    for octet in data:
        register = table[(register ^ octet) & 0xFF] ^ (register >> 8)
    return register


@lru_cache(64)
def _moved_by(power: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tables of the register after 2**power zero words, for its lower and upper 16 bits."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if power == 0:
        images = np.array([_advance(int(bit), bytes(4)) for bit in bits], np.uint32)
    else:
        low, high = _moved_by(power - 1)
        images = low[bits & 0xFFFF] ^ high[bits >> 16]  # half the words
        images = low[images & 0xFFFF] ^ high[images >> 16]
    tables = []
    for half in (images[:16], images[16:]):
        table = np.zeros(1, np.uint32)
        for image in half:
            table = np.concatenate([table, table ^ image])
        tables.append(table)
    return tables[0], tables[1]


# -- messages -------------------------------------------------------------------------------------


def _example(message: memoryview) -> dict[str, Values]:
    """Return the features of an Example: field 1 holds entries 1 of name 1 and feature 2."""
>>>>>>> w_words
    found: dict[str, Values] = {}
    for entry in _Example.FromString(payload).features.entries:
        kind = entry.feature.WhichOneof("kind")
        if kind is not None:
            name = entry.name.decode("utf-8", "replace")
            found[name] = list(getattr(entry.feature, kind).value)
    return found
<<<<<<< HEAD
=======


def _values(feature: memoryview) -> Values | None:
    """Return the list in a feature: 1 holds bytes, 3 integers; 2 holds floats, skipped."""
    values: Values | None = None
    for number, value in _fields(feature):
        if number == 1 and isinstance(value, memoryview):
            values = list(_messages(value, 1))
        elif number == 3 and isinstance(value, memoryview):
            values = _integers(value)
    return values


def _integers(message: memoryview) -> list[int]:
    """Return the values 1 of a list of 64-bit integers, packed or not."""
    values = []
    for number, value in _fields(message):
        if number != 1:
            continue
        if isinstance(value, int):
            values.append(value)
            continue
        at = 0
        while at < len(value):
            one, at = _varint(value, at)
            values.append(one)
    # Negative numbers are stored as two's complement.
    return [value - (1 << 64) if value >> 63 else value for value in values]


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """Iterate over the length-delimited fields with a given number."""
    for number, value in _fields(message):
        if number == wanted and isinstance(value, memoryview):
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Iterate over number and value of each field, skipping fields of fixed size."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _DELIMITED:
            length, at = _varint(message, at)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise _Damaged(f"it has a field of type {kind}")
        if length > len(message) - at:
            raise _Damaged("a field is longer than its message")
        if kind == _DELIMITED:
            yield key >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Read a varint (7 bits per byte, lowest first); return its value and end position."""
    value = 0
    for place in range(10):
        if at + place >= len(message):
            raise _Damaged("a number is cut off")
        octet = message[at + place]
        value |= (octet & 0x7F) << (7 * place)
        if octet < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + place + 1
    raise _Damaged("a number has more than 64 bits")
>>>>>>> w_words
