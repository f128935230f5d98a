"""The gallery's notebooks have one form: what they need and what came of it, short cells, real outputs of no one machine."""
import ast
import json
import re
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "tools"))
import pages
import website

NOTEBOOKS = sorted((root / "nbs/gallery").glob("*.ipynb"))
NO_RUN = ("is_it_learning", "it_does_not_fit") # nothing is trained, or nothing worth measuring


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def code(path): return [c for c in cells(path) if c["cell_type"] == "code"]


def said(path):
    "Everything that the outputs say, as text."
    outputs = [o for c in code(path) for o in c["outputs"]]
    return "\n".join("".join(o.get("text") or o.get("data", {}).get("text/plain") or "") for o in outputs)


def prose(path): return "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request): return request.param


def test_it_says_first_what_it_needs(notebook):
    name = notebook.relative_to(root / "nbs").as_posix()
    title, sentence = website.heading(name)
    assert title and sentence.endswith(".")
    front = website.front(name)
    assert list(front) == ["Machine", "Time", "Cost", "Model", "Held-out"], front
    assert re.search(r"\d+ (s|min)\b", front["Time"]), front["Time"]
    for opener, url in pages.OPEN.items():
        assert f"[![Open in {opener}](" in prose(notebook) and url.format(at=pages.address(name)) in prose(notebook), opener


def test_one_cell_installs_the_version_of_this_project(notebook):
    first = code(notebook)[0]
    assert source(first).splitlines() == ["try: import grpo_nb", "except ImportError:",
                                          f'    %pip install -q "grpo_nb=={website.settings()["version"]}"']
    assert not any("pip install" in source(c) for c in code(notebook)[1:])


def test_a_parameter_cell_makes_it_smaller(notebook):
    if notebook.stem == "is_it_learning": return
    assert sum(source(c).startswith("# parameters") and c["metadata"].get("tags") == ["parameters"] for c in code(notebook)) == 1


def test_cells_are_short_and_lines_can_be_read(notebook):
    for cell in code(notebook):
        lines = [line for line in source(cell).splitlines() if line.strip()]
        assert len(lines) <= 15, f"{len(lines)} lines: {lines[0]}"
        assert max(map(len, lines)) <= 150, max(lines, key=len)
        assert not re.search(r";\s*$|= lambda\b", source(cell), re.M), source(cell)


def test_imports_stand_in_cells_of_their_own(notebook):
    "The site's build runs the cells that import something, and those alone."
    for cell in code(notebook)[1:]:
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source(cell)).body}
        assert len(kinds) < 2, source(cell)


def test_outputs_are_kept(notebook):
    for cell in code(notebook):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", source(cell)
            assert output.get("name") != "stderr", source(cell)
    drawn = sum("<svg" in "".join(o.get("data", {}).get("text/html", "")) for c in code(notebook) for o in c["outputs"])
    assert drawn or notebook.stem == "it_does_not_fit", "no chart was kept"
    for output in (o for c in code(notebook) for o in c["outputs"] if "<svg" in "".join(o.get("data", {}).get("text/html", ""))):
        assert "image/svg+xml" in output["data"], "GitHub shows no SVG that stands in HTML"
    printing = [c for c in code(notebook) if re.search(r"^(print|show|answer)\(", source(c).splitlines()[-1] if source(c) else "")]
    assert said(notebook) and all(c["outputs"] for c in printing), [source(c) for c in printing if not c["outputs"]]


def test_nothing_in_it_is_of_one_machine(notebook):
    text = notebook.read_text(encoding="utf-8")
    found = re.search(r"/(tmp|root|home|work|Users|mnt)/\w+|0x[0-9a-f]{8,}|\x1b\[", text)
    assert not found, found[0]


def test_numbers_up_front_are_those_that_were_measured(notebook):
    "A share that is promised stands in an output, as a share or in percent."
    held_out = website.front(notebook.relative_to(root / "nbs").as_posix())["Held-out"]
    if notebook.stem not in NO_RUN: assert "→" in held_out, held_out
    measured = {f"{float(percent) / 100:.2f}" for percent in re.findall(r"([\d.]+)%", said(notebook))}
    measured |= set(re.findall(r"\b[01]\.\d\d\b", said(notebook)))
    assert set(re.findall(r"\b[01]\.\d\d\b", held_out)) <= measured


def test_what_a_run_needs_is_in_it(notebook):
    "A question, settings with reasons, a look before, held-out answers after, and what to try next."
    headings = re.findall(r"^## (.*)$", prose(notebook), re.M)
    assert headings[0] == "The question" and "What to try next" in headings[-1], headings
    if notebook.stem in NO_RUN: return
    for part in ("settings", "held-out,? after"): assert any(re.search(part, h.lower()) for h in headings), headings
    assert "before" in said(notebook) or "before" in prose(notebook)


def test_links_lead_somewhere(notebook):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(notebook)):
        path = link.partition("#")[0]
        if path and ":" not in path: assert (notebook.parent / path).exists(), link
