"""The Helm chart, rendered by helm, and the manifests that are written from it.

No cluster runs them. Without helm, only what is in configs/kubernetes is tested:
`make .venv/bin/helm` fetches it.
"""

from __future__ import annotations

import base64
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import sqlalchemy
import yaml

import sdbento
from sdbento.catalog.lookup import Catalog
from sdbento.environment import load_settings
from sdbento.jobs.store.database import connect, make_tables
from sdbento.jobs.table import jobs, metadata
from sdbento.metrics import definitions
from sdbento.metrics.instruments import Gauge
from sdbento.settings import Settings
from tests.support.postgres import is_installed, postgres
from tests.support.prometheus import promtool
from tools import chart

VERSIONS = ["1.30.0", "1.37.0"]  # of Kubernetes: the chart's oldest, and the newest with schemas
USER = 1034  # BentoML's, in every image that it makes
SETTINGS = {variable: default for variable, default, _ in Settings.variables()}
OTHERS = {"HF_HOME", "HOME", "BENTOML_HOME"}  # variables of other programs
GAUGES = {one.name for one in vars(definitions).values() if isinstance(one, Gauge)}
CUSTOM = {"ScaledObject", "TriggerAuthentication", "PodMonitor"}  # kinds that are not Kubernetes'

needs_helm = pytest.mark.skipif(
    chart.program("helm") is None and "REQUIRE_HELM" not in os.environ, reason="helm is missing"
)

EVERYTHING: dict[str, Any] = {
    "image": {"pullSecrets": ["registry"]},
    "secrets": ["fleet"],
    "keys": {"usersSecret": "users"},
    "runtimeClassName": "nvidia",
    "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4"},
    "affinity": {"podAntiAffinity": {}},
    "modelCache": {"accessMode": "ReadWriteMany", "storageClass": "nfs"},
    "volumes": [{"name": "loras", "configMap": {"name": "loras"}}],
    "volumeMounts": [{"name": "loras", "mountPath": "/home/bentoml/bento/loras"}],
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "host": "sd.example.com",
        "tlsSecret": "tls",
        "annotations": {"a": "b"},
    },
    "networkPolicy": {"egress": [{"to": [{"podSelector": {"matchLabels": {"app": "db"}}}]}]},
    "autoscaling": {"trigger": "postgresql", "minReplicas": 0, "postgresqlSecret": "fleet"},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "serviceAccountName": "sdbento",
    "podAnnotations": {"a": "b"},
}

