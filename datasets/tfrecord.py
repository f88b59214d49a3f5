"""Reader for TFRecord files of tf.train.Example messages, without TensorFlow.

A file is a chain of records: the length of the payload (8 bytes), a checksum of these 8 bytes (4),
the payload, and its checksum (4), all little-endian. A checksum is CRC-32C, rotated by 15 bits and
moved by a constant. The payload is a protocol buffer, a map from names to lists of bytes, of floats
or of integers. TensorFlow's guide "TFRecord and tf.train.Example" describes the format.
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

# Values of a feature: integers or bytes.
Values = list[int] | list[bytes]

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

    Lists of floats are passed over.

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


def _masked(data: bytes) -> int:
    """Return the masked CRC-32C of bytes, as TFRecord files store it."""
    checksum = google_crc32c.value(data)
    return (((checksum >> 15) | (checksum << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _values(payload: bytes) -> dict[str, Values]:
    """Return the features of an Example by name; the last one counts if a name is repeated."""
    found: dict[str, Values] = {}
    for entry in _Example.FromString(payload).features.entries:
        kind = entry.feature.WhichOneof("kind")
        if kind is not None:
            name = entry.name.decode("utf-8", "replace")
            found[name] = list(getattr(entry.feature, kind).value)
    return found
