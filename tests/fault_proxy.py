"""A reverse proxy before an S3 server that does harm by rule: for tests of what a store survives."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from aiohttp import ClientSession, TCPConnector, web

STALL_S = 3600.0
SLOW_CHUNKS, SLOW_PAUSE_S = 20, 0.05
FLIPPED = 7  # this byte of a body
SESSION = web.AppKey("session", ClientSession)


@dataclass
class Fault:
    """What to do to requests of a method whose path contains a text: the first `times` of them, after `skip`.

    Actions: `503`, `500`, `skew` (a wrong clock; answered without asking the server), `reset` (before the answer), `reset_body` (in the middle
    of it), `stall` (no answer), `slow`, `drop_answer` (the server did it, the client is not told), `flip` (one byte of the
    answer), `flip_request` (one byte of the request), `delete_error` (a bulk deletion that fails for one object).
    """

    action: str
    method: str = ""
    path: str = ""
    times: int = 1
    skip: int = 0
    done: int = 0


@dataclass
class FaultProxy:
    """Its address, its rules, and the requests that came: (method, path)."""

    target: str
    endpoint: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def do(self, action: str, **rule: object) -> Fault:
        """Add a rule."""
        fault = Fault(action, **rule)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget rules and requests."""
        self.faults.clear()
        self.requests.clear()

    def _take(self, request: web.Request) -> str:
        for fault in self.faults:
            if fault.done >= fault.times or (fault.method and fault.method != request.method):
                continue
            if fault.path and fault.path not in request.path_qs:
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            fault.done += 1
            return fault.action
        return ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on, harmed where a rule says so. The Host stays, so that its signature holds."""
        self.requests.append((request.method, request.path_qs))
        action, body = self._take(request), await request.read()
        if action == "503":
            return _error(503, "SlowDown", "Please reduce your request rate.")
        if action == "skew":
            return _error(403, "RequestTimeTooSkewed", "The difference between the request time and ... is too large.")
        if action == "500":
            return _error(500, "InternalError", "We encountered an internal error.")
        if action == "delete_error":
            return _refused_deletion()
        if action == "stall":
            await asyncio.sleep(STALL_S)
        if action == "reset":
            return _reset(request)
        if action == "flip_request":
            body = _flip(body)
        session: ClientSession = request.app[SESSION]
        async with session.request(
            request.method, self.target + request.raw_path, headers=request.headers, data=body, allow_redirects=False
        ) as answer:
            data = await answer.read()
            if action == "drop_answer":
                return _reset(request)
            if action == "flip":
                data = _flip(data)
            return await self._answer(request, answer.status, dict(answer.headers), data, action)

    async def _answer(
        self, request: web.Request, status: int, headers: dict[str, str], data: bytes, action: str
    ) -> web.StreamResponse:
        headers.pop("Transfer-Encoding", None)
        if request.method != "HEAD":
            headers["Content-Length"] = str(len(data))
        answer = web.StreamResponse(status=status, headers=headers)
        await answer.prepare(request)
        if action == "reset_body":
            await answer.write(data[: len(data) // 2])
            return _reset(request)
        size = -(-len(data) // SLOW_CHUNKS) if action == "slow" else len(data)
        for start in range(0, len(data), size or 1):
            await answer.write(data[start : start + size])
            if action == "slow":
                await asyncio.sleep(SLOW_PAUSE_S)
        await answer.write_eof()
        return answer


@contextmanager
def fault_proxy(target: str) -> Iterator[FaultProxy]:
    """Run a proxy before the server at `target`, in a thread."""
    proxy, ready, loop = FaultProxy(target), threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        app = web.Application(client_max_size=1 << 30)
        app[SESSION] = ClientSession(auto_decompress=False, connector=TCPConnector(limit=0))
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        proxy.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        try:
            await asyncio.Event().wait()
        finally:
            await app[SESSION].close()
            await runner.cleanup()
            stalled = asyncio.all_tasks() - {task}
            for handler in stalled:
                handler.cancel()
            await asyncio.gather(*stalled, return_exceptions=True)

    task = loop.create_task(serve())

    def work() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(20), "the proxy did not start"
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(20)


def _flip(data: bytes) -> bytes:
    place = min(FLIPPED, len(data) - 1)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] if data else data


def _reset(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def _refused_deletion() -> web.Response:
    error = "<Error><Key>a</Key><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
    text = f"<?xml version='1.0' encoding='UTF-8'?><DeleteResult>{error}</DeleteResult>"
    return web.Response(status=200, text=text, content_type="application/xml")


def _error(status: int, code: str, message: str) -> web.Response:
    text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")
