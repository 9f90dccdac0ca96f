"""The HTTP protocol of the server: uvicorn's h11 protocol, with a time limit for the headers of a request."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

# uvicorn waits without limit for the end of a request's headers, and for the unread rest of a body after the
# response. A client that sends one byte a minute would occupy a connection forever, and a thousand of them
# all file descriptors of the process.
#
#     connected, or response sent ------------- headers complete -------- response sent ---
#                 |<------ at most HEAD_SECONDS ------>|  the endpoint's deadline  |<-- again


class TimedH11Protocol(H11Protocol):
    """Close connections on which no complete request head arrives within `HEAD_SECONDS`."""

    HEAD_SECONDS = 10.0

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_timer()

    def _update_timer(self) -> None:
        """Start the timer if the connection is waiting for a request, and stop it otherwise.

        A running timer is not restarted, because the limit applies to the complete request head.
        """
        is_waiting = self.cycle is None or self.cycle.response_complete
        if not is_waiting or self.transport.is_closing():
            self._cancel_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.HEAD_SECONDS, self._close)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        """Close a connection on which no request has arrived in time."""
        # `close` still sends the data that was written before. If the client does not read it, abort the connection.
        self.transport.close()
        self._timer = self.loop.call_later(self.HEAD_SECONDS, self.transport.abort)
