"""Matplotlib's figures as small SVGs inside of one page of HTML.

Matplotlib repeats fonts and styles for every line and marker, writes each letter as an outline and each coordinate to a
millionth of a point, and stores pictures as PNG. On a page with dozens of figures, each style and the font stand once,
coordinates have two decimals, and pictures are WebP. The text stays text, which readers can find and copy.
"""

import base64
import io
import re
from collections.abc import Iterator
from itertools import count
from xml.etree import ElementTree

import matplotlib.pyplot as plt
from fontTools import subset
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

FONT = "DejaVu Sans"  # Matplotlib's, which sets the width of all texts of a figure
PHOTOGRAPH = 6000  # bytes; a picture that is larger without losses is a photograph, and stored with losses
_SVG, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_COORDINATES = ("d", "points", "transform", "x", "y", "width", "height", "viewBox")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


class Page:
    """The figures of one page of HTML. Names and styles are shared by the figures, and clash with nothing else."""

    def __init__(self) -> None:
        self._classes: dict[str, str] = {}
        self._letters: set[str] = set()
        self._names = _names()

    def add(self, figure: Figure, label: str) -> str:
        """The figure as an SVG element for HTML; the figure is closed.

        Args:
            figure: to draw.
            label: description for readers who cannot see the figure.
        """
        root = ElementTree.fromstring(_matplotlib_svg(figure))
        self._rename(root)
        for element in root.iter():
            for child in [child for child in element if child.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
                element.remove(child)
            self._shorten(element)
            self._letters.update("".join(element.itertext()) if element.tag == f"{_SVG}text" else "")
        _unwrap(root)
        width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
        root.attrib = {"viewBox": root.attrib["viewBox"], "class": "drawing", "role": "img", "aria-label": label}
        root.attrib |= {"width": f"{width * 4 / 3:.0f}", "height": f"{height * 4 / 3:.0f}"}  # points to CSS pixels
        for element in root.iter():
            element.tag = element.tag.removeprefix(_SVG)
        return ElementTree.tostring(root, encoding="unicode")

    def style(self) -> str:
        """The style sheet of the figures that were added, with the letters of the font that they need."""
        rules = [
            f'@font-face{{font-family:Figure;src:url("{font_uri(self._letters)}")format("woff")}}',
            ".drawing *{stroke-linejoin:round;stroke-linecap:butt}",
            *(f".{name}{{{style}}}" for style, name in self._classes.items()),
        ]
        return "\n".join(rules)

    def _rename(self, root: ElementTree.Element) -> None:
        """Short names for all elements that others refer to; the others lose their names."""
        referred = {
            name
            for element in root.iter()
            for key in (_HREF, "clip-path")
            for name in re.findall(r"#([\w-]+)", element.get(key, "") if "data:" not in element.get(key, "") else "")
        }
        names = {name: next(self._names) for name in sorted(referred)}
        for element in root.iter():
            if (name := element.attrib.pop("id", None)) in names:
                element.set("id", names[name])
            if "clip-path" in element.attrib:
                element.set(
                    "clip-path", re.sub(r"#([\w-]+)", lambda found: f"#{names[found[1]]}", element.attrib["clip-path"])
                )
            if (target := element.attrib.pop(_HREF, None)) is not None:
                element.set("href", f"#{names[target[1:]]}" if target[0] == "#" else smaller_picture(target))

    def _shorten(self, element: ElementTree.Element) -> None:
        for key in _COORDINATES:
            if key in element.attrib:
                element.set(key, _short_numbers(element.attrib[key]))
        if re.match(r"rotate\(-?0 ", element.get("transform", "")):
            del element.attrib["transform"]
        if style := _short_style(element.attrib.pop("style", "")):
            if style not in self._classes:
                self._classes[style] = next(self._names)
            element.set("class", self._classes[style])
        element.tail = None
        if not (element.text or "").strip() and element.tag != f"{_SVG}tspan":
            element.text = None


def font_uri(letters: set[str]) -> str:
    """Those letters of Matplotlib's font, as the URI of a WOFF file."""
    options = subset.Options(flavor="woff", layout_features=["kern"], hinting=False, notdef_outline=True)
    options.drop_tables += ["FFTM"]  # dates of FontForge
    font = subset.load_font(font_manager.findfont(FONT), options)
    chosen = subset.Subsetter(options)
    chosen.populate(text="".join(sorted(letters)))
    chosen.subset(font)
    buffer = io.BytesIO()
    subset.save_font(font, buffer, options)
    return "data:font/woff;base64," + base64.b64encode(buffer.getvalue()).decode()


def smaller_picture(uri: str) -> str:
    """A PNG in a data URI as WebP, if WebP is smaller."""
    content = base64.b64decode(uri.partition(",")[2])
    picture = Image.open(io.BytesIO(content))
    best = _webp(picture, lossless=True)
    if len(best) > PHOTOGRAPH:
        best = _webp(picture, quality=85)
    return "data:image/webp;base64," + base64.b64encode(best).decode() if len(best) < len(content) else uri


def _webp(picture: Image.Image, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", method=4, **options)
    return buffer.getvalue()


def _matplotlib_svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "tokenpool", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue().decode()


def _short_style(style: str) -> str:
    style = re.sub(r"font-family: [^;]*", "font-family: Figure,Verdana,sans-serif", style)
    style = re.sub(r"\s*([;:])\s*", r"\1", style).strip("; ")
    style = re.sub(r"#([0-9a-f])\1([0-9a-f])\2([0-9a-f])\3\b", r"#\1\2\3", style)
    return _NUMBER.sub(_rounded, style)


def _short_numbers(value: str) -> str:
    value = _NUMBER.sub(_rounded, " ".join(value.split()))
    return re.sub(r" ?([A-Za-z]) ?", r"\1", value) if value[:1] == "M" else value


def _rounded(found: re.Match[str]) -> str:
    """Two decimals, or three digits of a small number, such as a scale."""
    number = float(found[0])
    value = f"{number:.2f}".rstrip("0").rstrip(".") if abs(number) >= 1 else f"{number:.3g}"
    return "0" if value == "-0" else value


def _unwrap(root: ElementTree.Element) -> None:
    """Replace groups without attributes by their content."""
    for element in list(root.iter()):
        children = list(element)
        while any(child.tag == f"{_SVG}g" and not child.attrib for child in children):
            nested = [list(child) if child.tag == f"{_SVG}g" and not child.attrib else [child] for child in children]
            children = [child for group in nested for child in group]
        element[:] = children


def _names() -> Iterator[str]:
    """Short names: f0, f1, ..., f9, fa, ..., fz, f10, ..."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    for index in count():
        name = ""
        while index or not name:
            index, digit = divmod(index, len(digits))
            name = digits[digit] + name
        yield f"f{name}"
