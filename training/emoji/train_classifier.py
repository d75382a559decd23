"""Trains the judge of `emoji`: a classifier that names the icon in a picture.

It sees all icons, those that are held out from the model too: it has to know them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from training.emoji.budget import Budget, Training, arguments, autocast, memory_format
from training.emoji.compose import compose, random_layout
from training.emoji.icons import read_index, read_pictures
from training.emoji.networks import FULL, TOY, Classifier, Scale

PEAK_RATE, DECAY = 1e-3, 0.998
SIDES = (0.7, 0.8)
"""Sides of icons as parts of the picture's; those that are judged have the ordinary size."""


def names_of(path: Path) -> list[str]:
    """The classes, in the order of the classifier's logits."""
    return sorted({icon.name for icon in read_index(path)})


def blurred(images: Tensor) -> Tensor:
    """Half of them softened, as the autoencoder softens: the judge should not mind."""
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, soft, images)


def train(out: Path, scale: Scale, budget: Budget, device: str) -> None:
    torch.manual_seed(1)
    path = out / "icons.zip"
    pictures, names = read_pictures(path).to(device), names_of(path)
    classes = {name: index for index, name in enumerate(names)}
    labels = torch.tensor([classes[icon.name] for icon in read_index(path)], device=device)
    classifier = Classifier(len(names), scale.classifier_channels).to(device)
    training = Training(classifier, PEAK_RATE, out / "classifier.pt", DECAY)

    def loss() -> Tensor:
        icons = torch.randint(len(pictures), (scale.classifier_batch,), device=device)
        images = blurred(compose(pictures, random_layout(icons, SIDES)))
        with autocast(device):
            logits = classifier(images.contiguous(memory_format=memory_format(device)))
        return F.cross_entropy(logits.float(), labels[icons])

    training.run(loss, scale.classifier_batch, budget)


def load(out: Path, scale: Scale, device: str) -> Classifier:
    """The trained classifier with averaged weights."""
    classifier = Classifier(len(names_of(out / "icons.zip")), scale.classifier_channels).to(device)
    Training(classifier, PEAK_RATE, out / "classifier.pt", DECAY).use_averages()
    return classifier.eval()


def main() -> None:
    parser = arguments(__doc__, minutes=60.0)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    scale = TOY if options.toy else FULL
    scale = replace(scale, classifier_batch=options.batch or scale.classifier_batch)
    train(options.out, scale, Budget(options.minutes * 60), options.device)


if __name__ == "__main__":
    main()
