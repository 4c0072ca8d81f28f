"""The warm parent: a process that has torch and timm loaded and forks for each job, so that a job starts at once.

Loading them takes 4 to 13 s, often longer than the job. Started by models/launch.py as `python -m models.warm FD`; its
jobs come over the socket `FD`, each with the write end of its output pipe. It runs no torch operation itself, so no
thread pool exists when it forks, and no GPU is touched. It ends when the socket closes, and its children with it.
"""

import array
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from typing import Any

from models import worker

PRELOADED = ("models.inference", "models.training")
MESSAGE_BYTES = 1 << 16


def main() -> int:
    """Load, then serve until the socket closes. In a forked child: run its job and return its exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the jobs, which write a checkpoint; the socket ends us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in PRELOADED:
        importlib.import_module(name)
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    while True:
        for ready, _ in selector.select():
            if ready.data is not None:
                selector.unregister(ready.fileobj)
                _report_end(connection, ready.data)
                continue
            message, descriptors = _receive(connection)
            if message is None:
                return 0
            pid = os.fork()
            if pid == 0:
                selector.close()
                connection.close()
                return _run_job(message, descriptors[0])
            os.close(descriptors[0])
            connection.send(json.dumps({"job": message["job"], "pid": pid}).encode())
            handle = os.pidfd_open(pid)
            selector.register(handle, selectors.EVENT_READ, data=(message["job"], pid, handle))


def _receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    descriptors = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(MESSAGE_BYTES, socket.CMSG_LEN(descriptors.itemsize))
    for _, _, raw in ancillary:
        descriptors.frombytes(raw[: len(raw) - len(raw) % descriptors.itemsize])
    return (json.loads(data) if data else None), list(descriptors)


def _report_end(connection: socket.socket, ended: tuple[str, int, int]) -> None:
    job, pid, handle = ended
    os.close(handle)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.send(json.dumps({"job": job, "code": code}).encode())


def _run_job(message: dict[str, Any], output: int) -> int:
    """In the child: make the pipe its output, and be a worker like any other."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ["NST_PARENT"] = str(os.getppid())
    sys.argv = ["models.worker", message["spec"]]
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
