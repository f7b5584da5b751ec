"""Build sdist and wheel, install the wheel, and test it as a user would: ``make package``.

The tests run in an empty virtual environment outside of the checkout: the command, a daemon, the
library, and its types with mypy and pyright.  Two builds must give the same bytes.  The first
failure ends the script.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).resolve().parent.parent

#: Timeout of a step in seconds: the installation downloads a few packages.
PATIENCE = 120.0

#: $SOURCE_DATE_EPOCH of both builds, 2020-01-01: any time, if both have the same.
EPOCH = "1577836800"

USER_MODULE = """
import qmpfd


async def copy(source: str, sink: str) -> list[int]:
    async with qmpfd.connect(source) as one, qmpfd.connect(sink) as other:
        numbers: list[int] = []
        for fdset in await one.query_fdsets():
            for stored in fdset.fds:
                with await one.open_fdset(fdset.fdset_id, fd=stored.fd) as fd:
                    info: qmpfd.AddfdInfo = await other.add_fd(fd, opaque=stored.opaque)
                    numbers.append(info.fd)
        return numbers


def limits() -> qmpfd.Limits:
    return qmpfd.Limits(max_fds=10)
"""

#: Replacements in USER_MODULE; each makes one type error, which a type checker must find.
WRONG = [
    ("await one.query_fdsets()", "one.query_fdsets()"),
    ("fd=stored.fd", "fd=stored.opaque"),
    ("max_fds=10", "max_fds='10'"),
    ("numbers.append(info.fd)", "numbers.append(info)"),
]


Words: TypeAlias = Sequence[str | os.PathLike[str]]


class Wrong(Exception):
    """The package does not behave as documented."""


def run(command: Words, folder: Path, status: int = 0, **environ: str) -> str:
    """Run a command in *folder*; return its output; raise Wrong if it exits with another status."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QMPFD_"))}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**inherited, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode != status:
        words = " ".join(map(str, command))
        raise Wrong(f"{words}: exit status {done.returncode}, not {status}\n{done.stdout}")
    return done.stdout


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print the name of a step with the seconds that it took."""
    started = time.monotonic()
    yield
    print(f"{time.monotonic() - started:6.1f} s  {name}", flush=True)


def build(folder: Path) -> dict[str, bytes]:
    """Build the sdist, and the wheel from it, into *folder*; return the content of each by name."""
    words: Words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    run(words, folder, SOURCE_DATE_EPOCH=EPOCH)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_same(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    """Check that two builds are the same, byte by byte."""
    digests = [{n: hashlib.sha256(d).hexdigest() for n, d in b.items()} for b in (one, other)]
    if digests[0] != digests[1]:
        raise Wrong(f"two builds differ: {digests}")


def check_content(folder: Path) -> Path:
    """Check the files and metadata in the two archives; return the path of the wheel."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    units = ["qmpfd.service", "qmpfd.socket", "qmpfd@.service"]
    wanted = ["qmpfd/py.typed", "/LICENSE", *(f"system/{unit}" for unit in units)]
    wanted += ["share/man/man1/qmpfd.1", "share/man/man5/qmpfd.toml.5"]
    with tarfile.open(sdist) as archive:
        packed = archive.getnames()
    sources = [
        "tests/test_readme.py",
        "docs/index.md",
        "Makefile",
        ".flake8",
        "packaging/qmpfd.socket",
    ]
    for have, want in ((names, wanted), (packed, sources)):
        for name in want:
            if not any(each.endswith(name) for each in have):
                raise Wrong(f"{name} is in none of {have}")
    metadata = next(name for name in names if name.endswith("/METADATA"))
    described = zipfile.ZipFile(wheel).read(metadata).decode()
    if "Provides-Extra: shell\n" not in described:
        raise Wrong("there is no extra shell")
    strange = [name for name in names if not name.startswith(("qmpfd/", "qmpfd-"))]
    if strange or any("tests" in name for name in names):
        raise Wrong(f"the wheel would install {strange or 'tests'}")
    return wheel


