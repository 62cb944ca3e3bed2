"""The course as a web site, from the committed notebooks: `make book` writes build/book/.

One page a notebook, with search; nothing is executed, and the site needs no network.
"""

import json
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import publish
from sphinx.cmd.build import main as sphinx

from utils.plots import ATTRIBUTION
from utils.settings import ROOT

SOURCE, SITE = ROOT / "build" / "book-source", ROOT / "build" / "book"
ONLINE = publish.badge(publish.ADDRESS, "") != ""  # whether the repository has an address
CONFIGURATION = f"""
project = html_title = "How old does a face look?"
author, project_copyright, language = "The authors of the course", "", "en"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
nb_execution_mode, nb_merge_streams = "off", True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]  # of pictures kept beside their text
html_theme, html_show_sphinx, html_static_path = "sphinx_book_theme", False, ["_static"]
html_css_files = ["book.css"]
html_theme_options = {{
    "repository_url": "{publish.ADDRESS}", "use_repository_button": {ONLINE},
    "use_source_button": False, "use_download_button": False, "path_to_docs": "notebooks",
    "launch_buttons": {{"colab_url": "https://colab.research.google.com"}} if {ONLINE} else {{}},
    "show_toc_level": 2, "toc_title": "In this chapter",
    "extra_footer": "The portrait: {ATTRIBUTION}.",
}}
"""
STYLE = "table { font-size: 0.9em } div.cell_output { overflow-x: auto }\n"


def landing_page() -> str:
    """README's picture and results above the list of chapters."""
    readme = (ROOT / "README.md").read_text("utf-8")
    opening = publish.with_badge(readme, "").partition("```sh")[0]
    results = re.search(r"## What came out\n.*?(?=\n## )", readme, re.S)[0]
    pages = "\n".join(sorted(path.stem for path in SOURCE.glob("*.ipynb")))
    contents = f"```{{toctree}}\n:caption: Chapters\n:maxdepth: 1\n\n{pages}\n```\n"
    return "\n\n".join([opening.strip(), contents, results])


def to_page(text: str) -> str:
    """A notebook without its setup and recording cells; a badge would repeat the page's button."""
    cells = (notebook := json.loads(text))["cells"]
    hidden = {"setup", "record"}
    kept = [cell for cell in cells if not hidden & set(cell["metadata"].get("tags", []))]
    kept[0]["source"] = publish.with_badge("".join(kept[0]["source"]), "")
    for cell in kept:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]))
    return json.dumps(notebook | {"cells": kept})


def with_links(text: str) -> str:
    """Links to files outside the book lead to the repository, or are plain text without one."""
    link = rf"[\1]({publish.ADDRESS}/blob/main/\2)" if ONLINE else r"\1"
    outside = r"\[([^]]*)\]\((?:\.\./)?((?:data|figures|utils|\.ci)/[^)]*|[A-Z][\w.]*)\)"
    text = re.sub(outside, link, text)
    return text.replace("](notebooks/", "](")


def main() -> int:
    for folder in (SOURCE, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    (SOURCE / "_static").mkdir(parents=True)
    (SOURCE / "_static" / "book.css").write_text(STYLE)
    (SOURCE / "conf.py").write_text(CONFIGURATION)
    for path in ROOT.glob("notebooks/*.ipynb"):
        (SOURCE / path.name).write_text(to_page(path.read_text("utf-8")), "utf-8")
    picture = "average_faces_by_age.png"
    shutil.copy(ROOT / "figures" / picture, SOURCE / picture)
    page = landing_page().replace(f"(figures/{picture})", f"({picture})")
    (SOURCE / "index.md").write_text(with_links(page), "utf-8")
    return sphinx(["-b", "html", "-W", "--keep-going", "-q", "-j", "1", str(SOURCE), str(SITE)])


if __name__ == "__main__":
    sys.exit(main())
