"""Move, merge and rename modules by one table: python tools/move.py tools/moves.txt

A line of the table is one of
    OLD.py  NEW.py         moves a file
    OLD.py  > NEW.py       appends the body of OLD to NEW (imports are joined; names must not
    collide)
    name MODULE OLD NEW    renames an identifier in MODULE and in the files that import it from
    there
    word OLD NEW           renames an identifier everywhere, in strings and comments too
    text OLD => NEW        replaces a piece of text everywhere
Paths are relative to the root of the project. Tests that mirror a moved module move with it. Every
import, dotted name and path in tracked text follows, but for CHANGELOG.md and docs/LOG.md, which
tell of what was.
A line whose OLD is not there is passed over, so that the table may be applied to a branch that has
moved on."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalOperand=false

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

HISTORY = {"CHANGELOG.md", "docs/LOG.md", "tools/moves.txt", "tools/move.py"}
CODE = ("pipeline", "tests", "recipes", "benchmarks", "infra", "tools")


def dotted(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and Path(name).is_file()]


def read_table(path: str) -> tuple[dict[str, str], dict[str, list[str]], list[list[str]]]:
    moves: dict[str, str] = {}
    merges: dict[str, list[str]] = {}
    renames: list[list[str]] = []
    for line in Path(path).read_text().splitlines():
        parts = line.split("#")[0].split()
        if not parts:
            continue
        if parts[0] == "text":
            renames.append(
                ["text", *(text.strip() for text in line.removeprefix("text ").split("=>"))]
            )
        elif parts[0] in ("word", "name"):
            renames.append(parts)
        elif parts[1] == ">":
            if Path(parts[0]).is_file():
                merges.setdefault(parts[2], []).append(parts[0])
        elif Path(parts[0]).is_file():
            moves[parts[0]] = parts[1]
    return moves, merges, renames


def renamed(text: str, renames: list[list[str]], module: str) -> str:
    for kind, *parts in renames:
        if kind == "text":
            text = text.replace(*parts)
            continue
        old, new = parts[-2:]
        if kind == "name" and module != parts[0]:
            imports = rf"from {re.escape(parts[0])} import (?:\([^)]*?\b{old}\b|[^(\n]*?\b{old}\b)"
            if not re.search(imports, text):
                parent, _, base = parts[0].rpartition(".")
                if re.search(rf"from {re.escape(parent)} import [^\n]*\b{base}\b", text):
                    text = re.sub(rf"(?<!\w){base}\.{old}(?!\w)", f"{base}.{new}", text)
                continue
        text = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", new, text)
    return text


def with_tests(moves: dict[str, str], merges: dict[str, list[str]]) -> None:
    """Adds the move of each test file that mirrors a moved or merged module."""
    taken = set(moves.values())
    pairs = [*moves.items(), *((old, new) for new, olds in merges.items() for old in olds)]
    for old, new in pairs:
        if not old.startswith("pipeline/"):
            continue
        parent, base = old.removeprefix("pipeline/").rpartition("/")[::2]
        test = "/".join(filter(None, ("tests", parent, f"test_{base}")))
        if not Path(test).is_file() or test in moves:
            continue
        new_parent, new_base = new.removeprefix("pipeline/").rpartition("/")[::2]
        target = "/".join(filter(None, ("tests", new_parent, f"test_{new_base}")))
        if target in taken or (Path(target).is_file() and target not in moves and target != test):
            target = "/".join(filter(None, ("tests", new_parent, f"test_{base}")))
        if target in taken:
            sys.exit(f"move: two tests would be {target}: name one of them in the table")
        if target != test:
            moves[test] = target
            taken.add(target)


class Names:
    """Where each module and path is after the moves."""

    def __init__(self, final: dict[str, str]) -> None:
        self.modules = {dotted(old): dotted(new) for old, new in final.items()}
        texts: dict[str, str] = {}
        for old, new in final.items():
            texts[old] = new
            texts[dotted(old)] = dotted(new)
            for root in ("pipeline/", "tests/"):
                short = old.removeprefix(root)
                if short != old and "/" in short:
                    texts.setdefault(short, new.removeprefix(root))
        texts = {old: new for old, new in texts.items() if old != new and "." in old}
        alternatives = "|".join(re.escape(old) for old in sorted(texts, key=len, reverse=True))
        # A dotted name ends where no further word character follows; a path may not begin in the
        # middle of another.
        self.pattern = re.compile(rf"(?<![\w/.])(?:{alternatives})(?![\w])") if texts else None
        self.texts = texts

    def in_text(self, text: str) -> str:
        if self.pattern is None:
            return text
        return self.pattern.sub(lambda found: self.texts[found.group()], text)


def bound_names(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def rewritten(source: str, names: Names, here: str) -> str:
    """One Python file with its imports and dotted names moved; `here` is its new dotted name."""
    tree = ast.parse(source)
    lines = source.split("\n")
    edits: list[tuple[int, int, list[str]]] = []
    local: dict[
        str, str
    ] = {}  # names of modules that are called otherwise now; "" where they are this file
    used = bound_names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        inner = [a for a in node.names if f"{node.module}.{a.name}" in names.modules]
        if not inner and names.modules.get(node.module, "") != here:
            continue
        margin = " " * node.col_offset
        new_lines = []
        rest = [a for a in node.names if a not in inner]
        if rest and names.modules.get(node.module, node.module) != here:
            target = names.modules.get(node.module, node.module)
            listed = ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in rest)
            new_lines.append(f"{margin}from {target} import {listed}")
        elif rest:
            for a in rest:
                if a.asname and a.asname != a.name:
                    local[a.asname] = a.name
        for a in inner:
            target = names.modules[f"{node.module}.{a.name}"]
            parent, _, base = target.rpartition(".")
            bound = a.asname or a.name
            if target == here:
                local[bound] = ""
                continue
            if bound == base:
                new_lines.append(f"{margin}from {parent} import {base}")
            elif a.asname or base in used:
                new_lines.append(f"{margin}from {parent} import {base} as {bound}")
            else:
                new_lines.append(f"{margin}from {parent} import {base}")
                local[bound] = base
        comment = re.search(r"(  # noqa.*)$", lines[node.end_lineno - 1])
        if comment and new_lines:
            new_lines[-1] += comment.group(1)
        edits.append((node.lineno - 1, node.end_lineno, new_lines))
    # Uses of modules under another name; attributes of this very file lose their prefix.
    changes: dict[int, list[tuple[int, int, str]]] = {}
    if local:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and local.get(node.value.id) == ""
            ):
                start = node.value
                changes.setdefault(start.lineno, []).append(
                    (start.col_offset, start.end_col_offset + 1, "")
                )
            elif isinstance(node, ast.Name) and local.get(node.id):
                changes.setdefault(node.lineno, []).append(
                    (node.col_offset, node.end_col_offset, local[node.id])
                )
    for number, parts in changes.items():
        raw = lines[number - 1].encode()
        for start, end, text in sorted(set(parts), reverse=True):
            raw = raw[:start] + text.encode() + raw[end:]
        lines[number - 1] = raw.decode()
    for start, end, new in sorted(edits, reverse=True):
        # Lines of new imports hold final names already: a mark keeps them from being moved twice.
        lines[start:end] = ["\0" + line for line in new]
    out = [line[1:] if line.startswith("\0") else None for line in lines]
    text = names.in_text(
        "\n".join("" if done is not None else line for line, done in zip(lines, out, strict=True))
    )
    return "\n".join(
        done if done is not None else line for line, done in zip(text.split("\n"), out, strict=True)
    )


def split(source: str) -> tuple[str, list[str], str, dict[str, str]]:
    """Docstring, imports, body and top-level names (with their source) of a module."""
    tree = ast.parse(source)
    lines = source.split("\n")
    doc = ast.get_docstring(tree) or ""
    imports: list[str] = []
    taken: set[int] = set()
    defined: dict[str, str] = {}
    for at, node in enumerate(tree.body):
        span = range(node.lineno - 1, node.end_lineno)
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append("\n".join(lines[i] for i in span))
            taken |= set(span)
        elif at == 0 and doc and isinstance(node, ast.Expr):
            taken |= set(span)
        else:
            text = "\n".join(lines[i] for i in span)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined[node.name] = text
            elif isinstance(node, ast.Assign):
                defined |= {t.id: text for t in node.targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined[node.target.id] = text
    body = "\n".join(line for i, line in enumerate(lines) if i not in taken).strip("\n")
    return doc, imports, body, defined


def merged(sources: list[tuple[str, str]]) -> str:
    """One module made of several, given as (path, source); the first leads."""
    docs, imports, bodies = [], [], []
    names: dict[str, str] = {}
    for path, source in sources:
        doc, its, body, defined = split(source)
        for name, text in defined.items():
            if name in names and name not in ("__all__",):
                if names[name] != text:
                    sys.exit(f"move: {path} brings a second {name}")
                body = body.replace(text, "", 1)
        names |= defined
        docs.append(doc)
        imports += its
        bodies.append(body)
    future = [line for line in imports if "__future__" in line]
    others = [line for line in imports if "__future__" not in line]
    doc = "\n\n".join(filter(None, docs))
    quote = '"""'
    prefix = "r" if "\\" in doc else ""
    head = f"{prefix}{quote}{doc}\n{quote}" if "\n" in doc else f"{prefix}{quote}{doc}{quote}"
    return (
        "\n\n".join(
            filter(
                None,
                [
                    head if doc else "",
                    "\n".join(dict.fromkeys(future)),
                    "\n".join(dict.fromkeys(others)),
                    "\n\n\n".join(bodies),
                ],
            )
        )
        + "\n"
    )


