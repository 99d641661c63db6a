"""A QEMU guest with SoftRoCE that runs one command; setup makes its image. Python's standard library only."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "guest"
RUNS = WORK / "runs"  # what running guests share with the host; empty when none runs
# Verbs libraries and pyverbs of either generation, as trees to lay over the host's files.
VERBS = {"distribution": WORK / "image" / "sysroot", "current": WORK / "current"}
# Status codes beside the command's own: timeout(1)'s, env(1)'s for "it could not be run", automake's for "skipped".
TIME_LIMIT, NO_REPORT, CANNOT = 124, 125, 77
SIGNALLED = 128  # what a shell adds to the number of the signal that ended a command
# What an emulated processor does not need, or does slowly. It does not promise that its cores' time-stamp counters agree (they
# are the host's, and do), and without that promise Linux asks an emulated timer whenever a program asks for the time.
KERNEL_OPTIONS = ("mitigations=off", "nokaslr", "tsc=reliable", "nohz=off", "init_on_alloc=0", "audit=0", "lsm=capability")
# Lines of the kernel's log that speak of a fault in it; the guest still reports the command's status.
KERNEL_FAULTS = ("WARNING:", "BUG:", "Oops", "Call Trace", "refcount_t")


def tell(line: str) -> None:
    """Print a line at once, through a pipe too."""
    print(line, flush=True)


@dataclass(frozen=True)
class Link:
    """One end of the cable between two guests: datagrams over Unix sockets in `folder`, so that no port is opened."""

    folder: Path
    own_socket: str
    peer_socket: str
    own_address: str
    peer_address: str
    mac: str


@dataclass
class Guest:
    """One boot of the guest.

    command: a bash command line, run in the repository root with the host's files visible (writes stay in the guest's
    memory). `$OUT` is an empty folder, copied to `out` (if any) at the end. limit_s covers boot and command. Each line that
    the command prints, standard error included, goes to `show` from a thread. `verbs` is the tree with the verbs libraries.
    """

    command: str
    limit_s: float
    out: Path | None = None
    show: Callable[[str], None] = tell
    memory: str = "4G"  # of address space; QEMU takes what is touched
    cores: int = 2
    link: Link | None = None
    verbs: Path = VERBS["distribution"]
    _share: Path = field(init=False)
    _process: subprocess.Popen[str] | None = field(init=False, default=None)

    def start(self) -> None:
        """Boot. OSError where QEMU is not there."""
        RUNS.mkdir(parents=True, exist_ok=True)
        self._share = Path(tempfile.mkdtemp(dir=RUNS))
        (self._share / "out").mkdir()
        shutil.copy(HERE / "main", self._share / "main")
        (self._share / "command").write_text(self.command + "\n")
        own, peer = (self.link.own_address, self.link.peer_address) if self.link else ("", "")
        (self._share / "environment").write_text(
            f"export HOME=/root OUT=/mnt/share/out ROOT='{ROOT}' GUEST_ADDRESS={own} PEER_ADDRESS={peer}\n"
        )
        self._errors = open(self._share / "qemu", "w")  # noqa: SIM115  # closed by close()
        # setpriv: QEMU ends with this process, even where that is killed.
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *self._arguments()],
            cwd=self.link.folder if self.link else None,  # a socket's path has at most 107 bytes; so they go by name
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
        )
        self._deadline = time.monotonic() + self.limit_s
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def wait(self) -> int:
        """The command's exit status, TIME_LIMIT, or NO_REPORT; why, on standard error, where it is not the command's."""
        assert self._process is not None
        try:
            self._process.wait(self._deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            return self._blame(TIME_LIMIT, f"the time limit of {self.limit_s:.0f} s has passed")
        self._reader.join()
        if self.out is not None:
            shutil.copytree(self._share / "out", self.out, dirs_exist_ok=True)
        try:
            status = int((self._share / "status").read_text())
        except (OSError, ValueError):
            return self._blame(NO_REPORT, "the guest ended without a report")
        self._tell_kernel_faults()
        return status

    def close(self) -> None:
        """End QEMU if it runs, and remove what it left."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._errors.close()
        shutil.rmtree(self._share)
        self._process = None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self.show(line.rstrip("\n"))

    def _arguments(self) -> list[str]:
        image = WORK / "image"
        # Emulation, not KVM: the same guest everywhere, and no device of the host is needed. The options switch off what is
        # slow to emulate (address-space tags, five page-table levels, supervisor checks).
        arguments = ["-accel", "tcg,thread=multi", "-cpu", "max,pcid=off,-la57,-smap,-smep"]
        arguments += ["-smp", str(self.cores), "-m", self.memory, "-nodefaults", "-no-user-config", "-display", "none"]
        arguments += ["-no-reboot", "-monitor", "none"]
        arguments += ["-serial", f"file:{self._share / 'console'}", "-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out"]
        arguments += ["-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd.gz")]
        arguments += ["-append", "console=ttyS0 quiet panic=-1 " + " ".join(KERNEL_OPTIONS)]
        arguments += _files("host", Path("/"), "readonly=on,multidevs=remap")
        arguments += _files("verbs", self.verbs, "readonly=on")
        arguments += _files("share", self._share, "readonly=off")
        if self.link:
            ends = f"local.type=unix,local.path={self.link.own_socket},remote.type=unix,remote.path={self.link.peer_socket}"
            arguments += ["-netdev", f"dgram,id=net,{ends}"]
            # An MTU that takes RoCE's largest packet, 4,096 bytes and headers.
            arguments += ["-device", f"virtio-net-pci,netdev=net,mac={self.link.mac},host_mtu=9000"]
        return arguments

    def _blame(self, status: int, why: str) -> int:
        said = [_tail(self._share / name) for name in ("qemu", "console")]
        print(f"guest: {why}\n" + "".join(said), end="", file=sys.stderr)
        return status

    def _tell_kernel_faults(self) -> None:
        for line in (self._share / "dmesg").read_text(errors="replace").splitlines():
            if any(fault in line for fault in KERNEL_FAULTS):
                print(f"guest: kernel: {line}", file=sys.stderr)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `run` and `two_guests` have in common."""
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for boot and command (default: 300)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files that the command leaves in $OUT are copied to")
    parser.add_argument("--verbs", choices=VERBS, default="distribution", help="which verbs libraries")


def set_up(verbs: str) -> Path:
    """Make what is not fresh; the tree with these verbs libraries.

    SystemExit with CANNOT, the reason on standard error, where it cannot be had; with set-up's own status where it fails.
    """
    for program in ("setup", "setup_current") if verbs == "current" else ("setup",):
        if status := subprocess.run([HERE / program], check=False).returncode:
            sys.exit(status)
    return VERBS[verbs]


def end_on_signals() -> None:
    """Let the signals that end a process run its `finally` clauses first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(SIGNALLED + got))


def _files(name: str, path: Path, options: str) -> list[str]:
    """A folder of the host, shared as `name`."""
    return [
        "-fsdev",
        f"local,id={name},path={path},security_model=none,{options}",
        "-device",
        f"virtio-9p-pci,fsdev={name},mount_tag={name}",
    ]


def _tail(path: Path, lines: int = 20) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) + "\n"
    except OSError:
        return ""
