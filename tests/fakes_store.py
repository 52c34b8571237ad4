"""An S3 server that a test starts, and what clients in this process and its children need to find it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from s3fs import S3FileSystem


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment variables of a running server, set while it runs."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    stated = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in stated.items():
                patch.setenv(name, value)
            S3FileSystem.clear_instance_cache()
            yield stated
            S3FileSystem.clear_instance_cache()
    finally:
        httpx.post(f"http://{host}:{port}/moto-api/reset")  # servers of one process share their buckets
        started.stop()
