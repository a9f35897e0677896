"""Container images without a daemon and without a registry: buildah builds them, podman runs them.

    with image_store() as images:
        images.build("cpu")
        ended = images.run("megatron-lite:cpu", "train", "configs/runs/quickstart.yaml")

Images and containers lie in a store that is gone at the end. What a Dockerfile is built on comes from Debian's archive,
by debootstrap, and is kept for a month in the user's cache folder. Pip in a build finds what pip finds on this machine:
its settings, and the folders that they name, are mounted there.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.cluster.commands import ROOT, Command, Ended, run

BASE = "localhost/debian:bookworm-slim"
BASE_DOCKERFILE = 'FROM scratch\nADD rootfs.tar /\nCMD ["bash"]\n'
ENOUGH = 16384  # processes, and open files, of a container
LIMIT_S = 240  # of what takes seconds, on a machine that has other work
PYPI = "https://pypi.org/simple"
STORAGE = """
[storage]
driver = "{driver}"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""
# runc, as crun refuses hosts with both kinds of control groups; locks in files, as those in shared memory stay behind.
CONTAINERS = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
runtime = "runc"
tmp_dir = "{folder}/libpod"
"""


class Images:
    """A store of images, and the engines that work on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage, containers = folder / "storage.conf", folder / "containers.conf"
        storage.write_text(STORAGE.format(driver=storage_driver(folder), folder=folder))
        files, processes = (resource.getrlimit(which)[1] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        limits = {"files": _within(files), "processes": _within(processes)}
        containers.write_text(CONTAINERS.format(**limits, folder=folder))
        self.environment = {
            "CONTAINERS_STORAGE_CONF": str(storage),
            "CONTAINERS_CONF": str(containers),
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(folder),
        }

    def engine(self, *arguments: object) -> str:
        """What a command of an engine says, which must succeed."""
        ended = run(arguments, timeout_s=LIMIT_S, environment=self.environment)
        assert ended.code == 0, f"{arguments}: {ended.said}"
        return ended.said

    def import_base(self) -> None:
        """Debian, as a registry's image of it has it."""
        folder = self.folder / "base"
        folder.mkdir()
        with contextlib.suppress(OSError):
            os.link(debian_archive(), folder / "rootfs.tar")
        if not (folder / "rootfs.tar").exists():  # the cache lies on another file system
            shutil.copy(debian_archive(), folder / "rootfs.tar")
        (folder / "Dockerfile").write_text(BASE_DOCKERFILE)
        self.engine("buildah", "build", "--tag", BASE, folder)
        shutil.rmtree(folder)

    def build(self, image: str, *options: str, timeout_s: float = 540) -> Ended:
        """`docker/build.sh` for the image, on Debian, with this machine's pip and this process's torch."""
        folder = self.folder / "pip"
        folder.mkdir(exist_ok=True)
        index = pip_settings().keys() & {"find-links", "index-url", "extra-index-url"}
        arguments = [
            *("--pull-never", "--layers=false", "--network", "host", *pip_volumes(folder)),
            *("--build-arg", f"BASE={BASE}", "--build-arg", f"TORCH=torch=={metadata.version('torch')}"),
            *(("--build-arg", f"TORCH_INDEX={pip_settings().get('index-url', PYPI)}") if index else ()),
        ]
        environment = {**self.environment, "ENGINE": "buildah"}
        command = ["bash", ROOT / "docker" / "build.sh", image, *arguments, *options]
        return run(command, timeout_s=timeout_s, environment=environment)

    def inspect(self, image: str) -> dict[str, Any]:
        described: list[dict[str, Any]] = json.loads(self.engine("podman", "image", "inspect", image))
        return described[0]

    def container(self, image: str, arguments: Sequence[object], options: Sequence[object] = ()) -> list[str]:
        """The command that runs a container; its exit code is the container's."""
        return ["podman", "run", "--rm", "--pull=never", *map(str, options), image, *map(str, arguments)]

    def run(self, image: str, *arguments: object, options: Sequence[object] = (), timeout_s: float = LIMIT_S) -> Ended:
        """A container with no network, to its end."""
        command = self.container(image, arguments, ["--network=none", *options])
        return run(command, timeout_s=timeout_s, environment=self.environment)

    def command(self, image: str, *arguments: object, options: Sequence[object], log: Path) -> Command:
        """A container that goes on, as a command does."""
        return Command(
            self.container(image, arguments, options), log=log, timeout_s=LIMIT_S, environment=self.environment
        )

    def clear(self) -> None:
        """The end of the containers."""
        self.engine("podman", "rm", "--all", "--force", "--time", "0")
        self.engine("buildah", "rm", "--all")


@contextlib.contextmanager
def image_store() -> Iterator[Images]:
    """An empty store for the length of a `with` block."""
    folder = Path(tempfile.mkdtemp(prefix="megatron_lite_images_"))
    images = Images(folder)
    groups = set(_control_groups())
    try:
        yield images
    finally:
        with contextlib.ExitStack() as stack:  # each is done, whatever becomes of those before
            stack.callback(remove_groups, groups)
            stack.callback(shutil.rmtree, folder)
            stack.callback(unmount, folder)
            images.clear()


def unmount(folder: Path) -> None:
    """Whatever is mounted below a folder."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if mount.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, timeout=20)


def remove_groups(before: set[Path]) -> None:
    """The control groups that podman has made since, and leaves behind."""
    for group in set(_control_groups()) - before:
        inner = (path for path in group.rglob("*") if path.is_dir())
        for one in [*sorted(inner, reverse=True), group]:
            with contextlib.suppress(OSError):  # another's containers are in it
                one.rmdir()


def storage_driver(folder: Path) -> str:
    """How layers lie upon one another: overlay where the kernel can mount one here, and copies of all files if not."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        parts = [Path(scratch, name) for name in ("lower", "upper", "work", "merged")]
        for part in parts:
            part.mkdir()
        lower, upper, work, merged = map(str, parts)
        layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
        tried = subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", layers, merged], capture_output=True, check=False, timeout=20
        )
        if tried.returncode == 0:
            subprocess.run(["umount", merged], check=True, timeout=20)
    return "vfs" if tried.returncode else "overlay"


