"""Trains `emoji` from beginning to end within a given time: `python -m training.emoji.run`.

Each stage is a process of its own, so that a crash costs only its stage. The classifier and the
captions are made beside the autoencoder. Started again, it goes on where the last run stopped.
What is worth keeping goes to `--results` after each stage: the model in parts, grids, scores, log.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.emoji.carry import split, take_up

HERE = Path(__file__).parent
AUTOENCODER, CLASSIFIER, TEXT = 0.21, 0.12, 0.15
"""Parts of the whole time; the classifier is trained beside the autoencoder.

What the stages before it leave is the UNet's, less ENDING."""
ENDING = 0.11
GRACE = 20.0
"""Seconds that a stage may take beyond its time, for imports and its last checkpoint."""
TOY_SLACK = 900.0
"""What a trial may take longer than it trains: it runs where imports take their time."""
BROUGHT = ("samples.png", "autoencoder.png", "score.json")


@dataclass
class Run:
    """One run: where it works, how much time it has, and which stages have failed."""

    out: Path
    results: Path
    seconds: float
    options: list[str]
    compiled: bool
    slack: float = 0.0
    started: float = field(default_factory=time.monotonic)
    failed: list[str] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until everything has to be over."""
        return self.seconds + self.slack - (time.monotonic() - self.started)

    def begin(self, stage: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-u", "-m", f"training.emoji.{stage}", "--out", str(self.out)]
        with (self.out / f"{stage}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *self.options, *arguments], stdout=log, stderr=subprocess.STDOUT
            )

    def finish(self, stage: str, process: subprocess.Popen[bytes], limit: float) -> None:
        """Waits for a stage, at most `limit` seconds; what fails is told and noted."""
        try:
            status: int | str = process.wait(timeout=max(1.0, min(limit, self.left())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = "took too long"
        if status:
            self.failed.append(stage)
        print(f"{stage}: {status or 'done'}, {self.left():.0f} s left", flush=True)

    def stage(self, stage: str, seconds: float, *arguments: str) -> None:
        self.finish(stage, self.begin(stage, *arguments), seconds + GRACE + self.slack)

    def bring(self) -> None:
        """Copies what there is to `results`."""
        self.results.mkdir(parents=True, exist_ok=True)
        for name in BROUGHT:
            if (self.out / name).exists():
                shutil.copy(self.out / name, self.results / name)
        logs = sorted(self.out.glob("*.log"))
        text = "".join(f"== {path.name}\n{path.read_text(errors='replace')}\n" for path in logs)
        (self.results / "log.txt").write_text(text)


def minutes(seconds: float) -> Sequence[str]:
    return ("--minutes", str(seconds / 60))


def learn(run: Run, seed: int) -> None:
    """The autoencoder, beside it the captions and the classifier; then text encoder and UNet."""
    captions = run.begin("train_text", "--prepare", "--seed", str(seed))
    for_vae, for_classifier, for_text = (
        run.seconds * part for part in (AUTOENCODER, CLASSIFIER, TEXT)
    )
    beside = {}
    if not (run.out / "classifier.pt").exists():
        beside["train_classifier"] = run.begin("train_classifier", *minutes(for_classifier))
    autoencoder = run.begin("train_vae", *minutes(for_vae))
    run.finish("captions", captions, 6 * GRACE + run.slack)
    if run.compiled:
        beside["compiler"] = run.begin("train_unet", "--warm-up", "--compile")
    run.finish("train_vae", autoencoder, for_vae + GRACE + run.slack)
    for stage, process in beside.items():
        run.finish(stage, process, GRACE + run.slack)
    run.stage("train_text", for_text, *minutes(for_text))
    compiled = ["--compile"] if run.compiled else []
    seconds = max(GRACE + 1, run.left() - run.slack - run.seconds * ENDING)
    run.stage("train_unet", seconds, *minutes(seconds - GRACE), *compiled)


def conclude(run: Run) -> None:
    """The model of the last checkpoint, then its scores; the model is safe before they begin."""
    run.stage("export", run.left())
    if (run.out / "pipeline").exists():
        split(run.out / "pipeline", run.results)
    run.bring()
    run.stage("score", run.left())
    run.bring()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "out", help="where it works")
    parser.add_argument("--results", type=Path, help="where what is worth keeping goes")
    parser.add_argument("--carried", type=Path, default=Path(".emoji-gpu"))
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--seed", type=int, default=2, help="of the captions")
    parser.add_argument("--toy", action="store_true", help="tiny networks, to try the path")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    take_up(options.out, options.carried)
    run = Run(
        out=options.out,
        results=options.results or options.out / "results",
        seconds=options.seconds,
        options=["--toy"] if options.toy else [],
        compiled=options.compile,
        slack=TOY_SLACK if options.toy else 0.0,
    )
    learn(run, options.seed)
    conclude(run)
    print(f"failed: {', '.join(run.failed) or 'nothing'}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
