"""``qmpfd push`` gives a running QEMU its disk, which QEMU itself may not open.

Another process opens the image beforehand and stores its descriptors.  QEMU runs as ``nobody`` if
this script runs as root.  ``qmpfd push`` adds the fd set to QEMU, whose client then tells it to
open ``/dev/fdset/N``.  QEMU selects a descriptor by access mode: the set needs one that is
read-only and one that is read-write.

    python scripts/story_qemu.py      (needs a QEMU: apt-get install qemu-system-x86)
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import STDOUT

import trio
from daemon import Broken, running_daemon
from story import QMPFD, check, run_story, say

import qmpfd

QEMU = "qemu-system-x86_64"


@asynccontextmanager
async def running_qemu(*monitors: Path) -> AsyncGenerator[None, None]:
    """Run a QEMU without hardware, with a QMP monitor on each path of *monitors*: each serves one
    client at a time.  The block must end QEMU with ``quit``.

    QEMU inherits sockets that already listen: clients can connect at once.
    """
    command = [QEMU, "-nodefaults", "-machine", "none", "-display", "none"]
    listeners = []
    for number, path in enumerate(monitors):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(path))
        listener.listen()
        listeners.append(listener)
        chardev = f"socket,id=qmp{number},fd={listener.fileno()},server=on,wait=off"
        command += ["-chardev", chardev, "-qmp", f"chardev:qmp{number}"]
    # Root may open every image.
    become = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    process = await trio.lowlevel.open_process(
        command,
        pass_fds=[each.fileno() for each in listeners],
        user=become and become.pw_uid,
        group=become and become.pw_gid,
        extra_groups=become and [],
    )
    for listener in listeners:
        listener.close()
    try:
        yield
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()


async def shell(*words: str) -> str:
    """Run a ``qmpfd`` command, print command and output, and return the output."""
    say("$ qmpfd " + " ".join(words))
    done = await trio.run_process([*QMPFD, *words], capture_stdout=True, stderr=STDOUT)
    output = done.stdout.decode()
    print(output, end="")
    return output


async def story(folder: Path) -> None:
    """Store the image, start QEMU, push the fd set, and check what QEMU wrote."""
    if shutil.which(QEMU) is None:
        raise Broken("this needs a real QEMU: apt-get install qemu-system-x86")
    image = folder / "disk.img"
    image.write_bytes(b"boot sector".ljust(1 << 20, b"\0"))
    os.environ["QMPFD_SOCKET"] = str(folder / "qmpfd.sock")
    async with running_daemon(folder / "qmpfd.sock"):
        await shell("add", "--opaque", "rdonly:disk", str(image))
        await shell("add", "--fdset", "0", "--mode", "rw", "--opaque", "rdwr:disk", str(image))
        image.chmod(0)
        say("The image has mode 0 now, and is open in fd set 0. QEMU starts.")
        manager, another = folder / "vm.sock", folder / "vm-fds.sock"
        async with running_qemu(manager, another), qmpfd.connect(manager) as qemu:
            await use(qemu, image, another)
            await qemu.execute("quit")
        say("QEMU has exited; the daemon still holds the fd set.")
        await shell("ls", "--long")
    image.chmod(0o600)
    with image.open("rb") as file:
        file.seek(512)
        check(file.read(512) == b"Q" * 512, "what QEMU wrote is in the image")


async def use(qemu: qmpfd.Client, image: Path, another: Path) -> None:
    """Push the fd set into QEMU, and check that QEMU reads and writes the disk."""
    disk = {"driver": "file", "node-name": "disk", "read-only": False}
    try:
        await qemu.execute("blockdev-add", {**disk, "filename": str(image)})
    except qmpfd.GenericError as exc:
        check(True, f"QEMU cannot open the image: {exc}")
    else:
        check(False, "QEMU cannot open the image")
    # *qemu* stays connected: up to version 9.0, QEMU closes the unused descriptors of its fd sets
    # when its last client disconnects.
    await shell("push", "0", "--to", str(another), "--fdset", "5")
    [fdset] = await qemu.query_fdsets()
    check([fd.opaque for fd in fdset.fds] == ["rdonly:disk", "rdwr:disk"], f"QEMU has {fdset}")
    await qemu.execute("blockdev-add", {**disk, "filename": "/dev/fdset/5"})
    [node] = await qemu.execute("query-named-block-nodes")
    check(not node["ro"], f"QEMU has opened {node['file']} for reading and writing")
    size = node["image"]["virtual-size"]
    check(size == 1 << 20, f"QEMU sees a disk of {size} bytes")
    line = f'qemu-io disk "write -P {ord("Q")} 512 512"'
    await qemu.execute("human-monitor-command", {"command-line": line})
    # QEMU has duplicated the descriptor that it uses: it needs neither fd set any more.
    await qemu.remove_fd(5)
    await qemu.execute("blockdev-del", {"node-name": "disk"})
    check(await qemu.query_fdsets() == [], "QEMU has closed the disk, and has no fd sets any more")


if __name__ == "__main__":
    sys.exit(run_story(story))
