"""A real Triton as a child process: started, watched, stopped, nothing left behind."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from onerec.errors import Failure, UserError

START_SECONDS = 60.0
STOP_SECONDS = 15.0
FOLDER_PREFIX = "onerec-triton-"
_PR_SET_PDEATHSIG = 1


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """Ports on `host`; 0 = any free one."""

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


FREE_PORTS = Ports(http=0, grpc=0, metrics=0)


class Installation(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tritonserver keeps its parts; `stub` is the interpreter process of the Python backend, if it must be laid
    beside the backend first (the wheel), and `libraries` go to LD_LIBRARY_PATH."""

    binary: Path
    backends: Path
    stub: Path | None = None
    libraries: tuple[Path, ...] = ()


def find_installation(binary: Path | None = None) -> Installation:
    """The server to run: the one named, else that of the wheel `nvidia-pytriton`.

    Raises UserError when there is none, naming the ways to get one.
    """
    if binary is not None:
        if not os.access(binary, os.X_OK) or binary.is_dir():
            raise UserError(
                f"--server {binary} is not a program; name the tritonserver binary, for example "
                "/opt/tritonserver/bin/tritonserver"
            )
        backends = binary.resolve().parent.parent / "backends"
        if not (backends / "python").is_dir():
            raise UserError(f"--server {binary}: no Python backend in {backends}; install Triton with that backend")
        return Installation(binary=binary.resolve(), backends=backends)
    spec = importlib.util.find_spec("pytriton")
    root = Path(next(iter(spec.submodule_search_locations or []))) / "tritonserver" if spec else None
    if root is None or not (root / "bin" / "tritonserver").exists():
        raise UserError(
            "no tritonserver here: the wheel nvidia-pytriton is for Linux x86-64 only; name one by --server PATH, "
            "or use NVIDIA's container image (docs/serving.md)"
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise UserError(
            f"nvidia-pytriton has no Python backend for Python {version}; use Python 3.11 or 3.12, or --server PATH"
        )
    libraries = [root.parent.parent / "nvidia_pytriton.libs"]
    if library_folder := sysconfig.get_config_var("LIBDIR"):
        libraries.append(Path(library_folder))
    return Installation(
        binary=root / "bin" / "tritonserver", backends=root / "backends", stub=stub, libraries=tuple(libraries)
    )


def _lay_out_backends(installation: Installation, folder: Path) -> Path:
    """A backend directory with the stub of this interpreter in it, made of links; the installation stays untouched."""
    if installation.stub is None:
        return installation.backends
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for source in (installation.backends / "python").iterdir():
        if source.name != "__pycache__":
            (backend / source.name).symlink_to(source)
    (backend / installation.stub.name).symlink_to(installation.stub)
    return backend.parent


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_free(host: str, port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} on {host}: {error.strerror}; give another --{option}-port, or 0 for a free one"
            ) from None


def choose_ports(ports: Ports, *, metrics_option: str = "metrics") -> Ports:
    """The ports with every 0 replaced by a free one; UserError naming the option when a given one is taken.

    `metrics_option`: what the caller calls `--metrics-port`, without its ending.
    """
    options = {"http": "http", "grpc": "grpc", "metrics": metrics_option}
    chosen: dict[str, int] = {}
    for name in ("http", "grpc", "metrics"):
        port = getattr(ports, name)
        if port:
            _check_free(ports.host, port, options[name])
            for other, taken in chosen.items():
                if taken == port:
                    both = f"--{options[other]}-port and --{options[name]}-port"
                    raise UserError(f"{both} are both {port}; give each a port of its own")
        while not port or port in chosen.values():
            port = _free_port(ports.host)
        chosen[name] = port
    return Ports(host=ports.host, **chosen)