DOCUMENT = (chart.ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")

Manifests = dict[str, Any]  # by kind


def by_kind(text: str) -> Manifests:
    return {one["kind"]: one for one in yaml.safe_load_all(text) if one}


def rendered(values: dict[str, Any], release: str = "sdbento") -> Manifests:
    """What the chart makes of `values`. Raises CalledProcessError where helm refuses them."""
    command = [chart.program("helm") or "helm", "template", release, str(chart.CHART)]
    done = subprocess.run(
        [*command, "--namespace", "images", "--values", "-"],
        input=yaml.safe_dump(values),
        check=True,
        capture_output=True,
        text=True,
    )
    return by_kind(done.stdout)


@pytest.fixture(scope="module")
def written() -> Manifests:
    """The manifests of configs/kubernetes."""
    texts = [(chart.MANIFESTS / name).read_text(encoding="utf-8") for name in chart.RENDERED]
    return by_kind("\n---\n".join(texts))


@pytest.fixture(scope="module")
def everything() -> Manifests:
    """What the chart makes where everything is turned on."""
    return rendered(EVERYTHING, "mine")


def pod_of(manifests: Manifests) -> Any:
    return manifests["Deployment"]["spec"]["template"]["spec"]


def container_of(manifests: Manifests) -> Any:
    [container] = pod_of(manifests)["containers"]
    return container


def validate(manifests: Manifests, version: str) -> None:
    for kind in manifests.keys() - CUSTOM:
        kubernetes_validate.validate(manifests[kind], version, strict=True)


# The manifests for those who do not use helm


@needs_helm
@pytest.mark.parametrize("name", chart.RENDERED)
def test_the_manifests_are_what_make_chart_writes(name: str) -> None:
    assert (chart.MANIFESTS / name).read_text(encoding="utf-8") == chart.render(name)


@needs_helm
def test_kustomize_puts_them_together() -> None:
    made = by_kind(chart.run("kubectl", "kustomize", str(chart.MANIFESTS)))
    assert made["Deployment"]["metadata"]["namespace"] == made["Namespace"]["metadata"]["name"]
    assert container_of(made)["image"] == f"registry.example.com/sdbento:{sdbento.__version__}"


def test_no_key_is_in_the_repository(written: Manifests) -> None:
    assert "Secret" not in written


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_valid(written: Manifests, version: str) -> None:
    validate(written, version)


def test_the_settings_are_good(written: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = written["ConfigMap"]["data"]
    assert variables.keys() <= SETTINGS.keys() | OTHERS
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.request_timeout <= settings.shutdown_timeout
    spec = Catalog(settings).known(settings.sd_model)
    claim = written["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]
    assert spec is not None and spec.memory_gb < int(claim.removesuffix("Gi"))


def test_a_pod_is_probed_where_the_server_answers(written: Manifests) -> None:
    container = container_of(written)
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness")}
    assert {probe["path"] for probe in probes.values()} == {"/livez"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    [port] = container["ports"]
    assert {"name": "PORT", "value": str(port["containerPort"])} in container["env"]
    assert written["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert written["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]
    assert written["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == port["name"]
    assert container["args"] == ["serve"]  # not `command`: the entrypoint is the image's


def test_a_pod_has_one_gpu(written: Manifests) -> None:
    for part in ("requests", "limits"):
        assert container_of(written)["resources"][part]["nvidia.com/gpu"] == "1"


def test_a_pod_runs_without_privileges(written: Manifests) -> None:
    context = pod_of(written)["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == USER
    own = container_of(written)["securityContext"]
    assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}


def selectors(manifests: Manifests) -> Iterator[Any]:
    yield manifests["Service"]["spec"]["selector"]
    yield manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        yield manifests[kind]["spec"]["selector"]["matchLabels"]


def test_everything_is_about_the_same_pods(written: Manifests) -> None:
    labels = written["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert all(selector == labels for selector in selectors(written))


def test_the_alerts_know_the_pods(written: Manifests) -> None:
    """Alerts and dashboard select by job="sdbento"; a PodMonitor takes it from a pod's label."""
    labels = written["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels[written["PodMonitor"]["spec"]["jobLabel"]] == "sdbento"


def test_metrics_that_scale_the_pods_exist(written: Manifests) -> None:
    for trigger in written["ScaledObject"]["spec"]["triggers"]:
        metric, _, pods = trigger["metadata"]["query"].removeprefix("sum(").partition("{")
        assert metric in GAUGES
        assert pods.startswith('namespace="sdbento"')
    assert "replicas" not in written["Deployment"]["spec"]  # they are the autoscaler's


# The chart with other values


@needs_helm
def test_helm_finds_no_fault() -> None:
    chart.run("helm", "lint", "--strict", str(chart.CHART))


def test_the_chart_has_the_version_of_the_program() -> None:
    told = yaml.safe_load((chart.CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert told["version"] == told["appVersion"] == sdbento.__version__
    assert VERSIONS[0] in told["kubeVersion"]


@needs_helm
@pytest.mark.parametrize("version", VERSIONS)
def test_everything_turned_on_is_valid(everything: Manifests, version: str) -> None:
    assert everything.keys() > CUSTOM | {"Ingress", "Secret"}
    validate(everything, version)


@needs_helm
def test_what_kubernetes_does_not_know_is_noticed(everything: Manifests) -> None:
    service = everything["Service"]
    with pytest.raises(kubernetes_validate.ValidationError):
        validate({"Service": service | {"spec": service["spec"] | {"prot": 80}}}, VERSIONS[0])


@needs_helm
@pytest.mark.long
@pytest.mark.timeout(300)  # their import takes long
def test_kinds_that_are_not_kubernetes_own_are_valid(everything: Manifests) -> None:
    """A model leaves out what it does not know, so what comes back is no longer the same."""
    from cloudcoil.models.keda import v1alpha1 as keda
    from cloudcoil.models.prometheus_operator import v1 as operator

    models = (keda.ScaledObject, keda.TriggerAuthentication, operator.PodMonitor)
    by_kind = {model.__name__: model for model in models}
    assert by_kind.keys() == CUSTOM
    for kind, model in by_kind.items():
        given = everything[kind]
        read = model.model_validate(given)
        assert read.model_dump(mode="json", by_alias=True, exclude_unset=True) == given


@needs_helm
def test_two_releases_do_not_meet(everything: Manifests) -> None:
    names = {one["metadata"]["name"] for one in everything.values()}
    assert all(name.startswith("mine-sdbento") for name in names)
    labels = everything["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == "mine"
    assert all(selector == labels for selector in selectors(everything))
    assert everything["ScaledObject"]["spec"]["scaleTargetRef"]["name"] in names


def key(manifests: Manifests) -> str:
    return base64.b64decode(manifests["Secret"]["data"]["SDBENTO_API_KEY"]).decode()


def variable(manifests: Manifests, name: str) -> Any:
    return next((one for one in container_of(manifests)["env"] if one["name"] == name), None)


@needs_helm
def test_a_first_install_makes_a_key() -> None:
    manifests = rendered({"podMonitor": {"enabled": True}})
    secret = {"name": manifests["Secret"]["metadata"]["name"], "key": "SDBENTO_API_KEY"}
    assert len(key(manifests)) >= 32 and key(manifests) != key(rendered({}))
    assert variable(manifests, "SDBENTO_API_KEY")["valueFrom"]["secretKeyRef"] == secret
    [endpoint] = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == secret


@needs_helm
def test_a_key_can_be_yours_and_can_be_left_out() -> None:
    yours = rendered({"keys": {"existingSecret": "mine", "usersSecret": "users"}})
    assert "Secret" not in yours
    given = variable(yours, "SDBENTO_API_KEY")
    assert given["valueFrom"]["secretKeyRef"]["name"] == "mine"
    folder, _, _ = variable(yours, "SDBENTO_API_KEYS")["value"].rpartition("/")
    assert folder in {mount["mountPath"] for mount in container_of(yours)["volumeMounts"]}
    without = rendered({"keys": {"required": False}})
    assert "Secret" not in without and variable(without, "SDBENTO_API_KEY") is None


@needs_helm
@pytest.mark.parametrize("seconds", [250, 3600])
def test_a_pod_has_the_time_to_finish_its_work(seconds: int) -> None:
    """The pause before SIGTERM, the requests under way, and the 8 s in which the server ends."""
    manifests = rendered({"settings": {"SDBENTO_SHUTDOWN_TIMEOUT": seconds}})
    [_, pause] = container_of(manifests)["lifecycle"]["preStop"]["exec"]["command"]
    assert pod_of(manifests)["terminationGracePeriodSeconds"] > int(pause) + seconds + 8


@needs_helm
def test_settings_become_what_the_server_reads() -> None:
    given = {"SDBENTO_MAX_BODY_BYTES": 33_554_432, "SDBENTO_MEMORY_GB": 10.5, "SD_MODEL": "<&>"}
    data = rendered({"settings": given})["ConfigMap"]["data"]
    assert {name: data[name] for name in given} == {
        "SDBENTO_MAX_BODY_BYTES": "33554432",
        "SDBENTO_MEMORY_GB": "10.5",
        "SD_MODEL": "<&>",
    }
    assert data["SDBENTO_ALLOW_LORA_HUB"] == "false"
    moved = rendered({"settings": {"SDBENTO_STATE_DIR": "/data"}})["ConfigMap"]["data"]
    assert moved["SDBENTO_STATE_DIR"] == "/data"


@needs_helm
def test_a_change_of_the_settings_starts_new_pods() -> None:
    def template(steps: int) -> Any:
        return rendered({"settings": {"MAX_BATCH_SIZE": steps}})["Deployment"]["spec"]["template"]

    assert template(4) == template(4) != template(8)


@needs_helm
def test_without_a_gpu_the_pod_asks_for_none() -> None:
    manifests = rendered({"gpu": {"count": 0}})
    assert "nvidia.com/gpu" not in container_of(manifests)["resources"]["limits"]
    assert manifests["ConfigMap"]["data"]["SDBENTO_DEVICE"] == "cpu"


@needs_helm
def test_a_pod_uses_all_of_its_gpus() -> None:
    manifests = rendered({"gpu": {"count": 4}})
    assert container_of(manifests)["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert manifests["ConfigMap"]["data"]["SDBENTO_GPUS"] == "all"
    assert "SDBENTO_GPUS" not in rendered({})["ConfigMap"]["data"]


@needs_helm
def test_nobody_may_connect_where_no_sender_is_named() -> None:
    policy = rendered({"networkPolicy": {"from": []}})["NetworkPolicy"]["spec"]
    assert "Ingress" in policy["policyTypes"] and "ingress" not in policy


@needs_helm
def test_pods_are_counted_by_the_operator_or_by_keda(everything: Manifests) -> None:
    assert rendered({"replicas": 3})["Deployment"]["spec"]["replicas"] == 3
    assert "replicas" not in everything["Deployment"]["spec"]


@pytest.mark.long
def test_prometheus_adds_up_the_pods_of_this_release(written: Manifests, tmp_path: Path) -> None:
    series = {
        "sdbento/sdbento-7d9f8b6c5d-abcde": 3,
        "sdbento/sdbento-7d9f8b6c5d-fghij": 4,
        "sdbento/sdbento-large-7d9f8b6c5d-abcde": 20,
        "other/sdbento-7d9f8b6c5d-abcde": 20,
    }
    for trigger in written["ScaledObject"]["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        metric = query.removeprefix("sum(").partition("{")[0]
        given = [
            {"series": f'{metric}{{namespace="{where}", pod="{pod}"}}', "values": str(value)}
            for (where, pod), value in ((name.split("/"), value) for name, value in series.items())
        ]
        expected = {"expr": query, "exp_samples": [{"labels": "{}", "value": 7}]}
        path = tmp_path / f"{metric}.yaml"
        path.write_text(
            yaml.safe_dump({"tests": [{"input_series": given, "promql_expr_test": [expected]}]})
        )
        promtool("test", "rules", str(path), cwd=tmp_path)


@needs_helm
@pytest.mark.long
@pytest.mark.skipif(not is_installed(), reason="PostgreSQL is not installed")
def test_keda_counts_the_unfinished_jobs(everything: Manifests, tmp_path: Path) -> None:
    [trigger] = everything["ScaledObject"]["spec"]["triggers"]
    statuses = ["IN_QUEUE", "IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED"]
    with postgres() as server:
        database = connect(f"{server}/postgres", tmp_path)
        make_tables(database, metadata)
        columns = [one for one in jobs.columns if not one.nullable and not one.primary_key]
        filled = {one.key: 0 if one.type.python_type is int else "" for one in columns}
        with database.begin() as connection:
            rows = [filled | {"id": str(n), "status": one} for n, one in enumerate(statuses)]
            connection.execute(jobs.insert(), rows)
            counted = connection.scalar(sqlalchemy.text(trigger["metadata"]["query"]))
        database.dispose()
    assert counted == 3


@needs_helm
@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"gpus": 2}, "'gpus' not allowed"),
        ({"settings": {"sd_model": "shapes"}}, "sd_model"),
        ({"ingress": {"enabled": True}}, "/ingress/host"),
        ({"autoscaling": {"trigger": "cpu"}}, "/autoscaling/trigger"),
        ({"autoscaling": {"trigger": "prometheus", "minReplicas": 0}}, "at least 1"),
        ({"autoscaling": {"trigger": "postgresql"}}, "must name the Secret"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        rendered(values)
    assert complaint in refused.value.stderr


@needs_helm
@pytest.mark.parametrize(
    "values", re.findall(r"^```yaml\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
)
def test_values_that_the_document_shows_are_good(values: str) -> None:
    validate(rendered(yaml.safe_load(values)), VERSIONS[0])


@needs_helm
@pytest.mark.parametrize(
    "command", re.findall(r"^helm (install (?:.*\\\n)*.*)", DOCUMENT, re.MULTILINE)
)
def test_commands_that_the_document_shows_are_understood(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chart.ROOT)
    chart.run("helm", *shlex.split(command.replace("\\\n", "")), "--dry-run=client")


@needs_helm
def test_the_notes_say_how_to_go_on() -> None:
    command = ["install", "mine", str(chart.CHART), "--dry-run=client", "-n", "images"]
    notes = chart.run("helm", *command).partition("NOTES:")[2]
    assert "kubectl -n images get secret mine-sdbento-keys" in notes
    assert "port-forward service/mine-sdbento 3000:80" in notes
    chosen = ("replicas=2,keys.required=false", "secrets={db}")
    told = [chart.run("helm", *command, "--set", one).partition("NOTES:")[2] for one in chosen]
    for word in ("ReadWriteMany", "/run", "No key is needed"):
        assert word in told[0] and word not in notes
    assert "networkPolicy.egress" in told[1] and "networkPolicy.egress" not in notes
