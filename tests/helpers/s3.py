"""An S3 of this machine, for tests: moto's server in a thread of this process."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "runs"


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a bucket; inside, the environment holds what it takes to reach it."""
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "ENDPOINT_URL": f"http://{host}:{port}",
                "ACCESS_KEY_ID": "testing",
                "SECRET_ACCESS_KEY": "testing",
                "DEFAULT_REGION": "us-east-1",
            }.items():
                patch.setenv(f"AWS_{name}", value)
            # one of before knows the address of a server that is gone
            S3FileSystem.clear_instance_cache()
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield f"s3://{BUCKET}"
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()  # another server may be there, which began before
