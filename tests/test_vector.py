"""Small SVGs of Matplotlib's figures."""

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from html_pages import Page
from matplotlib.figure import Figure
from PIL import Image

from experiments.show import vector


def figure(title: str = "accuracy < 5 & cost") -> Figure:
    drawn, (left, right) = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
    x = np.linspace(0.1, 9, 40)
    left.errorbar(x, np.sin(x), yerr=0.1, marker="o", label="sine", color="#0072B2")
    left.errorbar(x, np.cos(x), yerr=0.1, marker="s", linestyle="--", label="cosine", color="#D55E00")
    left.set_title(title)
    left.set_xlabel("GFLOPs an image")
    left.legend()
    right.imshow(np.random.default_rng(0).random((8, 8, 3)), interpolation="nearest")
    right.text(2, 3, "upright", rotation=90)
    return drawn


def html(figures: list[str], style: str) -> str:
    page = "<!DOCTYPE html><html><head><meta charset='utf-8'><style>body{margin:0;background:#fff}svg{display:block}"
    return f"{page}{style}</style></head><body>{''.join(figures)}</body></html>"


def test_names_lead_to_one_element_of_their_own_figure() -> None:
    page = vector.Page()
    figures = [page.add(figure(), "one"), page.add(figure("another"), 'a "second" one')]
    parsed = [Page(each) for each in figures]
    ids = [[found["id"] for _, found, _ in each.elements if "id" in found] for each in parsed]
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1]) > 10
    for each, own in zip(figures, ids, strict=True):
        referred = re.findall(r'(?:href="|url\()#([\w-]+)', each)
        assert set(referred) == set(own)
    assert [parsed[1].elements[0][1][key] for key in ("role", "aria-label")] == ["img", 'a "second" one']
    classes = {name for each in parsed for _, found, _ in each.elements for name in found.get("class", "").split()}
    assert {f".{name}{{" for name in classes - {"drawing"}} == set(re.findall(r"\.f\w+\{", page.style()))
    assert "accuracy < 5 & cost" in [text for _, text in parsed[0].find("text")]


def test_size() -> None:
    buffer = io.StringIO()
    figure().savefig(buffer, format="svg")
    page = vector.Page()
    assert len(page.add(figure(), "small")) + len(page.style()) < 0.5 * len(buffer.getvalue())


@pytest.mark.slow
def test_the_picture_is_matplotlibs(tmp_path: Path) -> None:
    """Chromium draws it as Matplotlib's own SVG, whose letters are outlines and whose picture is a PNG."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs Chromium, which is not installed")

    def pixels(name: str, text: str) -> np.ndarray:
        (tmp_path / f"{name}.html").write_text(text)
        options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [program, *options, "--window-size=672,336", f"--screenshot={tmp_path / name}.png"]
        page = (tmp_path / f"{name}.html").as_uri()
        subprocess.run([*command, page], check=True, capture_output=True, timeout=120)
        return np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"), float)

    page, original = vector.Page(), io.StringIO()
    figure().savefig(original, format="svg")
    found = pixels("found", html([page.add(figure(), "figure")], page.style()))
    expected = pixels("expected", html([original.getvalue().partition("<!DOCTYPE")[2].partition(">")[2]], ""))
    assert found.shape == expected.shape == (336, 672) and expected.std() > 30
    assert np.abs(found - expected).mean() < 1.5
    assert np.abs(_blurred(found) - _blurred(expected)).max() < 30  # edges of letters differ by parts of a pixel


def _blurred(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(pixels.shape[0] // 8, 8, pixels.shape[1] // 8, 8).mean((1, 3))


def test_flat_pictures_lose_nothing_and_photographs_little() -> None:
    flat = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(30, 0).repeat(30, 1)
    smooth = np.asarray(Image.fromarray(flat).resize((300, 300), Image.Resampling.BICUBIC))
    noise = np.random.default_rng(1).integers(-4, 5, smooth.shape)
    photograph = (smooth + noise).clip(0, 255).astype(np.uint8)
    for pixels, most in ((flat, 0), (photograph, 5)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        small = vector.smaller_picture(uri)
        assert small.startswith("data:image/webp;base64,") and len(small) < len(uri)
        again = np.asarray(Image.open(io.BytesIO(base64.b64decode(small.partition(",")[2]))), float)
        assert np.abs(again - pixels).mean() <= most
