"""The site: what is generated is fresh, everything is two clicks from the landing page, and ten questions have their pages."""
import json
import re
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
nbs = root / "nbs"
sys.path.insert(0, str(root / "tools"))
import pages
import website


def cells(path): return json.loads((nbs / path).read_text(encoding="utf-8"))["cells"]


def shown(path):
    "The Markdown that a page's cells have made."
    outputs = [o.get("data", {}) for c in cells(path) for o in c.get("outputs", [])]
    return "".join("".join(data["text/markdown"]) for data in outputs if "text/markdown" in data)


def links(path):
    "Pages that a page leads to, by its prose and by what its cells made."
    if not path.endswith(".ipynb"): return set()
    texts = ["".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown"] + [shown(path)]
    found = (link.partition("#")[0] for text in texts for link in re.findall(r"\]\(([^)\s]+)\)", text))
    resolved = ((nbs / path).parent.joinpath(link).resolve() for link in found if link and ":" not in link)
    return {p.relative_to(nbs).as_posix() for p in resolved if p.is_relative_to(nbs) and p.suffix == ".ipynb"}


def clicks():
    "{page: clicks from the landing page}, by what stands on the pages and not in the sidebar."
    far, edge = {"index.ipynb": 0}, ["index.ipynb"]
    while edge:
        page = edge.pop(0)
        for target in sorted(links(page) - far.keys()):
            far[target] = far[page] + 1
            edge.append(target)
    return far


FAR = clicks()


def test_the_gallery_page_is_what_the_notebooks_say():
    assert shown("gallery.ipynb").strip() == pages.gallery_table().strip(), "make pages"


def test_the_settings_page_is_what_the_panel_says():
    assert shown("settings.ipynb").strip() == pages.settings_text().strip(), "make pages"


def test_every_setting_of_the_panel_has_its_sentence_and_an_anchor():
    from grpo_nb.ui.parts.fields import settings

    text = shown("settings.ipynb")
    for name, setting in settings().items(): assert f'<a id="{name}"></a>`{name}`' in text and setting.says in text, name


def test_the_order_names_what_is_there():
    for folder, names in website.ORDER.items():
        there = {p.stem for p in (nbs / folder).glob("*.ipynb")}
        assert set(names) <= there, f"{folder}: {sorted(set(names) - there)}"


@pytest.mark.parametrize("folder", ["tutorials", "gallery", "howto", "explanations"])
def test_every_page_for_users_is_two_clicks_away(folder):
    far = {path: FAR.get(path) for path in website.chapters(folder)}
    assert not {path for path, n in far.items() if n is None or n > 2}, far


# A newcomer's questions, the page that answers each, and a word of the answer
QUESTIONS = {
    "Can I try it without a GPU?": ("tutorials/quickstart.ipynb", "no"),
    "What do I need for which notebook, and what comes out?": ("gallery.ipynb", "held-out"),
    "Which model fits my card?": ("howto/memory_by_card.ipynb", "T4"),
    "How do I write a reward, for strings and for chats?": ("howto/add_a_reward.ipynb", "text_of"),
    "What should these curves look like?": ("howto/read_the_charts.ipynb", "Entropy"),
    "Why does my reward not rise?": ("howto/why_it_does_not_learn.ipynb", "doctor"),
    "What does this setting do?": ("settings.ipynb", "num_generations"),
    "My session was cut off. Is it lost?": ("gallery/stop_resume_branch.ipynb", "resume=True"),
    "Is the result the same as TRL's?": ("explanations/what_is_exact.ipynb", "rounding"),
    "How do I take the model away?": ("howto/ship_it.ipynb", "save_pretrained_merged"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_ten_questions(question):
    page, word = QUESTIONS[question]
    assert FAR.get(page, 9) <= 2, f"{page}: {FAR.get(page)} clicks"
    assert word.lower() in (nbs / page).read_text(encoding="utf-8").lower(), f"{page} does not say {word}"
    landing = "".join("".join(c["source"]) for c in cells("index.ipynb"))
    assert f"[{question}]({page})" in landing


def test_the_changes_are_a_page_and_the_search_is_on():
    assert (nbs / "changelog.md").resolve() == root / "CHANGELOG.md" and "changelog.md" in website.START
    assert "search: true" in (root / "_quarto.yml").read_text(encoding="utf-8")
    assert "changelog.html)" in website.llms() and "gallery.html.md)" in website.llms()


def test_no_text_was_left_in_the_middle_of_a_merge():
    marks = re.compile(r"^(<{7} |>{7} |={7}$)", re.M)
    texts = [*root.glob("*.md"), *(root / "tests").glob("*.md"), *(root / "benchmarks").glob("*.md"), *nbs.rglob("[!.]*.ipynb")]
    assert not [path.name for path in texts if marks.search(path.read_text(encoding="utf-8"))]


PAGES = [p for folder in ("tutorials", "howto", "explanations") for p in website.chapters(folder)]
PAGES += [p for p in website.START if p.endswith(".ipynb")]


@pytest.mark.parametrize("path", PAGES)
def test_links_of_pages_for_users_lead_somewhere(path):
    "Without the site's build; `tools/checks.py docs` looks at every page as it is built, anchors too."
    text = "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown") + shown(path)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = link.partition("#")[0]
        if target and ":" not in target: assert (nbs / path).parent.joinpath(target).exists(), link
