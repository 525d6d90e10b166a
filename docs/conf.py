"""The documentation site. `make docs` writes it to docs/_build/html. It needs no server.

The pages are also readable where they lie. Three things are filled in here, in the text of a page:

    <!-- text of ../CONTRIBUTING.md -->   the text of a file outside docs/
    ```{api}                              documentation of the dotted names in the block
    ```{commands}                         the options of every command
"""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from typer.main import get_command

from pipeline.cli.app import app as command_line

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))  # notebooks import recipes

project = "spiketrain"
copyright = "the authors of spiketrain, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_copybutton"]
exclude_patterns = ["_build", "questions.md"]
nitpicky = True
# Types of other packages, and of our own that the API does not list: no other site is asked.
nitpick_ignore_regex = [("py:.*", ".*")]
highlight_language = "none"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress, and warnings that name paths of this machine
smartquotes = False

autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 72
add_module_names = False
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "pydata_sphinx_theme"
html_title = "spiketrain"
html_show_sphinx = False
html_context = {"default_mode": "auto"}
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_sidebars = {page: [] for page in ("index", "start", "overview", "results")}
html_theme_options = {
    "logo": {"text": "spiketrain"},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": {"**": ["page-toc"], "LOG": [], "changes": []},
    "footer_start": ["copyright"],
    "footer_end": [],
}
# One file of a package in place of a server of MathJax; SVG needs no fonts.
_mathjax = distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline")
html_static_path.append(f"{_mathjax}/static/mathjax/tex-svg.js")
mathjax_path = "tex-svg.js"

# Pages that have the text of a file elsewhere, by the path of this file from docs/.
WHOLE = re.compile(r"<!-- text of (\S+) -->")
PAGES = {
    match[1]: page.name
    for page in DOCS.glob("*.md")
    if (match := WHOLE.search(page.read_text())) is not None
}


def setup(app: Any) -> None:
    app.connect("source-read", _fill_in)
    app.connect("autodoc-process-docstring", _as_rst)


def _fill_in(app: Any, page: str, source: list[str]) -> None:
    for path in WHOLE.findall(source[0]):
        app.env.note_dependency(str(DOCS / path))
    text = WHOLE.sub(lambda match: _text_of(match[1]), source[0])
    for path, name in PAGES.items():
        text = re.sub(
            rf"\]\((?:\.\./)*{re.escape(path.removeprefix('../'))}(?=[)#])", f"](/{name}", text
        )
    text = re.sub(r"```\{api\}\n(.*?)```", lambda match: _api(match[1]), text, flags=re.DOTALL)
    source[0] = text.replace("```{commands}\n```", "\n".join(_commands()))


def _text_of(path: str) -> str:
    """A file without its heading. Its links into docs/ become links of the site."""
    _, _, text = (DOCS / path).read_text().partition("\n")
    text = re.sub(r"\[([^]]+)\]\(LICENSE\)", r"\1", text)
    return re.sub(r"\]\((?:\.\./)?docs/", "](/", text)


def _api(names: str) -> str:
    lines = ["```{eval-rst}"]
    for name in names.split():
        directive = "autoclass" if isinstance(resolve_name(name), type) else "autofunction"
        lines += [f".. {directive}:: {name}", ""]
    return "\n".join([*lines, "```"])


def _commands() -> Iterator[str]:
    for words, command in _leaves("spiketrain", get_command(command_line)):
        yield f"\n### {words}\n\n{_plain(command.help)}\n"
        example = (command.epilog or "").removeprefix("Example: ").replace("; ", "\n")
        yield f"```sh\n{example}\n```\n"
        yield "| argument or option | meaning |\n|---|---|"
        for each in command.params:
            if not getattr(each, "hidden", False):
                yield f"| {_usage(each)} | {_plain(_help_of(each))} |"


def _leaves(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield words, command
    for name, each in getattr(command, "commands", {}).items():
        yield from _leaves(f"{words} {name}", each)


def _usage(parameter: Any) -> str:
    of = parameter.type_descriptor
    kind = "" if of.annotation in (bool, None) else getattr(of.annotation, "__name__", "")
    value = parameter.metavar or "|".join(map(str, of.choices or ())) or kind.upper()
    if parameter.param_type_name == "option":
        value = f"{'/'.join(parameter.opts)} {value}".strip()
    return f"`{value or parameter.name.upper()}`".replace("|", r"\|")


def _help_of(parameter: Any) -> str:
    text, default = parameter.help or "", parameter.default
    is_said = isinstance(default, bool) or not default or "default:" in text
    return text if is_said or callable(default) else f"{text}; default: {default}"


def _plain(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", r"\|").replace("<", r"\<")


# A docstring of this project is plain text: an indented paragraph is an equation or code, and
# `Args:`, `Fields:` and `Raises:` have lists below them or text beside them.


def _as_rst(app: Any, what: str, name: str, part: Any, options: Any, lines: list[str]) -> None:
    made: list[str] = []
    mode = "text"
    for line in map(str.rstrip, lines):
        heading = re.match(r"(Args|Fields|Raises|Source):(?: (.*))?$", line)
        if heading is not None:
            title = {"Args": "Arguments"}.get(heading[1], heading[1])
            made += ["", f"**{title}:** {_inline(heading[2] or '')}", *([] if heading[2] else [""])]
            mode = "text" if heading[2] else "list"
        elif not line.startswith("    ") and line:
            made += [*([""] if mode in ("list", "literal") else []), _inline(line)]
            mode = "text"
        elif mode == "list" and (item := re.match(r"    ([\w*][\w*., ]*): (.*)$", line)):
            made += ["", f"* ``{item[1]}``: {_inline(item[2])}"]
        elif mode == "list" and line:
            made.append(f"  {_inline(line.strip())}")
        elif line:
            made += ([] if mode == "literal" else ["", "::", ""]) + [line]
            mode = "literal"
        else:
            made.append("")
    lines[:] = made


def _inline(text: str) -> str:
    """Backticks as code; what RST would read as markup, as it is."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*|\\])|(?<=\w)_(?!\w)", _escaped, each) for each in parts[::2]]
    return "``".join(parts)


def _escaped(match: re.Match[str]) -> str:
    return f"\\{match[0]}"
