"""`python -m experiments explain` on whatever a user may hand it."""

import html
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import tokenpool
from tokenpool.downsampling import REGISTRY
from tokenpool.tools.explain import explain

MODEL = "test_vit"  # timm's smallest


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    safetensors.torch.save_file(timm.create_model(MODEL).state_dict(), path)
    return path


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def run(image: Path, weights: Path, output: Path, method: str = "key_medoids", **schedule: object) -> list[str]:
    return list(explain(image, MODEL, method, schedule or {"keep": 0.8}, True, weights, output))


@pytest.mark.parametrize(
    "mode, size, suffix",
    [
        ("CMYK", (99, 98), "jpg"),
        pytest.param("P", (50, 60), "gif", marks=pytest.mark.slow),
        pytest.param("RGBA", (1, 1), "png", marks=pytest.mark.slow),
        pytest.param("RGB", (4000, 3000), "webp", marks=pytest.mark.slow),
        pytest.param("1", (20000, 2), "png", marks=pytest.mark.slow),
    ],
)
def test_any_photograph(mode: str, size: tuple[int, int], suffix: str, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / f"photo.{suffix}"
    picture(mode, size).save(path)
    lines = run(path, weights, tmp_path / "out")
    assert lines[0].startswith("plain: ") and lines[1].startswith("key_medoids: ") and "clustering" in lines[1]
    written = tmp_path / "out" / "photo-key_medoids.png"
    assert lines[-2:] == [f"picture: {written}", f"page: {written.with_suffix('.html')}"]
    assert np.asarray(Image.open(written)).std() > 10  # something is drawn


@pytest.mark.slow
def test_a_budget_and_what_it_really_costs(weights: Path, tmp_path: Path) -> None:
    picture("RGB", (160, 160)).save(tmp_path / "photo.png")
    plain, pooled, *_ = run(tmp_path / "photo.png", weights, tmp_path / "out", "kmedoids", gmacs=0.02)
    assert plain.startswith(f"plain: {tokenpool.flops.count(timm.create_model(MODEL)).gmacs:.4g} GMACs; ")
    model = tokenpool.create_model(MODEL, "kmedoids", gmacs=0.02)
    counted = tokenpool.flops.count(model)
    assert pooled.startswith(f"kmedoids: {counted.gmacs:.4g} GMACs, of which clustering {counted.clustering_gmacs:.3g}")
    assert 0.98 * 0.02 <= counted.gmacs <= 0.02 and f"{counted.gmacs:.4g}" not in plain


def test_files_that_are_no_images_are_named(weights: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    picture("RGB", (300, 300)).save(whole)
    for name, content in (("cut.png", whole.read_bytes()[:5000]), ("notes.txt", b"hello"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read image .*{name}"):
            run(tmp_path / name, weights, tmp_path / "out")
    with pytest.raises(ValueError, match="cannot read image .*absent.png"):
        run(tmp_path / "absent.png", weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named_before_weights_are_read(tmp_path: Path) -> None:
    picture("RGB", (30, 30)).save(tmp_path / "photo.png")
    for method, schedule, message in (
        ("kmediods", {"keep": 0.8}, "unknown downsampler 'kmediods'"),
        ("kmedoids", {"keep": "fast"}, "keep = 'fast'"),
        ("kmedoids", {"gmacs": 1e-6}, "too few"),
        ("none", {"keep": 0.9}, "method 'none' has no schedule"),
        ("convolution", {"keep": 0.9}, "method 'convolution' has no schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "photo.png", tmp_path / "absent.safetensors", tmp_path / "out", method, **schedule)


def test_models_of_other_images_are_refused(weights: Path, tmp_path: Path) -> None:
    picture("RGB", (30, 30)).save(tmp_path / "photo.png")
    lines = explain(tmp_path / "photo.png", "deit_digits_patch2_16", "tome", {"keep": 0.9}, True, weights, tmp_path)
    with pytest.raises(ValueError, match="deit_digits_patch2_16 does not take photographs"):
        list(lines)


@pytest.mark.parametrize("classes, named", [(0, ""), (2, "; class 0 50%, class 1 50%")])
@pytest.mark.slow
def test_classes_are_named_as_far_as_the_model_has_any(
    classes: int, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenpool, "create_model", partial(tokenpool.create_model, num_classes=classes))
    state = tokenpool.create_model(MODEL).state_dict()
    state |= {name: torch.zeros_like(value) for name, value in state.items() if name.startswith("head.")}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    picture("RGB", (30, 30)).save(tmp_path / "photo.png")
    plain, pooled, *_ = run(tmp_path / "photo.png", tmp_path / "weights.safetensors", tmp_path / "out")
    assert plain.partition(" GMACs")[2] == named and pooled.endswith(named) and "class" not in pooled.replace(named, "")


@pytest.mark.slow
def test_the_command(weights: Path, tmp_path: Path, in_process) -> None:
    picture("RGB", (300, 200)).save(tmp_path / "photo.png")
    command = ["explain", str(tmp_path / "photo.png")]
    command += ["--model", MODEL, "--weights", str(weights), "--output", str(tmp_path)]
    done = in_process(*command, "--level", "2", "--against", "tome", "--share", "0.7")
    assert done.returncode == 0, done.stderr
    assert "tokens after each block: " in done.stdout and (tmp_path / "photo-key_medoids.png").exists()
    page = (tmp_path / "photo-key_medoids.html").read_text()
    assert REGISTRY["tome"].label in html.unescape(page) and REGISTRY["power_bert"].label not in page
    assert page.count('{"budget":1,"method"') == page.count('{"budget":0,"method"') == 2  # the level, the share
    done = in_process(*command, "--against", "tme")
    assert done.returncode == 1 and "unknown downsampler 'tme'" in done.stderr
    done = in_process(*command, "--level", "2", "--keep", "0.9")
    assert done.returncode == 1 and done.stderr.startswith("error: --level, --keep and --gmacs are three ways")


@pytest.mark.slow
def test_raw_weights_or_their_moving_average(in_process, weights: Path, tmp_path: Path) -> None:
    picture("RGB", (64, 64)).save(tmp_path / "photo.png")
    raw, averaged = safetensors.torch.load_file(weights), timm.create_model(MODEL).state_dict()
    torch.save({"model": raw, "model_ema": averaged}, tmp_path / "both.pth")
    torch.save({"model": raw}, tmp_path / "raw.pth")
    torch.save({"model": averaged}, tmp_path / "averaged.pth")
    fixed = ("--model", MODEL, "--output", str(tmp_path), "--weights")

    def said(file: str, *options: str) -> tuple[str, str]:
        done = in_process("explain", str(tmp_path / "photo.png"), *fixed, str(tmp_path / file), *options)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    alone, _ = said("raw.pth")
    found, warned = said("both.pth", "--raw")
    assert found == alone
    assert (
        "warning: " in warned and "loaded the raw weights 'model', not 'model_ema'; ema=True loads the other" in warned
    )
    found, warned = said("both.pth")
    assert found == said("averaged.pth")[0] != alone
    assert "loaded the moving average 'model_ema', not 'model'; ema=False loads the other" in warned
