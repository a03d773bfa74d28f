"""A real Kafka broker of one node for people without Docker: jars by Maven, data kept, gone when whoever started it is gone."""

from __future__ import annotations

import base64
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from onerec.errors import Failure, UserError

VERSION: Final = "4.2.0"
"""The last before KAFKA-20734: from 4.3 on a coordinator that comes back while a partition has no leader takes it for deleted,
and a commit confirmed just before a kill is never shown to readers."""
JAVA: Final = 17
"""Oldest Java that Kafka 4 runs on."""
HOST: Final = "127.0.0.1"
READY_SECONDS: Final = 120.0
"""After a kill with busy clients a broker recovers its logs first: half a minute has been seen."""
_OURS: Final = {"lock", "server.properties", "format.properties", "data.formatting", "broker.log", "jvm.log"}
"""What may lie in the folder of a broker before its data do."""
_HERE: Final = Path(__file__).parent
# Reads until the pipe breaks, which is when the process that started the broker is gone, however it died.
_GUARD: Final = "trap '' INT TERM HUP; read -r _; kill -9 \"$0\""


class MissingTool(UserError):
    """What is needed to run a broker is not there: Java, Maven, or the way to a repository."""


def java() -> str:
    """Path of a `java` new enough; JAVA_HOME wins over PATH. Raises MissingTool."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which(f"{home}/bin/java") if home else shutil.which("java")
    if not found:
        raise MissingTool(
            (f"no java in JAVA_HOME {home}" if home else "no java on the PATH")
            + f"; install Java {JAVA} or newer (Debian: apt install openjdk-{JAVA}-jre-headless), or run Kafka with "
            "`docker compose up kafka` or elsewhere and give its address with --bootstrap"
        )
    said = subprocess.run([found, "-version"], capture_output=True, text=True, check=False)  # noqa: S603
    version = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    if said.returncode or not version:
        raise MissingTool(f"`{found} -version` failed: {said.stderr.strip()[:300]}; install Java {JAVA} or newer")
    if int(version[1]) < JAVA:
        raise MissingTool(f"{found} is Java {version[1]}, Kafka {VERSION} needs {JAVA}; install it or point JAVA_HOME at it")
    return found


def jars() -> Path:
    """Folder with the jars of Kafka, fetched by Maven the first time and shared by all brokers of the user.

    Raises MissingTool where Maven is missing or cannot fetch them.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onerec"
    there = cache / f"kafka-{VERSION}"
    if there.is_dir():
        return there
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"kafka-{VERSION}.lock").open("w")
    except OSError as error:
        raise MissingTool(
            f"folder {cache} for Kafka's jars: {error.strerror}; let XDG_CACHE_HOME name a folder that can be written"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not there.is_dir():
            _fetch(there)
    return there


def _fetch(there: Path) -> None:
    maven = shutil.which("mvn")
    if not maven:
        raise MissingTool(
            "no mvn on the PATH, and Kafka's jars are not here yet; install Maven (Debian: apt install maven), or run Kafka "
            "with `docker compose up kafka` or elsewhere and give its address with --bootstrap"
        )
    partial = Path(tempfile.mkdtemp(prefix=f"{there.name}.", dir=there.parent))
    command = [
        maven, "-B", "-q", "-f", str(_HERE / "pom.xml"), "dependency:copy-dependencies", "-DincludeScope=runtime",
        f"-DoutputDirectory={partial}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode or not any(partial.glob("kafka_*.jar")):
            said = next((line for line in done.stdout.splitlines() if "ERROR" in line), done.stdout + done.stderr).strip()
            raise MissingTool(
                f"Maven could not fetch Kafka {VERSION}: {said[:400]}; check the network, or the repository in "
                f"~/.m2/settings.xml, and run the command again, or copy the jars to {there}"
            )
        partial.chmod(0o755)
        partial.rename(there)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def free_port(spoken_for: Collection[int] = ()) -> int:
    """A port that nobody listens on, below the range out of which the system serves outgoing connections."""
    for _ in range(1_000):
        port = random.randrange(20_000, 32_000)  # noqa: S311
        if port not in spoken_for and _is_free(port):
            return port
    raise Failure("no free port between 20000 and 32000; end some servers")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class Broker:
    """A broker over a folder: `start`, `stop`, `kill`, and `start` again on the same data at the same port.

    `port` 0 takes a free one. `listeners` are further listeners, name → security protocol, whose addresses stand in
    `addresses`; `properties` go over the settings of `server.properties`. As a context manager it starts and stops.
    """

    def __init__(
        self,
        directory: Path,
        port: int = 0,
        *,
        heap: str = "512m",
        listeners: Mapping[str, str] | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        if not re.fullmatch(r"\d+[kmgKMG]", heap):
            raise UserError(f"heap {heap!r}: write it as for Java, such as 512m or 2g")
        if "," in str(directory.absolute()):
            raise UserError(f"folder {directory}: Kafka takes a comma for the end of a path; give --dir one without")
        self.directory = directory.absolute()
        self.log = self.directory / "broker.log"
        self._heap = heap
        self._protocols = {"PLAINTEXT": "PLAINTEXT", **(listeners or {})}
        self._ports: dict[str, int] = {"PLAINTEXT": port} if port else {}
        for name in self._protocols:
            self._ports.setdefault(name, free_port(self._ports.values()))
        self._properties = dict(properties or {})
        self._lock: int | None = None
        self._jvm: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def addresses(self) -> dict[str, str]:
        """host:port of every listener."""
        return {name: f"{HOST}:{port}" for name, port in self._ports.items()}

    @property
    def bootstrap(self) -> str:
        """host:port for clients without security settings."""
        return self.addresses["PLAINTEXT"]

    @property
    def pid(self) -> int:
        """Process id of the running broker."""
        if self._jvm is None:
            raise Failure(f"the broker of {self.directory} is not running")
        return self._jvm.pid

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self, ready_seconds: float = READY_SECONDS, stopping: Callable[[], bool] = lambda: False) -> None:
        """Returns once the broker answers, or once `stopping()`.

        Raises UserError for a folder or port that cannot be used, MissingTool without Java or Maven, Failure with the end of
        the broker's log when it does not come up.
        """
        if self._jvm is not None:
            raise Failure(f"the broker of {self.directory} runs already, process {self._jvm.pid}")
        binary, library = java(), jars()
        self._claim()
        try:
            for name, port in self._ports.items():
                if not _is_free(port):
                    raise UserError(
                        f"port {port} ({name}) is taken by another program; choose another with --port, or end that program "
                        f"(`ss -ltnp 'sport = :{port}'` shows it)"
                    )
            self._configure()
            classpath = f"{library}/*"
            self._format(binary, classpath)
            command = [
                binary, f"-Xmx{self._heap}", "-Djava.awt.headless=true", f"-Donerec.kafka.log={self.log}",
                f"-Dlog4j2.configurationFile={_HERE / 'log4j2.properties'}", "-cp", classpath,
                "kafka.Kafka", str(self.directory / "server.properties"),
            ]
            assert self._lock is not None
            self.log.unlink(missing_ok=True)
            with (self.directory / "jvm.log").open("wb") as output:
                # The JVM holds the folder's lock too, and is out of reach of a terminal's Ctrl-C: we stop it.
                self._jvm = subprocess.Popen(  # noqa: S603
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                    pass_fds=(self._lock,), env=_environment(),
                )
            self._guard = subprocess.Popen(  # noqa: S603
                ["/bin/sh", "-c", _GUARD, str(self._jvm.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )
            self._await_ready(ready_seconds, stopping)
        except BaseException:
            self.kill()
            raise

    def wait(self, seconds: float) -> bool:
        """True once the broker has ended, by itself or by somebody's hand; False after `seconds`."""
        deadline = time.monotonic() + seconds
        while not self._has_ended():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def stop(self, seconds: float = 60.0) -> None:
        """Clean stop, after `seconds` by SIGKILL; nothing where it does not run."""
        if self._jvm is not None and not self._has_ended():
            os.kill(self._jvm.pid, signal.SIGTERM)
            self.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """SIGKILL, and returns when the broker is gone; nothing where it does not run."""
        if self._guard is not None:
            # Before the broker is reaped: its number could be another process's afterwards.
            self._guard.kill()
            self._guard.wait()
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard = None
        if self._jvm is not None:
            with suppress(ProcessLookupError):
                os.kill(self._jvm.pid, signal.SIGKILL)
            self._jvm.wait()
            self._jvm = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def fault(self) -> str:
        """What the broker said last, for a message."""
        lines: list[str] = []
        for path in (self.directory / "jvm.log", self.log):
            with suppress(OSError):
                text = path.read_text(encoding="utf-8", errors="replace").splitlines()
                lines += [line for line in text if re.search(r"\b(ERROR|FATAL|Exception|Error)\b", line)][-3:] or text[-1:]
        return " | ".join(line.strip()[:300] for line in lines) or "nothing"

    def _claim(self) -> None:
        """Takes the folder: ours, or empty, and used by nobody else."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            strange = sorted(set(os.listdir(self.directory)) - _OURS)
            if strange and not (self.directory / "data" / "meta.properties").is_file():
                raise UserError(
                    f"folder {self.directory} holds something else ({strange[0]}); give --dir an empty or a new folder"
                )
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"folder {self.directory}: {error.strerror}; give --dir a folder that can be written") from None
        # A broker whose starter was killed needs a moment to go.
        deadline = time.monotonic() + 5.0
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(self._lock)
                    self._lock = None
                    raise UserError(
                        f"folder {self.directory} is in use by another broker; stop that one, or give --dir another folder"
                    ) from None
            time.sleep(0.1)

    def _configure(self) -> None:
        addresses = ",".join(f"{name}://{address}" for name, address in self.addresses.items())
        controller = free_port(self._ports.values())
        protocols = {**self._protocols, "CONTROLLER": "PLAINTEXT"}
        text = (_HERE / "server.properties").read_text(encoding="utf-8")
        values = {
            "listeners": f"{addresses},CONTROLLER://{HOST}:{controller}",
            "advertised": addresses,
            "protocols": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
            "controller": str(controller),
            "data": _escaped(self.directory / "data"),
        }
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", value)
        text += "".join(f"{name}={value}\n" for name, value in self._properties.items())
        path = self.directory / "server.properties"
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")

    def _format(self, binary: str, classpath: str) -> None:
        """Makes the data folder the first time; under another name first, so that it is whole or not there."""
        data, partial = self.directory / "data", self.directory / "data.formatting"
        if data.exists():
            return
        shutil.rmtree(partial, ignore_errors=True)
        settings = self.directory / "format.properties"
        text = (self.directory / "server.properties").read_text(encoding="utf-8")
        settings.touch(mode=0o600)
        settings.write_text(text.replace(f"log.dirs={_escaped(data)}", f"log.dirs={_escaped(partial)}"), encoding="utf-8")
        done = subprocess.run(  # noqa: S603
            [binary, "-cp", classpath, "kafka.tools.StorageTool", "format", "--standalone", "-t", _cluster_id(), "-c",
             str(settings)],
            capture_output=True, text=True, check=False, env=_environment(),
        )
        settings.unlink()
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise Failure(f"folder {partial} could not be formatted for Kafka: {said[-400:]}; is there room on the disk?")
        partial.rename(data)

    def _await_ready(self, seconds: float, stopping: Callable[[], bool]) -> None:
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        deadline = time.monotonic() + seconds
        properties = (self.directory / "data" / "meta.properties").read_text(encoding="utf-8")
        identity = next((line[len("cluster.id=") :] for line in properties.splitlines() if line.startswith("cluster.id=")), "")
        admin: AdminClient | None = None
        while not stopping():
            if self._has_ended():
                raise Failure(f"Kafka ended at start: {self.fault()}; its log is {self.log}")
            if time.monotonic() > deadline:
                raise Failure(f"Kafka did not answer within {seconds:.0f} s: {self.fault()}; its log is {self.log}")
            if admin is not None:
                with suppress(KafkaException):
                    # By its id: at the same port another broker may answer, which took it at the same moment.
                    if admin.list_topics(timeout=1.0).cluster_id == identity:
                        return
            elif _listens(self._ports["PLAINTEXT"]):
                admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})
                continue
            time.sleep(0.1)

    def _has_ended(self) -> bool:
        """Without reaping: the process keeps its number until the guard, which knows it by that, is gone."""
        if self._jvm is None or self._jvm.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self._jvm.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True


def _cluster_id() -> str:
    """A random id as Kafka writes them: never with a dash first, which its tools take for an option."""
    while (identity := base64.urlsafe_b64encode(uuid.uuid4().bytes)[:22].decode()).startswith("-"):
        pass
    return identity


def _environment() -> dict[str, str]:
    """Ours, in an encoding in which Java finds every path."""
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _escaped(path: Path) -> str:
    """A path as a value of a Java properties file, which is Latin-1."""
    return "".join(
        f"\\u{unit:04x}" if unit > 126 or chr(unit) == "\\" else chr(unit)
        for unit in memoryview(str(path).encode("utf-16-le", "surrogatepass")).cast("H")
    )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0
