"""prefect.yaml against the flows, and the flows' parameters against what Prefect's run form can show and store."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.cli.deploy._models import ConcurrencyLimitSpec, DeploymentConfig, PrefectYamlModel, RawScheduleConfig
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from flows.experiment import shipped_recipes
from flows.graph import ROLES
from flows.iteration import RerunChoice, next_iteration, noisy_student, recipe_parameters
from flows.stages import STAGE_FLOWS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {deployment["name"]: deployment for deployment in PROJECT["deployments"]}
FLOWS: dict[str, Any] = {"noisy-student": noisy_student, "next-iteration": next_iteration, **STAGE_FLOWS}


def schema(flow: Any) -> dict[str, Any]:
    """The JSON schema that the server checks parameters against and the form is drawn from; no other names here."""
    found: dict[str, Any] = parameter_schema(flow).model_dump(mode="json")
    return {**found, "additionalProperties": False}


def test_every_flow_has_a_deployment_and_every_stage_a_flow() -> None:
    assert list(STAGE_FLOWS) == list(ROLES)
    assert list(DEPLOYMENTS) == list(FLOWS)


def test_prefect_reads_the_file_and_ignores_no_field_of_it() -> None:
    PrefectYamlModel.model_validate(PROJECT)
    for deployment in PROJECT["deployments"]:
        assert deployment.keys() <= DeploymentConfig.model_fields.keys()
        assert deployment["concurrency_limit"].keys() <= ConcurrencyLimitSpec.model_fields.keys()
        assert deployment["concurrency_limit"]["collision_strategy"] == "ENQUEUE"
        assert deployment["work_pool"]["name"] == "default"
        for schedule in deployment.get("schedules", []):
            assert RawScheduleConfig.model_validate(schedule).active is False
            assert "rerun" not in schedule.get("parameters", {}), "it would be made anew every night"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_names_its_flow_and_gives_it_parameters_that_it_takes(name: str) -> None:
    deployment, flow = DEPLOYMENTS[name], FLOWS[name]
    found = load_flow_from_entrypoint(str(ROOT / deployment["entrypoint"]))
    assert (found.name, schema(found)) == (flow.name, schema(flow))
    for schedule in (None, *deployment.get("schedules", [])):
        parameters = {**deployment["parameters"], **(schedule or {}).get("parameters", {})}
        jsonschema.validate(parameters, schema(flow))
        flow.validate_parameters(parameters)
    assert deployment["description"].endswith(".")
    assert "noisy-student" in deployment["tags"]
    assert ("stage" in deployment["tags"]) == (name in STAGE_FLOWS)


@pytest.mark.parametrize("name", FLOWS)
def test_a_form_has_words_for_every_field_and_none_that_it_stores_junk_for(name: str) -> None:
    properties = schema(FLOWS[name])["properties"]
    in_order = sorted(properties, key=lambda field: properties[field]["position"])
    assert in_order == list(properties), "the form shows them in the order of the code"
    for field, found in properties.items():
        assert found["description"], field
        assert found["title"] != field, field
        assert found["type"] in ("string", "integer", "array"), field
        assert not {"anyOf", "oneOf", "allOf", "$ref"} & found.keys(), field
        assert "default" in found, field
        if found["type"] == "array":
            assert found["items"] == {"type": "string"}


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "next-iteration"])
def test_the_recipe_is_chosen_from_the_shipped_ones_or_named_by_path_or_url(name: str) -> None:
    properties = schema(FLOWS[name])["properties"]
    assert tuple(properties["recipe"]["enum"]) == shipped_recipes()
    assert properties["recipe_url"]["default"] == ""
    for parameters in ({"recipe": "digitz"}, {"recipe": "my.yaml"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(parameters, schema(FLOWS[name]))


def test_a_form_knows_the_least_iteration() -> None:
    assert schema(STAGE_FLOWS["label"])["properties"]["iteration"]["minimum"] == 0
    assert schema(noisy_student)["properties"]["rerun_iteration"]["minimum"] == -1


def test_rerun_is_chosen_from_the_stages() -> None:
    assert schema(noisy_student)["properties"]["rerun"]["enum"] == ["nothing", *ROLES]
    assert RerunChoice.__args__ == ("nothing", *ROLES)  # type: ignore[attr-defined]


def test_the_command_line_gives_a_flow_a_shipped_recipe_by_name_and_another_by_path() -> None:
    assert recipe_parameters("digits") == {"recipe": "digits"}
    assert recipe_parameters("recipes/my.yaml") == {"recipe_url": "recipes/my.yaml"}
