"""Uploaded content: files by their SHA-256, mounts, and blobs, which go over HTTP."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

from aiohttp import web
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from support.modal_server.containers import Container
from support.modal_server.parts import Part, new_id

# What the client sends at once to a Volume or as an argument is below this.
MAX_BODY = 1 << 33


class Store(Part):
    """Everything uploaded: files in the folder `content` of the server's state, blobs only until the command ends."""

    # Pairs of path and SHA-256.
    mounts: dict[str, list[tuple[str, str]]]

    async def start(self) -> None:
        """Open the HTTP server on a free port. Its addresses have a random part, which only this account's clients know."""
        self.mounts = {}
        (self.server.state / "content").mkdir(exist_ok=True)
        self._blobs = self.server.folder / "blobs"
        self._blobs.mkdir()
        secret = secrets.token_urlsafe(16)
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_put(f"/{secret}/blobs/{{id}}", self._put_blob)
        app.router.add_get(f"/{secret}/blobs/{{id}}", self._get_blob)
        app.router.add_get(f"/{secret}/volumes/{{name}}/{{path:.+}}", self.server.volumes.send_block)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port = self._runner.addresses[0][1]
        self.address = f"http://127.0.0.1:{port}/{secret}"

    async def stop(self) -> None:
        """Close the HTTP server."""
        await self._runner.cleanup()

    def path_of(self, sha256: str) -> Path:
        """Where content with this hash is, or would be."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise GRPCError(Status.INVALID_ARGUMENT, f"{sha256!r} is not a SHA-256")
        return self.server.state / "content" / sha256

    async def _put_blob(self, request: web.Request) -> web.Response:
        content = await request.read()
        (self._blobs / Path(request.match_info["id"]).name).write_bytes(content)
        # The client compares it.
        return web.Response(headers={"ETag": f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'})

    async def _get_blob(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(self._blobs / Path(request.match_info["id"]).name)

    async def BlobCreate(self, request: pb.BlobCreateRequest, container: Container | None) -> pb.BlobCreateResponse:
        blob = new_id("bl")
        urls = pb.UploadUrlList(items=[f"{self.address}/blobs/{blob}"])
        return pb.BlobCreateResponse(blob_ids=[blob], upload_urls=urls)

    async def BlobGet(self, request: pb.BlobGetRequest, container: Container | None) -> pb.BlobGetResponse:
        return pb.BlobGetResponse(download_url=f"{self.address}/blobs/{request.blob_id}")

    async def MountBatchedCheckExistence(
        self, request: pb.MountBatchedCheckExistenceRequest, container: Container | None
    ) -> pb.MountBatchedCheckExistenceResponse:
        missing = [sha256 for sha256 in request.sha256_hex_hashes if not self.path_of(sha256).is_file()]
        return pb.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request: pb.MountPutFileRequest, container: Container | None) -> pb.MountPutFileResponse:
        """Called with a hash alone, to ask whether the content is there, and with the content or a blob of it."""
        path = self.path_of(request.sha256_hex)
        source = request.WhichOneof("data_oneof")
        if source is not None:
            content = request.data if source == "data" else (self._blobs / Path(request.data_blob_id).name).read_bytes()
            if hashlib.sha256(content).hexdigest() != request.sha256_hex:
                raise GRPCError(Status.INVALID_ARGUMENT, "the content does not have the SHA-256 that was announced")
            path.write_bytes(content)
        return pb.MountPutFileResponse(exists=path.is_file())

    async def MountGetOrCreate(
        self, request: pb.MountGetOrCreateRequest, container: Container | None
    ) -> pb.MountGetOrCreateResponse:
        # Modal's own packages are mounts with a name and without files here: containers have this environment's.
        files = sorted((file.filename, file.sha256_hex) for file in request.files)
        digest = hashlib.sha256(repr(files).encode()).hexdigest()
        self.mounts[f"mo-{digest[:24]}"] = files
        metadata = pb.MountHandleMetadata(content_checksum_sha256_hex=digest)
        return pb.MountGetOrCreateResponse(mount_id=f"mo-{digest[:24]}", handle_metadata=metadata)
