"""A port to listen at."""

import socket


def free_port(host: str = "127.0.0.1") -> int:
    """One that nobody listens at on `host` ("" for every address of this machine), until somebody
    else is as quick.
    """
    with socket.socket() as door:
        door.bind((host, 0))
        return door.getsockname()[1]
