"""The shared server process, for every test of this folder."""

from tests.support.server import no_server_is_left, server

__all__ = ["no_server_is_left", "server"]
