"""What describes machines is right: manifests by KubeRay's own schemas, launcher files by Ray's, commands by our
command line, alerts by Prometheus' own tools, dashboards by Grafana's types."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "cluster"
KUBERAY = CLUSTER / "kuberay"
FILES = sorted(path for path in KUBERAY.rglob("*.yaml") if path.name != "kustomization.yaml")
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices", "RayCronJob": "raycronjobs"}
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())


def strict(schema: Any) -> Any:
    """A schema of Kubernetes that refuses fields it does not know, as the API server does when it is asked to."""
    if not isinstance(schema, dict):
        return schema
    schema = deepcopy(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    if "properties" in schema:
        schema["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
        known = [name for name in schema.get("required", ()) if "default" not in schema["properties"].get(name, {})]
        schema["required"] = known
    for name in ("items", "additionalProperties"):
        schema[name] = strict(schema[name]) if isinstance(schema.get(name), dict) else schema.get(name, {})
        if schema[name] == {}:
            del schema[name]
    return schema


@pytest.fixture(scope="session")
def schemas(shared) -> dict[str, jsonschema.Draft7Validator]:
    if not (shared / "crds").is_dir():
        pytest.skip(f"no schemas of KubeRay at {shared}/crds")
    found = {}
    for kind, name in KINDS.items():
        crd = yaml.load((shared / f"crds/{name}.yaml").read_text(), Loader=yaml.CSafeLoader)
        (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[kind] = jsonschema.Draft7Validator(schema)
    return found


def documents(text: str) -> list[dict]:
    return [document for document in yaml.safe_load_all(text) if document]


def faults(document: dict, schemas: dict) -> list[str]:
    if document["kind"] not in KINDS:
        return []
    assert document["apiVersion"] == "ray.io/v1"
    return [
        f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}"
        for e in schemas[document["kind"]].iter_errors(document)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KUBERAY)))
def test_manifests_hold_by_kuberays_schemas(path, schemas):
    for document in documents(path.read_text()):
        assert faults(document, schemas) == []


def test_a_misspelt_field_is_found(schemas):
    (document,) = documents((KUBERAY / "base/cluster.yaml").read_text())
    document["spec"]["workerGroupSpecs"][0]["maxReplica"] = 4
    assert any("maxReplica" in fault for fault in faults(document, schemas))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_build_and_hold(overlay, schemas):
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    built = subprocess.run(["kubectl", "kustomize", KUBERAY / "overlays" / overlay], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    found = documents(built.stdout)
    assert {"RayCluster", "RayService", "CronJob", "NetworkPolicy", "StatefulSet"} <= {one["kind"] for one in found}
    for document in found:
        assert faults(document, schemas) == []
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "owl"
    nightly = next(one for one in found if one["metadata"]["name"] == "nightly-curation" and one["kind"] == "ConfigMap")
    (job,) = documents(nightly["data"]["rayjob.yaml"])
    assert faults(job, schemas) == []


def entrypoints() -> dict[str, str]:
    found = {}
    for path in FILES:
        for document in documents(path.read_text()):
            spec = document.get("spec", {})
            spec = spec.get("jobTemplate", spec) if document["kind"] == "RayCronJob" else spec
            if "entrypoint" in spec:
                found[f"{path.stem}"] = spec["entrypoint"]
    return found


@pytest.mark.parametrize("name", entrypoints())
def test_jobs_are_commands_that_owl_knows(name):
    """Parsed by the command line itself, with the recipe and its settings, up to the first file that is asked for."""
    from typer.main import get_command

    from jobs.cli import app
    from jobs.options import recipe_of

    owl, verb, *arguments = shlex.split(entrypoints()[name])
    assert owl == "owl"
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    context = command.make_context(verb, arguments, resilient_parsing=False)
    given = context.params
    if hasattr(command, "commands"):
        inner, rest = context.protected_args[0] if hasattr(context, "protected_args") else arguments[0], context.args
        sub = command.commands.get(inner) or command.commands["run"]
        given = sub.make_context(inner, arguments if inner not in command.commands else rest).params
    group = {"curate": "curation", "eval": "evaluation", "batch": "serving"}.get(verb) or given["stage"]
    recipe_of(given["recipe"], given["set"], group)


def test_the_endpoint_is_a_config_that_serve_takes():
    from ray.serve.schema import ServeDeploySchema

    from pipelines.serving.deploy import Deployed, checked, refuse_unknown

    service = documents((KUBERAY / "base/endpoint.yaml").read_text())[0]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    refuse_unknown(config, ServeDeploySchema, "serveConfigV2")
    checked(ServeDeploySchema, config, "serveConfigV2")
    checked(Deployed, config["applications"][0]["args"], "args")


@pytest.mark.parametrize("name", ["aws", "local"])
def test_launcher_files_hold_by_rays_schema(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    validate_config(prepare_config(deepcopy(config)))
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config({**config, "idle_timeout_minute": 3}))


# --- watching --------------------------------------------------------------------------------------------------------

BOARDS = sorted((CLUSTER / "grafana").glob("*.json"))
ALERTS = yaml.safe_load((CLUSTER / "prometheus/alerts.yaml").read_text())


@pytest.fixture
def promtool() -> str:
    return shutil.which("promtool") or pytest.skip("no promtool: apt install prometheus")


def test_alerts_and_panels_are_queries_that_prometheus_takes(promtool, tmp_path):
    subprocess.run([promtool, "check", "rules", CLUSTER / "prometheus/alerts.yaml"], check=True, capture_output=True)
    panels = [
        target["expr"]
        for path in BOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(panels)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run([promtool, "check", "rules", tmp_path / "panels.yaml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


SERIES = {
    "NodeLost": [('ray_node_cpu_count{instance="a"}', "2x60"), ('ray_node_cpu_count{instance="b"}', "2x20 _x40")],
    "NodeMemoryFull": [('ray_node_mem_used{instance="a"}', "95x60"), ('ray_node_mem_total{instance="a"}', "100x60")],
    "ObjectStoreFull": [('ray_object_store_used_memory{instance="a"}', "95x60"),
                        ('ray_object_store_available_memory{instance="a"}', "5x60")],
    "DiskFull": [('ray_node_disk_free{instance="a"}', "5000000000x60")],
    "WorkStalled": [('ray_owl_progress_done{work="curate"}', "3x60"), ('ray_owl_progress_expected{work="curate"}',
    "9x60")], "CurationDamaged": [('ray_owl_curate_samples_total{dataset="d",reason="image_corrupt"}', "0+1x60"),
                        ('ray_owl_curate_samples_total{dataset="d",reason="fit"}', "0+9x60")],
    "CurationDropsMost": [('ray_owl_curate_samples_total{dataset="d",reason="caption_short"}', "0+99x60"),
                          ('ray_owl_curate_samples_total{dataset="d",reason="fit"}', "0+1x60")],
    "TrainingStalled": [('ray_owl_train_step{run="r"}', "7x60")],
    "TrainingWaitsForData": [('ray_owl_train_wait{run="r"}', "0.4x60")],
    "TrainingDiverges": [('ray_owl_train_loss{run="r"}', "2x20 9x40")],
    "EndpointErrors": [('ray_owl_request_errors_total{status="503"}', "0+1x60"),
                       ("ray_owl_request_success_total", "0+9x60")],
    "EndpointSlow": [('ray_owl_time_to_first_token_seconds_bucket{le="5"}', "0+1x60"),
                     ('ray_owl_time_to_first_token_seconds_bucket{le="10"}', "0+9x60"),
                     ('ray_owl_time_to_first_token_seconds_bucket{le="+Inf"}', "0+9x60")],
    "EndpointRefuses": [('ray_owl_admission_rejections_total{reason="queue"}', "0+30x60")],
    "EnginesGoAway": [("ray_owl_request_retries_total", "0+1x60")],
    "EndpointEmpty": [("ray_owl_num_requests_waiting", "3x60"), ("ray_owl_num_requests_running", "0x60")],
}  # fmt: skip
"""For each alert, what is measured in an hour of minutes in which it must come."""
WELL = [
    ('ray_node_cpu_count{instance="a"}', "2x60"), ('ray_node_mem_used{instance="a"}', "50x60"),
    ('ray_node_mem_total{instance="a"}', "100x60"), ('ray_node_disk_free{instance="a"}', "50000000000x60"),
    ('ray_object_store_used_memory{instance="a"}', "5x60"), ('ray_object_store_available_memory{instance="a"}',
    "95x60"), ('ray_owl_progress_done{work="curate"}', "0+1x60"), ('ray_owl_progress_expected{work="curate"}',
    "99x60"), ('ray_owl_progress_done{work="done"}', "9x60"), ('ray_owl_progress_expected{work="done"}', "9x60"),
    ('ray_owl_curate_samples_total{dataset="d",reason="image_corrupt"}', "0+1x60"),
    ('ray_owl_curate_samples_total{dataset="d",reason="fit"}', "0+99x60"), ('ray_owl_train_step{run="r"}', "0+10x60"),
    ('ray_owl_train_wait{run="r"}', "0.01x60"), ('ray_owl_train_loss{run="r"}', "3-0.02x60"),
    ('ray_owl_request_errors_total{status="429"}', "0+1x60"), ("ray_owl_request_success_total", "0+99x60"),
    ("ray_owl_num_requests_waiting", "3x60"), ("ray_owl_num_requests_running", "8x60"),
    ("ray_owl_request_retries_total", "0x60"), ('ray_owl_time_to_first_token_seconds_bucket{le="5"}', "0+9x60"),
    ('ray_owl_time_to_first_token_seconds_bucket{le="+Inf"}', "0+9x60"), ('up{job="ray"}', "1x60"),
]  # fmt: skip


def test_every_alert_comes_when_it_should_and_none_when_all_is_well(promtool, tmp_path):
    """By Prometheus' own evaluation of the rules over made-up hours."""
    names = [rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]]
    assert sorted(names) == sorted(SERIES)
    queries = {
        "comes": 'count(ALERTS{alertname="%s",alertstate="firing"}) > bool 0',
        "none": 'count(ALERTS{alertstate="firing"})',
    }
    tests = [
        {"interval": "1m", "input_series": [{"series": s, "values": v} for s, v in SERIES[name]],
         "promql_expr_test": [{"expr": queries["comes"] % name, "eval_time": "50m" if name != "NodeLost" else "30m",
                               "exp_samples": [{"labels": "{}", "value": 1}]}]}
        for name in names
    ]  # fmt: skip
    calm = [{"series": s, "values": v} for s, v in WELL]
    tests.append(
        {
            "interval": "1m",
            "input_series": calm,
            "promql_expr_test": [{"expr": queries["none"], "eval_time": "50m", "exp_samples": []}],
        }
    )
    told = {"rule_files": [str(CLUSTER / "prometheus/alerts.yaml")], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(told))
    run = subprocess.run([promtool, "test", "rules", tmp_path / "tests.yaml"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_has_its_chapter_in_the_runbook():
    chapters = {title.lower() for title in re.findall(r"^## (\w+)$", (CLUSTER / "RUNBOOK.md").read_text(), re.M)}
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["runbook"] == f"cluster/RUNBOOK.md#{rule['alert'].lower()}"
            assert rule["alert"].lower() in chapters


def test_panels_ask_for_metrics_that_are_told():
    """Ours, by the names in the code; Ray's own are looked for on a running cluster (test_watching.py)."""
    from pipelines.progress import GAUGES as OF_PROGRESS
    from pipelines.serving.meters import METERS
    from pipelines.training.watch import GAUGES as OF_TRAINING

    told = {f"ray_owl_{name}" for name in METERS} | {f"ray_owl_train_{name}" for name in OF_TRAINING}
    told |= {f"ray_owl_progress_{name}" for name in OF_PROGRESS}
    told |= {f"ray_owl_curate_{name}_total" for name in ("samples", "later", "shards", "bytes")}
    text = "".join(path.read_text() for path in [*BOARDS, CLUSTER / "prometheus/alerts.yaml"])
    asked = {name.removesuffix("_bucket") for name in re.findall(r"ray_owl_\w+", text)} - {
        "ray_owl_",
        "ray_owl_curate_",
        "ray_owl_progress_",
        "ray_owl_train_",
    }
    assert asked <= told


DASHBOARD = """
import type {{ Dashboard, FieldConfig, Panel }} from "{types}/dashboard/x/types.gen";
import type {{ Options as Stat }} from "{types}/composable/stat/panelcfg/x/types.gen";
import type {{ FieldConfig as Drawn, Options as Series }} from "{types}/composable/timeseries/panelcfg/x/types.gen";

type Json<T> = T extends string ? `${{T}}` : T extends object ? {{ [K in keyof T]: Json<T[K]> }} : T;
type Some<T> = T extends object ? {{ [K in keyof T]?: Some<T[K]> }} : T;
type Fields<C> = {{ defaults: Omit<Json<FieldConfig>, "custom"> & {{ custom?: Some<Json<C>> }}; overrides: [] }};
type Query = {{ refId: string; expr: string; legendFormat?: string }};
type Kind =
  | {{ type: "stat"; options: Some<Json<Stat>>; fieldConfig: Fields<{{}}> }}
  | {{ type: "timeseries"; options: Some<Json<Series>>; fieldConfig: Fields<Drawn> }};
type Strict = Omit<Json<Panel>, "type" | "options" | "fieldConfig" | "targets"> & {{ targets: Query[] }} & Kind;
export const dashboard: Omit<Json<Dashboard>, "panels"> & {{ panels: Strict[] }} = {dashboard};
"""
"""A dashboard as a value of Grafana's own types. Its panels may leave options out, and enumerations are strings."""


@pytest.mark.slow
@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_of_grafanas_own_types(path, tmp_path):
    installed = CLUSTER.parent / ".clients/node/node_modules"
    if not (installed / "@grafana/schema").is_dir():
        pytest.skip("no @grafana/schema: make clients installs it")
    types = f"{installed}/@grafana/schema/dist/types/raw"
    (tmp_path / "dashboard.ts").write_text(DASHBOARD.format(types=types, dashboard=path.read_text()))
    options = shlex.split("--noEmit --strict --skipLibCheck --moduleResolution bundler --module esnext --target es2022")
    command = ["node", installed / "typescript/bin/tsc", *options, tmp_path / "dashboard.ts"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
