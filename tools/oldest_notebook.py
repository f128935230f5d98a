"""The oldest supported notebook packages, which are Colab's: `python tools/oldest_notebook.py` prints the Python that has them.

They are installed into an environment of their own, .oldest-notebook/; everything else comes from the environment that runs this.
"""
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distributions, version
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
folder = root / ".oldest-notebook"
PINNED = (
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


def site():
    "The environment's own packages."
    return Path(sysconfig.get_path("purelib", vars=dict(base=str(folder), platbase=str(folder))))


def complete():
    "Whether everything that is pinned is there."
    have = {d.metadata["Name"].lower().replace("-", "_"): d.version for d in distributions(path=[str(site())])}
    return "nbconvert" in have and all(
        r.specifier.contains(have.get(r.name.lower().replace("-", "_"), "0")) for r in map(Requirement, PINNED)
    )


def pip(*args):
    "Install into the environment; what is installed outside it counts as met, unless its version does not fit."
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", *args]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(f"FAILED: pip could not install {' '.join(args)} into {folder}")


if __name__ == "__main__":
    if not complete():
        venv.create(folder, clear=True, symlinks=True)
        (site() / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", "utf-8")
        pip(*PINNED)
        # for its templates, which it looks for beside its Python
        pip("--no-deps", "--ignore-installed", f"nbconvert=={version('nbconvert')}")
        if not complete(): sys.exit(f"FAILED: {folder} is not complete.")
    print(folder / "bin" / "python")
