"""Read pages of HTML in tests."""

from collections.abc import Iterator
from html.parser import HTMLParser

_VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """The elements of a page.

    Attributes:
        elements: (tag, attributes, text with that of inner elements), in the order of their beginnings.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self._open: list[tuple[int, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, ""))
        if tag not in _VOID:
            self._open.append((len(self.elements) - 1, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, ""))

    def handle_data(self, data: str) -> None:
        for _, texts in self._open:
            texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        index, texts = self._open.pop()
        name, attributes, _ = self.elements[index]
        assert name == tag, f"</{tag}> closes <{name}>"
        self.elements[index] = (name, attributes, "".join(texts))

    def find(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and texts of the elements with that tag and these attributes (`class_` for class)."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            (found, text)
            for name, found, text in self.elements
            if name == tag and all(value in found.get(key, "").split(" ") for key, value in wanted.items())
        ]

    def requests(self) -> Iterator[str]:
        """All that a browser would load or follow outside of the page."""
        for _, attributes, _ in self.elements:
            for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                if name in attributes and not attributes[name].startswith(("data:", "#")):
                    yield attributes[name]
