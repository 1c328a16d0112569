"""Functions and classes as apps define them, and the images and secrets that their containers get."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from support.modal_server.containers import Container
from support.modal_server.parts import Part, new_id, not_found

if TYPE_CHECKING:
    from support.modal_server.server import Server

PYTHON = "Python 3.11"
COPIED = re.compile(r"COPY \. /")
INSTALLED = re.compile(r"pip install '?(/[^'\[\s]+)")


@dataclass
class Function:
    """A function, or a class with its methods. base, parameters: of one that is bound to a class's parameters or to options."""

    id: str
    app: str
    announced: pb.FunctionPrecreateRequest
    definition: pb.Function = field(default_factory=pb.Function)
    base: str = ""
    parameters: bytes = b""

    @property
    def name(self) -> str:
        """Of a class, `Class.*`."""
        return self.announced.function_name

    def metadata(self) -> pb.FunctionHandleMetadata:
        """What clients and containers know of it."""
        announced, definition = self.announced, self.definition
        return pb.FunctionHandleMetadata(
            function_name=self.name,
            function_type=announced.function_type,
            app_id=self.app,
            definition_id=f"de-{self.id}",
            function_schema=announced.function_schema,
            supported_input_formats=announced.supported_input_formats,
            supported_output_formats=announced.supported_output_formats,
            class_parameter_info=definition.class_parameter_info,
            is_method=definition.is_method,
            base_function_id=self.base,
            method_handle_metadata={
                name: pb.FunctionHandleMetadata(
                    function_name=method.function_name,
                    function_type=method.function_type,
                    app_id=self.app,
                    is_method=True,
                    use_method_name=name,
                    function_schema=method.function_schema,
                    supported_input_formats=method.supported_input_formats,
                    supported_output_formats=method.supported_output_formats,
                )
                for name, method in announced.method_definitions.items()
            },
        )


@dataclass(frozen=True)
class Environment:
    """What images and secrets make of a container. folders: by their path in it, what was copied into the image."""

    variables: dict[str, str]
    folders: dict[str, Path]
    python_path: list[str]
    workdir: str


