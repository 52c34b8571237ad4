import base64
import json
import struct

import numpy as np

from embedloom.retrieval.stored import shorten
from embedloom.serving.encodings import encode_vectors, encoded


def test_base64_is_little_endian_float32():
    vectors = np.array([[1.5, -2.0, 0.1]], dtype=">f4").astype(np.float32)
    (encoded,) = encode_vectors(vectors, "base64")
    assert struct.unpack("<3f", base64.b64decode(encoded)) == tuple(vectors[0].tolist())


def test_floats_survive_json():
    vectors = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    back = np.array(json.loads(json.dumps(encode_vectors(vectors, "float"))), dtype=np.float32)
    assert np.array_equal(back, vectors)


def test_shortened_vectors_are_unit_vectors_again():
    vectors = np.array([[0.3, 0.4, 0.866]], dtype=np.float32)
    assert np.allclose(shorten(vectors, 2, normalize=True), [[0.6, 0.8]], atol=1e-6)
    assert np.allclose(shorten(vectors, 2, normalize=False), [[0.3, 0.4]])


# Three vectors of eight dimensions and what becomes of them, worked out by hand: bits from the highest down, set above 0.
VECTORS = np.array(
    [
        [0.5, -0.5, 0.25, 0.0, 1.27, -1.27, 0.01, -0.01],  # 1010 1010
        [-1, -2, -3, -4, -5, -6, -7, -8],
        [127, 1, 2, 3, 4, 5, 6, 7],
    ],
    dtype=np.float32,
)
UBINARY = [[0b10101010], [0], [255]]
INT8 = [
    [50, -50, 25, 0, 127, -127, 1, -1],
    [-16, -32, -48, -64, -79, -95, -111, -127],
    [127, 1, 2, 3, 4, 5, 6, 7],
]


def test_bits_are_packed_from_the_highest_down_and_binary_is_128_less():
    assert encode_vectors(VECTORS, "ubinary") == UBINARY == np.packbits(VECTORS > 0, axis=1).tolist()
    assert encode_vectors(VECTORS, "binary") == [[42], [-128], [127]]
    # As Voyage's documentation brings offset binary back.
    signed = np.array(encode_vectors(VECTORS, "binary"), dtype=np.int8)
    bits = np.unpackbits((signed.astype(np.int16) + 128).astype(np.uint8), axis=1)
    assert np.array_equal(bits, VECTORS > 0)


def test_eight_bits_fill_each_vectors_own_range_and_its_scale_brings_it_back():
    values, scales = encoded(VECTORS, "int8")
    assert values == INT8
    assert np.allclose(scales, [0.01, 8 / 127, 1.0])
    unsigned, same = encoded(VECTORS, "uint8")
    assert (np.array(unsigned) - 128).tolist() == INT8 and same == scales
    assert np.abs(np.array(values) * np.array(scales)[:, None] - VECTORS).max() <= max(scales) / 2 + 1e-6


def test_base64_is_of_the_bytes_of_the_type():
    for kind, dtype in (("int8", np.int8), ("uint8", np.uint8), ("binary", np.int8), ("ubinary", np.uint8)):
        plain, packed = encode_vectors(VECTORS, kind), encode_vectors(VECTORS, kind, as_base64=True)
        assert [np.frombuffer(base64.b64decode(one), dtype).tolist() for one in packed] == plain


def test_numbers_in_eight_bits_point_the_same_way():
    vectors = np.random.default_rng(0).standard_normal((50, 384)).astype(np.float32)
    values = np.array(encode_vectors(vectors, "int8"), dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(values, axis=1)
    assert ((vectors * values).sum(axis=1) / lengths).min() > 0.9998
