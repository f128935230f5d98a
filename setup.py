"""Build metadata from settings.ini: the build backend calls this file, so nothing is written twice."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
ini = config["DEFAULT"]


def lines(key):
    "The non-empty lines of a multi-line setting."
    return [line.strip() for line in ini.get(key, "").splitlines() if line.strip()]


extras = {key.removesuffix("_requirements"): lines(key) for key in ini if key.endswith("_requirements")}

setup(
    name=ini["name"],
    version=ini["version"],
    description=ini["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=ini["author"],
    license=ini["license"],
    keywords=ini["keywords"].split(),
    url=ini["repository"],
    project_urls={"Documentation": ini["documentation"]},
    python_requires=f">={ini['min_python']}",
    install_requires=lines("requirements"),
    extras_require=extras,
    packages=find_packages(include=["grpo_nb*"]),
    package_data={"grpo_nb": ["py.typed"], "grpo_nb.ui": ["static/*"], "grpo_nb.trainers": ["*.json"]},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["grpo_nb = grpo_nb._modidx:d"]},
)
