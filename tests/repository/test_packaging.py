"""The files for the image and RunPod, and that they agree with each other.

They are read, not run: `make image-smoke` builds the image and runs it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdbento.catalog.lookup import Catalog
from sdbento.doors.runpod.worker import input_of
from sdbento.environment import load_settings
from sdbento.jobs.formats.native import JobInput
from sdbento.settings import Settings

ROOT = Path(__file__).parents[2]
RUNPOD = ROOT / ".runpod"
SBOM = "sbom.cdx.json"  # which scripts/image writes
USER = 1034  # BentoML's, in every image that it makes
DEFAULTS = {variable: default for variable, default, _ in Settings.variables()}
RUNPODS_OWN = {"RUNPOD_INIT_TIMEOUT"}
SHARE = 0.85  # of a GPU's memory is for models, unless SDBENTO_MEMORY_GB is set


def load(path: str) -> Any:
    text = (ROOT / path).read_text(encoding="utf-8")
    return json.loads(text) if path.endswith(".json") else yaml.safe_load(text)


def pins(path: str) -> dict[str, str]:
    """Versions by name; every line must be a pin, and every pin must have a hash."""
    text = (ROOT / path).read_text().replace(" \\\n", "")
    found = {}
    for line in text.splitlines():
        if line[0] not in "#-":
            pin, *hashes = line.split()
            assert hashes and all(len(one) == len("--hash=sha256:") + 64 for one in hashes), pin
            name, _, found[name] = pin.partition("==")
    return found


# BentoCloud


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of importing BentoML
def test_the_deployment_for_bentocloud_has_only_fields_that_bentoml_reads() -> None:
    from bentoml._internal.cloud.schemas import modelschemas, schemasv2

    def fields(schema: Any) -> set[str]:
        return {field.name for field in schema.__attrs_attrs__}

    deployment = load("configs/bentocloud.yaml")
    assert deployment.keys() <= fields(schemasv2.CreateDeploymentSchema)
    assert deployment["services"].keys() == {load("bentofile.yaml")["name"]}
    [service] = deployment["services"].values()
    assert service.keys() <= fields(modelschemas.DeploymentServiceConfig)
    assert service["scaling"].keys() <= fields(modelschemas.DeploymentTargetHPAConf)
    assert {env["name"] for env in deployment["envs"]} <= DEFAULTS.keys()


# The entrypoint


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder for PATH in which `python` and `nvidia-smi` only print how they were called."""
    for name in ("python", "nvidia-smi"):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho "{name} $*"\n')
        stub.chmod(0o755)
    return tmp_path


QUEUE = {"RUNPOD_WEBHOOK_GET_JOB": "https://api.runpod.ai/v2/ep/job-take/$ID?gpu=x"}
SERVE = "python -m sdbento serve --host 0.0.0.0 --port 3000"
WORK = "python -m sdbento worker"