def check_command(bin_: Path, folder: Path) -> None:
    """Check ``qmpfd --version``, a daemon, and a round trip with ``add`` and ``ls``."""
    version = run([bin_ / "qmpfd", "--version"], folder)
    if not version.startswith("qmpfd "):
        raise Wrong(f"--version says {version!r}")
    path = folder / "q.sock"
    words: Words = [bin_ / "qmpfd", "serve", "--socket", path]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stderr is not None
            line = daemon.stderr.readline()
            if "listening" not in line:
                raise Wrong(f"the daemon says {line!r}")
            (folder / "file").touch()
            to: Words = ["--socket", path]
            run([bin_ / "qmpfd", "add", *to, "--opaque", "mine", folder / "file"], folder)
            listed = run([bin_ / "qmpfd", "ls", *to], folder)
            if "mine" not in listed:
                raise Wrong(f"ls says {listed!r}")
        finally:
            daemon.terminate()
        if daemon.wait(PATIENCE) != 0 or path.exists():
            raise Wrong("the daemon did not end as it should")


def check_library(bin_: Path, folder: Path) -> None:
    """Check that the installed package has all public names, its types, and the units."""
    program = "import qmpfd; [getattr(qmpfd, n) for n in qmpfd.__all__]; print(qmpfd.__file__)"
    where = run([bin_ / "python", "-W", "error", "-c", program], folder).strip()
    if not Path(where).is_relative_to(bin_.parent):
        raise Wrong(f"imported from {where}")
    if not Path(where).with_name("py.typed").exists():
        raise Wrong("py.typed is not installed")
    if not (bin_.parent / "lib/systemd/system/qmpfd.service").exists():
        raise Wrong("the units are not installed")


def check_types(bin_: Path, folder: Path, checker: Sequence[str]) -> None:
    """Check that *checker* passes a user's module, and fails each variant with a type error."""
    module = folder / "user_module.py"
    module.write_text(USER_MODULE)
    run([*checker, module], folder)
    for right, wrong in WRONG:
        if right not in USER_MODULE:
            raise Wrong(f"there is no {right} to be made wrong")
        module.write_text(USER_MODULE.replace(right, wrong))
        run([*checker, module], folder, status=1)


def checkers(bin_: Path) -> dict[str, list[str]]:
    """Return the command line of each installed type checker, for the environment *bin_*."""
    python = str(bin_ / "python")
    found = {"mypy": [sys.executable, "-m", "mypy", "--strict", "--python-executable", python]}
    if importlib.util.find_spec("basedpyright"):
        found["pyright"] = [sys.executable, "-m", "basedpyright", "--pythonpath", python]
        found["pyright"] += ["--level", "error"]
    else:
        print("          pyright is not installed: see requirements-package.txt")
    return found


def main() -> int:
    """Run all steps; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="qmpfd-package-") as name:
        folder = Path(name)
        for each in ("one", "other", "work"):
            (folder / each).mkdir()
        with step("build"):
            built = build(folder / "one")
        with step("the same build again gives the same bytes"):
            check_same(built, build(folder / "other"))
        wheel = check_content(folder / "one")
        bin_ = folder / "venv" / "bin"
        with step(f"install {wheel.name} in an empty environment"):
            venv.create(folder / "venv", with_pip=True)
            words: Words = [bin_ / "python", "-m", "pip", "install", "--quiet"]
            run([*words, "-c", ROOT / "requirements-dev.txt", wheel], folder)
        with step("the command: --version, serve, add, ls"):
            check_command(bin_, folder / "work")
        with step("the library, from where it was installed"):
            check_library(bin_, folder / "work")
        for checker, words_ in checkers(bin_).items():
            with step(f"types, as a user's program has them, by {checker}"):
                check_types(bin_, folder / "work", words_)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Wrong as exc:
        sys.exit(f"check_package.py: {exc}")
