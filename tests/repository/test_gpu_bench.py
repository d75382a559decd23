"""`python -m bench.gpu`, run as its users run it, with small networks on the CPU."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.gpu.bench import Bench  # noqa: E402
from bench.gpu.rows import Kind, Log, Row, latest, read  # noqa: E402
from bench.gpu.sections import DEFAULT, TOY, Options  # noqa: E402
from bench.gpu.supervise import share  # noqa: E402
from bench.gpu.tables import table  # noqa: E402
from tools import gpu_tables, gpu_wheels  # noqa: E402

FAULTS = ("fault-raise", "fault-crash", "fault-hang")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of all sections, three of which fail on purpose."""
    folder = tmp_path_factory.mktemp("gpu")
    names = ",".join([*FAULTS, *TOY])
    command = [sys.executable, "-m", "bench.gpu", "--toy", "--limit", "900"]
    command += ["--out", str(folder), "--sections", names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1000)
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    assert done.returncode == 1, done.stderr  # some sections have failed
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    return read(folder.glob("*.jsonl"))


pytestmark = pytest.mark.timeout(1100)


@pytest.mark.long
@pytest.mark.parametrize("section", TOY)
def test_every_section_ends_well_and_has_rows(section: str, rows: list[Row]) -> None:
    own = [row for row in rows if row.section == section]
    assert [row.text for row in own if row.kind is Kind.FAILURE] == []
    assert [row.text for row in own if row.text.startswith("left out")] == []
    assert own[-1].kind is Kind.DONE
    without_triton = section == "kernels" and own[0].text == "Triton is not installed"
    assert without_triton or any(row.kind is Kind.FIGURES for row in own)


@pytest.mark.long
def test_no_two_rows_of_a_run_measure_the_same(rows: list[Row]) -> None:
    topics = [(row.section, tuple(row.labels.items())) for row in rows if row.kind is Kind.FIGURES]
    assert [topic for topic in topics if topics.count(topic) > 1] == []


@pytest.mark.long
def test_work_that_needs_a_gpu_is_no_failure_without_one(rows: list[Row]) -> None:
    notes = {row.section for row in rows if row.text == "needs CUDA"}
    assert {"graphs", "ceilings", "eager", "loading"} <= notes


@pytest.mark.long
@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("fault-raise", "RuntimeError: out of memory, say"),
        ("fault-crash", "killed by SIGSEGV"),
        ("fault-hang", "ended after its"),
    ],
)
def test_a_section_that_fails_costs_only_itself(section: str, words: str, rows: list[Row]) -> None:
    own = [row for row in rows if row.section == section]
    assert own[0].figures == {"value": 1}
    assert any(row.kind is Kind.FAILURE and words in row.text for row in own)


@pytest.mark.long
def test_a_part_that_fails_costs_only_itself(rows: list[Row]) -> None:
    own = [row for row in rows if row.section == "fault-raise"]
    [failed] = [row for row in own if row.labels == {"what": "part"}]
    assert "one part fails" in failed.text and "faults.py" in str(failed.figures["where"])
    assert own[own.index(failed) + 1].figures == {"value": 2}


@pytest.mark.long
def test_every_row_is_printed_and_the_table_matches_the_file(folder: Path, rows: list[Row]) -> None:
    printed = (folder / "stdout").read_text(encoding="utf-8")
    assert all(str(row) in printed for row in rows)
    text = table(latest(rows))
    assert printed.endswith(f"\n{text}\n")
    assert (folder / "table.md").read_text(encoding="utf-8") == f"{text}\n"


@pytest.mark.long
def test_the_files_of_a_run_are_few_and_small(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.name != "stdout"]
    assert {path.name for path in files} == {"rows.jsonl", "table.md", "log.txt"}
    assert all(path.stat().st_size < 2**20 for path in files)


@pytest.mark.long
def test_the_engine_makes_the_images_of_the_stock_pipeline(rows: list[Row]) -> None:
    verdicts = {row.figures["engine_is"] for row in rows if "engine_is" in row.figures}
    assert verdicts == {"right"}


@pytest.mark.long
def test_a_replay_of_the_stand_in_is_the_eager_step(rows: list[Row]) -> None:
    compared = [
        row
        for row in rows
        if row.section == "graphs" and row.labels.get("what") == "replay against eager"
    ]
    assert {row.labels["rows"] for row in compared} == {"full", "padded by one row"}
    assert all(float(row.figures["relative_difference"]) < 1e-6 for row in compared)


def test_the_toy_leaves_out_only_what_another_section_rehearses() -> None:
    assert set(DEFAULT) - set(TOY) == {"sd15-compiled"}


def test_without_a_gpu_full_size_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--sections", "nonsense", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no section nonsense" in done.stderr


@pytest.mark.parametrize(
    ("left", "weights", "seconds"),
    [(100, [10, 40], 20), (40, [10, 40], 10), (5, [10, 40], 5), (90, [30], 90)],
)
def test_the_first_sections_have_their_time_and_the_last_what_is_left(
    left: float, weights: list[float], seconds: float
) -> None:
    assert share(left, weights) == seconds