@pytest.mark.parametrize(
    ("args", "variables", "command"),
    [
        ("", {}, SERVE),
        ("", {"PORT": "80"}, SERVE.replace("3000", "80")),
        ("", {"BENTOML_PORT": "81", "BENTOML_HOST": "::"}, f"{SERVE[:-19]}:: --port 81"),
        ("--model shapes", {}, f"{SERVE} --model shapes"),
        ("serve", {}, SERVE),
        ("serve --port 4000", {}, f"{SERVE} --port 4000"),
        ("", QUEUE, WORK),
        ("", QUEUE | {"PORT": "80", "PORT_HEALTH": "80"}, SERVE.replace("3000", "80")),
        ("serve", QUEUE, SERVE),
        ("worker", {}, WORK),
        ("runpod", {}, WORK),
        ("sdbento pull sdxl", QUEUE, "python -m sdbento pull sdxl"),
        ("nvidia-smi -L", QUEUE, "nvidia-smi -L"),
    ],
)
def test_the_entrypoint_starts(
    commands: Path, args: str, variables: dict[str, str], command: str
) -> None:
    done = subprocess.run(
        [ROOT / "scripts/entrypoint", *args.split()],
        env={"PATH": f"{commands}:/usr/bin:/bin"} | variables,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == command


def test_the_code_can_be_imported_from_wherever_a_command_runs(tmp_path: Path) -> None:
    program = "import os; print(os.environ['PYTHONPATH'])"
    command = [str(ROOT / "scripts/entrypoint"), "python3", "-c", program]
    printed = subprocess.check_output(command, cwd=tmp_path, text=True)
    assert printed.split(":")[0].strip() == str(ROOT)


# The image


def test_the_build_file_includes_what_there_is_and_what_the_image_needs() -> None:
    build = load("bentofile.yaml")
    paths = [name.strip("/").removesuffix("/**") for name in build["include"]]
    assert {path for path in paths if not (ROOT / path).exists()} <= {SBOM}
    template = ROOT / build["docker"]["dockerfile_template"]
    [entrypoint] = re.findall(r'ENTRYPOINT \["{{ bento__path }}/src/(.*)"\]', template.read_text())
    assert entrypoint in paths and os.access(ROOT / entrypoint, os.X_OK)
    assert build["python"]["requirements_txt"] in paths


def test_the_image_installs_what_is_locked_and_cuda_builds() -> None:
    text = (ROOT / "requirements-gpu.lock").read_text()
    assert "\n-r requirements.lock\n-r requirements-cuda.lock\n" in text
    extra = pins("requirements-gpu.lock") | pins("requirements-cuda.lock")
    assert not extra.keys() & (pins("requirements.lock") | pins("requirements-dev.lock")).keys()
    assert {"xformers", "triton", "nvidia-cudnn-cu13"} <= extra.keys()


def test_the_hubs_dockerfile_makes_the_same_image() -> None:
    dockerfile = (RUNPOD / "Dockerfile").read_text()
    template = (ROOT / "scripts/Dockerfile.j2").read_text()
    [installs_uv] = re.findall(r"uv==.*", template)
    assert installs_uv in dockerfile and "--require-hashes" in dockerfile
    assert f"FROM {load('bentofile.yaml')['docker']['base_image']}\n" in dockerfile
    assert f"-u {USER} " in dockerfile and "\nUSER bentoml\n" in dockerfile
    copied = re.findall(r"^COPY (?:--chown=\S+ )?(.*) \S+$", dockerfile, re.MULTILINE)
    sources = " ".join(copied).split()
    assert [name for name in sources if not (ROOT / name).exists()] == []
    included = {name.strip("/").removesuffix("/**") for name in load("bentofile.yaml")["include"]}
    assert included - {SBOM} == set(sources) - {".runpod/handler.py"}


@pytest.mark.parametrize("name", ["image", "image-smoke", "entrypoint"])
def test_scripts_are_executable_and_parse(name: str) -> None:
    path = ROOT / "scripts" / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("builders", [[], ["docker"]], ids=["none", "a client with no engine"])
def test_a_missing_image_builder_is_reported(tmp_path: Path, builders: list[str]) -> None:
    for name in builders:
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    for tool in ("bash", "dirname", "sed"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = subprocess.run(
        [ROOT / "scripts/image"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("image: no builder here: install docker")


# Every place that names settings


@pytest.mark.parametrize(
    "path",
    [
        *(str(path.relative_to(ROOT)) for path in sorted(RUNPOD.iterdir())),
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs").glob("*/*.yaml"))),
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "scripts").iterdir())),
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "charts").rglob("*.*"))),
        "docs/deploy.md",
        "docs/kubernetes.md",
    ],
)
def test_every_setting_that_is_named_exists(path: str) -> None:
    if (ROOT / path).is_dir():
        pytest.skip("a folder")
    named = set(re.findall(r"\bSDBENTO_[A-Z_]*[A-Z]\b", (ROOT / path).read_text()))
    assert named <= DEFAULTS.keys()


def variables_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that these variables give; each must be known and valid."""
    assert environment.keys() <= DEFAULTS.keys()
    for variable, value in environment.items():
        assert isinstance(value, str), f"{variable} must be a string"
        monkeypatch.setenv(variable, value)
    return load_settings()


# RunPod


def test_the_hubs_variables_are_settings_with_their_defaults() -> None:
    for item in load(".runpod/hub.json")["config"]["env"]:
        default = item["input"]["default"]
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        default = DEFAULTS[item["key"]]
        if item["input"]["type"] == "boolean" and default == "unset":
            default = "false"  # what the worker takes it for; the form has no third state
        assert (shown or "unset") == default, item["key"]
        assert item["input"]["type"] in ("string", "number", "boolean", "huggingface")
        assert item["input"]["name"] and item["input"]["description"]


def test_the_hubs_bounds_are_those_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for item in load(".runpod/hub.json")["config"]["env"]:
        given = item["input"]
        allowed = [option["value"] for option in given.get("options", [])]
        if given["type"] == "number":
            allowed += [given["min"], given["max"]]
        if given["type"] == "boolean":
            allowed += [given["trueValue"], given["falseValue"]]
        for value in allowed:
            variables_of({item["key"]: str(value)}, monkeypatch)


def test_the_hubs_page_has_what_runpod_demands() -> None:
    hub = load(".runpod/hub.json")
    config = hub["config"]
    assert hub["title"] and hub["description"]
    assert (hub["type"], hub["category"], config["runsOn"]) == ("serverless", "image", "GPU")
    assert config["gpuCount"] == 1  # one engine, one GPU
    assert isinstance(config["containerDiskInGb"], int)
    for name in ("handler.py", "Dockerfile", "README.md"):
        assert (RUNPOD / name).exists() or (ROOT / name).exists()


def test_every_gpu_of_the_hub_holds_every_model_that_it_offers() -> None:
    config = load(".runpod/hub.json")["config"]
    sizes = load("configs/runpod/template.yaml")["pools"]
    smallest = min(sizes[pool] for pool in config["gpuIds"].split(","))
    keys = {item["key"] for item in config["env"]}
    catalog = Catalog(load_settings())
    for preset in config["presets"]:
        assert preset["defaults"].keys() <= keys
        model = preset["defaults"]["SD_MODEL"]
        spec = catalog.known(model)
        assert spec is not None and model == spec.sources[0]  # RunPod's page asks the Hub for it
        assert spec.memory_gb <= SHARE * smallest


@pytest.mark.parametrize("test", load(".runpod/tests.json")["tests"], ids=lambda test: test["name"])
def test_the_hubs_tests_are_jobs_that_the_worker_accepts(test: dict[str, Any]) -> None:
    assert isinstance(test["timeout"], int)
    given = input_of({"input": test["input"]})
    assert isinstance(given, JobInput)
    assert given.request.prompt == test["input"]["prompt"]


def test_the_hubs_tests_need_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    config, hub = load(".runpod/tests.json")["config"], load(".runpod/hub.json")
    variables = {item["key"]: item["value"] for item in config["env"]}
    assert variables_of(variables, monkeypatch).sd_model == "shapes"
    assert config["allowedCudaVersions"] == hub["config"]["allowedCudaVersions"]


@pytest.mark.parametrize("kind", ["queue", "load_balancer"])
def test_the_templates_variables_are_good(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = load("configs/runpod/template.yaml")[kind]
    variables = {k: v for k, v in template["env"].items() if k not in RUNPODS_OWN}
    settings = variables_of(variables, monkeypatch)
    for name in ("SD_MODEL", "PRECISION", "ENABLE_XFORMERS", "MAX_QUEUE_SIZE", "MAX_BATCH_SIZE"):
        assert template["env"][name] == DEFAULTS[name]
    if kind == "queue":
        jobs = settings.max_batch_size + settings.runpod_prefetch
        assert template["start_command"] == "worker" and template["scaler"]["value"] == jobs
    else:
        assert template["start_command"] == "serve"
        assert template["expose_http_ports"] == [settings.port] == [settings.port_health]
        assert settings.request_timeout < 330 and settings.max_body_bytes <= 30_000_000


def test_the_choice_of_gpu_follows_the_catalogue() -> None:
    template = load("configs/runpod/template.yaml")
    catalog = Catalog(load_settings())
    for name, choice in template["gpus"].items():
        spec = catalog.known(name)
        assert spec is not None and spec.name == name
        assert choice["memory_gb"] == spec.memory_gb
        mirror = "" if spec.sources[0] == name else f"`{spec.sources[0]}` "
        assert (
            f"| `{name}` | {mirror}| {spec.memory_gb:g} GB |"
            in (ROOT / "docs/deploy.md").read_text()
        )
        assert all(spec.memory_gb <= SHARE * template["pools"][pool] for pool in choice["pools"])
    drawing = {spec.name for spec in catalog.list() if not spec.inpaints and not spec.refines}
    assert drawing - {"shapes", "emoji"} == set(template["gpus"])
