"""The pictures of the documentation anew: `python tools/pictures.py tests/test_browser_quickstart.py` runs tests that take them and
puts those that nbs/images has into it. What the tests did not take is named, and stays as it was.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
images = root / "nbs" / "images"


def renew(taken):
    "Copy the pictures that have a place; returns the names of those renewed and of those that were not taken."
    known = {path.name for path in images.glob("*.png")}
    found = {path.name for path in Path(taken).glob("*.png")}
    for name in sorted(known & found): shutil.copyfile(Path(taken, name), images / name)
    return sorted(known & found), sorted(known - found)


if __name__ == "__main__":
    if not sys.argv[1:]: sys.exit("usage: python tools/pictures.py TEST ...")
    with tempfile.TemporaryDirectory() as taken:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "browser", "--shots", taken, *sys.argv[1:]], cwd=root)
        renewed, left = renew(taken)
    print(f"renewed: {', '.join(renewed) or 'none'}\nas they were: {', '.join(left) or 'none'}")
    sys.exit(tests.returncode)
