"""Front ends beside JupyterLab, each set in an environment of its own: `python tools/front_ends.py oldest | others` prints the
Python that has it. `oldest` is Colab's and the classic notebook, in .oldest-notebook/; `others` is Notebook 7, Voila and marimo, in
.front-ends/. Everything else comes from the environment that runs this.
"""
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distributions, version
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
OLDEST = (
    "ipywidgets==7.7.1",
    "anywidget==0.9.21",
    "plotly==5.24.1",
    "ipykernel==6.17.1",
    "ipython==7.34.0",
    "jupyter_client==7.4.9",
    "traitlets==5.7.1",
    "notebook==6.5.7", # the classic one: JupyterLab 4 shows no widgets of ipywidgets 7
    "jupyter_server<2",
    "pyzmq<27",
    "setuptools<81",
)
OTHERS = ("notebook==7.6.5", "voila==0.5.13", "marimo==0.25.2", "resvg-py==0.5.0")
# a folder, what is pinned there, and what is looked for beside its Python: templates, and the pages' own scripts
SETS = {"oldest": (".oldest-notebook", OLDEST, ("nbconvert",)),
        "others": (".front-ends", OTHERS, ("nbconvert", "jupyterlab", "jupyterlab_widgets", "anywidget"))}


def site(folder):
    "An environment's own packages."
    return Path(sysconfig.get_path("purelib", vars=dict(base=str(folder), platbase=str(folder))))


def lower(name): return name.lower().replace("-", "_")


def complete(folder, pinned, own):
    "Whether everything is there that is to be."
    have = {lower(d.metadata["Name"]): d.version for d in distributions(path=[str(site(folder))])}
    return {lower(name) for name in own} <= set(have) and all(
        r.specifier.contains(have.get(lower(r.name), "0")) for r in map(Requirement, pinned)
    )


def pip(folder, *args):
    "Install into an environment; what is installed outside it counts as met, unless its version does not fit."
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-compile", *args]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(f"FAILED: pip could not install {' '.join(args)} into {folder}")


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in SETS]: sys.exit(f"usage: python tools/front_ends.py {' | '.join(SETS)}")
    where, pinned, own = SETS[sys.argv[1]]
    folder = root / where
    if not complete(folder, pinned, own):
        venv.create(folder, clear=True, symlinks=True)
        (site(folder) / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", "utf-8")
        pip(folder, *pinned)
        pip(folder, "--no-deps", "--ignore-installed", *(f"{name}=={version(name)}" for name in own))
        if not complete(folder, pinned, own): sys.exit(f"FAILED: {folder} is not complete.")
    print(folder / "bin" / "python")
