"""A real PostgreSQL server on loopback, from Debian's packages, that tests may stop and start again."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def binaries() -> Path | None:
    """The folder with initdb and postgres, of the newest version there is."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    return versions[-1].parent if versions else None


def missing() -> str | None:
    """Why no server can be started here, or None."""
    if binaries() is None:
        return "no PostgreSQL in /usr/lib/postgresql (Debian: apt-get install postgresql)"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no driver for PostgreSQL (pip install 'groupsearch[postgresql]')"
    return None


@dataclass
class Server:
    """One server, its data in a folder of its own.

    Attributes:
        folder: where its data are.
        port: where it listens, on loopback only.
        process: the running server, or None while it is stopped.
    """

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        program = [str(binaries() / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)]
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=60"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([*program, *settings], stdout=log, stderr=log, **_unprivileged())
        ready = [str(binaries() / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        end = time.monotonic() + 30
        while subprocess.run(ready, check=False).returncode:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT ends every connection at once, SIGQUIT is a crash that is recovered from on start."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def create(self, name: str) -> str:
        """The URL of a new, empty database."""
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def url(self, name: str) -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/{name}"


@contextmanager
def running_server() -> Iterator[Server]:
    """A server that runs while this lasts."""
    folder = Path(tempfile.mkdtemp(prefix="groupsearch-postgres-"))
    try:
        if "user" in _unprivileged():
            os.chown(folder, *[pwd.getpwnam(_unprivileged()["user"])[i] for i in (2, 3)])
        command = [str(binaries() / "initdb"), "-D", str(folder / "data"), "-U", "tester", "-A", "trust", "--no-sync"]
        subprocess.run([*command, "--no-locale", "-E", "UTF8"], check=True, capture_output=True, **_unprivileged())
        server = Server(folder, free_port())
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_name, "group": entry.pw_gid, "extra_groups": [], "cwd": "/"}