def debian_archive() -> Path:
    """A minimal Debian as a tar archive: this month's of the user's cache folder, made now if there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-lite-tests"
    archive = cache / time.strftime("debian-bookworm-%Y-%m.tar")
    if archive.exists():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob("debian-bookworm-*.tar"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        root, made = Path(scratch, "root"), Path(scratch, "rootfs.tar")
        ended = run(["debootstrap", "--variant=minbase", "bookworm", root], timeout_s=300)
        assert ended.code == 0, ended.said
        ended = run(["tar", "--directory", root, "--one-file-system", "--create", "--file", made, "."])
        assert ended.code == 0, ended.said
        made.rename(archive)
    return archive


def pip_settings() -> dict[str, str]:
    """What pip is set to do on this machine, by files and by the environment, which comes first."""
    listed = run([sys.executable, "-m", "pip", "config", "list"])
    assert listed.code == 0, listed.said
    settings: dict[str, str] = {}
    for scope, name, value in re.findall(r"^([^.=]+)\.([^.=]+)=('.*'|\".*\")$", listed.said, re.MULTILINE):
        if scope == ":env:" or name not in settings:
            settings[name] = str(ast.literal_eval(value))
    return settings


def pip_volumes(folder: Path) -> list[str]:
    """Options of a build that give its pip this machine's settings; files that are made for that go to `folder`."""
    settings, volumes = pip_settings(), []
    if "cert" in settings:
        # A copy elsewhere: in its own place it would be in the way of the package that writes that file.
        shutil.copy(settings["cert"], folder / "ca.crt")
        settings["cert"] = "/mnt/ca.crt"
        volumes.append(f"{folder}/ca.crt:/mnt/ca.crt:ro")
    for place in " ".join(settings.get(name, "") for name in ("find-links", "index-url", "extra-index-url")).split():
        local = Path(place.removeprefix("file://"))
        if local.is_dir():
            # An index refers to files that lie beside it.
            shared = local.parent if place.startswith("file://") else local
            volumes.append(f"{shared}:{shared}:ro")
    lines = ["[global]", *(f"{name} = {value}" for name, value in settings.items())]
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    volumes.append(f"{folder}/pip.conf:/etc/pip.conf:ro")
    return [f"--volume={volume}" for volume in dict.fromkeys(volumes)]


def _within(limit: int) -> int:
    """A limit for a container that this process may set; podman itself would ask for more than some machines give."""
    return ENOUGH if limit == resource.RLIM_INFINITY else min(limit, ENOUGH)


def _control_groups() -> list[Path]:
    """The groups that podman makes for its containers."""
    groups = Path("/sys/fs/cgroup")
    return [*groups.glob("libpod_parent"), *groups.glob("*/libpod_parent")]
