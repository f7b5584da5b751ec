#!/usr/bin/env bash
# Run a command, by default the tests, on a copy of this checkout in another release of Debian, for
# instance with the newest Python, QEMU, systemd and s6.
#
#     scripts/elsewhere.sh [--system sid] [--python python3.13] [COMMAND...]
#
# debootstrap installs the system in build/elsewhere/SYSTEM ($ELSEWHERE/SYSTEM, if that is set),
# which takes two minutes; later runs use it again.  SYSTEM is a release of Debian, by default sid;
# the default Python is the newest of that release.  The command runs in mount, pid, ipc and uts
# namespaces of its own, with its own /proc, /dev and /sys, and in the machine's network namespace.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)

# The programs that the tests run, and the tools to build packages for a new Python.
PACKAGES=(make gcc libc6-dev git ca-certificates iproute2 procps qemu-system-x86 systemd s6 runit zsh fish)

die() { printf 'elsewhere: %s\n' "$*" >&2; exit 2; }

# --- making a system ---

# The machine's first mirror; share_settings copies its apt, certificate and network settings.
mirror() { apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1; }

share_settings() {
    local path
    for path in /etc/apt/apt.conf.d /etc/apt/auth.conf.d /etc/ssl/certs /usr/local/share/ca-certificates \
                /etc/pip.conf /etc/resolv.conf /etc/hosts; do
        [[ -e $path ]] || continue
        mkdir -p "$root$(dirname "$path")"
        cp --recursive --dereference --no-clobber "$path" "$root$(dirname "$path")/" 2>/dev/null || true
    done
}

apt() { DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get -q "$@"; }

# The newest interpreter of the system: python3 may be an older one.
newest_python() {
    chroot "$root" apt-cache search --names-only '^python3\.[0-9]+$' | cut -d' ' -f1 | sort -V | tail -n 1
}

make_system() {
    local url
    url=$(mirror)
    [[ -n $url ]] || die "apt on this machine has no source of packages: see sources.list(5)"
    rm -rf "$root"
    mkdir -p "$root"
    debootstrap --variant=minbase "$system" "$root" "$url"
    share_settings
    # Keep packages from starting daemons (Debian policy 9.3.3).
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod +x "$root/usr/sbin/policy-rc.d"
    apt update
    apt install --yes --no-install-recommends "${PACKAGES[@]}"
    newest_python >"$root/.python"
}

# --- running in it ---

# Copy tracked and untracked files, with uncommitted changes; skip ignored files.
copy_checkout() {
    cd "$1"
    git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' path; do [[ ! -e $path ]] || printf '%s\0' "$path"; done |
        tar --null --files-from=- --create | tar --directory="$2" --extract --no-same-owner
}

# Runs in new namespaces.  pivot_root(2) rather than chroot(2): mountinfo(5) then lists only mounts of
# the system.
enter() {
    local root=$1 checkout=$2 python=$3 place
    shift 3
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sys "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mount -t devtmpfs dev "$root/dev"
    mount -t devpts -o newinstance,mode=620,gid=5,ptmxmode=666 devpts "$root/dev/pts"
    for place in tmp dev/shm; do mount -t tmpfs -o mode=1777 tmpfs "$root/$place"; done
    for place in run srv; do mount -t tmpfs -o mode=755 tmpfs "$root/$place"; done
    # The copy is on a tmpfs and ends with this run; the virtual environment stays on disk.
    place=srv/$(basename "$checkout")
    mkdir -p "$root/$place/.venv" "$root/var/cache/$python/$place"
    mount --bind "$root/var/cache/$python/$place" "$root/$place/.venv"
    (copy_checkout "$checkout" "$root/$place")
    cd "$root"
    pivot_root . mnt
    cd "/$place"
    umount --lazy /mnt
    "$@"  # not exec: this shell is process 1 of the pid namespace, and reaps orphans
}

system=sid python=
while (($#)); do
    case $1 in
        --system) system=${2:?} && shift 2 ;;
        --python) python=${2:?} && shift 2 ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
        *) break ;;
    esac
done
((EUID == 0)) || die "a system of its own needs root, for debootstrap and for mounts: sudo $0"
for tool in debootstrap unshare pivot_root; do
    command -v "$tool" >/dev/null || die "$tool is missing: apt-get install debootstrap util-linux"
done

root=$(realpath -m "${ELSEWHERE:-$checkout/build/elsewhere}")/$system
[[ -e $root/.python ]] || make_system
python=${python:-$(<"$root/.python")}
chroot "$root" dpkg --status "$python-venv" >/dev/null 2>&1 ||
    apt install --yes --no-install-recommends "$python" "$python"-{venv,dev}
(($#)) || set -- make test
exec env -u MAKEFLAGS -u MAKELEVEL -u MFLAGS -u PIP_FIND_LINKS HOME=/root PYTHON="$python" \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    unshare --mount --pid --ipc --uts --fork --kill-child --propagation private \
    bash -euo pipefail -c "$(declare -f copy_checkout enter); enter \"\$@\"" enter \
    "$root" "$checkout" "$python" "$@"
