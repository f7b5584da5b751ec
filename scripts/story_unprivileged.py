"""A privileged process opens a disk image, and an unprivileged process reads and writes it.

The first process stores its descriptors in the daemon and exits.  The second process may not open
the image, but gets duplicates of the descriptors.  If this script runs as root, the second process
runs as ``nobody``, and a policy grants access to that user; else it runs as the same user, and the
image has mode 0.

    python scripts/story_unprivileged.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeAlias

import trio
from daemon import become, run, running_daemon
from story import check, run_story, say

import qmpfd

#: User nobody may query and open the disks of machine vm1, and nothing else.
POLICY = """
[[rule]]
user = "nobody"
allow = ["query", "open"]
opaque = ["vm1:*"]
"""

Connect: TypeAlias = "Callable[[Path], AbstractAsyncContextManager[qmpfd.Client]]"

SECTOR = b"written by the worker"


async def privileged(socket: Path, image: Path, secret: Path) -> None:
    """Store the image twice, read-only and read-write, and a file that the policy hides."""
    async with qmpfd.connect(socket) as client:
        with image.open("rb") as to_read, image.open("r+b") as to_write, secret.open("rb") as other:
            disk = await client.add_fd(to_read, opaque="vm1:disk,ro")
            await client.add_fd(to_write, disk.fdset_id, opaque="vm1:disk,rw")
            await client.add_fd(other, opaque="secret")
    say(f"The privileged process has stored the image in fd set {disk.fdset_id}, and has exited.")


async def worker(connect: Connect, socket: Path, image: Path) -> None:
    """Run the unprivileged process: find, open, read and write the image."""
    say(f"The worker is pid {os.getpid()}, uid {os.geteuid()}.")
    try:
        image.open("rb").close()
    except PermissionError:
        check(True, "it may not open the image itself")
    else:
        check(False, "it may not open the image itself")
    async with connect(socket) as client:
        found = await client.query_fds(opaque_prefix="vm1:disk")
        modes = {fd.opaque: fd.access for fd in found}
        check(
            modes == {"vm1:disk,ro": "rdonly", "vm1:disk,rw": "rdwr"},
            f"it finds the image by its opaque text: {modes}",
        )
        fdset_id = found[0].fdset_id
        with await client.open_fdset(fdset_id, access="rdonly") as fd:
            sector = os.pread(fd.fileno(), 11, 0)
            check(sector == b"boot sector", f"it reads {sector!r} through the read-only descriptor")
            try:
                os.pwrite(fd.fileno(), b"x", 0)
            except OSError as exc:
                check(True, f"it cannot write through that descriptor: {exc.strerror}")
            else:
                check(False, "it cannot write through that descriptor")
        with await client.open_fdset(fdset_id, access="rdwr") as fd:
            os.pwrite(fd.fileno(), SECTOR, 512)
        if os.geteuid() != socket.stat().st_uid:
            await refused(client, fdset_id)


async def refused(client: qmpfd.Client, fdset_id: int) -> None:
    """Check that the policy denies everything else; the daemon's own user may do all of it."""
    shown = [fdset.fdset_id for fdset in await client.query_fdsets()]
    check(shown == [fdset_id], f"it sees fd set {fdset_id} and no other")
    for what, command, arguments in (
        ("remove the image", "remove-fd", {"fdset-id": fdset_id}),
        ("end the daemon", "quit", None),
    ):
        try:
            await client.execute(command, arguments)
        except qmpfd.PermissionDenied as exc:
            check(True, f"it may not {what}: {exc}")
        else:
            check(False, f"it may not {what}")


async def story(folder: Path) -> None:
    """Run the privileged process, then the worker, and check what the worker wrote."""
    as_nobody = os.geteuid() == 0
    image, secret, socket = folder / "disk.img", folder / "secret", folder / "qmpfd.sock"
    image.write_bytes(b"boot sector".ljust(1 << 20, b"\0"))
    secret.write_text("nobody's business")
    options = []
    if as_nobody:
        (folder / "policy.toml").write_text(POLICY)
        options = ["--policy", str(folder / "policy.toml"), "--socket-mode", "666"]
    async with running_daemon(socket, *options):
        await privileged(socket, image, secret)
        image.chmod(0)
        command = [sys.executable, __file__, "worker", str(socket), str(image)]
        await trio.run_process(command + (["nobody"] if as_nobody else []))
        image.chmod(0o600)
        with image.open("rb") as file:
            file.seek(512)
            check(file.read(len(SECTOR)) == SECTOR, "what the worker wrote is in the image")


async def main() -> int:
    """Run the second process; return its exit status."""
    _, _, socket, image, *user = sys.argv
    connect = qmpfd.connect  # imported now: *user* may be unable to read the package
    if user:
        become(user[0])
    await worker(connect, Path(socket), Path(image))
    return 0


if __name__ == "__main__":
    sys.exit(run(main) if sys.argv[1:2] == ["worker"] else run_story(story))
