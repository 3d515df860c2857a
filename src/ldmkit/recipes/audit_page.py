"""The page of `ldmkit check`: one HTML file with small versions of the pictures concerned.

It needs no script, no network and no other file, and every name, caption and sentence in it is escaped.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image

from ldmkit.autoencoder_configs import PreprocessingConfig
from ldmkit.data.census import Finding
from ldmkit.data.images import read_picture
from ldmkit.data.items import Item
from ldmkit.errors import DataError

THUMBNAIL = 96
"""Longer side, pixels."""
MOST = 20
"""Findings of a kind that are shown."""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --error: #c0392b; --warning: #b9770e; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h2 { border-top: 1px solid var(--line); font-size: 1.1rem; margin-top: 2rem; padding-top: 1rem; }
.error { color: var(--error); } .warning { color: var(--warning); }
ul { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); padding: 0; }
li { border: 1px solid var(--line); border-radius: 6px; list-style: none; padding: .7rem; }
li p { margin: .3rem 0 0; overflow-wrap: anywhere; white-space: pre-wrap; }
img { background: #8882; image-rendering: pixelated; margin-right: .4rem; vertical-align: top; }
td, th { padding: 0 1rem 0 0; text-align: left; vertical-align: top; }
.caption, .none { opacity: .7; }
@media (prefers-color-scheme: dark) { :root { --error: #ff8a75; --warning: #f0b45a; } }
"""


def page(
    report: dict[str, Any],
    kinds: Sequence[Sequence[Finding]],
    items: Sequence[Item],
    config: PreprocessingConfig,
) -> str:
    """The whole page.

    Args:
        report: of `check`.
        kinds: the findings behind it, each kind by itself.
        items: the pictures that findings point at.
        config: how to read them.
    """
    title = f"{report['pictures']} pictures in {report['data']}"
    summary = f"{report['errors']} error(s), {report['warnings']} warning(s)"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{text_of(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{text_of(title)}</h1><p>{summary}</p>",
        facts_table(report["facts"]),
        *(section(group, items, config) for group in kinds),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def section(group: Sequence[Finding], items: Sequence[Item], config: PreprocessingConfig) -> str:
    """What was found of one kind, with pictures."""
    first = group[0]
    rest = f"<p>and {len(group) - MOST} more</p>" if len(group) > MOST else ""
    entries = "\n".join(entry(finding, items, config) for finding in group[:MOST])
    return (
        f'<h2><span class="{first.severity}">{first.severity}</span>: '
        f"{text_of(first.kind)} ({len(group)})</h2>\n<ul>\n{entries}\n</ul>{rest}"
    )


def entry(finding: Finding, items: Sequence[Item], config: PreprocessingConfig) -> str:
    """One finding."""
    shown = "".join(thumbnail(items[index], config) for index in finding.pictures)
    caption = items[finding.pictures[-1]].caption if finding.pictures else ""
    quoted = f'<p class="caption">{text_of(caption)}</p>' if caption else ""
    return f"<li>{shown}<p><b>{text_of(finding.name)}</b></p><p>{text_of(finding.text)}</p>{quoted}</li>"


def thumbnail(item: Item, config: PreprocessingConfig) -> str:
    """A picture as an `img` with its bytes in it, or words where it cannot be read."""
    try:
        picture = read_picture(item._replace(mask=None), config)
    except DataError:
        return '<span class="none">cannot be shown</span>'
    shrink = THUMBNAIL / max(*picture.shape[1:], THUMBNAIL)
    height, width = (max(1, round(side * shrink)) for side in picture.shape[1:])
    shown = (picture[:3] if len(picture) >= 3 else picture[:1]).nan_to_num(0.0).clamp(-1.0, 1.0)
    small = F.adaptive_avg_pool2d(shown, (height, width)).permute(1, 2, 0).expand(-1, -1, 3)
    pixels = np.rint((small.numpy() + 1.0) * 127.5).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{text_of(item.key)}" src="data:image/png;base64,{data}">'


def facts_table(found: dict[str, Any]) -> str:
    """What the pictures are, as a table."""
    rows = []
    for name, value in found.items():
        cells = ", ".join(f"{key}: {number}" for key, number in value.items() if number != {})
        if not cells:
            continue
        rows.append(f"<tr><th>{text_of(name.replace('_', ' '))}</th><td>{text_of(cells)}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def text_of(text: str) -> str:
    """Text that cannot be taken for markup, nor break the encoding of the page."""
    return escape(text.encode("utf-8", "backslashreplace").decode("utf-8"))
