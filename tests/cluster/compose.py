"""docker/compose.yaml as what its services run, so that a test can run just that without a daemon."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.commands import ROOT

FILE = ROOT / "docker" / "compose.yaml"


@dataclass(frozen=True)
class Service:
    """What a container of the service is given."""

    image: str
    entrypoint: list[str]
    command: list[str]
    environment: dict[str, str]
    hostname: str | None
    volumes: dict[str, str]  # the name of each, and where it is mounted

    def options(self, **folders: Path) -> list[str]:
        """An engine's options for it; `folders` has one for each of its volumes."""
        options = ["--entrypoint", json.dumps(self.entrypoint)]
        for name, value in self.environment.items():
            options += ["--env", f"{name}={value}"]
        for name, place in self.volumes.items():
            options += ["--volume", f"{folders[name]}:{place}"]
        return [*options, *(("--hostname", self.hostname) if self.hostname else ())]


def load(text: str | None = None, **variables: str) -> dict[str, Any]:
    """The file with its variables filled in: from `variables`, or the default that stands beside the name."""
    return _filled_in(yaml.safe_load(FILE.read_text(encoding="utf-8") if text is None else text), variables)


def services(**variables: str) -> dict[str, Service]:
    return {
        name: Service(
            image=service["image"],
            entrypoint=service.get("entrypoint", []),
            command=service.get("command", []),
            environment=service.get("environment", {}),
            hostname=service.get("hostname"),
            volumes=dict(volume.split(":", 1) for volume in service.get("volumes", ())),
        )
        for name, service in load(**variables)["services"].items()
    }


def complaints(document: dict[str, Any]) -> list[str]:
    """In what a document breaks the Compose Specification, as far as this project uses it."""
    found = [f"{key}: no such section" for key in document if key not in SECTIONS and not key.startswith("x-")]
    for name, service in document.get("services", {}).items():
        found += [f"{name}.{key}: no such key" for key in service if key not in SERVICE_KEYS]
        found += [
            f"{name}.{key}: {service[key]!r} is not {kind}"
            for key, (kind, fits) in SERVICE_KEYS.items()
            if key in service and not fits(service[key])
        ]
        if "image" not in service and "build" not in service:
            found.append(f"{name}: neither an image nor a build")
        depends = service.get("depends_on", {})
        found += [f"{name}: depends on {other}, which is not there" for other in depends.keys() - document["services"]]
        mounted = {volume.split(":")[0] for volume in service.get("volumes", ())}
        found += [
            f"{name}: the volume {volume} is not there" for volume in mounted - document.get("volumes", {}).keys()
        ]
        build = service.get("build", {})
        context = FILE.parent / build.get("context", ".")
        if build and not (context / build.get("dockerfile", "Dockerfile")).is_file():
            found.append(f"{name}: there is no {build.get('dockerfile')} in {os.path.normpath(context)}")
    return found


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _string(value: object) -> bool:
    return isinstance(value, str)


def _mapping_of_strings(value: object) -> bool:
    # A number or a boolean of YAML would reach the container as YAML writes it, which may not be how it stands there.
    return isinstance(value, dict) and all(isinstance(one, str) for pair in value.items() for one in pair)


def _conditions(value: object) -> bool:
    allowed = ("service_started", "service_healthy", "service_completed_successfully")
    return isinstance(value, dict) and all(
        isinstance(one, dict) and one.keys() <= {"condition", "required", "restart"} and one["condition"] in allowed
        for one in value.values()
    )


def _build(value: object) -> bool:
    return _mapping_of_strings(value) and set(dict(value)) <= {"context", "dockerfile", "target"}  # type: ignore[call-overload]


def _duration(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(\d+h)?(\d+m)?(\d+s)?", value) is not None and value != ""


def _host_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value) is not None


SECTIONS = {"name", "services", "volumes"}
SERVICE_KEYS = {
    "image": ("a name", _string),
    "build": ("a context and a Dockerfile", _build),
    "command": ("a list of strings", _strings),
    "entrypoint": ("a list of strings", _strings),
    "environment": ("a mapping of strings", _mapping_of_strings),
    "hostname": ("a host name", _host_name),
    "volumes": ("a list of strings", _strings),
    "depends_on": ("a mapping of conditions", _conditions),
    "stop_grace_period": ("a time such as 1m30s", _duration),
}


def _filled_in(value: Any, variables: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled_in(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled_in(one, variables) for one in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], value)
    return value