def _die_with_parent() -> None:
    """In the child: a killed parent takes its Triton along, so that no orphan keeps the ports."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _remove_server_folder(folder: Path) -> None:
    """Remove a server's temporary folder and its shared memory."""
    for region in Path("/dev/shm").glob(f"{folder.name}_*"):  # noqa: S108
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _lock_folder(folder: Path) -> int:
    """A lock that lasts as long as any process that inherited it: tells a live server's folder from a dead one's."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _sweep() -> None:
    """Remove what servers left whose process was killed together with its parent."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        try:
            handle = os.open(folder / "lock", os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_server_folder(folder)
        except OSError:
            pass
        finally:
            os.close(handle)


class TritonServer:
    """`tritonserver` over one model repository, as a context manager; models are loaded by request only.

    Nothing is loaded at start: `exporter.publish.load_repository` does that, so that a bad version cannot keep the
    server from coming up. The thread that enters must outlive the server (its end is the server's end on Linux).

    Args:
        repository: folder of the model repository; must exist.
        state: folder of the stream's state on this host, for stored histories; None = only given histories.
        ports: where to listen.
        binary: another tritonserver than the wheel's.
        log: file for the server's log; None = `triton.log` in a folder that is removed at the end.
    """

    def __init__(
        self,
        repository: Path,
        state: Path | None = None,
        *,
        ports: Ports = FREE_PORTS,
        binary: Path | None = None,
        log: Path | None = None,
    ) -> None:
        self.repository = repository
        self.state = state
        self._wanted = ports
        self._installation = find_installation(binary)
        self._log = log
        self._folder: Path | None = None
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.ports = ports

    @property
    def url(self) -> str:
        """host:port for gRPC, the way `Client` and `publish --server` take it."""
        return f"{self.ports.host}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        """host:port for HTTP."""
        return f"{self.ports.host}:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        """Address of the Prometheus page."""
        return f"http://{self.ports.host}:{self.ports.metrics}/metrics"

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process else None

    def returncode(self) -> int | None:
        """Exit status once it has ended by itself, else None."""
        return self._process.poll() if self._process else None

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the server's log."""
        try:
            return "\n".join(self._log_path().read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def __enter__(self) -> Self:
        if not self.repository.is_dir():
            raise UserError(f"repository {self.repository}: no such folder; publish into it first, or create it")
        self.ports = choose_ports(self._wanted)
        _sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        try:
            self._lock = _lock_folder(self._folder)
            self._start()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _log_path(self) -> Path:
        if self._log is not None:
            return self._log
        if self._folder is None:
            raise OSError("not started")
        return self._folder / "triton.log"

    def _shm_prefix(self) -> str:
        return f"{self._folder.name}_" if self._folder else ""

    def _environment(self) -> dict[str, str]:
        # What a killed stub leaves in its temporary folder goes with ours.
        environment = {**os.environ, "TMPDIR": str(self._folder)}
        if self._installation.libraries:
            folders = [*map(str, self._installation.libraries), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
        if self._installation.stub is not None:
            # The stub looks for `python3` on PATH to find its packages, numpy first of all.
            environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
            environment["ONEREC_SITE_PACKAGES"] = sysconfig.get_path("purelib")
        if self.state is not None:
            environment["ONEREC_STATE"] = str(self.state.resolve())
        return environment

    def _command(self, folder: Path) -> list[str]:
        ports = self.ports
        return [
            str(self._installation.binary),
            f"--model-repository={self.repository.resolve()}",
            f"--backend-directory={_lay_out_backends(self._installation, folder)}",
            "--model-control-mode=explicit",
            # The configuration is complete; without this the Python backend starts a second process just to ask for it.
            "--disable-auto-complete-config",
            # Strict readiness would stay false for good after one refused version.
            "--strict-readiness=false",
            "--exit-timeout-secs=10",
            *(f"--{kind}-address={ports.host}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={ports.metrics}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix()}",
        ]

    def _start(self) -> None:
        folder = self._folder
        if folder is None:
            raise Failure("Triton has no folder to start in")
        log_path = self._log_path()
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log = log_path.open("ab")
        except OSError as error:
            raise UserError(f"log {log_path}: {error.strerror}; name a file that can be written") from None
        with log:
            self._process = subprocess.Popen(  # noqa: S603
                self._command(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
                pass_fds=() if self._lock is None else (self._lock,),
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def _wait_ready(self) -> None:
        import tritonclient.grpc as grpcclient
        from tritonclient.utils import InferenceServerException

        deadline = time.monotonic() + START_SECONDS
        with grpcclient.InferenceServerClient(self.url) as client:
            while True:
                if (status := self.returncode()) is not None:
                    raise Failure(f"Triton ended at its start (status {status}):\n{self.log_tail()}")
                try:
                    if client.is_server_ready(client_timeout=1.0):
                        return
                except InferenceServerException:
                    pass
                if time.monotonic() > deadline:
                    raise Failure(f"Triton was not ready after {START_SECONDS:.0f} s:\n{self.log_tail()}")
                time.sleep(0.05)

    def stop(self) -> None:
        """End the server and its stubs: SIGTERM, then SIGKILL to its own process group; remove what it left."""
        process, self._process = self._process, None
        if process is not None:
            group = process.pid
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
            try:
                os.killpg(group, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
            process.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._folder is not None:
            _remove_server_folder(self._folder)
            self._folder = None
