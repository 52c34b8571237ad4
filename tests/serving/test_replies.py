import base64
import json
import struct

import numpy as np

from embedloom.retrieval.stored import shorten
from embedloom.serving.routes import encode_vectors


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
