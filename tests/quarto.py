"""A stand-in for Quarto: it reads notebooks as Quarto does, and pandoc, its engine, renders them.

As a program it does what `quarto render` does with a folder of notebooks, and like Quarto it lets
the pages load scripts from a server.
"""
import json
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import pypandoc

from superpos.book import _options

afar = """<script src="https://cdn.example/ajax/require.min.js" crossorigin="anonymous"></script>
<script src="https://cdn.example/jquery.min.js" data-relocate-top="true"></script>
<script type="application/javascript">define('jquery', [],function() {return 1;})</script>
<link rel="stylesheet" href="https://cdn.example/style.css">
"""


def joined(text: str | list[str]) -> str:
    "What a notebook holds, joined as Quarto joins it: a string loses the ends of its lines."
    return "".join(text if isinstance(text, list) else text.splitlines())


def picture(png: str, options: dict) -> str:
    said = (f'<img alt="{escape(options.get("fig-alt", ""))}" src="data:image/png;base64,{png}">'
            f"<figcaption>{escape(options.get('fig-cap', ''))}</figcaption>")
    return f'<figure id="{options.get("label", "")}">{said}</figure>'


def shown(output: dict, options: dict) -> str:
    if "text" in output: return f"~~~~~~\n{joined(output['text'])}\n~~~~~~"
    data = {mime: joined(text) for mime, text in output["data"].items()}
    if "text/markdown" in data: return data["text/markdown"]
    html = data.get("text/html")
    if "image/png" in data: html = picture(data["image/png"].replace("\n", ""), options)
    kind, text = ("{=html}", html) if html else ("", data["text/plain"])
    return f"~~~~~~{kind}\n{text}\n~~~~~~"


def markdown(nb: dict) -> str:
    "A notebook as the Markdown that Quarto gives to pandoc."
    parts = []
    for cell in nb["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        options = _options(source)
        if options.get("echo", True): parts.append(f"~~~~~~python\n{source}\n~~~~~~")
        parts += [shown(output, options) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def pandoc(text: str) -> tuple[str, str]:
    "What pandoc makes of Markdown, and what it warns of."
    command = [pypandoc.get_pandoc_path(), "--from=markdown", "--to=html", "--mathml",
               "--wrap=none"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def render(folder: Path) -> None:
    site = folder/"_docs"
    site.mkdir()
    for sheet in folder.glob("*.css"): shutil.copy(sheet, site)
    for path in folder.glob("*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf-8"))
        html, warnings = pandoc(markdown(nb))
        sys.stderr.write(warnings)
        html = re.sub(r'href="(\w+)\.ipynb', r'href="\1.html', html)
        title = re.search(r"(?m)^title: (.+)", joined(nb["cells"][0]["source"]))
        head = f'<header id="title-block-header"><h1>{title[1]}</h1></header>'
        page = f"<html><head>{afar}</head><body><main>{head}{html}</main></body></html>"
        (site/f"{path.stem}.html").write_text(page, encoding="utf-8")


if __name__ == "__main__": render(Path())
