"""What the site's generated pages say: the gallery's table and the glossary of settings, as Markdown.

nbs/gallery.ipynb and nbs/settings.ipynb show it; tests/test_site.py holds that they show what it is now."""
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "tools"))
import website

OPEN = { # where a notebook can be opened, by the path of its file in the repository
    "Colab": "https://colab.research.google.com/github/{at}",
    "Kaggle": "https://kaggle.com/kernels/welcome?src=https://github.com/{at}",
    "molab": "https://molab.marimo.io/github/{at}",
}


def address(path):
    "A notebook's file as GitHub, Colab and the others name it."
    return f"{website.settings()['repository'].removeprefix('https://github.com/')}/blob/main/nbs/{path}"


def gallery_row(path):
    "A notebook's line of the table, from its own front."
    (title, sentence), said = website.heading(path), website.front(path)
    openers = " · ".join(f"[{name}]({url.format(at=address(path))})" for name, url in OPEN.items())
    about = [said.get(name, "") for name in ("Machine", "Time", "Cost", "Held-out")]
    cells = (f"[**{title}**]({path})<br>{sentence}", *about, openers)
    return f"| {' | '.join(cells)} |"


def gallery_table():
    "Every notebook that says what it needs, in the sidebar's order."
    paths = [p for folder in ("tutorials", "gallery") for p in website.chapters(folder) if "Time" in website.front(p)]
    widths = "|".join("-" * n for n in (40, 14, 8, 14, 18, 12)) # of the columns
    head = ["| notebook | machine | time | cost | held-out, before and after | open in |", f"|{widths}|"]
    return "\n".join([*head, *map(gallery_row, paths)])


def written(value):
    "A default as it stands in a program; a dash where it is left open."
    return "–" if value is None else f"`{value!r}`"


def settings_row(s):
    "A setting's line: its name, which can be linked to, its default, its sentence and what it takes."
    takes = ", ".join(f"`{choice!r}`" for choice in s.choices if type(choice) is str)
    return f'| <a id="{s.name}"></a>`{s.name}` | {written(s.default)} | {s.says}{takes and f" Takes {takes}."} |'


CALLS = {"model": "An argument of `FastLanguageModel.from_pretrained`.",
         "lora": "An argument of `FastLanguageModel.get_peft_model`.",
         "config": "A field of `GRPOConfig`, or of the dict that `GRPORun(config=...)` takes."}


def settings_text():
    "Every setting of the panel, by group, with its sentence there; then the fields of ours that have no row in it."
    from grpo_nb.trainers.config import FIELDS
    from grpo_nb.ui.parts.fields import GROUPS, settings

    lines, head = [], ["", "| setting | default | what it does |", f"|{'-' * 26}|{'-' * 16}|{'-' * 58}|"]
    for name, rows in GROUPS.items(): lines += [f"## {name}", "", CALLS[rows[0].part], *head, *map(settings_row, rows), ""]
    lines += ["## Fields without a row in the panel", "", "Ours, beside TRL's; in `GRPOConfig` once TRL is patched.", *head]
    own = {name: field for name, field in FIELDS.items() if name not in settings()}
    lines += [f'| <a id="{name}"></a>`{name}` | {written(default)} | {text} |' for name, (_, default, text) in own.items()]
    return "\n".join(lines) + "\n"
