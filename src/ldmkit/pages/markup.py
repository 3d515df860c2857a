"""Pieces of a page that stands alone: no script, no network, no other file. All text is escaped here."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MOST_TEXT = 100_000
"""Characters of one text that are shown."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Told to the browser: should a script ever get onto the page, it does not run."""
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2024; --line: #8885; --soft: #8881;
 --good: #1e7e44; --bad: #b3261e; --a: #2563c9; --b: #c2570c; --c: #15803d; --d: #9333a8; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --text: #e4e6e8; --good: #6fd08c;
 --bad: #ff8a75; --a: #7db0ff; --b: #ffa45c; --c: #6fd08c; --d: #d79bef; } }
* { box-sizing: border-box; }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
 max-width: 72rem; overflow-wrap: anywhere; padding: 1rem; }
th { overflow-wrap: normal; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { border-top: 2px solid var(--line); font-size: 1.25rem;
 margin-top: 2.5rem; padding-top: 1rem; } h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
nav a { margin-right: 1rem; } a { color: var(--a); }
.findings { list-style: none; padding: 0; }
.findings li { border-left: 4px solid var(--line); margin: .4rem 0; padding: .1rem .7rem; }
.findings .good { border-color: var(--good); } .findings .bad { border-color: var(--bad); }
.findings b { font-weight: 600; } .good b { color: var(--good); } .bad b { color: var(--bad); }
.figures { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { border: 1px solid var(--line); border-radius: 8px; margin: 0; padding: .6rem; }
figure h4 { font-size: .95rem; margin: 0 0 .3rem; } figcaption { font-size: .85rem; opacity: .85; }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); }
.figures { margin-top: .8rem; }
img { display: block; height: auto; image-rendering: pixelated; margin-bottom: .3rem; max-width: 100%; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .9rem .2rem 0; text-align: left;
 vertical-align: top; } td.number { font-variant-numeric: tabular-nums; text-align: right; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--soft); border-radius: 6px; overflow-x: auto; padding: .7rem; white-space: pre-wrap; }
summary { cursor: pointer; } .plot { display: block; height: auto; max-width: 34rem; width: 100%; }
.plot text { fill: var(--text); font-size: 12.5px; } .plot path { fill: none; stroke: var(--text); }
.plot .grid { stroke: var(--line); stroke-width: .6; } .plot .line, .plot .marked { stroke-width: 2; }
.plot .faint { opacity: .4; stroke-width: 1; } .plot .dashed { stroke-dasharray: 6 4; stroke-width: 1.6; }
.plot .c0 { stroke: var(--a); } .plot .c1 { stroke: var(--b); } .plot .c2 { stroke: var(--c); }
.plot .c3 { stroke: var(--d); } .plot .dot, .plot .bar { stroke: none; }
.plot .dot.c0, .plot .bar.c0 { fill: var(--a); } .plot .dot.c1, .plot .bar.c1 { fill: var(--b); }
.plot .dot.c2, .plot .bar.c2 { fill: var(--c); } .plot .dot.c3, .plot .bar.c3 { fill: var(--d); }
LEVELS@media (max-width: 30rem) { .plot text { font-size: 14px; } }
@media print { :root { --page: #fff; --text: #000; --a: #2563c9; --b: #c2570c; --c: #15803d; --d: #9333a8; }
 body { font-size: 10pt; max-width: none; } .figures { grid-template-columns: 1fr 1fr; } nav { display: none; }
 figure, tr, .findings li { break-inside: avoid; } h2, h3 { break-after: avoid; } }
""".replace(
    "LEVELS",
    "".join(
        f".plot .n{n} {{ stroke: hsl({230 + 16 * n} 70% 55%); }}"
        f" .plot .dot.n{n} {{ fill: hsl({230 + 16 * n} 70% 55%); }}\n"
        for n in range(10)
    ),
)


def printable(text: str) -> str:
    """The text with control characters, and what is no character, spelled out."""
    known = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(
        ascii(sign)[1:-1]
        if (ord(sign) < 32 and sign not in "\n\t") or 127 <= ord(sign) < 160
        else sign
        for sign in known
    )


def text_of(text: str) -> str:
    """Text that cannot be taken for markup, nor break the encoding of the page or its parser."""
    return escape(printable(text))


def shortened(text: str, most: int = MOST_TEXT) -> str:
    """The first characters of a text, saying how many are left out."""
    if len(text) <= most:
        return text
    return f"{text[:most]} ... and {len(text) - most} more characters"


def whole_page(title: str, parts: Iterable[str]) -> str:
    """The page around its parts, which are markup already.

    Args:
        title: as text.
        parts: of the body.
    """
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text_of(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body>\n<h1>{text_of(title)}</h1>\n{body}\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A part under a heading of the third level; "" if there is nothing in it."""
    body = "\n".join(part for part in parts if part)
    return f"<h3>{text_of(title)}</h3>\n{body}" if body else ""


def figure(title: str, picture: str, caption: str) -> str:
    """A picture (markup) with a title and a sentence below; "" without a picture."""
    if not picture:
        return ""
    return (
        f"<figure><h4>{text_of(title)}</h4>\n{picture}\n"
        f"<figcaption>{text_of(caption)}</figcaption></figure>"
    )


def figures(shown: Sequence[str], kind: str = "") -> str:
    """Figures beside one another as far as the screen is wide; "" without any."""
    parts = [one for one in shown if one]
    return (
        f'<div class="{f"figures {kind}".strip()}">\n' + "\n".join(parts) + "\n</div>"
        if parts
        else ""
    )


def facts_table(facts: Mapping[str, Any]) -> str:
    """Names and values, a row each; what is None is left out. Long texts are shortened."""
    rows = [
        f"<tr><th>{text_of(name)}</th><td>{text_of(shortened(shown(value), 2_000))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    ]
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>' if rows else ""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with a heading; numbers stand to the right."""
    if not rows:
        return ""
    titles = "".join(f"<th>{text_of(name)}</th>" for name in head)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{titles}</tr>\n{body}</table></div>'


def details(title: str, body: str) -> str:
    """Something long that is closed at first; "" if it is empty."""
    return f"<details><summary>{text_of(title)}</summary>\n{body}</details>" if body else ""


def preformatted(text: str) -> str:
    """A file as it is."""
    return f"<pre>{text_of(shortened(text))}</pre>" if text else ""


def shown(value: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    """A value as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(shown(part) for part in value)
    return str(value)


def _cell(value: Any) -> str:  # noqa: ANN401
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = ' class="number"' if number else ""
    return f"<td{kind}>{text_of(shortened(shown(value), 500))}</td>"
