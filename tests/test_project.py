"""The project's own files: metadata from settings.ini, layers, the public face."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
package = root / "grpo_nb"

# The table of the design: each folder is one floor. A module may import what stands on a lower floor, and what stands before it
# in the order
# in which the house is read: the folders as they are written here, the chapters of a folder by their numbers under nbs/.
FLOORS = {
    "ground": 0, "patch": 0,
    "packs": 1, "algo": 1, "ops/layer": 1, "ops/head": 1, "ops/decode": 1,
    "models": 2, "engines": 2, "engines/inplace": 2, "engines/vllm": 2, "tasks": 2,
    "step": 3,
    "trainers": 4,
    "recipe": 5, "record": 5, "launch": 5, "run": 5, "advice": 5,
    "ui/parts": 6, "ui/charts": 6, "ui/completions": 6, "ui/panels": 6, "ui/lab": 6, "ui/runs": 6, "ui/studio": 6,
    "app": 7,
}
# on one floor, and know nothing of each other
STRANGERS = {("packs", "algo"), ("packs", "ops"), ("algo", "ops"), ("engines", "tasks")}
KNOW_TRL = ("trainers", "recipe", "record", "run", "advice", "app")
LIGHT = ("ground", "patch") # the standard library, and fastcore's `patch`, by which a class grows over cells


def folder(module): return module.rpartition(".")[0].replace(".", "/")


def reading_order():
    "Every module by its notebook, from the first chapter to the last."
    return [
        ".".join([*f.split("/"), path.stem.split("_", 1)[1]]) for f in FLOORS for path in sorted((root / "nbs" / f).glob("*.ipynb"))
    ]


def modules():
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        if path.stem not in ("__init__", "_modidx"): yield name, path


def imports(name, path):
    "Absolute names that a module imports, at any depth of its code."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parts = ["grpo_nb", *name.split(".")][: -node.level]
                base = ".".join([*parts, node.module] if node.module else parts)
            else: base = node.module
            yield base
            if base and base.startswith("grpo_nb"): yield from (f"{base}.{alias.name}" for alias in node.names)


def test_the_listing_is_the_table():
    "Each folder is one floor; outside them the package has its face alone. Each module is one notebook, in the same folder."
    assert {folder(name) for name, _ in modules()} == set(FLOORS)
    assert sorted(reading_order()) == sorted(name for name, _ in modules())
    assert not [p for p in package.glob("*.py") if p.name not in ("__init__.py", "_modidx.py")]
    for f in FLOORS:
        numbers = [path.name[:2] for path in sorted((root / "nbs" / f).glob("*.ipynb"))]
        assert numbers == [f"{n:02}" for n in range(1, len(numbers) + 1)], f"nbs/{f}: {numbers}"


def ours(name, path):
    "The modules of ours that a module imports, at any depth of its code."
    known = {n for n, _ in modules()}
    for imported in imports(name, path):
        inner = imported.removeprefix("grpo_nb.")
        if imported.startswith("grpo_nb.") and inner in known: yield inner


@pytest.mark.parametrize("name,path", modules(), ids=[n for n, _ in modules()])
def test_layers(name, path):
    floor, order, own = FLOORS[folder(name)], reading_order(), folder(name).split("/")[0]
    for inner in ours(name, path):
        assert FLOORS[folder(inner)] <= floor, f"{name} (floor {floor}) imports {inner} (floor {FLOORS[folder(inner)]})"
        assert order.index(inner) < order.index(name), f"{name} imports {inner}, a later chapter"
        other = folder(inner).split("/")[0]
        assert (other, own) not in STRANGERS, f"{name} imports {inner}: {own} and {other} know nothing of each other"
    for outside in {i.split(".")[0] for i in imports(name, path)} - {"grpo_nb"}:
        if outside == "trl": assert own in KNOW_TRL, f"{name} imports TRL: only floors 4 and 5 do, and the application"
        if own in LIGHT:
            allowed = {*sys.stdlib_module_names, "fastcore"}
            assert outside in allowed, f"{name} imports {outside}: the standard library and fastcore only"


@pytest.mark.parametrize("path", sorted((package / "step").glob("*.py")), ids=lambda p: p.stem)
def test_the_step_has_never_heard_of_a_trainer(path):
    "step/ knows a model, an Accelerator and a few numbers: no name `trainer` in its code, neither trl nor what stands above it."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)}
    names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert "trainer" not in names
    assert not {i.split(".")[0] for i in imports(f"step.{path.stem}", path)} & {"trl"}


def test_no_module_of_ours_sets_private_attributes_on_a_trainer_but_one():
    "One record, `trainer._grpo_nb`."
    import re
    found = {
        m
        for path in package.rglob("*.py")
        for m in re.findall(r"(?:trainer|self\.trainer)\.(_grpo_nb\w*)", path.read_text(encoding="utf-8"))
    }
    assert found == {"_grpo_nb"}, found


def metadata(folder, tmp_path):
    "The core metadata that the build backend writes for a source tree."
    out = tmp_path / f"metadata{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    code = f"from setuptools.build_meta import prepare_metadata_for_build_wheel as p; print(p({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = out / done.stdout.strip().splitlines()[-1]
    return (found / "METADATA").read_text(), (found / "entry_points.txt").read_text()


def test_settings_ini_makes_the_metadata(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE"):
        shutil.copy(root / name, tree)
    shutil.copytree(package, tree / "grpo_nb", ignore=shutil.ignore_patterns("__pycache__"))
    text, entry_points = metadata(tree, tmp_path)
    assert "Requires-Dist: trl>=1.12" in text and "grpo-nb = grpo_nb.app.cli:main" in entry_points
    for extra in ("vllm", "gpu", "tasks", "dev"): assert f"Provides-Extra: {extra}" in text

    ini = tree / "settings.ini"
    ini.write_text(ini.read_text().replace("name = grpo_nb", "name = renamed").replace("version = 0.1.0", "version = 9.8.7")
                   .replace("min_python = 3.11", "min_python = 3.12").replace("    trl>=1.12\n", "    trl>=1.12\n    six>=1.16\n")
                   .replace("gpu_requirements =", "gpu_requirements =\n    some-kernels>=2"))
    text, _ = metadata(tree, tmp_path)
    for line in ("Name: renamed", "Version: 9.8.7", "Requires-Python: >=3.12", "Requires-Dist: six>=1.16"): assert line in text
    assert 'some-kernels>=2; extra == "gpu"' in text


def test_static_files_ship(tmp_path):
    "Subpackages and the front end's files are part of what is installed."
    from setuptools import find_packages

    found = set(find_packages(str(root), include=["grpo_nb*"]))
    folders = {".".join(p.relative_to(root).parts) for p in [package, *package.rglob("*")] if p.is_dir() and list(p.glob("*.py"))}
    assert {f for f in folders if "__pycache__" not in f} <= found


def test_public_face():
    import grpo_nb

    assert {"FastLanguageModel", "PatchFastRL", "GRPORun", "rewards"} <= set(dir(grpo_nb))
    for name in grpo_nb.__all__: assert getattr(grpo_nb, name) is not None
    with pytest.raises(AttributeError, match="FastLanguageModel"): grpo_nb.FastLangageModel


def test_import_is_light():
    "`import grpo_nb` loads neither torch nor TRL: the command line answers at once."
    code = "import sys, grpo_nb; print(sorted({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def links_of(name):
    "Where a page or a text of the project leads to: its Markdown's links and those of the HTML that it has drawn."
    text = (root / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        drawn = [o["data"].get("text/html", "") for c in cells for o in c.get("outputs", []) if "data" in o]
        text = "\n".join("".join(part) for part in (*(c["source"] for c in cells if c["cell_type"] == "markdown"), *drawn))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'href="([^"]+)"', text)


@pytest.mark.parametrize("name", ["nbs/map.ipynb", "nbs/glossary.ipynb", "CONTRIBUTING.md"])
def test_what_a_page_names_is_there(name):
    "Every file that the map, the glossary and CONTRIBUTING lead to exists, and every dotted name of ours in the map."
    ours = "https://github.com/grpo-nb/grpo_nb/blob/main/"
    for link in links_of(name):
        path = link.partition("#")[0]
        if path.startswith(ours): assert (root / path.removeprefix(ours)).exists(), link
        elif path and ":" not in path: assert (root / name).parent.joinpath(path).exists(), link


def test_the_map_leaves_no_chapter_out_and_names_what_is_there():
    chapters = {path.relative_to(root / "nbs").as_posix() for f in FLOORS for path in (root / "nbs" / f).glob("*.ipynb")}
    assert chapters <= set(links_of("nbs/map.ipynb")), "run nbs/map.ipynb again"
    text = "".join("".join(c["source"]) for c in json.loads((root / "nbs/map.ipynb").read_text(encoding="utf-8"))["cells"])
    known = {name: path.read_text(encoding="utf-8") for name, path in modules()}
    for dotted in re.findall(r"`(\w+(?:\.\w+)+)`", text):
        if dotted.split(".")[0] not in FLOORS and dotted.split(".")[0] not in ("ops", "ui"): continue
        if dotted in known or dotted.replace(".", "/") in FLOORS: continue
        module, _, name = dotted.rpartition(".")
        assert re.search(rf"^\s*(?:def |class )?{name}\b", known[module], re.M), dotted
