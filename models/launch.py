"""The one module that starts processes: a child runs `models.worker` on a JSON spec, alone or as a torch elastic gang.

A single child that needs torch is forked by a warm parent (models/warm.py), which this process starts once.

Programs that work beside this process (Prefect's server and worker, flows/serve.py) are started here too, as services.

A child's output is always piped (models/heard.py), because one that inherits stdout can hold a dead flow open; a child
dies with its parent (models/worker.py), and gets `GRACE_S` to write a checkpoint when it is asked to stop.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import util
from pathlib import Path
from typing import IO, Any, TypeAlias

from models.failures import WorkerLost, failure_of
from models.heard import Record, listen
from models.meeting import Meeting, pinned
from models.memory import ask_for_huge_pages
from storage.backend import ANSWERED

GRACE_S = 25.0  # Prefect kills a cancelled flow after 30 s
CLOSE_S = 1.0
PR_SET_PDEATHSIG = 1
SOCKET_FOLDER_BYTES = 107 - len("/pymp-12345678/listener-12345678")  # the kernel's limit for a socket's path

Service: TypeAlias = "subprocess.Popen[str]"
Child: TypeAlias = "Service | WarmChild"


@dataclass(frozen=True)
class Place:
    """Which rank a child is of a gang that several machines form, and where its ranks meet: an address of rank 0's machine."""

    rank: int
    world: int
    address: str
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What torch.distributed reads; each rank is alone with the devices that it sees."""
        found = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return {**{name: str(value) for name, value in found.items()}, **self.meeting_point}

    @property
    def meeting_point(self) -> dict[str, str]:
        """torch's names of address and port."""
        return {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}