def main(table: str) -> None:
    moves, merges, renames = read_table(table)
    with_tests(moves, merges)
    final = dict(moves)
    for new, olds in merges.items():
        for old in olds:
            final[old] = new
    names = Names(final)
    files = tracked()
    contents: dict[str, str] = {}
    for path in files:
        if path in HISTORY or path.startswith(table):
            continue
        try:
            text = Path(path).read_text()
        except UnicodeDecodeError:
            continue
        new = final.get(path, path)
        if path.endswith(".py") and path.split("/")[0] in CODE:
            text = rewritten(renamed(text, renames, dotted(path)), names, dotted(new))
        else:
            text = names.in_text(renamed(text, renames, ""))
        contents[path] = text
    for old in final:
        Path(old).unlink()
    for path, text in contents.items():
        if path in final and path not in moves:
            continue  # a merged file is written below
        new = Path(moves.get(path, path))
        new.parent.mkdir(parents=True, exist_ok=True)
        if not new.exists() or new.read_text() != text:
            new.write_text(text)
    for new, olds in merges.items():
        parts = [
            path for path in contents if moves.get(path, path) == new and path not in olds
        ] + olds
        Path(new).parent.mkdir(parents=True, exist_ok=True)
        Path(new).write_text(merged([(path, contents[path]) for path in parts]))
    for new in list(final.values()):
        for folder in Path(new).parents:
            if folder.parts[:1] == ("pipeline",):
                (folder / "__init__.py").touch()
    for folder in sorted({parent for old in final for parent in Path(old).parents}, reverse=True):
        left = (
            list(folder.rglob("*")) if folder.parts[:1] == ("pipeline",) and folder.exists() else []
        )
        if [path.name for path in left if "__pycache__" not in path.parts] == ["__init__.py"]:
            (folder / "__init__.py").unlink()  # nothing but an empty package is left
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
    ruff = os.environ.get("RUFF", "ruff")
    subprocess.run(
        [ruff, "check", "-q", "--select", "I,F401,F811", "--fix", "--exit-zero", "."], check=True
    )
    subprocess.run([ruff, "format", "-q", "."], check=True)
    subprocess.run(["git", "add", "-A"], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
