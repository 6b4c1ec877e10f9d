"""Short tables in the documents, from the tables of the committed results.

    python benchmarks/excerpts.py docs/*.md README.md

Replaces what stands between the two comments of an excerpt:

    <!-- excerpt: compare/cifar10, compare/demo | strategy; K; used | prune 86; refit 32 -->
    <!-- end -->

First the tables: `compare/demo` is benchmarks/results/compare/demo/table.md, `trust` is benchmarks/results/trust.md.
Then the columns, and the rows by their first cell or their first two. Without columns and rows, the whole file.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
EXCERPT = re.compile(r"(<!-- excerpt: ([^>]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def filled(document: str) -> str:
    """The document with all excerpts taken from the results.

    Raises:
        ValueError: An excerpt has no end, or cannot be taken.
    """
    if document.count("<!-- excerpt:") != document.count("<!-- end -->"):
        raise ValueError("an excerpt without its <!-- end -->")
    return EXCERPT.sub(lambda match: match[1] + excerpt(match[2]), document)


def excerpt(selection: str) -> str:
    """The Markdown table of a selection, as the comment of an excerpt has it.

    Raises:
        ValueError: There is no such column, not exactly one such row, or the tables have different columns.
    """
    names, *chosen = selection.split("|")
    texts = [table_file(name.strip()).read_text(encoding="utf-8") for name in names.split(",")]
    if not chosen:
        return "".join(texts)
    columns, rows = ([name.strip() for name in part.split(";")] for part in chosen)
    tables = [[_cells(line) for line in text.splitlines() if line.startswith("|")] for text in texts]
    (head, rule), *others = ((table[0], table[1]) for table in tables)
    if any(other != (head, rule) for other in others):
        raise ValueError(f"{names}: different columns")
    everything = [row for table in tables for row in table[2:]]
    lines = [head, rule, *(_row(everything, name) for name in rows)]
    indices = [head.index(column) for column in columns]
    return "".join(f"| {' | '.join(line[index] for index in indices)} |\n" for line in lines)


def table_file(name: str) -> Path:
    """The file of a table."""
    folder = RESULTS / name
    return folder / "table.md" if folder.is_dir() else folder.with_suffix(".md")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def _row(rows: list[list[str]], name: str) -> list[str]:
    named = [row for row in rows if name in (row[0], " ".join(row[:2]))]
    if len(named) != 1:
        raise ValueError(f"{len(named)} rows are called {name!r}")
    return named[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path, metavar="DOCUMENT")
    for path in parser.parse_args().documents:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
