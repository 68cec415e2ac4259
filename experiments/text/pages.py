r"""Text that is on the machine already: manual pages in many languages, and Python's documentation.

Debian keeps translated pages below ``/usr/share/man/LANGUAGE``. ``apt-get install manpages-de
manpages-fr manpages-es manpages-it manpages-nl manpages-da manpages-ro manpages-pl`` adds some
hundred pages each; others come with dpkg, apt, man-db, procps and so on, where ``dpkg`` was not
told to leave them out (``/etc/dpkg/dpkg.cfg.d/``). Other text: one folder per domain.

A page is the text below one name; the names are alike in all languages.
"""

import ast
import gzip
import re
import sysconfig
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ksm_ext.checks import message

MANUALS = Path("/usr/share/man")
LANGUAGES = ("de", "nl", "sv", "da", "fr", "es", "it", "pt", "ro", "pl")
DOMAINS = ("en", "python", *LANGUAGES)
"""Without a folder of one's own: all in one script, since another one would drown the rest."""

Pages = dict[str, str]
"""Texts by name."""

_COMMENT = re.compile(r"""[.'\s]*\\["#]|\.\.|\.de|\.ig""")
_TITLED = re.compile(r"[.']\s*(?:SH|SS|B|I|BR|BI|IR|RB|IB|RI|SM|IP|TP|Nm|Sh|Ss)\s+(.*)")
_ESCAPES = (
    (re.compile(r"\\f(?:\[[^]]*\]|\(..|.)"), ""),  # fonts
    (re.compile(r"\\[-e]"), "-"),
    (re.compile(r"\\(?:aq|\(aq|\[aq\]|\(cq|\[cq\])"), "'"),
    (re.compile(r"\\\*?(?:\(..|\[[^]]*\])|\\s[-+]?\d+|\\[&|^/,%:cd~ 0u]"), ""),
    (re.compile(r"\\."), ""),
)


def domains_of(path: str | None, names: tuple[str, ...]) -> dict[str, Pages]:
    """The pages of each domain: of the folders in ``path``, or of this machine.

    Raises:
        ValueError: If there is no text of a domain.
    """
    if path is None:
        found = {name: _of_machine(name) for name in names or DOMAINS}
        remedy = (
            "Install it (apt-get install man-db, and manpages-de, -fr, ... for languages), name "
            "other domains (data.domains), or give a folder with one of text per domain (--data)."
        )
    else:
        root = Path(path)
        folders = sorted(x.name for x in root.iterdir() if x.is_dir()) if root.is_dir() else []
        found = {name: _of_folder(root / name) for name in names or folders}
        remedy = (
            "Put text files into one folder per domain, three or more; --set data.domains=[] takes "
            "all of them."
        )
    empty = [name for name, pages in found.items() if not pages]
    if empty or len(found) < 3:
        missing = f"none of {', '.join(empty)}" if empty else f"{len(found)} domains"
        where = str(MANUALS) if path is None else path
        raise ValueError(message("data", f"text of every domain in {where}", missing, remedy))
    return found


def _of_machine(name: str) -> Pages:
    if name == "python":
        return _docstrings()
    if name == "en":  # of tens of thousands those that someone found worth translating
        files = [p for lang in LANGUAGES for p in (MANUALS / lang).glob("man*/*.gz")]
        return _manual_pages(MANUALS / p.parent.name / p.name for p in files)
    return _manual_pages((MANUALS / name).glob("man*/*.gz"))


def _manual_pages(files: Iterable[Path]) -> Pages:
    """Pages that are in UTF-8 and no link to another."""
    pages = {}
    for file in sorted(set(files)):
        if file.is_file() and not file.is_symlink():
            try:
                raw = gzip.decompress(file.read_bytes()).decode()
            except UnicodeDecodeError:
                continue
            if not raw.startswith(".so "):
                pages[file.name.removesuffix(".gz")] = plain(raw)
    return pages


def plain(page: str) -> str:
    """The words of a page in roff, line by line: without macros, fonts and comments."""
    lines = []
    for line in page.splitlines():
        if _COMMENT.match(line):
            continue
        if line[:1] in (".", "'"):
            titled = _TITLED.match(line)
            line = titled[1].replace('"', "") if titled else ""
        for pattern, replacement in _ESCAPES:
            line = pattern.sub(replacement, line)
        if line.strip():
            lines.append(unicodedata.normalize("NFC", line.strip()))
    return "\n".join(lines)


def _docstrings() -> Pages:
    """What the modules, classes and functions of Python's library say of themselves."""
    pages = {}
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = [x for x in ast.walk(ast.parse(file.read_text())) if isinstance(x, kinds)]
        text = "\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))
        if text:
            pages[file.name] = text
    return pages


def _of_folder(folder: Path) -> Pages:
    """Every file below a folder."""
    files = sorted(x for x in folder.rglob("*") if x.is_file()) if folder.is_dir() else []
    try:
        return {str(x.relative_to(folder)): x.read_text(encoding="utf-8") for x in files}
    except UnicodeDecodeError as error:
        remedy = "Convert it, or take it out."
        raise ValueError(message("data", "text in UTF-8", f"{folder}: {error}", remedy)) from error
