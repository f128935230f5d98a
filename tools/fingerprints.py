"""Fingerprints of what the patches stand in for in TRL: `python tools/fingerprints.py write | moved FOLDER`.

`write` reads the tested versions of TRL (installed, or brought by overlay_trl.py) and writes grpo_nb/trainers/trl_sources.json.
`moved` lists what of the TRL in a folder has a source that no tested version has, with the differences. TRL's files are only read,
never imported, so a version that cannot be imported here can be looked at."""
import ast
import base64
import json
import lzma
import sys
from importlib.metadata import distribution
from pathlib import Path

from overlay_trl import installed_in, overlay

from grpo_nb.patch.fingerprint import fingerprint, plain
from grpo_nb.trainers import drift, seams


class Tree:
    "The source of one TRL."
    def __init__(self, folder): self.folder, self.read = Path(folder), {}

    def module(self, name):
        "The same as `parsed`, once."
        if name not in self.read: self.read[name] = self.parsed(name)
        return self.read[name]

    def parsed(self, name):
        "(text, {name: node} of its definitions and their methods, {name: where it was imported from})."
        path = self.folder.joinpath(*name.split("."))
        file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
        if file is None: return "", {}, {}
        text, package = file.read_text(encoding="utf-8"), name if file.name == "__init__.py" else name.rpartition(".")[0]
        found, imported = {}, {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                imported |= {a.asname or a.name: (source, a.name) for a in node.names}
        for node in self.top(ast.parse(text).body):
            found[node.name] = node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef): found[f"{node.name}.{inner.name}"] = inner
        return text, found, imported

    def top(self, body):
        "Definitions of a module, those inside `if` and `try` too."
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef): yield node
            for name in ("body", "orelse", "handlers", "finalbody"):
                if isinstance(node, ast.If | ast.Try | ast.ExceptHandler): yield from self.top(getattr(node, name, []))

    def home(self, module, name):
        "(module, name) where something that a module names is defined; None outside TRL."
        for _ in range(9):
            if not module.startswith("trl"): return None
            _, found, imported = self.module(module)
            if name in found: return module, name
            if name not in imported: return None
            module, name = imported[name]
        return None

    def method(self, module, cls, name):
        "(module, 'Class.name') of a method, of the class or a base of TRL's."
        _, found, _ = self.module(module)
        if f"{cls}.{name}" in found: return module, f"{cls}.{name}"
        for base in found[cls].bases if cls in found else ():
            home = self.home(module, base.id) if isinstance(base, ast.Name) else None
            if home and (there := self.method(*home, name)): return there
        return None

    def find(self, target):
        "(module, name) of a target as the data name it; None where TRL has none."
        module, _, name = target.partition(":")
        cls, _, method = name.partition(".")
        return self.method(module, cls, method) if method else self.home(module, name)

    def node(self, place): return self.module(place[0])[1][place[1]]

    def text(self, place): return "\n".join(line(self, place))

    def calls(self, place, cls):
        "What of TRL's a definition names: methods of `self`, functions and classes."
        module, name = place
        node = self.node(place)
        inside = [node.args, *node.body] if not isinstance(node, ast.ClassDef) else node.body
        for n in (n for part in inside for n in ast.walk(part)):
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in ("self", "cls") and cls:
                if there := self.method(*cls, n.attr): yield there
            if isinstance(n, ast.Name) and (there := self.home(module, n.id)): yield there


def line(tree, place):
    "The lines of a definition, its decorators too."
    text, node = tree.module(place[0])[0].splitlines(), tree.node(place)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return text[first - 1 : node.end_lineno]


def absolute(part, method):
    "A target in full."
    if ":" in method: return method
    return f"{seams.HOMES[part.partition(' ')[0]].trainer}.{method}"


def closure(tree, part):
    "{target: (module, name) or None}: what a part stands in for or leans on."
    spec, found = drift.PARTS[part], {}

    def add(target, deep):
        place, module, name = tree.find(target), *target.split(":")
        found[target] = place
        if place is None or not deep: return
        cls = (module, name.partition(".")[0]) if "." in name else None
        for inner in tree.calls(place, cls):
            own = cls and "." in inner[1]
            then = f"{module}:{cls[1]}.{inner[1].partition('.')[2]}" if own else ":".join(inner)
            if then not in found and small(tree.node(inner)): add(then, True)

    for method in spec.rewritten: add(absolute(part, method), True)
    for method in spec.leaned: found.setdefault(absolute(part, method), tree.find(absolute(part, method)))
    return found


def small(node):
    "A class is one definition; a trainer is none."
    return not isinstance(node, ast.ClassDef) or node.end_lineno - node.lineno < 400


def trees():
    "(minor version, Tree) of each tested TRL, the oldest first."
    installed = distribution("trl")
    for minor in seams.minor_versions(seams.TESTED.first, seams.TESTED.last):
        if installed.version == f"{minor}.0": yield minor, Tree(installed.locate_file(""))
        else: yield minor, Tree(overlay(f"{minor}.0")[0])


def write():
    "Write trl_sources.json."
    parts, texts, newest = {}, {}, {}
    for version, tree in trees():
        for part in drift.PARTS:
            home = seams.HOMES.get(part.partition(" ")[0])
            if home and not tree.module(home.trainer.partition(":")[0])[1]: continue
            newest[part] = []
            for target, place in closure(tree, part).items():
                found = fingerprint(tree.node(place)) if place else drift.NONE
                parts.setdefault(part, {}).setdefault(target, {}).setdefault(found, []).append(version)
                if place: newest[part].append((found, tree.text(place)))
    for each in newest.values(): texts |= {found: "\n".join(plain(text)) for found, text in each}
    assert all(fingerprint(text) == found for found, text in texts.items())
    def one(prints): return {f: " ".join(versions) for f, versions in prints.items()}
    joined = {part: {target: one(prints) for target, prints in sorted(each.items())} for part, each in parts.items()}
    packed = base64.b85encode(lzma.compress(json.dumps(texts, sort_keys=True).encode(), preset=9)).decode()
    drift.FILE.write_text(json.dumps({"parts": joined, "sources": packed}, indent=0) + "\n", encoding="utf-8")
    count = sum(map(len, joined.values()))
    print(f"{count} places of {len(joined)} parts, {len(texts)} sources, {drift.FILE.stat().st_size} bytes")


def report(folder):
    "What moved in the TRL of a folder, as text."
    tree, there = Tree(folder), installed_in(folder).version
    def found(target):
        place = tree.find(target)
        return drift.MISSING if place is None else tree.text(place)
    lines = [f"TRL {there}: what the patches stand in for or lean on, against the tested versions"]
    seen = set()
    for part in drift.PARTS:
        home = seams.HOMES.get(part.partition(" ")[0])
        if home and not tree.module(home.trainer.partition(":")[0])[1]:
            lines.append(f"  {part}: not in this TRL")
            continue
        moved = drift.moved(part, there, found)
        version = drift.compared_with(part, there)
        lines.append(f"  {part}: " + (drift.listed(moved) + f" {'is' if len(moved) == 1 else 'are'} not as in TRL {version}"
                                      if moved else f"as in TRL {version}"))
        for m in moved:
            if m.target not in seen: lines += ["    " + text for text in m.difference.splitlines()]
            seen.add(m.target)
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]: write()
    elif len(sys.argv) == 3 and sys.argv[1] == "moved": print(report(sys.argv[2]))
    else: sys.exit("usage: python tools/fingerprints.py write | moved FOLDER")
