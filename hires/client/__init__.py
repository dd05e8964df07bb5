"""A client of `hires serve`: renders on another machine as if they were here."""

from hires.client.client import Client
from hires.client.connection import UnreachableError
from hires.client.jobs import RemoteJob

__all__ = ["Client", "RemoteJob", "UnreachableError"]
