"""What a report is made of, as HTML and as Markdown.

HTML needs nothing beside itself: styles and charts are inside.
"""

import dataclasses
import importlib.resources
import re
from collections.abc import Mapping, Sequence

import jinja2


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells of text.

  Attributes:
    heads: Of columns.
    rows: Of as many cells.
    title: Above it, if any.
    numbers: Columns that are aligned as numbers.
    best: Cells (row, column) that are the best of their row.
    groups: Rows that begin a group.
  """

  heads: Sequence[str]
  rows: Sequence[Sequence[str]]
  title: str = ""
  numbers: frozenset[int] = frozenset()
  best: frozenset[tuple[int, int]] = frozenset()
  groups: frozenset[int] = frozenset()

  def markdown(self) -> list[str]:
    """Lines; the best of a row in bold."""
    rule = ["---:" if i in self.numbers else "---" for i in range(len(self.heads))]
    lines = [f"### {self.title}", ""] if self.title else []
    heads = [head.replace("|", "\\|") for head in self.heads]
    rows = [
      [
        f"**{cell}**" if (i, j) in self.best else cell.replace("|", "\\|")
        for j, cell in enumerate(row)
      ]
      for i, row in enumerate(self.rows)
    ]
    return [
      *lines,
      *(f"| {' | '.join(row)} |" for row in (heads, rule, *rows)),
      "",
    ]


@dataclasses.dataclass(frozen=True)
class Detail:
  """Text that is shown on demand."""

  title: str
  text: str


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page.

  Attributes:
    title: Its heading.
    texts: Paragraphs.
    tables: Its tables.
    charts: SVG.
    details: Texts to unfold; HTML only.
    wide: Whether charts take the page's width.
  """

  title: str
  texts: Sequence[str] = ()
  tables: Sequence[Table] = ()
  charts: Sequence[str] = ()
  details: Sequence[Detail] = ()
  wide: bool = False

  @property
  def anchor(self) -> str:
    """Of links to it."""
    return re.sub(r"\W+", "-", self.title.lower())


@dataclasses.dataclass(frozen=True)
class Page:
  """A report.

  Attributes:
    title: Its heading.
    subtitle: Below that.
    cards: What matters most: label to value.
    sections: In order.
  """

  title: str
  subtitle: str
  cards: Mapping[str, str]
  sections: Sequence[Section]

  def html(self) -> str:
    """One file, for a browser without a network."""
    source = importlib.resources.files(__package__) / "page.html"
    environment = jinja2.Environment(
      autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    cards = [{"label": label, "value": value} for label, value in self.cards.items()]
    return environment.from_string(source.read_text("utf-8")).render(
      title=self.title, subtitle=self.subtitle, cards=cards, sections=self.sections
    )

  def markdown(self) -> str:
    """Tables and texts; charts are HTML's."""
    lines = [f"# {self.title}", "", self.subtitle, ""]
    lines += [f"- {label}: {value}" for label, value in self.cards.items()]
    for section in self.sections:
      body = [line for text in section.texts for line in (text, "")]
      body += [line for table in section.tables for line in table.markdown()]
      if body:
        lines += ["", f"## {section.title}", "", *body]
    return "\n".join(lines).rstrip() + "\n"
