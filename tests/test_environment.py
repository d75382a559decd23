"""Sources of settings, their precedence, and the messages for wrong values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from sdbento.environment import child_environment, load_settings, unknown_variables
from sdbento.settings import Settings, SettingsError

Configure = Callable[[str], Path]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Write a config file and name it in SDBENTO_CONFIG."""

    def write(text: str) -> Path:
        path = tmp_path / "sdbento.yaml"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setenv("SDBENTO_CONFIG", str(path))
        return path

    return write


def complaint(**overrides: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(**overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# A value for each variable that is not its default, and what it reads as.
GIVEN = {
    "SD_MODEL": ("shapes", "shapes"),
    "PRECISION": ("bf16", "bf16"),
    "ENABLE_XFORMERS": ("false", False),
    "SDBENTO_CUDA_GRAPHS": ("false", False),
    "SDBENTO_COMPILE": ("true", True),
    "SDBENTO_COMPILE_DIR": ("/compiled", Path("/compiled")),
    "MAX_QUEUE_SIZE": ("7", 7),
    "MAX_BATCH_SIZE": ("16", 16),
    "SDBENTO_DEVICE": ("cpu", "cpu"),
    "SDBENTO_GPUS": ("0,2", "0,2"),
    "SDBENTO_OTLP_ENDPOINT": ("http://collector:4318/v1/traces",) * 2,
    "SDBENTO_TRACE_RATE": ("0.25", 0.25),
    "SDBENTO_LOG_FORMAT": ("json", "json"),
    "SDBENTO_LOG_PROMPTS": ("true", True),
    "SDBENTO_MEMORY_GB": ("2.5", 2.5),
    "SDBENTO_MODELS_DIR": ("/models", Path("/models")),
    "SDBENTO_ALLOW_ANY_MODEL": ("0", False),
    "SDBENTO_HUB_OWNERS": ("acme, org/repo ,", "acme,org/repo"),
    "SDBENTO_OFFLINE": ("true", True),
    "SDBENTO_PREFER_CACHE": ("true", True),
    "SDBENTO_MAX_PIXELS": ("65536", 65536),
    "SDBENTO_MAX_BODY_BYTES": ("2048", 2048),
    "SDBENTO_REQUEST_TIMEOUT": ("1.5", 1.5),
    "SDBENTO_STALL_SECONDS": ("90", 90.0),
    "SDBENTO_SHUTDOWN_TIMEOUT": ("280", 280.0),
    "SDBENTO_MAX_TIMEOUT": ("900", 900.0),
    "SDBENTO_NUM_THREADS": ("2", 2),
    "SDBENTO_PUBLIC_URL": ("https://images.example/sd", "https://images.example/sd"),
    "SDBENTO_URL_SECONDS": ("60", 60),
    "SDBENTO_URL_BYTES": ("4096", 4096),
    "SDBENTO_LOG_LEVEL": ("DEBUG", "DEBUG"),
    "SDBENTO_LORA_DIR": ("/loras", Path("/loras")),
    "SDBENTO_MAX_LORAS": ("5", 5),
    "SDBENTO_ALLOW_LORA_HUB": ("false", False),
    "SDBENTO_ALLOW_LORA_URLS": ("true", True),
    "SDBENTO_EMBEDDINGS_DIR": ("/words", Path("/words")),
    "SDBENTO_ALLOW_PRIVATE_URLS": ("true", True),
    "SDBENTO_FETCH_TIMEOUT": ("2.5", 2.5),
    "SDBENTO_MAX_IMAGE_BYTES": ("4096", 4096),
    "SDBENTO_WEBHOOK_SECRET": ("whsec_" + "QUJD" * 8, SecretStr("whsec_" + "QUJD" * 8)),
    "SDBENTO_UPLOAD": ("always", "always"),
    "BUCKET_ENDPOINT_URL": ("https://s3.example", "https://s3.example"),
    "BUCKET_ACCESS_KEY_ID": ("key", SecretStr("key")),
    "BUCKET_SECRET_ACCESS_KEY": ("secret", SecretStr("secret")),
    "BUCKET_NAME": ("pictures", "pictures"),
    "SDBENTO_BUCKET_URL_SECONDS": ("60", 60),
    "SDBENTO_RUNPOD_MAX_RUN_BYTES": ("2048", 2048),
    "SDBENTO_RUNPOD_MAX_RUNSYNC_BYTES": ("2048", 2048),
    "SDBENTO_RUNPOD_PREFETCH": ("0", 0),
    "SDBENTO_RUNPOD_DRAIN_SECONDS": ("1.5", 1.5),
    "SDBENTO_RUNPOD_VOLUME": ("/volume", Path("/volume")),
    "PORT": ("8080", 8080),
    "PORT_HEALTH": ("8081", 8081),
    "SDBENTO_API_KEY": ("sesame", SecretStr("sesame")),
    "SDBENTO_API_KEYS": ("/keys.yaml", Path("/keys.yaml")),
    "SDBENTO_TRUSTED_PROXIES": ("10.0.0.7, fd00::/8", "10.0.0.7/32,fd00::/8"),
    "SDBENTO_METRICS_PUBLIC": ("true", True),
    "SDBENTO_ALLOWED_HOSTS": ("SD.example.com., *.b.example", "sd.example.com,*.b.example"),
    "SDBENTO_CORS_ORIGINS": ("https://a.example,https://b.example",) * 2,
    "SDBENTO_STATE_DIR": ("/state", Path("/state")),
    "SDBENTO_JOB_RESULTS": ("bucket", "bucket"),
    "SDBENTO_JOB_RESULTS_DIR": ("/shared", Path("/shared")),
    "JOB_STORE_URL": ("sqlite:////jobs.db", SecretStr("sqlite:////jobs.db")),
    "SDBENTO_JOB_RESULT_SECONDS": ("60", 60),
    "SDBENTO_MAX_JOBS": ("5", 5),
}


def field_of(variable: str) -> str:
    return variable.removeprefix("SDBENTO_").lower()


def test_without_any_source_there_are_only_defaults() -> None:
    settings = load_settings()
    assert settings.changed() == []
    assert not settings.model_fields_set


def test_every_variable_is_tried_below() -> None:
    assert {variable for variable, *_ in Settings.variables()} == GIVEN.keys()


@pytest.mark.parametrize("variable", GIVEN)
def test_each_variable_is_read(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = GIVEN[variable]
    monkeypatch.setenv(variable, text)
    settings = load_settings()
    assert getattr(settings, field_of(variable)) == value
    assert settings.model_fields_set == {field_of(variable)}
    assert [name for name, *_ in settings.changed()] == [variable]


@pytest.mark.parametrize("variable", GIVEN)
def test_each_setting_can_stand_in_the_config_file_under_either_name(
    variable: str, configure: Configure
) -> None:
    text, value = GIVEN[variable]
    for name in (variable, field_of(variable)):
        configure(f"{name}: {text}\n")
        assert getattr(load_settings(), field_of(variable)) == value


def test_explicit_wins_over_environment_over_file_over_default(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings().max_batch_size == 4
    configure("max_batch_size: 5\n")
    assert load_settings().max_batch_size == 5
    monkeypatch.setenv("MAX_BATCH_SIZE", "6")
    assert load_settings().max_batch_size == 6
    assert load_settings(max_batch_size=7).max_batch_size == 7
    assert load_settings(max_batch_size=None).max_batch_size == 6


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("PRECISION", "fp4", "'fp16', 'bf16', 'fp32' or 'fp8'"),
        ("ENABLE_XFORMERS", "maybe", "a valid boolean"),
        ("MAX_QUEUE_SIZE", "0", "greater than or equal to 1"),
        ("MAX_QUEUE_SIZE", "100001", "less than or equal to 100000"),
        ("MAX_BATCH_SIZE", "0", "greater than or equal to 1"),
        ("MAX_BATCH_SIZE", "257", "less than or equal to 256"),
        ("MAX_BATCH_SIZE", "four", "a valid integer"),
        ("SDBENTO_API_KEYS", "", "must not be empty; name a file of keys, or unset it"),
        ("SDBENTO_DEVICE", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("SDBENTO_MEMORY_GB", "0", "greater than 0"),
        ("SDBENTO_MEMORY_GB", "nan", "a finite number"),
        ("SDBENTO_MAX_PIXELS", "4095", "greater than or equal to 4096"),
        ("SDBENTO_MAX_BODY_BYTES", "1", "greater than or equal to 1024"),
        ("SDBENTO_REQUEST_TIMEOUT", "-1", "greater than 0"),
        ("SDBENTO_REQUEST_TIMEOUT", "3601", "less than or equal to 3600"),
        ("SDBENTO_REQUEST_TIMEOUT", "inf", "a finite number"),
        ("SDBENTO_NUM_THREADS", "1025", "less than or equal to 1024"),
        ("SDBENTO_LOG_LEVEL", "loud", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ],
)
def test_a_bad_value_is_one_line_with_variable_value_and_what_is_allowed(
    variable: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    text = complaint()
    assert text.startswith(f"{variable}={value!r}: ")
    assert allowed in text


def test_a_database_that_is_not_known_is_refused_without_being_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(job_store_url="mysql://bob:secret@host/jobs")
    assert str(caught.value).startswith("JOB_STORE_URL=***: must begin with postgresql:// or ")


@pytest.mark.parametrize("variable", sorted(GIVEN.keys() - {"SDBENTO_API_KEY", "SDBENTO_API_KEYS"}))
def test_an_empty_variable_counts_as_unset(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unset = load_settings()
    monkeypatch.setenv(variable, "")
    assert load_settings() == unset
    assert load_settings().model_fields_set == unset.model_fields_set


def test_an_empty_variable_leaves_what_the_file_says(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure("models_dir: elsewhere")
    monkeypatch.setenv("SDBENTO_MODELS_DIR", "")
    assert load_settings().models_dir == Path("elsewhere")


@pytest.mark.parametrize(
    "secret",
    ["whsec_", "whsec_short", "whsec_" + "A" * 30, "whsec_" + "é" * 32, "whsec_" + "QUJD" * 22,
     "QUJD " * 8],
)  # fmt: skip
def test_a_malformed_webhook_secret_is_refused_without_being_shown(secret: str) -> None:
    text = complaint(webhook_secret=secret)
    assert text == "SDBENTO_WEBHOOK_SECRET=***: must be whsec_ and the base64 of 24 to 64 bytes"


def test_all_bad_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECISION", "fp4")
    monkeypatch.setenv("MAX_BATCH_SIZE", "0")
    assert {"PRECISION='fp4'", "MAX_BATCH_SIZE='0'"} <= {
        part.split(":")[0] for part in complaint().split("; ")
    }


def test_a_bad_explicit_value_is_named_by_its_variable() -> None:
    assert complaint(max_batch_size=0).startswith("MAX_BATCH_SIZE=0: ")


def test_variables_of_other_programs_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "tpu")
    monkeypatch.setenv("LOG_LEVEL", "debug")
    assert load_settings().changed() == []


def test_a_misspelt_setting_in_the_config_file_is_refused(configure: Configure) -> None:
    configure("max_batchsize: 8\n")
    text = complaint()
    assert text.startswith("max_batchsize is not a setting; known: sd_model, precision")


def test_a_misspelt_variable_can_be_found() -> None:
    environment = {"SDBENTO_MEMROY_GB": "1", "SDBENTO_CONFIG": "", "SDBENTO_DEVICE": "cpu"}
    assert unknown_variables(environment) == ["SDBENTO_MEMROY_GB"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a: [", "not YAML"), ("- precision", "a mapping"), ("precision", "a mapping")],
)
def test_a_config_file_that_cannot_be_read_is_one_line(
    text: str, problem: str, configure: Configure
) -> None:
    path = configure(text)
    assert complaint().startswith(f"SDBENTO_CONFIG='{path}': ")
    assert problem in complaint()


def test_a_config_file_that_is_not_text_is_one_line(configure: Configure) -> None:
    configure("").write_bytes(b"\xff\xfe")
    assert "not YAML" in complaint()


def test_an_empty_config_file_changes_nothing(configure: Configure) -> None:
    configure("")
    assert load_settings().changed() == []


def test_a_config_file_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDBENTO_CONFIG", "/nowhere.yaml")
    assert complaint() == "SDBENTO_CONFIG='/nowhere.yaml': no such file"


def test_the_environment_of_a_child_gives_the_same_settings_in_another_folder(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    configure("precision: bf16\nmemory_gb: 3\n")
    monkeypatch.chdir(tmp_path)
    settings = load_settings(sd_model="mine/model", models_dir=Path("mine"))
    for variable, value in child_environment(settings, EXTRA="1").items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir("/")
    child = load_settings()
    assert child.sd_model == str(tmp_path / "mine/model")
    assert child.models_dir == tmp_path / "mine"
    here: dict[str, object] = {"sd_model": str(tmp_path / "mine/model")}
    here |= {name: tmp_path / value for name, value in settings if isinstance(value, Path)}
    assert child == settings.model_copy(update=here)


def test_names_of_hub_models_are_passed_to_a_child_as_they_are() -> None:
    environment = child_environment(load_settings(sd_model="owner/name"))
    assert environment["SD_MODEL"] == "owner/name"
    assert "SDBENTO_MEMORY_GB" not in environment
    assert environment["ENABLE_XFORMERS"] == "true"
