"""A page of HTML that shows a sampled answer with each token coloured by its entropy."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loglinear.evaluation.entropy import SampledAnswer, SampledToken, label, visible_lines
from loglinear.runs.files import write_atomically

Colour = tuple[int, int, int]


class Palette(NamedTuple):
    """Colours of text on a background that goes from `paper` at no entropy to `hot` at the answer's highest."""

    paper: Colour
    ink: Colour
    dim: Colour  # of the prompt
    hot: Colour

    def background(self, share: float) -> Colour:
        """Return the background at this share of the highest entropy."""
        red, green, blue = (round(low + share * (high - low)) for low, high in zip(self.paper, self.hot, strict=True))
        return red, green, blue


LIGHT = Palette(paper=(255, 255, 255), ink=(27, 27, 27), dim=(96, 96, 96), hot=(255, 158, 61))
DARK = Palette(paper=(22, 22, 24), ink=(240, 240, 240), dim=(160, 160, 160), hot=(158, 70, 0))

STYLE = """\
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
body { background: rgb(var(--paper)); color: rgb(var(--ink)); font: 16px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { background: rgba(var(--hot), var(--h)); padding: 0.15em 0; }
.fork { text-decoration: underline 2px; text-underline-offset: 0.25em; font-weight: bold; }
.dim { color: rgb(var(--dim)); }
.scale { display: inline-block; width: 12rem; height: 0.8em;
  background: linear-gradient(to right, rgba(var(--hot), 0), rgb(var(--hot))); }
table { border-collapse: collapse; }
td, th { padding: 0.1rem 0.8rem; text-align: right; border-bottom: 1px solid rgba(var(--dim), 0.4); }
td.token { text-align: left; font-family: ui-monospace, monospace; white-space: pre-wrap; }
"""
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<p>0 <span class="scale"></span> {highest:.3f} nats. Underlined: the forking tokens. A token's title has its
numbers; they are those of temperature 1.</p>
<pre><span class="dim" style="--h:0">{prompt}</span>{tokens}</pre>
<h2>Forking tokens</h2>
<table>
<thead><tr><th>position</th><th>token</th><th>nats</th><th>bits</th><th>probability</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p class="dim">{settings}</p>
</body>
</html>
"""


def write_page(path: Path, answer: SampledAnswer, settings: Mapping[str, Any]) -> None:
    """Write one file that needs no other: colours for light and dark readers, numbers as titles, forking tokens listed.

    Everything of the model and of the user is escaped. The file is ASCII, so that no encoding can break it.
    """
    write_atomically(path, page(answer, settings).encode("ascii", "xmlcharrefreplace").decode())


def page(answer: SampledAnswer, settings: Mapping[str, Any]) -> str:
    """Return the page; `settings` are listed below it."""
    forking = answer.forking()
    summary = (
        f"{len(answer.tokens):,} tokens, mean entropy {answer.entropies.mean():.3f} nats; {len(forking):,} forking "
        f"tokens have at least {answer.threshold:.3f} nats (the {answer.quantile:.0%} of highest entropy)."
    )
    return PAGE.format(
        title="Entropy of every sampled token",
        style=STYLE.replace("LIGHT", _variables(LIGHT)).replace("DARK", _variables(DARK)),
        summary=summary,
        highest=float(answer.entropies.max()),
        prompt=html.escape("\n".join(visible_lines(answer.prompt))) if answer.prompt else "",
        tokens="".join(_spans(answer)),
        rows="\n".join(_row(index + 1, answer.tokens[index]) for index in forking),
        settings=html.escape("; ".join(f"{name}: {value}" for name, value in settings.items())),
    )


def _variables(palette: Palette) -> str:
    return " ".join(f"--{name}: {', '.join(map(str, colour))};" for name, colour in palette._asdict().items())


def _spans(answer: SampledAnswer) -> Iterable[str]:
    marked = zip(answer.tokens, answer.shares, answer.is_forking, strict=True)
    for position, (token, share, forking) in enumerate(marked, 1):
        title = f"{position}: {label(token.text)} | {token.entropy:.4f} nats, {token.bits:.4f} bits"
        title += f" | probability {token.probability:.4f} | id {token.id}" + (" | forking" if forking else "")
        kind = ' class="fork"' if forking else ""
        text = html.escape("\n".join(visible_lines(token.text)))
        yield f'<span{kind} style="--h:{share:.3f}" title="{html.escape(title)}">{text}</span>'


def _row(position: int, token: SampledToken) -> str:
    numbers = (f"{token.entropy:.4f}", f"{token.bits:.4f}", f"{token.probability:.4f}")
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    return f'<tr><td>{position}</td><td class="token">{html.escape(label(token.text))}</td>{cells}</tr>'
