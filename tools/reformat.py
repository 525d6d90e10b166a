"""Rewrite every tracked Python file to lines of 100 columns: python tools/reformat.py

Code is formatted by ruff, long strings are split by black (whose string processing ruff lacks), and
docstrings and comments are wrapped here. A file whose syntax tree would change, but for white space
in docstrings, is refused. black need not be installed in the environment: name its program in
BLACK.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalOperand=false

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

COLUMNS = 100
# a line that the next word would have carried past this column was wrapped, not ended on purpose
FULL = 112
ITEM = re.compile(r"([-*+] |\d+[.)] |>>> |\| )")
FIELD = re.compile(r"[A-Z]\w*:")
PRAGMA = re.compile(r"#\s*(noqa|type:|pyright:|pragma|ruff:|fmt:)")


def wrap(text: str, first: str, rest: str) -> list[str]:
    """`text` in lines of at most COLUMNS, which begin with `first` and then with `rest`."""
    words = re.findall(r"\S+|(?<=\S) {2,}(?=\S)", text)
    lines, line, gap = [], first, ""
    empty = True
    for word in words:
        if word.isspace():
            gap = word
            continue
        extra = "" if empty else (gap or " ")
        gap = ""
        if not empty and len(line) + len(extra) + len(word) > COLUMNS:
            lines.append(line)
            line, extra = rest, ""
        line += extra + word
        empty = False
    return [*lines, line]


def wrapped(lines: list[str]) -> list[str]:
    """Lines of one block of text, with its indentation; those that are too wide are wrapped."""
    out: list[str] = []
    at = 0
    while at < len(lines):
        group = [lines[at]]
        while at + len(group) < len(lines) and continues(
            group[-1], lines[at + len(group)], len(group) == 1
        ):
            group.append(lines[at + len(group)])
        at += len(group)
        if all(len(line) <= COLUMNS for line in group):
            out += group
            continue
        first = indent(group[0])
        body = group[0][len(first) :]
        if len(group) > 1:
            rest = indent(group[1])
        elif found := ITEM.match(body) or re.match(r"[A-Z]\w*: {2,}", body):
            rest = first + " " * len(found.group())
        else:
            rest = first
        out += wrap(" ".join([body, *(line.strip() for line in group[1:])]), first, rest)
    return out


def continues(line: str, following: str, is_second: bool) -> bool:
    """Whether `following` is the rest of a sentence that was wrapped at the end of `line`."""
    body = following.strip()
    if not line.strip() or not body or ITEM.match(body) or (FIELD.match(body) and is_heading(body)):
        return False
    deeper = len(indent(following)) - len(indent(line))
    if deeper and not (is_second and deeper > 0):
        return False
    return len(line) + 1 + len(body.split()[0]) > FULL


def is_heading(body: str) -> bool:
    return bool(
        re.match(
            r"(Args|Raises|Returns|Yields|Source|Result|Command|Note|Differs|Data|Cost)\b.*:", body
        )
    )


def indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def docstrings(tree: ast.Module):
    """Strings that stand alone: of modules, classes, functions, and those below a field."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node


def rewrapped(source: str) -> str:
    lines = source.split("\n")
    edits: list[tuple[int, int, list[str]]] = []
    for node in docstrings(ast.parse(source)):
        start, end = node.lineno - 1, node.end_lineno
        block = lines[start:end]
        if all(len(line) <= COLUMNS for line in block):
            continue
        margin = indent(block[0])
        closing = block[-1].rstrip().endswith('"""') and block[-1].strip() != '"""'
        # A paragraph of text may end with the closing quotes: they count as part of its last word.
        new = wrapped(block)
        if len(block) == 1 and closing:
            new = [*new[:-1], new[-1][:-3], margin + '"""'] if new[-1].strip() != '"""' else new
        edits.append((start, end, new))
    for start, end, new in sorted(edits, reverse=True):
        lines[start:end] = new
    source = "\n".join(lines)

    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0] - 1] = token
    lines = source.split("\n")
    out: list[str] = []
    at = 0
    while at < len(lines):
        token = comments.get(at)
        if token is None:
            out.append(lines[at])
            at += 1
            continue
        margin = lines[at][: token.start[1]]
        if margin.strip():  # behind code
            text, pragma = token.string, ""
            if PRAGMA.match(text):
                pragma, _, text = text.partition("  # ")
                text = text and "# " + text
            if len(lines[at]) > COLUMNS and text:
                out += comment(indent(lines[at]), [text])
                out.append((margin + pragma).rstrip())
            else:
                out.append(lines[at])
            at += 1
            continue
        block = []
        while (
            at < len(lines)
            and at in comments
            and lines[at].strip().startswith("#")
            and indent(lines[at]) == margin
        ):
            block.append(comments[at].string)
            at += 1
        out += comment(margin, block)
    return "\n".join(out)


def comment(margin: str, block: list[str]) -> list[str]:
    if all(len(margin) + len(line) <= COLUMNS for line in block):
        return [margin + line for line in block]
    out = []
    # The text behind "# " is wrapped as if it stood alone.
    block = [headed(line, COLUMNS - len(margin)) for line in block]
    texts = [margin + "  " + line[2:] if line.startswith("# ") else None for line in block]
    run: list[str] = []

    def flush() -> None:
        out.extend(margin + "# " + line[len(margin) + 2 :] for line in wrapped(run))
        run.clear()

    for text, line in zip(texts, block, strict=True):
        if text is None:
            flush()
            out.append(margin + line)
        else:
            run.append(text)
    flush()
    return out


def headed(line: str, columns: int) -> str:
    """A comment of dashes, with or without a title behind them, shortened to `columns`."""
    found = re.fullmatch(r"(# ?)(-{20,})(.*)", line)
    if not found:
        return line
    start, dashes, title = found.groups()
    return start + dashes[: columns - len(start) - len(title)] + title


def meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in docstrings(tree):
        node.value.value = " ".join(node.value.value.split())
    return ast.dump(tree)


def main() -> None:
    settings = Path("pyproject.toml")
    settings.write_text(
        re.sub(r"(?m)^line-length = \d+", f"line-length = {COLUMNS}", settings.read_text())
    )
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py"], capture_output=True, text=True, check=True
    )
    files = [Path(name) for name in listed.stdout.split("\0") if name and Path(name).exists()]
    before = {path: meaning(path.read_text()) for path in files}
    for path in files:  # tables that were aligned by hand are too wide now
        text = re.sub(r"(?m)^ *# fmt: (off|on)\n|  # fmt: skip$", "", path.read_text())
        path.write_text(text)
    ruff, black = os.environ.get("RUFF", "ruff"), os.environ.get("BLACK", "black")
    names = [str(path) for path in files]
    subprocess.run([ruff, "format", "-q", *names], check=True)
    splits = [
        "--line-length",
        str(COLUMNS),
        "--preview",
        "--enable-unstable-feature",
        "string_processing",
    ]
    subprocess.run([black, "-q", *splits, *names], check=True)
    subprocess.run([ruff, "format", "-q", *names], check=True)
    for path in files:
        old = path.read_text()
        new = rewrapped(old)
        if new != old:
            path.write_text(new)
    subprocess.run([ruff, "format", "-q", *names], check=True)
    changed = [str(path) for path, was in before.items() if meaning(path.read_text()) != was]
    if changed:
        sys.exit(f"reformat: the meaning changed of {', '.join(changed)}")


if __name__ == "__main__":
    main()
