"""Another TRL in a folder of its own: `python tools/overlay_trl.py 1.12.0` prints the folder, which goes first on PYTHONPATH.

`newest` stands for the newest release, `main` for the head of TRL's repository. Only TRL itself is installed there; what it
requires has to be met by the environment that runs this, and every requirement that is not is named.
"""
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
SOURCES = {"newest": "trl", "main": "trl @ git+https://github.com/huggingface/trl"}


def installed_in(folder):
    "TRL's distribution in a folder, or None."
    return next((d for d in distributions(path=[str(folder)]) if d.metadata["Name"] == "trl"), None)


def overlay(name):
    "The folder with that TRL; made where it is not there or not complete."
    folder = root / ".trl" / name
    found = installed_in(folder)
    if found is None or name in SOURCES: # these two move
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), SOURCES.get(name, f"trl=={name}"),
        ]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(f"FAILED: pip could not install TRL {name} into {folder}")
        found = installed_in(folder)
    return folder, found


def unmet(found):
    "What that TRL requires and this environment does not have."
    for text in found.requires or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}): continue
        try: have = version(wanted.name)
        except PackageNotFoundError: have = "nothing"
        if have == "nothing" or not wanted.specifier.contains(have, prereleases=True): yield f"{text}; installed is {have}"


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit("usage: python tools/overlay_trl.py VERSION | newest | main")
    folder, found = overlay(sys.argv[1])
    missing = list(unmet(found))
    if missing: sys.exit(f"FAILED: TRL {found.version} requires " + ", ".join(missing))
    print(f"TRL {found.version} in {folder}", file=sys.stderr)
    print(folder)
