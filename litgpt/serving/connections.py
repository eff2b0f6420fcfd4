"""Connections: how many there are at a time, and how long a client may take for each part of a request.

uvicorn itself takes connections until the system has no more to give, and waits for what they send without end. (So do
hypercorn, but for a limit on reading at all, and granian, but for one on headers.)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import h11
import uvicorn
from starlette.datastructures import Headers
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from litgpt.serving.errors import ApiError
from litgpt.serving.guard import LARGEST_BODY
from litgpt.serving.origins import Origins

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None

OTHER_FILES = 48  # that the program opens besides its connections: the model's, those that are being downloaded
WANTED_FILES = 4096
BURST = 16  # connections that are taken before others are served
LATER = {"Retry-After": "5"}
LATEST = sys.float_info.max
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
logger = logging.getLogger("litgpt.serving")


@dataclass(frozen=True)
class Limits:
    """What one client, or all together, may take. Times are in seconds."""

    connections: int | None = None
    """At a time; by default as many as the process may have files open, less those that it needs itself."""
    idle: float = 75
    """Without a request: before the first, and between two. Longer than the 60 of most load balancers, which send
    requests on connections that they believe to be open."""
    fresh: float = 1
    """Less without one does not count: it may be on its way."""
    head: float = 20
    """From the first byte of a request to the end of its headers."""
    body: float = 20
    """From there to the end of its body, and besides what its size takes at `body_rate`."""
    body_rate: float = 20_000
    """Bytes a second."""
    unread: float = 60
    """While the client takes nothing of what it is sent."""
    bodies: int = 4 * LARGEST_BODY
    """Bytes of bodies that have not come to their end, of all connections together."""


class Phase(Enum):
    """What a connection is waiting for."""

    IDLE = "the next request"
    HEAD = "the rest of a request's headers"
    BODY = "the rest of its body"
    ANSWER = "the answer"


class Connection(H11Protocol):
    """One connection, which the client has only so much time for.

    Args:
        everyone: All of them.
        config, server_state: The server's.
    """

    def __init__(self, everyone: Connections, config: uvicorn.Config, server_state: ServerState) -> None:
        super().__init__(config, server_state, app_state={})
        self.everyone = everyone
        self.phase, self.since = Phase.IDLE, self.loop.time()
        self.received = 0  # bytes of the present body
        self._held = 0  # of them, those that are kept for the application
        self._unsent, self._unsent_since = 0, self.since
        self._ended = False
        self._noted: RequestResponseCycle | None = None  # the request that `phase` is about

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.everyone.coming -= 1
        self.everyone.open.add(self)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        super().data_received(data)
        self._note(len(data))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def connection_lost(self, exc: Exception | None) -> None:
        self.everyone.open.discard(self)
        self._hold(0)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent, self._unsent_since = self.transport.get_write_buffer_size(), self.loop.time()

    @property
    def owes_since(self) -> float:
        """The time since which the client owes the server a request, or to read; infinity where it does not."""
        if self._ended or (self.phase is Phase.ANSWER and not self._unsent):
            return math.inf
        return self._unsent_since if self.phase is Phase.ANSWER else self.since

    def shutdown(self) -> None:
        """The server is about to end: a request that has not come to its end is not waited for."""
        if self.phase in (Phase.HEAD, Phase.BODY):
            self.end(ApiError(503, "The server is shutting down.", code="shutting_down", headers=LATER))
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self.end(ApiError(400, msg, code="invalid_request"))

    def end(self, error: ApiError | None = None) -> None:
        """Closes it. A client whose request is not answered yet is told why."""
        if self._ended:
            return
        self._ended = True
        is_answered = self.cycle is None or self.cycle.response_complete
        if error is not None:
            if not is_answered:
                self.scope.setdefault("state", {})["ended"] = error.status
            elif self.phase is not Phase.BODY:  # it never was a request
                self.everyone.note(error.status, self.loop.time() - self.since)
            with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun
                self._answer(error)
        if not is_answered:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._hold(0)
        if self.transport.get_write_buffer_size():  # nobody reads: it would never be empty
            self.transport.abort()
        else:
            self.transport.close()

    def end_if_late(self, now: float) -> None:
        """Ends it where its client takes longer than it may."""
        limits, waited = self.everyone.limits, now - self.since
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent or not unsent:
            self._unsent, self._unsent_since = unsent, now
        elif now - self._unsent_since > limits.unread:
            self.transport.abort()
            return
        if self.phase is Phase.IDLE and waited > limits.idle and not unsent:
            self.end()
        elif self.phase is Phase.HEAD and waited > limits.head:
            self.end(ApiError(408, f"The headers were not complete after {limits.head:g} seconds.", code="timeout"))
        elif self.phase is Phase.BODY and waited > limits.body + self.received / limits.body_rate:
            message = f"The body is too slow: {self.received:,} bytes have come within {waited:.0f} seconds."
            self.end(ApiError(408, message, code="timeout"))

    def _answer(self, error: ApiError) -> None:
        response, origin = error.response, None
        if self.cycle is not None and (self.phase is Phase.BODY or not self.cycle.response_complete):
            origin = Headers(raw=list(self.scope["headers"])).get("origin")  # which the script of a page is to read it
        response.headers.update({"Connection": "close", **self.everyone.origins.headers(origin)})
        answer = h11.Response(
            status_code=error.status, headers=response.raw_headers, reason=STATUS_PHRASES[error.status]
        )
        for event in (answer, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))

    def _note(self, received: int = 0) -> None:
        """What has come, and what is waited for now."""
        phase, is_answered = Phase.IDLE, self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.SEND_BODY:
            phase = Phase.BODY
        elif not is_answered:
            phase = Phase.ANSWER
        elif self.conn.trailing_data[0]:
            phase = Phase.HEAD
        if (phase, self.cycle) != (self.phase, self._noted):
            self.phase, self.since, self.received = phase, self.loop.time(), 0
        if self.cycle is not self._noted and self.everyone.is_crowded:
            # As if the client had asked: the next request waits its turn.
            self.scope["headers"] = [*self.scope["headers"], CLOSE_HEADER]
        self._noted = self.cycle
        self.received += received
        self._hold(self.received if phase is Phase.BODY and not is_answered else 0)

    def _hold(self, size: int) -> None:
        difference, self._held = size - self._held, size
        self.everyone.hold(difference)


class Connections:
    """All connections: takes them from a listening socket, and ends those whose clients take too long.

    Args:
        limits: What clients may take.
        note: Called with the status that ended what never became a request, and the seconds that it was waited for.
        origins: The web pages that may read what is answered.
    """

    def __init__(
        self,
        limits: Limits,
        note: Callable[[int, float], None] = lambda status, seconds: None,
        origins: Origins | None = None,
    ) -> None:
        self.limits, self.note, self.origins = limits, note, origins or Origins()
        self.most = limits.connections or _most_connections()
        self.open: set[Connection] = set()
        self.coming = 0  # taken, and not open yet
        self._held = 0  # bytes of bodies that have not come to their end
        self._tasks: list[asyncio.Task[None]] = []
        self._connecting: set[asyncio.Task[None]] = set()

    def listen(self, listener: socket.socket, make: Callable[[], Connection]) -> None:
        """Begins to take connections.

        Args:
            listener: A socket that listens.
            make: Makes what speaks on one of them.
        """
        listener.setblocking(False)
        self._tasks = [asyncio.ensure_future(self._accept(listener, make)), asyncio.ensure_future(self._watch())]

    def close(self) -> None:
        """Takes no more. Those that there are must still keep to their times."""
        self._tasks[0].cancel()

    def stop_watching(self) -> None:
        """Lets them take their time."""
        self._tasks[1].cancel()

    @property
    def is_crowded(self) -> bool:
        return len(self.open) >= self.most

    def hold(self, difference: int) -> None:
        """Of bodies that have not come to their end, more or fewer bytes are held; too many end the oldest of them."""
        self._held += difference
        while difference > 0 and self._held > self.limits.bodies:
            holding = [one for one in self.open if one.phase is Phase.BODY and one._held]
            oldest = min(holding, key=lambda one: one.since, default=None)
            if oldest is None:
                return
            message = "Too many requests are being sent whose bodies have not come to their end."
            oldest.end(ApiError(503, message, code="too_many_bodies", headers=LATER))

    async def _accept(self, listener: socket.socket, make: Callable[[], Connection]) -> None:
        loop, said, taken = asyncio.get_running_loop(), -math.inf, 0
        while True:
            try:
                client, _ = await loop.sock_accept(listener)  # at once where one waits
            except OSError as error:
                if error.errno in EXHAUSTED and loop.time() - said > 60:
                    said = loop.time()
                    logger.error("no connection can be taken: %s (said once a minute)", error.strerror)
                has_room = error.errno in EXHAUSTED and self._make_room()
                await asyncio.sleep(0 if has_room else 0.05)  # what is wrong now is wrong in the next moment, too
                continue
            while sum(not one._ended for one in self.open) + self.coming >= self.most and self._make_room():
                pass
            self.coming += 1
            task = asyncio.ensure_future(self._connect(client, make))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
            taken += 1
            if taken % BURST == 0:
                await asyncio.sleep(0)  # the others' turn

    async def _connect(self, client: socket.socket, make: Callable[[], Connection]) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(make, client)
        except OSError:  # it is gone already
            self.coming -= 1
            client.close()

    def _make_room(self) -> bool:
        """Ends one of those whose clients owe the server something: that which has done so for longest, and of those
        without a request before others. Whether there was one."""
        fresh = asyncio.get_running_loop().time() - self.limits.fresh
        owing = [one for one in self.open if one.owes_since <= (fresh if one.phase is Phase.ANSWER else LATEST)]
        idle = [one for one in owing if one.phase is Phase.IDLE and one.owes_since <= fresh]
        oldest = min(idle or owing, key=lambda one: one.owes_since, default=None)
        if oldest is not None and oldest.phase in (Phase.HEAD, Phase.BODY):
            oldest.end(ApiError(503, "Too many connections are open.", code="too_many_connections", headers=LATER))
        elif oldest is not None:
            oldest.end()
        return oldest is not None

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1, self.limits.head / 4))
            for connection in list(self.open):
                connection.end_if_late(loop.time())


def _most_connections() -> int:
    """How many connections a process may have; raises the number of files that it may have open, where it can."""
    if resource is None:
        return 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    wanted = WANTED_FILES if hard == infinite else min(hard, WANTED_FILES)
    if soft != infinite and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return max(8, (WANTED_FILES if soft == infinite else soft) - OTHER_FILES)
