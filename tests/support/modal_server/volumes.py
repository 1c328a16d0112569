"""Volumes: a folder of committed files each, and a working copy for every container that mounts one."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISLNK
from urllib.parse import quote
from uuid import uuid4

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from support.modal_server.containers import Container
from support.modal_server.parts import Event, Part, already_exists, not_found

# The client expects blocks of this size.
BLOCK = 8 << 20

# Modification time and size of a file, the target of a symbolic link; None for a folder.
Version = tuple[int, int] | str | None


@dataclass
class WorkingCopy:
    """What a container sees of a Volume. seen: what was there when it was last brought up to date or committed."""

    committed: Path
    folder: Path
    seen: dict[str, Version] = field(default_factory=dict)

    def refresh(self) -> None:
        """Bring it up to date with what is committed."""
        _make_same(versions(self.committed), versions(self.folder), self.committed, self.folder)
        self.seen = versions(self.folder)

    def commit(self) -> tuple[str, ...]:
        """Make changes since then visible to others, the last to write a file wins; returns the files."""
        now = versions(self.folder)
        _make_same(now, self.seen, self.folder, self.committed)
        written = {path for path, version in now.items() if version is not None and self.seen.get(path) != version}
        removed = {path for path, version in self.seen.items() if version is not None and path not in now}
        self.seen = now
        return tuple(sorted(written | removed))


def versions(folder: Path) -> dict[str, Version]:
    """Everything below a folder by its relative path, folders before what is in them."""
    found: dict[str, Version] = {}
    for path in sorted(folder.rglob("*")):
        # A container may rename files meanwhile.
        with suppress(FileNotFoundError):
            found[path.relative_to(folder).as_posix()] = _version(path)
    return found


def _version(path: Path) -> Version:
    status = path.lstat()
    if S_ISLNK(status.st_mode):
        return f"link to {path.readlink()}"
    return None if S_ISDIR(status.st_mode) else (status.st_mtime_ns, status.st_size)


def _make_same(wanted: dict[str, Version], there: dict[str, Version], source: Path, target: Path) -> None:
    for path in reversed(list(there)):
        if path not in wanted or (wanted[path] is None) != (there[path] is None):
            _remove(target / path)
    for path, version in wanted.items():
        if version is None:
            (target / path).mkdir(parents=True, exist_ok=True)
        elif there.get(path, "") != version:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            # Others may read the old one meanwhile.
            temporary = (target / path).with_name(f".{uuid4().hex}")
            with suppress(FileNotFoundError):
                shutil.copy2(source / path, temporary, follow_symlinks=False)
                temporary.replace(target / path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # Not what another container has put there.
        if not any(path.iterdir()):
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


class Volumes(Part):
    """Volumes of the account, in the folder `volumes` of the server's state, each in a folder of its name."""

    def folder(self, volume_id: str) -> Path:
        """The committed files."""
        return self._named(volume_id.removeprefix("vo-"))

    def _named(self, name: str) -> Path:
        if not name or PurePosixPath(name).name != name or name == "..":
            raise GRPCError(Status.INVALID_ARGUMENT, f"{name!r} is not the name of a Volume")
        return self.server.state / "volumes" / name

    def path(self, volume_id: str, path: str) -> Path:
        """A committed file or folder, which must exist."""
        found = self._inside(volume_id, path)
        if not os.path.lexists(found):
            raise not_found(f"No such file or directory: {path!r}")
        return found

    def _inside(self, volume_id: str, path: str) -> Path:
        if ".." in PurePosixPath(path).parts:
            raise GRPCError(Status.INVALID_ARGUMENT, f"{path!r} leaves the Volume")
        return self.folder(volume_id) / path.lstrip("/")

    def metadata(self, volume_id: str) -> pb.VolumeMetadata:
        """As a client wants it."""
        folder = self.folder(volume_id)
        created = pb.CreationInfo(created_at=folder.stat().st_ctime)
        return pb.VolumeMetadata(version=pb.VOLUME_FS_VERSION_V1, name=folder.name, creation_info=created)

    def mount(self, volume_id: str, folder: Path) -> WorkingCopy:
        """A working copy in a new folder."""
        folder.mkdir()
        copy = WorkingCopy(self.folder(volume_id), folder)
        copy.refresh()
        return copy

    async def VolumeGetOrCreate(
        self, request: pb.VolumeGetOrCreateRequest, container: Container | None
    ) -> pb.VolumeGetOrCreateResponse:
        folder = self._named(request.deployment_name)
        kind = request.object_creation_type
        if folder.is_dir() and kind == pb.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise already_exists(f"Volume '{folder.name}' already exists")
        if not folder.is_dir() and kind == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
            raise not_found(f"Volume '{folder.name}' not found in environment 'main'")
        folder.mkdir(parents=True, exist_ok=True)
        volume_id = f"vo-{folder.name}"
        metadata = self.metadata(volume_id)
        return pb.VolumeGetOrCreateResponse(volume_id=volume_id, version=metadata.version, metadata=metadata)

    async def VolumeListFiles(
        self, request: pb.VolumeListFilesRequest, container: Container | None
    ) -> AsyncIterator[pb.VolumeListFilesResponse]:
        found = self.path(request.volume_id, request.path)
        paths = [found]
        if found.is_dir():
            paths = sorted(found.rglob("*") if request.recursive else found.iterdir())
        root = self.folder(request.volume_id)
        yield pb.VolumeListFilesResponse(entries=[_entry(path, root) for path in paths])

    async def VolumeGetFile2(self, request: pb.VolumeGetFile2Request, container: Container | None) -> pb.VolumeGetFile2Response:
        path = self.path(request.volume_id, request.path)
        if not path.is_file():
            raise not_found(f"Not a file: {request.path!r}")
        size = path.stat().st_size
        end = min(size, request.start + request.len) if request.len else size
        address = f"{self.server.store.address}/volumes/{self.folder(request.volume_id).name}/{quote(request.path.lstrip('/'))}"
        edges = [request.start, *range((request.start // BLOCK + 1) * BLOCK, end, BLOCK), end]
        urls = [f"{address}?from={first}&to={last}" for first, last in pairwise(edges) if last > first]
        return pb.VolumeGetFile2Response(get_urls=urls, size=size, start=request.start, len=max(end - request.start, 0))

    async def send_block(self, request: web.Request) -> web.Response:
        """A part of a committed file, over HTTP."""
        path = self.path(f"vo-{request.match_info['name']}", request.match_info["path"])
        with path.open("rb") as file:
            file.seek(int(request.query["from"]))
            return web.Response(body=file.read(int(request.query["to"]) - int(request.query["from"])))

    async def VolumePutFiles(self, request: pb.VolumePutFilesRequest, container: Container | None) -> Empty:
        targets = [self._inside(request.volume_id, file.filename) for file in request.files]
        if request.disallow_overwrite_existing_files:
            for target, file in zip(targets, request.files, strict=True):
                if target.exists():
                    raise already_exists(f"{file.filename}: already exists")
        for target, file in zip(targets, request.files, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.server.store.path_of(file.sha256_hex), target)
        return Empty()

    async def VolumeRemoveFile(self, request: pb.VolumeRemoveFileRequest, container: Container | None) -> Empty:
        path = self.path(request.volume_id, request.path)
        if path.is_dir() and not request.recursive:
            raise GRPCError(Status.INVALID_ARGUMENT, f"{request.path!r} is a directory")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        return Empty()

    def commit(self, container: Container, volume_id: str) -> None:
        """Commit what a container has changed."""
        files = _mounted(container, volume_id).commit()
        if files:
            name = self.folder(volume_id).name
            self.server.note(
                Event(kind="volume_commit", container=container.id, function=container.function.name, volume=name, files=files)
            )

    async def VolumeCommit(self, request: pb.VolumeCommitRequest, container: Container | None) -> pb.VolumeCommitResponse:
        assert container is not None
        self.commit(container, request.volume_id)
        return pb.VolumeCommitResponse(skip_reload=True)

    async def VolumeReload(self, request: pb.VolumeReloadRequest, container: Container | None) -> Empty:
        assert container is not None
        copy = _mounted(container, request.volume_id)
        opened = container.open_files()
        for path in copy.folder.rglob("*"):
            with suppress(FileNotFoundError):
                if (path.stat().st_dev, path.stat().st_ino) in opened:
                    name = path.relative_to(copy.folder)
                    raise GRPCError(Status.FAILED_PRECONDITION, f"there are open files preventing the operation: {name}")
        # As on Modal, what was changed is committed.
        self.commit(container, request.volume_id)
        copy.refresh()
        return Empty()


def _mounted(container: Container, volume_id: str) -> WorkingCopy:
    if volume_id not in container.volumes:
        raise not_found(f"the container does not mount {volume_id}")
    return container.volumes[volume_id]


def _entry(path: Path, root: Path) -> pb.FileEntry:
    status = path.lstat()
    kind, size = pb.FileEntry.FileType.FILE, status.st_size
    if path.is_symlink():
        kind = pb.FileEntry.FileType.SYMLINK
    elif path.is_dir():
        kind, size = pb.FileEntry.FileType.DIRECTORY, 0
    return pb.FileEntry(path=path.relative_to(root).as_posix(), type=kind, mtime=int(status.st_mtime), size=size)
