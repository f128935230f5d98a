"""`make demo`: run the main job's notebook and keep it with its outputs: `python tools/demo.py [small | tiny]`."""
import subprocess
import sys
from pathlib import Path

import checks

root = Path(__file__).resolve().parent.parent
NOTEBOOKS = {"small": "real_model", "tiny": "quickstart"} # model -> tutorial


def chosen(model):
    "(tutorial, why it is another than was asked for)"
    from grpo_nb.tasks.small import INSTALL, NAME, why_not_ready

    if model != "tiny" and why_not_ready():
        return NOTEBOOKS["tiny"], f"{NAME} could not be had here ({INSTALL}), so the tiny model stands in for it."
    return NOTEBOOKS[model], ""


def main(model="small"):
    "Run it, make a page of it, and see that the page holds what it should."
    if model not in NOTEBOOKS: sys.exit(f"MODEL={model} is not known; there are: {', '.join(NOTEBOOKS)}.")
    name, why = chosen(model)
    if why: print(why, flush=True)
    (root / "demo").mkdir(exist_ok=True)
    convert = [str(Path(sys.executable).with_name("jupyter")), "nbconvert", "--output-dir", "demo"]
    for more in (["--to", "notebook", "--execute", f"nbs/tutorials/{name}.ipynb", "--output", f"{name}.ipynb"],
                 ["--to", "html", f"demo/{name}.ipynb", "--output", f"{name}.html"]):
        if code := subprocess.run([*convert, *more], cwd=root).returncode: sys.exit(code)
    checks.demo(name)


if __name__ == "__main__": main(*sys.argv[1:2])
