"""A virtual machine with a Debian 12 on which README's command has been run."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hosts.host import InstalledHost

DISK_SIZE = 2 << 30
MODULES = "virtio_pci\nvirtio_blk\nvirtio_net\next4\n"
# In the words of a shell: a service at a port of its own, and the way there.
SERVE = """
set -e
serve() {
    cat > /etc/systemd/system/$1.socket <<END
[Socket]
ListenStream=0.0.0.0:$2
Accept=yes
[Install]
WantedBy=sockets.target
END
    cat > /etc/systemd/system/$1@.service <<END
[Service]
StandardInput=socket
StandardError=journal
ExecStart=$3
END
    systemctl enable -q $1.socket
}
cat > /etc/systemd/network/wire.network <<END
[Match]
Type=ether
[Network]
Address=10.0.2.15/24
END
systemctl enable -q systemd-networkd
systemctl disable -q ssh openbsd-inetd e2scrub_reap || true
systemctl mask -q systemd-networkd-wait-online man-db.timer dpkg-db-backup.timer
echo '/dev/vda / ext4 defaults 0 1' > /etc/fstab
"""


def build_disk(directory: Path, preparation: str) -> None:
    """Make DIRECTORY/disk, a host that `preparation` was run on, and its DIRECTORY/initrd."""
    directory.mkdir(exist_ok=True)
    confdir = directory / "initramfs"
    shutil.copytree("/etc/initramfs-tools", confdir, dirs_exist_ok=True)
    (confdir / "modules").write_text(MODULES)
    (confdir / "conf.d/modules").write_text("MODULES=list\n")
    initrd = directory / "initrd"
    subprocess.run(["mkinitramfs", "-d", confdir, "-o", initrd, kernel_version()], check=True)
    host = InstalledHost(directory.name.removeprefix("mda-"), tree="debian12")
    try:
        host.boot()
        host.install()
        host.run(SERVE + preparation)
        fresh = directory / "disk.new"
        with fresh.open("wb") as file:
            file.truncate(DISK_SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-d", host.root, fresh], check=True)
        fresh.rename(directory / "disk")
    finally:
        host.stop()


def kernel_version() -> str:
    """The newest of the cloud kernels that are installed here."""
    names = sorted(
        Path("/boot").glob("vmlinuz-*-cloud-amd64"), key=lambda path: path.stat().st_mtime
    )
    if not names:
        raise SystemExit("install linux-image-cloud-amd64 first")
    return names[-1].name.removeprefix("vmlinuz-")


def qemu_command(directory: Path, ports: dict[int, int]) -> list[str]:
    """The words that start the machine, but for its disk, its screen and its keyboard.

    `ports` leads from those inside to those on our loopback.
    """
    forward = ",".join(
        f"hostfwd=tcp:127.0.0.1:{outside}-10.0.2.15:{inside}" for inside, outside in ports.items()
    )
    options = ["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "768"]
    options += ["-no-reboot", "-kernel", f"/boot/vmlinuz-{kernel_version()}"]
    options += ["-initrd", str(directory / "initrd")]
    options += ["-append", "root=/dev/vda rw console=ttyS0 quiet"]
    options += ["-netdev", f"user,id=wire,restrict=off,{forward}"]
    options += ["-device", "virtio-net-pci,netdev=wire"]
    return ["qemu-system-x86_64", *options]


def greets(port: int) -> bool:
    """Does a mail server say its greeting at this port of our loopback?"""
    try:
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            return connection.recv(3) == b"220"
    except OSError:
        return False
