"""The site beside what nbdev makes of it: `python tools/website.py sidebar | links | titles | texts`.

`sidebar` writes nbs/sidebar.yml from the folders, `links` mends links to chapters that got another number, `titles` puts each
title into a cell of its own, `texts` writes llms.txt and apilist.txt into the built site. The table of floors is the one that
tests/test_project.py asserts."""
import ast
import hashlib
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import yaml

root = Path(__file__).resolve().parent.parent
START = ("index.ipynb", "gallery.ipynb", "settings.ipynb", "glossary.ipynb", "map.ipynb", "changelog.md")
SECTIONS = {"Tutorials": "tutorials", "Gallery": "gallery", "How to": "howto", "How it works": "explanations"}
ORDER = { # a folder that is not here, and what is not named in one, is in the order of its names
    "tutorials": ("quickstart", "studio", "write_a_patch"),
    "gallery": ("writing_rewards", "is_it_learning", "it_does_not_fit", "loss_types", "calculator_agent", "code_rewards",
                "preference_data", "stop_resume_branch"),
    "howto": ("add_a_reward", "read_the_charts", "why_it_does_not_learn", "memory_by_card", "log_elsewhere", "use_vllm",
              "several_gpus", "ship_it", "coming_from_trl", "coming_from_unsloth"),
    "explanations": ("the_packed_step", "sampling_in_place", "what_is_exact", "how_patching_works", "which_models"),
}


def floors():
    "{folder: floor}, in reading order."
    tree = ast.parse((root / "tests/test_project.py").read_text(encoding="utf-8"))
    named = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "FLOORS")
    return ast.literal_eval(next(named))


def chapters(folder):
    "A folder's notebooks, in their order, as paths below nbs/."
    known = ORDER.get(folder, ())

    def place(path): return known.index(path.stem) if path.stem in known else len(known), path.name

    return [p.relative_to(root / "nbs").as_posix() for p in sorted((root / "nbs" / folder).glob("*.ipynb"), key=place)]


