"""Write the pages of `explain` for three free photographs, as in docs/explain.

    python -m experiments.extras.explain_examples --weights FILE   # a DeiT-Ti; 15 seconds on two cores

The photographs are parts of scikit-learn and Matplotlib.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from matplotlib import cbook
from PIL import Image
from sklearn.datasets import load_sample_image

import tokenpool
from tokenpool.tools import explain_page

MODEL, METHOD, GMACS = "deit_tiny_patch16_224", "ward", 0.8
_BY = "Creative Commons Attribution 2.0 (creativecommons.org/licenses/by/2.0), cropped and scaled."
CREDITS = {
    "china": f"Photograph: danielbuechele, flickr.com/photos/danielbuechele/6061409035, {_BY}",
    "flower": f"Photograph: vultilion, flickr.com/photos/vultilion/6056698931, {_BY}",
    "grace_hopper": "Photograph: Grace M. Hopper, by James S. Davis, US Navy, public domain, cropped and scaled.",
}


def photograph(name: str) -> Image.Image:
    """One of the photographs of `CREDITS`."""
    if name == "grace_hopper":
        return Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def write(weights: Path | None, output: Path) -> Iterator[str]:
    """Write one page for each photograph.

    Args:
        weights: of the model; None for timm's download.
        output: folder of the pages.

    Yields:
        Lines to print.
    """
    model = tokenpool.create_model(MODEL, pretrained=weights is None).eval()
    if weights is not None:
        tokenpool.load_weights(model, weights)
    for name, credit in CREDITS.items():
        subject = explain_page.Subject(
            name.replace("_", " ").title(), photograph(name), MODEL, METHOD, {"gmacs": GMACS}, credit=credit
        )
        yield from explain_page.write(output / f"{name}.html", subject, model)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="Weights of a DeiT-Ti. Default: timm's download.")
    parser.add_argument("--output", type=Path, default=Path("docs/explain"), help="Folder of the pages.")
    given = parser.parse_args()
    for line in write(given.weights, given.output):
        print(line)
