"""The page of `explain`: its numbers are those of the library, and its script shows them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from html_pages import Page
from PIL import Image
from torch import nn

import tokenpool
from experiments.extras import explain_examples
from tokenpool.tools import explain_page
from tokenpool.tools.explain_page import Subject

FOLDER = Path(__file__).parents[1] / "docs" / "explain"
GRID = (6, 10)  # rows and columns of patches
EVIL = """</script><img src=x onerror="alert(1)">'"&{{ 7 * 7 }}.jpg"""


def model(name: str = "test_vit", classes: int = 7, **options: Any) -> nn.Module:
    """A model of random weights on 96 x 160 pixels, whose attention has a shape."""
    torch.manual_seed(0)
    size = {"pretrained_cfg_overlay": {"input_size": (3, 16 * GRID[0], 16 * GRID[1])}}
    made = timm.create_model(name, num_classes=classes, **size, **options)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return made.eval()


def subject(method: str = "kmedoids", title: str = "photo.jpg", **schedule: Any) -> Subject:
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    photograph = Image.fromarray(noise).resize((400, 240))
    return Subject(title, photograph, "test_vit", method, schedule or {"keep": 0.7})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    lines = list(explain_page.write(path, subject(title=EVIL), model(), ("power_bert", "tome"), (0.7,)))
    assert lines == [f"page: {path}"]
    return path


def data_of(page: Page) -> dict[str, Any]:
    ((_, text),) = page.find("script", id="data")
    return json.loads(text)


@pytest.mark.parametrize("method, schedule", [("kmedoids", {"keep": 0.7}), ("power_bert", {"gmacs": 0.015})])
def test_numbers_are_those_of_a_trace(method: str, schedule: dict[str, Any]) -> None:
    about, net = subject(method, **schedule), model()
    data = explain_page.describe(about, net, ("power_bert", "tome"), (0.7,))
    assert not tokenpool.is_patched(net) and data["grid"] == list(GRID) and data["pixels"] == [160, 96]
    pixels = explain_page.transformed(about.photograph, net)[None]
    plain, full = net(pixels)[0], tokenpool.flops.count(net).gmacs
    assert data["plain"]["gmacs"] == pytest.approx(full)
    assert len(data["settings"]) == 2 * len({method, "power_bert", "tome"}) and not data["skipped"]
    (chosen,) = [each for each in data["settings"] if data["chosen"].items() <= each.items()]
    for setting in data["settings"]:
        budget = schedule if setting is chosen else {"gmacs": chosen["gmacs"]}
        if setting["budget"] != chosen["budget"]:
            budget = {"gmacs": 0.7 * full}
        pooled = tokenpool.patch(model(), setting["method"], carry=True, **budget)
        trace = tokenpool.trace(pooled, pixels)
        assert setting["tokens"] == [block.tokens for block in trace.blocks]
        for shown, block in zip(setting["blocks"], trace.blocks, strict=True):
            assert shown == block.assignment[0].tolist()
            counted = np.bincount([token for token in shown if token >= 0], minlength=block.tokens)
            assert counted.tolist() == block.sizes[0].tolist()
        count = tokenpool.flops.count(pooled)
        assert setting["gmacs"] == pytest.approx(count.gmacs)
        assert setting["clustering"] == pytest.approx(count.clustering_gmacs)
        assert setting["cosine"] == pytest.approx(F.cosine_similarity(plain, trace.logits[0], dim=0).item(), abs=1e-4)
        shares, before = trace.logits[0].softmax(-1), plain.softmax(-1)
        for rank, each in enumerate(setting["classes"]):
            index = shares.argsort(descending=True)[rank].item()
            assert each["name"] == f"class {index}"
            assert [each["share"], each["plain"]] == pytest.approx(
                [shares[index].item(), before[index].item()], abs=1e-4
            )


def test_values_that_are_not_finite_are_null_and_shown_as_a_dash(tmp_path: Path) -> None:
    net = model()
    net.head.bias.data[3] = float("nan")
    list(explain_page.write(tmp_path / "page.html", subject(), net, (), ()))
    page = Page((tmp_path / "page.html").read_text())
    ((_, text),) = page.find("script", id="data")
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (setting,) = data["settings"]
    assert setting["cosine"] is None and all(each["share"] is None for each in setting["classes"])
    cells = [text for _, text in page.find("td")]
    assert "-" in cells and not any("nan" in text for text in cells)