def heading(path):
    "(title, sentence) of a page: its H1 and the quoted line below or, in a text, the first paragraph."
    text = (root / "nbs" / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"): text = "".join(json.loads(text)["cells"][0]["source"])
    title, _, rest = text.partition("\n")
    sentence = re.search(r"^> (.*)$" if path.endswith(".ipynb") else r"^(\w.*)$", rest, re.M)
    return title.removeprefix("# "), sentence[1] if sentence else ""


def front(path):
    "{name: words} of a notebook's second cell, where it says what machine it needs, how long it takes and what it costs."
    cells = json.loads((root / "nbs" / path).read_text(encoding="utf-8"))["cells"]
    line = "".join(cells[1]["source"]).partition("\n")[0]
    return dict(re.findall(r"\*\*(\w[\w-]*)\*\* (.+?)(?= · \*\*|$)", line))


def numbered(path):
    "A chapter of the reference: its number and its name within the folder."
    number, name = Path(path).stem.split("_", 1)
    return {"text": f"{int(number)} {name}", "href": path}


def reference():
    "The package's folders, each a folded section; a folder within a folder is one of its own."
    found = {}
    for folder, floor in floors().items():
        top, _, inner = folder.partition("/")
        section = found.setdefault(top, {"section": f"{floor} · {top}", "contents": []})
        entries = [numbered(path) for path in chapters(folder)]
        section["contents"] += [{"section": inner, "contents": entries}] if inner else entries
    return list(found.values())


def settings():
    "What stands in settings.ini; nbdev reads no addresses there, and writes empty ones into nbs/nbdev.yml."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def sidebar():
    "nbs/sidebar.yml as text. Quarto reads it after nbdev.yml, so the addresses here are the ones that count."
    ini = settings()
    contents = [{"section": "Start", "contents": list(START)}]
    contents += [{"section": name, "contents": chapters(folder)} for name, folder in SECTIONS.items() if chapters(folder)]
    contents.append({"section": "Reference by floor", "contents": reference()})
    website = {
        "site-url": ini["documentation"].rstrip("/"), "repo-url": ini["repository"], "description": ini["description"],
        "navbar": {"right": [{"icon": "github", "href": ini["repository"], "aria-label": "The repository on GitHub"}]},
        "sidebar": {"collapse-level": 2, "contents": contents},
    }
    head = "# Written by `python tools/website.py sidebar` from the folders under nbs/ and from settings.ini; do not edit.\n"
    return head + yaml.safe_dump({"website": website}, sort_keys=False, allow_unicode=True, width=200)


def listed(node):
    "The notebooks of a sidebar, in their order."
    for item in node:
        if isinstance(item, str): yield item
        elif "contents" in item: yield from listed(item["contents"])
        else: yield item["href"]


def page(path):
    "The address of a notebook's page below the site: nbdev drops a chapter's number."
    return re.sub(r"(^|/)\d+[a-z0-9]*_", r"\1", path.lower()).replace(".ipynb", ".html").replace(".md", ".html")


def path_of(chapter):
    "The module that a chapter is exported to."
    return "grpo_nb/" + re.sub(r"/\d+_([^/]+)\.ipynb$", r"/\1.py", chapter)


def llms():
    "llms.txt: each page's sentence, and where its Markdown is."
    ini, lines = settings(), []
    for section in yaml.safe_load(sidebar())["website"]["sidebar"]["contents"]:
        lines += ["", f"## {section['section']}", ""]
        for path in listed(section["contents"]):
            title, sentence = heading(path)
            text = ".md" if path.endswith(".ipynb") else "" # nbdev keeps a page's Markdown beside it
            lines.append(f"- [{title}]({ini['documentation']}{page(path)}{text}): {sentence}")
    return "\n".join([f"# {ini['name']}", "", f"> {ini['description']}", *lines, ""])


def grown(node):
    "The class that a function is added to by `@patch`, with a dot; an empty string for all others."
    by = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    if not any(getattr(d, "id", "") == "patch" for d in by): return ""
    return f"{ast.unparse(node.args.args[0].annotation)}."


def signature(node):
    "A function's or class's line without its body."
    if isinstance(node, ast.ClassDef): return f"class {node.name}({', '.join(map(ast.unparse, node.bases))})".removesuffix("()")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {grown(node)}{node.name}({ast.unparse(node.args)}){returns}"


def public(tree):
    "The public functions, classes and methods of a module; a method that was added by `@patch` counts."
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"): continue
        yield "- ", node
        inside = node.body if isinstance(node, ast.ClassDef) else ()
        yield from (("  - ", n) for n in inside if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"))


def apilist():
    "apilist.txt: every public name with its signature and its sentence, module by module."
    lines = [f"# {settings()['name']} Module Documentation"]
    for path in (path for folder in floors() for path in chapters(folder)):
        module = path_of(path)
        source = (root / module).read_text(encoding="utf-8")
        lines += ["", f"## {module.removesuffix('.py').replace('/', '.')}", "", f"> {heading(path)[1]}", ""]
        for indent, node in public(ast.parse(source)):
            lines.append(f"{indent}`{signature(node)}`")
            if said := ast.get_docstring(node): lines.append(f"{' ' * len(indent)}{said.splitlines()[0]}")
    return "\n".join([*lines, ""])


def mended(text, folder):
    "Text of a page with the links right whose chapter stands where they lead, under another number."
    def right(match):
        path = folder / match[1]
        if path.exists() or not (number := re.match(r"\d+_(.+)", path.name)): return match[0]
        found = [p for p in path.parent.glob("*.ipynb") if re.fullmatch(rf"\d+_{re.escape(number[1])}", p.name)]
        return match[0] if len(found) != 1 else match[0].replace(path.name, found[0].name)
    return re.sub(r"\]\(([\w./]+\.ipynb)", right, text)


def mend():
    "All links of notebooks and texts to chapters."
    for path in [*(root / "nbs").rglob("*.ipynb"), *root.glob("*.md"), *(root / "benchmarks").glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        if (new := mended(text, path.parent)) == text: continue
        path.write_text(new, encoding="utf-8")
        print(path.relative_to(root))


def split_title(cells, path):
    "Cells whose first has the title and its sentence alone: nbdev makes the page's head of it, and drops whatever else is in it."
    text = "".join(cells[0]["source"])
    head = re.match(r"# [^\n]*\n+(?:> [^\n]*\n*)?", text)
    if not head or not (rest := text[head.end():].strip("\n")): return cells
    number = hashlib.sha1(f"{path} title".encode()).hexdigest()[:8]
    title = {**cells[0], "id": number, "source": head[0].strip("\n").splitlines(keepends=True)}
    return [title, {**cells[0], "source": rest.splitlines(keepends=True)}, *cells[1:]]


def titles(write=False):
    "The notebooks whose first cell holds more than a title; `write` splits it."
    found = []
    for path in sorted((root / "nbs").rglob("[!.]*.ipynb")):
        notebook, name = json.loads(path.read_text(encoding="utf-8")), path.relative_to(root).as_posix()
        cells = split_title(notebook["cells"], name)
        if len(cells) == len(notebook["cells"]): continue
        found.append(name)
        if write: path.write_text(json.dumps({**notebook, "cells": cells}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def main(name=""):
    if name == "sidebar": (root / "nbs/sidebar.yml").write_text(sidebar(), encoding="utf-8")
    elif name == "texts":
        site = root / "_docs"
        (site / "llms.txt").write_text(llms(), encoding="utf-8")
        (site / "apilist.txt").write_text(apilist(), encoding="utf-8")
    elif name == "links": mend()
    elif name == "titles": print("\n".join(titles(write=True)) or "every title has a cell of its own")
    else: sys.exit(f"FAILED: {name!r} is not a command; there are sidebar, links, titles, texts")


if __name__ == "__main__": main(*sys.argv[1:2])