class Functions(Part):
    """Functions, classes, images and secrets of the running command."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.functions: dict[str, Function] = {}
        self.images: dict[str, pb.Image] = {}
        self.secrets: dict[str, dict[str, str]] = {}

    def find(self, function_id: str) -> Function:
        """A function that has been created."""
        if function_id not in self.functions:
            raise not_found(f"no function {function_id}")
        return self.functions[function_id]

    def layout(self, app: str) -> pb.AppLayout:
        """Everything an app's container needs to know of the app."""
        published = self.server.apps.apps[app].published
        functions = [function for function in self.functions.values() if function.app == app]
        objects = [pb.Object(object_id=one.id, function_handle_metadata=one.metadata()) for one in functions]
        objects += [
            pb.Object(object_id=class_id, class_handle_metadata=pb.ClassHandleMetadata())
            for class_id in published.class_ids.values()
        ]
        used = {dependency.object_id for one in functions for dependency in one.definition.object_dependencies}
        for object_id in sorted(used - {one.object_id for one in objects}):
            if object_id.startswith("vo-"):
                objects.append(pb.Object(object_id=object_id, volume_metadata=self.server.volumes.metadata(object_id)))
            else:
                objects.append(pb.Object(object_id=object_id))
        return pb.AppLayout(objects=objects, function_ids=published.function_ids, class_ids=published.class_ids)

    def environment(self, function: Function) -> Environment:
        """What the function's containers are to have. Images are not built: of the steps, these count.

        `ENV`, `WORKDIR`, the copy of a local folder, and `pip install` of that. Other packages are this environment's.
        """
        variables: dict[str, str] = {}
        folders: dict[str, Path] = {}
        python_path, workdir = ["/root"], "/root"
        for image in self._layers(function.definition.image_id):
            for command in image.dockerfile_commands:
                step, _, rest = command.strip().partition(" ")
                if step == "ENV":
                    variables |= dict(text.split("=", 1) for text in shlex.split(rest))
                elif step == "WORKDIR":
                    workdir = rest.strip()
                elif COPIED.fullmatch(command.strip()):
                    folders |= self._copied(image.context_mount_id)
                elif found := INSTALLED.search(command):
                    python_path.append(found.group(1))
        for secret_id in function.definition.secret_ids:
            variables |= self.secrets[secret_id]
        return Environment(variables, folders, python_path, workdir)

    def _layers(self, image_id: str) -> list[pb.Image]:
        image = self.images.get(image_id)
        if image is None:
            return []
        return [*(layer for base in image.base_images for layer in self._layers(base.image_id)), image]

    def _copied(self, mount_id: str) -> dict[str, Path]:
        """The mount's folder. Containers share it, as they share their image, and with it the compiled modules."""
        files = self.server.store.mounts[mount_id]
        common = os.path.commonpath([str(Path(name).parent) for name, _ in files])
        if common == "/":
            raise GRPCError(Status.UNIMPLEMENTED, "the offline server copies a folder into an image, but not onto its root")
        folder = self.server.state / "images" / mount_id
        if not folder.is_dir():
            building = folder.with_name(new_id("building"))
            for name, sha256 in files:
                target = building / name.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.server.store.path_of(sha256), target)
            building.rename(folder)
        return {common: folder / common.lstrip("/")}

    async def ImageGetOrCreate(
        self, request: pb.ImageGetOrCreateRequest, container: Container | None
    ) -> pb.ImageGetOrCreateResponse:
        digest = hashlib.sha256(request.image.SerializeToString(deterministic=True)).hexdigest()
        self.images[f"im-{digest[:24]}"] = request.image
        return pb.ImageGetOrCreateResponse(
            image_id=f"im-{digest[:24]}",
            result=pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS),
            metadata=pb.ImageMetadata(image_builder_version=request.builder_version, python_version_info=PYTHON),
        )

    async def SecretGetOrCreate(
        self, request: pb.SecretGetOrCreateRequest, container: Container | None
    ) -> pb.SecretGetOrCreateResponse:
        name = request.deployment_name
        variables = dict(request.env_dict)
        if request.object_creation_type == pb.OBJECT_CREATION_TYPE_UNSPECIFIED:
            if name not in self.server.settings.secrets:
                raise not_found(f"Secret '{name}' not found in environment 'main'")
            variables = self.server.settings.secrets[name]
            missing = [key for key in request.required_keys if key not in variables]
            if missing:
                raise not_found(f"Secret '{name}' is missing key(s) {', '.join(missing)}")
        elif name:
            raise GRPCError(Status.UNIMPLEMENTED, "secrets are given to the server as it starts")
        secret_id = new_id("st")
        self.secrets[secret_id] = variables
        return pb.SecretGetOrCreateResponse(secret_id=secret_id, metadata=pb.SecretMetadata(name=name))

    async def FunctionPrecreate(
        self, request: pb.FunctionPrecreateRequest, container: Container | None
    ) -> pb.FunctionPrecreateResponse:
        function = Function(request.existing_function_id or new_id("fu"), request.app_id, request)
        self.functions[function.id] = function
        return pb.FunctionPrecreateResponse(function_id=function.id, handle_metadata=function.metadata())

    async def FunctionCreate(self, request: pb.FunctionCreateRequest, container: Container | None) -> pb.FunctionCreateResponse:
        """Of several GPUs in order of preference, the first counts."""
        ranked = [one.function for one in request.function_data.ranked_functions]
        function = self.find(request.existing_function_id)
        function.definition = ranked[0] if ranked else request.function
        data = (
            request.function_data
            if ranked
            else pb.FunctionData(
                function_name=function.name, ranked_functions=[pb.FunctionData.RankedFunction(function=request.function)]
            )
        )
        return pb.FunctionCreateResponse(
            function_id=function.id, function=function.definition, function_data=data, handle_metadata=function.metadata()
        )

    async def FunctionBindParams(
        self, request: pb.FunctionBindParamsRequest, container: Container | None
    ) -> pb.FunctionBindParamsResponse:
        """The same parameters and options give the same function."""
        base, options = self.find(request.function_id), request.function_options
        digest = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
        definition = pb.Function()
        definition.CopyFrom(base.definition)
        if options.HasField("retry_policy"):
            definition.retry_policy.CopyFrom(options.retry_policy)
        if options.HasField("resources"):
            definition.resources.CopyFrom(options.resources)
        if options.HasField("concurrency_limit"):
            definition.autoscaler_settings.max_containers = options.concurrency_limit
        if options.HasField("timeout_secs"):
            definition.timeout_secs = options.timeout_secs
        if options.replace_volume_mounts:
            del definition.volume_mounts[:]
            definition.volume_mounts.extend(options.volume_mounts)
        if options.replace_secret_ids:
            del definition.secret_ids[:]
            definition.secret_ids.extend(options.secret_ids)
        bound = Function(
            f"fu-{digest[:24]}", base.app, base.announced, definition, base=base.id, parameters=request.serialized_params
        )
        bound = self.functions.setdefault(bound.id, bound)
        return pb.FunctionBindParamsResponse(bound_function_id=bound.id, handle_metadata=bound.metadata())

    async def ClassCreate(self, request: pb.ClassCreateRequest, container: Container | None) -> pb.ClassCreateResponse:
        class_id = request.existing_class_id or new_id("cs")
        return pb.ClassCreateResponse(class_id=class_id, handle_metadata=pb.ClassHandleMetadata())
