"""The tables of ``docs/huggingface_support.md``: written from what the tests saw, and read again."""

import re
from pathlib import Path

HEAD = """# What was run with transformers

Written by `make test-transformers ARGS=--write-support-table`; do not edit. Tiny random models of each family
generate from a left-padded ragged batch, unpatched and patched; the last rows are encoder-decoders, whose encoder
reads that batch (whisper's reads features), and vision-language models, whose prompts have an image each. `yes`:
integers are equal, other numbers follow the rule of `torch_paged/testing/compare.py`. *layers* says how a patched
model's attention reads the cache: *paged*, *latent* (paged, on compressed keys), or *gathered* (its own attention on
dense copies). Where a cell has a letter, the note below the table says why. The [page on HuggingFace](huggingface.md)
explains the columns.
"""


class Table:
    """What happened with one version of transformers.

    Attributes:
        version: of transformers.
        rows: of each family the cell of each column.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        self.rows: dict[str, dict[str, str]] = {}

    def set(self, family: str, title: str, cell: str) -> None:
        """Fill one cell."""
        self.rows.setdefault(family, {})[title] = cell.replace("|", "/")

    def markdown(self) -> str:
        """Return the section of this version."""
        titles = ["layers", *(title for title in next(iter(self.rows.values())) if title != "layers")]
        notes: list[str] = []
        lines = [
            f"## transformers {self.version}",
            "",
            f"| | {' | '.join(titles)} |",
            "| --- " * (len(titles) + 1) + "|",
        ]
        for family, cells in self.rows.items():
            shown = []
            for title in titles:
                cell = cells.get(title, "not run")
                if " " in cell:
                    if cell not in notes:
                        notes.append(cell)
                    cell = letter(notes.index(cell))
                shown.append(cell)
            lines.append(f"| {family} | {' | '.join(shown)} |")
        lines += ["", *(f"- {letter(index)}: {note}" for index, note in enumerate(notes)), ""]
        return "\n".join(lines)


def letter(index: int) -> str:
    """Return the name of a note."""
    return chr(ord("a") + index)


def read_tables(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Return of each version and family the cells, notes in the place of their letters."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for section in re.split(r"^## transformers ", text, flags=re.MULTILINE)[1:]:
        lines = section.splitlines()
        notes = dict(re.findall(r"^- (\w): (.+)$", section, re.MULTILINE))
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        titles = cells[0][1:]
        tables[lines[0]] = {
            row[0]: {title: notes.get(cell, cell) for title, cell in zip(titles, row[1:], strict=True)}
            for row in cells[2:]
        }
    return tables


def write_table(path: Path, table: Table, families: list[str]) -> None:
    """Put a version's section in the place of the one before, the newest version first; cells that did not run stay."""
    text = path.read_text() if path.exists() else ""
    before = read_tables(text).get(table.version, {})
    rows = {family: {**before.get(family, {}), **table.rows.get(family, {})} for family in families}
    table.rows = {family: cells for family, cells in rows.items() if cells}
    sections = {table.version: table.markdown()}
    for section in re.split(r"^(?=## transformers )", text, flags=re.MULTILINE)[1:]:
        sections.setdefault(section.split()[2], section)
    newest_first = sorted(sections, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    path.write_text(HEAD + "\n" + "\n".join(sections[version].rstrip() + "\n" for version in newest_first))
