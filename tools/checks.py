"""Checks that stand beside the tests: `python tools/checks.py export | cells | readme [--write] | docs | demo`."""
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def fail(message): sys.exit(f"FAILED: {message}")


def contents(folder):
    "Every file of a folder with the digest of its bytes."
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


def export():
    "Exporting the notebooks again must change nothing in the package."
    before = contents(root / "grpo_nb")
    subprocess.run([str(Path(sys.executable).with_name("nbdev-export"))], cwd=root, check=True)
    after = contents(root / "grpo_nb")
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed: fail(f"nbdev-export changed {', '.join(changed)}: export and commit the result")
    print(f"export changes nothing ({len(after)} files)")


def long_cells(most=25):
    "`notebook: lines: first line` of each exported cell that is longer; a kernel of Triton is one function and stays whole."
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        name = path.relative_to(root)
        if any(part[0] in "._" for part in name.parts): continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or not re.match(r"\s*#\| *exports?\b", source) or "@triton.jit" in source: continue
            lines = [line for line in source.splitlines() if not line.startswith("#|")]
            if len(lines) > most: yield f"{name}: {len(lines)} lines: {next(line for line in lines if line.strip())}"


def cells():
    "An exported cell holds one idea, in at most 25 lines."
    found = list(long_cells())
    if found: fail("\n".join([f"{len(found)} exported cells of more than 25 lines: cut them, a word of prose between", *found]))
    print("exported cells: none of more than 25 lines")


def readme_text():
    "README.md from nbs/index.ipynb: its markdown, its code in fences, its text outputs."
    cells = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown": parts.append(source)
        if cell["cell_type"] != "code" or not source or re.search(r"^#\| *(hide|include: *false)", source, re.M): continue
        code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
        parts.append(f"```python\n{code}\n```")
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain")
            if text: parts.append(f"```\n{''.join(text).rstrip()}\n```")
    text = "\n\n".join(p for p in parts if p) + "\n"
    return re.sub(r"\]\((?!https?:|#|/)", "](nbs/", text) # the notebook's links start in its own folder


def readme(write=False):
    "README.md must be what nbs/index.ipynb says."
    path, text = root / "README.md", readme_text()
    if write: path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        fail("README.md differs from nbs/index.ipynb: run `make readme`")
    print(f"README.md agrees with nbs/index.ipynb ({len(text.splitlines())} lines)")


def pages():
    "Process the notebooks as the site's build does, without Quarto itself, and return {page: html}."
    import nbdev.quarto
    import pypandoc

    nbdev.quarto._ensure_quarto = lambda: None
    cache, _, _ = nbdev.quarto._pre_docs(root / "nbs")
    found = {}
    for path in sorted(Path(cache).rglob("*.ipynb")):
        relative = path.relative_to(cache)
        if any(part[0] in "._" for part in relative.parts): continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        head = "".join(cells[0]["source"]) if cells and cells[0]["cell_type"] == "raw" else ""
        named = re.search(r"^output-file: *(\S+)", head, re.M)
        text = "\n\n".join(
            "".join(c["source"]) if c["cell_type"] == "markdown"
            else "\n\n".join("".join(o.get("data", {}).get("text/markdown", [])) for o in c.get("outputs", []))
            for c in cells
        )
        page = relative.with_name(named[1]) if named else relative.with_suffix(".html")
        found[str(page)] = (str(relative), pypandoc.convert_text(text, "html", format="markdown"))
    return found


def docs():
    "Every notebook becomes a page that pandoc converts, stands in the sidebar, and links only to what exists."
    import website
    import yaml

    if lost := website.titles():
        fail(f"the site would lose what shares a cell with the title of {', '.join(lost)}: run `python tools/website.py titles`")
    found = pages()
    notebooks = {source: page for page, (source, _) in found.items()}
    if not isinstance(yaml.safe_load((root / "nbs/_quarto.yml").read_text()), dict): fail("nbs/_quarto.yml is not a mapping")
    if not (root / "nbs/_quarto.yml").is_symlink(): fail("nbs/_quarto.yml should be a link to the root's file")

    def entries(node):
        for item in node:
            if isinstance(item, str): yield item
            else:
                if "href" in item: yield item["href"]
                yield from entries(item.get("contents", []))

    text = (root / "nbs/sidebar.yml").read_text(encoding="utf-8")
    if text != website.sidebar(): fail("nbs/sidebar.yml is not what the folders say: run `make sidebar`")
    config = yaml.safe_load(text)["website"]
    site, listed = config["site-url"], set(entries(config["sidebar"]["contents"]))
    problems = [f"not in the sidebar: {name}" for name in sorted(notebooks.keys() - listed)]
    problems += [
        f"in the sidebar without a notebook: {name}" for name in sorted(listed - notebooks.keys()) if name.endswith(".ipynb")
    ]
    ids = {page: set(re.findall(r'id="([^"]+)"', html)) for page, (_, html) in found.items()}
    links = 0
    for page, (_, html) in found.items():
        for href in re.findall(r'(?:href|src)="([^"]+)"', html):
            links += 1
            if site and href.startswith(site): href = "/" + href[len(site):].lstrip("/")
            elif re.match(r"[a-z]+:", href): continue
            path, _, fragment = href.partition("#")
            target = page if not path else path.lstrip("/") if path.startswith("/") else str(resolve(Path(page).parent / path))
            target = notebooks.get(target, target)
            if target not in found and not (root / "nbs" / target).exists(): problems.append(f"{page}: dead link {href}")
            elif fragment and target in ids and fragment not in ids[target]: problems.append(f"{page}: dead anchor {href}")
    if problems: fail("\n".join(["docs", *problems]))
    print(f"docs: {len(found)} pages, {links} links, all alive")


def resolve(path):
    "A relative path with its `..` worked out."
    parts = []
    for part in path.parts:
        if part == "..": parts.pop()
        elif part != ".": parts.append(part)
    return Path(*parts)


def demo():
    "The executed quickstart must hold its three charts and a task that was learnt."
    html = (root / "demo/quickstart.html").read_text(encoding="utf-8")
    if html.count("<svg") < 3: fail(f"demo/quickstart.html holds {html.count('<svg')} charts, not three")
    print(f"demo/quickstart.ipynb and demo/quickstart.html are ready ({html.count('<svg')} charts)")


if __name__ == "__main__":
    name, *rest = sys.argv[1:] or [""]
    known = {"export": export, "cells": cells, "readme": readme, "docs": docs, "demo": demo}
    if name not in known: fail(f"{name!r} is not a check; there are {', '.join(known)}")
    known[name](**({"write": True} if "--write" in rest else {}))
