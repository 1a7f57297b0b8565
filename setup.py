import re
from configparser import ConfigParser
from pathlib import Path
from runpy import run_path

from setuptools import setup

ROOT = Path(__file__).parent


def description() -> str:
    """README.md, with absolute links to the files of this version: an index shows the page without the repository."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    repository = config["metadata"]["url"]
    tag = f"v{run_path(str(ROOT / 'tokenpool' / 'version.py'))['__version__']}"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\])\((?!https?:|#)", rf"\1({repository}/raw/{tag}/", text)
    return re.sub(r"((?<!!)\[[^]]*\])\((?!https?:|#)", rf"\1({repository}/blob/{tag}/", text)


setup(long_description=description(), long_description_content_type="text/markdown")
