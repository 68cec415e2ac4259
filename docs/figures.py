"""Draw the pictures of the pages that draw some, by the pages' own snippets.

    python docs/figures.py    # matplotlib, and chromium for the report

A picture belongs to the snippet before it: its figure, or else the report that it wrote.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from PIL import Image

DOCS = Path(__file__).resolve().parent
CELL = re.compile(
    r"^```python\n(.*?)^```\n(?:(?:(?!```).)*?^!\[[^]]*\]\((images/[^)]+)\))?", re.M | re.S
)


def draw(page: Path) -> None:
    """Run a page from its beginning, and keep its pictures."""
    names: dict[str, object] = {}
    for code, picture in CELL.findall(page.read_text(encoding="utf-8")):
        exec(compile(code, str(page), "exec"), names)
        if picture:
            keep(DOCS / picture)


def keep(picture: Path) -> None:
    """Write the figure that is open, or a picture of the report's first screen."""
    if plt.get_fignums():
        plt.savefig(picture, dpi=80)
        plt.close("all")
        return
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit(f"{picture.name} is a picture of a web page: install chromium.")
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1000,920"]
    page = Path("report.html").resolve().as_uri()
    called = [browser, *options, f"--screenshot={picture}", page]
    subprocess.run(called, check=True, capture_output=True)
    with Image.open(picture) as shot:
        shot.quantize(256, Image.Quantize.FASTOCTREE).save(picture, optimize=True)


if __name__ == "__main__":
    (DOCS / "images").mkdir(exist_ok=True)
    pages = [page for page in DOCS.glob("*.md") if "](images/" in page.read_text("utf-8")]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for page in pages:
            draw(page)
