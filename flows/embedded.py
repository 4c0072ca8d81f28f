"""Prefect's API for one command: a server of its own, which comes up while the command loads Prefect, and ends with it.

Prefect starts such a server by itself where no API is named (its "ephemeral" mode), but only once a flow is called, after
it has loaded the server's code into the calling process as well.
"""

import atexit
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from models.failures import WorkerFailed
from models.launch import Service, free_port, start_service, stop_process

HOST = "127.0.0.1"
START_S = 180.0  # a machine that has just installed everything reads it from disk first
POLL_S = 0.05
PORTS_TRIED = 3  # another program may take the port between our look and the server's start
LOG_LINES = 30
APP = "prefect.server.api.server:create_app"


class EmbeddedApi:
    """A server that is on its way. Made before Prefect is imported: it says in the environment where the API is.

    Its database is the user's (PREFECT_HOME), so `prefect server start` shows later what has run. It ends after all else
    that this process does at its end (Prefect sends its last logs then), and where this process is killed (Linux).
    """

    def __init__(self) -> None:
        self._log = Path(tempfile.mkstemp(prefix="nst-prefect-", suffix=".log")[1])
        self._tried = 0
        self._service = self._start()
        atexit.register(self.stop)

    def wait(self) -> None:
        """Return when it answers. Raises WorkerFailed, with what the server said, where it does not come up."""
        deadline = time.monotonic() + START_S
        while not self._answers():
            ended = self._service.poll() is not None
            if ended and self._tried < PORTS_TRIED:
                self._service = self._start()
            elif ended or time.monotonic() > deadline:
                said = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
                how = f"ended with code {self._service.returncode}" if ended else f"did not come up in {START_S:.0f} s"
                raise WorkerFailed(f"Prefect's API {how}; --prefect off does without it. It said:\n{said}")
            else:
                time.sleep(POLL_S)

    def stop(self) -> None:
        """End the server."""
        stop_process(self._service)
        self._log.unlink(missing_ok=True)

    def _start(self) -> Service:
        self._tried += 1
        port = free_port(HOST)
        self._url = f"http://{HOST}:{port}/api"
        os.environ["PREFECT_API_URL"] = self._url
        own = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}
        inherited = {name: value for name, value in os.environ.items() if name != "PREFECT_SERVER_API_AUTH_STRING"}
        line = [sys.executable, "-m", "uvicorn", "--factory", APP, "--host", HOST, "--port", str(port)]
        line += ["--log-level", "error", "--lifespan", "on"]
        return start_service(line, {**inherited, **own}, Path.cwd(), self._log)

    def _answers(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with suppress(urllib.error.URLError, OSError), direct.open(f"{self._url}/health", timeout=5) as answer:
            return answer.status == 200
        return False