def test_the_photograph_is_what_the_model_sees() -> None:
    about, net = subject(), model()
    seen = explain_page.shown(about.photograph, net, zoom=1)
    large = explain_page.shown(about.photograph, net)
    assert (seen.size, large.size) == ((160, 96), (320, 192))
    difference = np.asarray(large.resize(seen.size, Image.Resampling.BOX), float) - np.asarray(seen, float)
    assert np.abs(difference).mean() < 0.2 * np.asarray(seen).std()  # the same part of the photograph
    pixels = np.asarray(large)
    for patch, colour in enumerate(explain_page.patch_colours(pixels, GRID)):
        row, column = divmod(patch, GRID[1])
        part = pixels[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        assert colour == pytest.approx(part.mean((0, 1)), abs=0.5)


def test_the_page_needs_no_network_and_escapes_names(written: Path) -> None:
    text = written.read_text()
    page = Page(text)
    assert list(page.requests()) == [] and "url(h" not in text
    assert [text for _, text in page.find("h1")] == [f"{EVIL}: which patches become one token"]
    assert not page.find("img") and len(page.find("script")) == 2
    policy = [found["content"] for found, _ in page.find("meta", http_equiv="Content-Security-Policy")]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'; img-src data:;")
    (slider,) = page.find("input", id="block")
    assert (slider[0]["min"], slider[0]["max"]) == ("0", str(len(data_of(page)["settings"][0]["blocks"])))
    assert page.find("label", for_="block") and page.find("p", aria_live="polite")
    assert all(found["tabindex"] == "0" and found["aria-label"] for found, _ in page.find("svg", class_="picture"))
    assert len(text) < 200_000


def borders(labels: list[int]) -> int:
    """Number of sides between neighbouring patches of different tokens."""
    grid = np.array(labels).reshape(GRID)
    return int((grid[1:] != grid[:-1]).sum() + (grid[:, 1:] != grid[:, :-1]).sum())


@pytest.mark.slow
def test_the_script_draws_the_assignment(written: Path, browser: Any, tmp_path: Path) -> None:
    """Of the last block, with the cursor moved by the keyboard; a wrong script leaves the page empty."""
    data = data_of(Page(written.read_text()))
    move = """<script>
    const slider = document.getElementById("block"), picture = document.querySelector(".picture");
    slider.value = slider.max;
    slider.dispatchEvent(new Event("input"));
    for (const key of ["ArrowDown", "ArrowUp", "ArrowUp", "ArrowLeft"])
      picture.dispatchEvent(new KeyboardEvent("keydown", { key }));
    </script>"""
    moved = tmp_path / "moved.html"
    moved.write_text(written.read_text().replace("</body>", f"{move}</body>"))
    page = Page(browser(moved))
    patch = (GRID[0] // 2 - 2) * GRID[1] + GRID[1] // 2 - 1  # the first key only enters the picture, at its centre
    shown = [next(each for each in data["settings"] if data["chosen"].items() <= each.items())]
    shown += [
        each for each in data["settings"] if each["method"] == "power_bert" and each["budget"] == shown[0]["budget"]
    ]
    lines, dark = page.find("path", class_="over"), page.find("path", class_="dark")
    sentences = [text for _, text in page.find("p", class_="token")]
    assert len(lines) == len(sentences) == len(shown) == 2
    for setting, (line, _), (black, _), sentence in zip(shown, lines, dark, sentences, strict=True):
        labels = setting["blocks"][-1]
        assert line["d"].count("M") == borders(labels)
        assert black.get("d", "").count("M") == labels.count(-1)
        size = labels.count(labels[patch])
        if labels[patch] < 0:
            block = next(index for index, each in enumerate(setting["blocks"]) if each[patch] < 0) + 1
            expected = f"This patch was dropped in block {block}."
        else:
            noun = "patch" if size == 1 else "patches"
            expected = f"Token with {size} {noun}, {100 * size / len(labels):.1f} % of the image."
        assert sentence == f"{setting['tokens'][-1]} token{'s' * (setting['tokens'][-1] != 1)}. {expected}"
    assert f"Row {GRID[0] // 2 - 1}, column {GRID[1] // 2}." in page.find("p", id="live")[0][1]


@pytest.mark.parametrize(
    "name, classes",
    [("test_vit", 0), ("deit_tiny_distilled_patch16_224", 3), ("vit_tiny_r_s16_p8_224", 1000), ("test_vit4", 1)],
)
@pytest.mark.slow
def test_other_models(name: str, classes: int, tmp_path: Path) -> None:
    """Without classes, with a distillation token, with ImageNet's names."""
    about = subject("ward", gmacs=0.9 * tokenpool.flops.count(model(name, classes)).gmacs)
    path = tmp_path / "page.html"
    assert list(explain_page.write(path, about, model(name, classes), ("evit",), ()))[-1] == f"page: {path}"
    page = Page(path.read_text())
    data = data_of(page)
    assert len(page.find("table", class_="classes")) == (2 if classes else 0)
    assert all(len(each["classes"]) == min(classes, 5) for each in data["settings"])
    assert all(len(block) == np.prod(data["grid"]) for each in data["settings"] for block in each["blocks"])


def test_budgets_that_a_method_cannot_meet_are_named(tmp_path: Path) -> None:
    net = model()
    lines = list(explain_page.write(tmp_path / "page.html", subject(), net, ("tome",), (0.01,)))
    gmacs = f"{0.01 * tokenpool.flops.count(net).gmacs:.3g} GMACs: "
    assert [line.partition(gmacs)[0] for line in lines[:-1]] == [
        "not on the page: kmedoids at ",
        "not on the page: tome at ",
    ]
    methods = [each["method"] for each in data_of(Page((tmp_path / "page.html").read_text()))["settings"]]
    assert methods == ["kmedoids", "tome"]


@pytest.mark.parametrize("name", explain_examples.CREDITS)
def test_pages_of_the_documentation(name: str) -> None:
    """They are made by the present template, from photographs that may be shown with their credit."""
    text = (FOLDER / f"{name}.html").read_text()
    template = explain_page.TEMPLATE.read_text()
    assert template[template.rindex("<script>") :] in text
    page = Page(text)
    data = data_of(page)
    assert list(page.requests()) == [] and explain_examples.CREDITS[name] in "".join(each for _, each in page.find("p"))
    assert [len(each["blocks"]) for each in data["settings"]] == 12 * [12] and data["grid"] == [14, 14]
    stored = Image.open(io.BytesIO(base64.b64decode(data["photograph"].partition(",")[2])))
    seen = explain_page.shown(explain_examples.photograph(name), timm.create_model(explain_examples.MODEL))
    assert np.abs(np.asarray(stored, float) - np.asarray(seen, float)).mean() < 6
    assert sum(each.stat().st_size for each in FOLDER.glob("*.html")) < 1_000_000