def run_worker(
    function: str,
    spec: dict[str, Any],
    *,
    world: int = 1,
    threads: int = 1,
    place: Place | None = None,
    meeting: Meeting | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
    on_log: Callable[[str], None] = lambda line: None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Run `function` ("module:name") on a JSON spec in `world` child processes and return rank 0's result.

    Blocks until all processes are gone, on an exception too; `stop` ends them from another thread. With `place` the child is
    one rank of a gang whose other ranks are started elsewhere; all but rank 0 return {}. With `meeting` this machine starts its
    share of `world` ranks, once the other machines are there. Raises UserError
    where the child found bad input, StoreAway where its store did not answer, WorkerLost where a process of it was
    killed, WorkerFailed for every other failure.
    """
    with tempfile.TemporaryDirectory(prefix="nst-") as folder:
        path = Path(folder) / "spec.json"
        ranks = place.world if place else world
        job = {"function": function, "spec": spec, "world": ranks, "threads": threads}
        path.write_text(json.dumps({**job, "meeting": asdict(meeting) if meeting else None}))
        child = _start(function, path, world, threads, place, meeting)
        finished = threading.Event()
        if stop is not None:
            threading.Thread(target=_stop_on, args=(child, stop, finished), daemon=True).start()
        try:
            assert child.stdout is not None  # we asked for the pipe
            records, last_lines, at = listen(child.stdout, on_record, on_log)
            code = child.wait()
        finally:
            finished.set()
            stop_process(child)
    if place and place.rank and code == 0:
        return {}
    error = failure_of(function, ranks, records, code, at, last_lines, place.rank if place else 0)
    if error is not None:
        raise error
    result: dict[str, Any] = next(record["result"] for record in records if "result" in record)
    return result


def join(meeting: Meeting, on_record: Callable[[Record], None], on_log: Callable[[str], None]) -> int:
    """Wait for the next training that other machines hand out at a meeting, and be one of its machines; its exit code."""
    with tempfile.TemporaryDirectory(prefix="nst-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps({"world": 0, "meeting": asdict(meeting)}))
        child = _start("", path, 0, 1, None, meeting)
        try:
            assert child.stdout is not None
            listen(child.stdout, on_record, on_log)
            return child.wait()
        finally:
            stop_process(child)


def _start(
    function: str, spec: Path, world: int, threads: int, place: Place | None, meeting: Meeting | None = None
) -> Child:
    """A child on its way: forked by the warm parent where it needs torch and is alone, else a process of its own."""
    if world == 1 and place is None and function.startswith("models.") and sys.platform == "linux":
        return WarmParent.of_this_process().start(spec)
    return subprocess.Popen(
        [sys.executable, "-m", "models.worker", str(spec)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=child_environment(threads, place, meeting),
        text=True,
        errors="replace",
    )


class WarmChild:
    """A child of the warm parent, to be used like a `subprocess.Popen`."""

    def __init__(self, stdout: IO[str]) -> None:
        self.stdout = stdout
        self.pid = 0
        self.code: int | None = None
        self.known, self.ended = threading.Event(), threading.Event()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.code if self.ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired("models.worker", timeout or 0.0)
        return self.code if self.code is not None else 1

    def terminate(self) -> None:
        """Ask it to stop."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        self.known.wait()
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class WarmParent:
    """This process's warm parent: started with the first job, ended with this process."""

    _lock = threading.Lock()
    _current: "WarmParent | None" = None

    @classmethod
    def of_this_process(cls) -> "WarmParent":
        """The one that runs, or a new one."""
        with cls._lock:
            if cls._current is None or cls._current._gone or cls._current._process.poll() is not None:
                cls._current = cls()
            return cls._current

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "models.warm", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=child_environment(threads=1),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._children: dict[str, WarmChild] = {}
        self._state, self._gone = threading.Lock(), False
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self._close)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def start(self, spec: Path) -> WarmChild:
        """Fork a child that runs `models.worker` on a spec file."""
        reading, writing = os.pipe()
        child = WarmChild(os.fdopen(reading, errors="replace"))
        job = uuid.uuid4().hex
        try:
            with self._state:
                if self._gone:
                    raise ConnectionResetError
                self._children[job] = child
            socket.send_fds(self._connection, [json.dumps({"job": job, "spec": str(spec)}).encode()], [writing])
        except OSError as error:
            raise WorkerLost("the warm parent of the workers was killed; run again") from error
        finally:
            os.close(writing)
        return child

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # a connection that is reset has ended like one that is closed
            while data := self._connection.recv(1 << 16):
                message = json.loads(data)
                child = self._children[message["job"]]
                if "pid" in message:
                    child.pid = message["pid"]
                    child.known.set()
                else:
                    child.code = message["code"]
                    child.ended.set()
                    del self._children[message["job"]]
        with self._state:
            self._gone = True
        for child in self._children.values():  # their parent was killed, and they with it
            child.code = -signal.SIGKILL
            child.ended.set()
            child.known.set()

    def _close(self) -> None:
        """End it: at once where it waits for jobs, by force where it is still loading."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def warm_up() -> None:
    """Start the warm parent ahead of the first job, so that it loads torch while other work goes on."""
    if sys.platform == "linux":
        WarmParent.of_this_process()


def child_environment(threads: int, place: Place | None = None, meeting: Meeting | None = None) -> dict[str, str]:
    """The environment of a child: pinned threads, where ranks meet, no import from the working directory."""
    environment = dict(os.environ)
    environment.update(
        pinned(threads),
        PYTHONSAFEPATH="1",  # another repository's `tasks` in the working directory is never imported
        PYTHONUNBUFFERED="1",
        NST_PARENT=str(os.getpid()),
    )
    environment[ANSWERED] = "1"  # a child waits longer for a store that is away: its parent has spoken to it
    if place is not None:
        environment.update(place.environment)
    elif meeting is None or meeting.on_loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ask_for_huge_pages(environment)
    return _finding_this_code(environment)


def _finding_this_code(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python imports this checkout's packages, from any working directory."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = environment.get("PYTHONPATH", "")
    if root in inherited.split(os.pathsep):
        return dict(environment)
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [root, inherited]))}


def start_service(line: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> Service:
    """Start a program that works beside this process, in `folder`; what it prints goes to the file `log`.

    Ctrl-C reaches this process alone, which stops its services in order (`stop_process`). Where it ends without doing
    so, killed for instance, they get SIGTERM (Linux).
    """
    libc = ctypes.CDLL(None)

    def before_program() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored below a shell script's `&`, and so in all children
        if sys.platform == "linux":
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    with log.open("a") as output:
        return subprocess.Popen(
            list(line),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_finding_this_code(environment),
            cwd=folder,
            text=True,
            start_new_session=True,
            preexec_fn=before_program,
        )


def free_port(host: str) -> int:
    """A port of `host` (empty: of any address) that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def make_room_for_sockets() -> None:
    """Tensors come from loader processes over sockets in the temporary folder. Where that folder's path is too long
    for a socket they would be lost without a word (multiprocessing's feeder only prints): then take /tmp for them."""
    if len(os.fsencode(tempfile.gettempdir())) > SOCKET_FOLDER_BYTES:
        users, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            util.get_temp_dir()  # made once, and inherited by the loader processes
        finally:
            tempfile.tempdir = users


@functools.cache
def code_state() -> dict[str, Any]:
    """The program's own git commit and whether its tree was dirty; empty strings outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (root / ".git").exists():
        return {"commit": "", "dirty": False}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def stop_process(child: Child) -> None:
    """End a child and wait for it: SIGTERM, then SIGKILL after the grace. No effect on one that has ended."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _stop_on(child: Child, stop: threading.Event, finished: threading.Event) -> None:
    """Ask the child to end as soon as `stop` is set; it may have been set before the child started."""
    while not finished.is_set():
        if stop.wait(0.2):
            child.terminate()
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
            return
