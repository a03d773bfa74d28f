"""The error of one request."""

from __future__ import annotations


class RequestError(Exception):
    """Refuses one request; `client_fault` False where the server, not the request, is to blame."""

    def __init__(self, text: str, *, client_fault: bool = True) -> None:
        super().__init__(text)
        self.client_fault = client_fault
