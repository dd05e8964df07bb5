"""HTTP requests to a server, sent again while it does not answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from hires.errors import HiresError, RequestError, RunError

if TYPE_CHECKING:
    import httpx

RETRIES, PAUSE_SECONDS = 5, 0.5  # of a request that did not reach the server


class UnreachableError(RunError):
    """The server does not answer."""


class Connection:
    """The HTTP connections to one server. Use it in a `with` statement, or call `close`."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 60.0) -> None:
        import httpx

        self.errors: tuple[type[Exception], ...] = (httpx.TransportError,)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        if not url.startswith(("http://", "https://")):
            raise RequestError(f"url {url!r}: give one such as http://127.0.0.1:7860")
        try:
            self.http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        except (httpx.InvalidURL, TypeError) as error:
            raise RequestError(f"url {url!r}: {error}; give one such as http://127.0.0.1:7860") from None
        self.url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        json: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send one request, again while the server does not answer. UnreachableError, or what `check` raises."""
        failures = 0
        while True:
            try:
                response = self.http.request(method, path, params=params, json=json, headers=headers)
                self.check(response)
                return response
            except self.errors as error:
                failures += 1
                self.pause(failures, error)

    def pause(self, failures: int, error: Exception | None = None) -> None:
        """Wait before the next try. UnreachableError, which names `error`, after too many."""
        if failures > RETRIES:
            reason = "" if error is None else f" ({error})"
            raise UnreachableError(f"{self.url}: does not answer{reason}; is `hires serve` running there?") from None
        time.sleep(PAUSE_SECONDS * failures)

    def check(self, response: httpx.Response) -> None:
        """RequestError or RunError with the server's reason where it refuses."""
        if response.status_code < 400:
            return
        response.read()
        try:
            reason = str(response.json()["detail"])
        except (ValueError, KeyError, TypeError):
            reason = f"HTTP {response.status_code}"
        kind: type[HiresError] = RequestError if response.status_code < 500 and response.status_code != 429 else RunError
        raise kind(f"{self.url}: {reason}")