def test_the_stock_sdxl_pipeline_decodes_beside_a_half_precision_unet(tmp_path: Path) -> None:
    """The engine's own VAE is not in fp16 there, but the stock pipeline passes it fp16 latents."""
    from bench.gpu.subjects import build, stock_images

    bench = Bench(Log(tmp_path / "rows.jsonl", "1"), "eager", Options(toy=True), 60.0)
    subject = build("sdxl", bench, torch.float16)
    assert subject.pipeline.vae_dtype is not torch.float16
    with warnings.catch_warnings(action="ignore"):  # diffusers' own
        images = stock_images(subject, range(1), 1, "np")
    assert images.shape == (1, 64, 64, 3)


# Rows


def test_the_figures_of_the_later_run_count(tmp_path: Path) -> None:
    for run, ms in (("1", 30.0), ("2", 20.123456)):
        log = Log(tmp_path / "rows.jsonl", run)
        log.add("eager", Kind.FIGURES, {"images": 1}, {"ms": ms})
        log.add("eager", Kind.FIGURES, {"images": int(run) + 1}, {"ms": 1.0})
    merged = latest(read([tmp_path / "rows.jsonl"]))
    assert [(row.labels["images"], row.figures["ms"]) for row in merged] == [
        (1, 20.12),
        (2, 1.0),
        (3, 1.0),
    ]


def test_a_failure_is_dropped_once_a_later_run_succeeds() -> None:
    failed = Row("1", "vae", Kind.FAILURE, {"part": "section"}, text="killed by SIGKILL")
    done = Row("2", "vae", Kind.DONE)
    other = Row("2", "vae", Kind.NOTE, text="needs CUDA")
    assert latest([failed, other, done]) == [other, done]
    assert latest([failed, Row("1", "vae", Kind.DONE)])[0] == failed


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    log = Log(path, "1")
    log.add("vae", Kind.FIGURES, {"images": 1}, {"ms": 1.0})
    path.write_text(path.read_text() + '{"run": "1", "sec')
    log.add("vae", Kind.FIGURES, {"images": 2}, {"ms": 2.0})
    log.add("vae", Kind.FIGURES, {"images": 4}, {"ms": 4.0})
    assert [row.labels["images"] for row in read([path])] == [1, 2, 4]


def test_rows_with_the_same_columns_stand_in_one_table() -> None:
    rows = [
        Row("1", "eager", Kind.FIGURES, {"model": "sdxl", "images": n}, {"ms_per_step": 10 * n})
        for n in (1, 2)
    ]
    assert table(rows).splitlines()[2:] == [
        "sdxl",
        "",
        "| images | ms per step |",
        "| --- | --- |",
        "| 1 | 10 |",
        "| 2 | 20 |",
    ]


# The document


def test_the_document_has_what_the_stored_rows_give() -> None:
    text = gpu_tables.REPORT.read_text(encoding="utf-8")
    assert gpu_tables.written(text) == text, "run `python -m tools.gpu_tables`"


def test_without_rows_the_document_says_that_nothing_was_run(tmp_path: Path) -> None:
    assert gpu_tables.measured(tmp_path) == gpu_tables.NOT_RUN


@pytest.mark.long
def test_small_networks_are_not_taken_for_a_result(tmp_path: Path, folder: Path) -> None:
    assert gpu_tables.measured(folder) == gpu_tables.NOT_RUN
    for run, toy in (("1", "True"), ("2", "False")):
        log = Log(tmp_path / "rows.jsonl", run)
        log.add("run", Kind.HEADER, figures={"device": f"card {run}", "toy": toy})
        log.add("vae", Kind.FIGURES, {"images": 1}, {"ms": float(run)})
    text = gpu_tables.measured(tmp_path)
    assert "card 2" in text and "card 1" not in text
    assert "| 2.0 |" in text and "| 1.0 |" not in text


# The wheels


def test_the_wheels_are_those_that_the_lock_pins() -> None:
    pins = gpu_wheels.pins()
    assert set(gpu_wheels.WANTED) <= set(pins)
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert [name for name in gpu_wheels.WANTED if f"\n{name}=={pins[name]} " not in lock] == []


def test_a_changed_or_superfluous_wheel_is_noticed(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    good = gpu_wheels._digest(b"x = 1\n")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("good.py", "x = 1\n")
        archive.writestr("bad.py", "x = 2\n")
        record = f"good.py,{good},6\nbad.py,{good},6\nthing-1.0.dist-info/RECORD,,\n"
        archive.writestr("thing-1.0.dist-info/RECORD", record)
    assert gpu_wheels.changed(wheel) == ["bad.py"]
    found = list(gpu_wheels.problems(tmp_path))
    assert "thing" in found[0] and "bad.py" in found[1]


def test_the_wheels_folder_is_not_committed() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {".gpu-wheels/", ".gpu-rehearsal/"} <= set(ignored)


def test_the_bare_machine_lacks_what_the_wheels_bring() -> None:
    lines = (ROOT / "bench/gpu/machine.txt").read_text(encoding="utf-8").splitlines()
    there = {line.partition("==")[0].lower() for line in lines if not line.startswith("#")}
    assert not {"diffusers", "pydantic", "bentoml"} & there
