"""MkDocs hook: links of the pages to files outside docs/, such as `../../results/digits/pareto.png`.

The links are relative, so that they work in a clone and on the pages of the repository, too. In the site, a picture is
at its path in the repository, and any other link leads to the repository. The word REPOSITORY_URL becomes its address.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()\.\./[^)\s#]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of the results."""
    for path in sorted((ROOT / "results").rglob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Change the links that leave docs/."""
    folder = posixpath.dirname(page.file.src_uri)

    def changed(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, match[0]))
        if path.startswith("docs/"):
            return match[0]
        if files.get_file_from_path(path):
            return posixpath.relpath(path, folder)
        return f"{config.extra['repository'].rstrip('/')}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"

    return LINK.sub(changed, markdown).replace("REPOSITORY_URL", config.extra["repository"])
