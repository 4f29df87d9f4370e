"""Pages of results, of which a script writes the tables and people the rest."""

from pathlib import Path

BEGIN, END = "<!-- tables -->\n", "<!-- /tables -->"


def write_tables(page: Path, tables: str) -> None:
    """Put Markdown between the two comments of a page; a page without them gets both."""
    text = page.read_text() if page.is_file() else ""
    before, _, rest = text.partition(BEGIN) if BEGIN in text else ("", "", END + "\n")
    page.write_text(f"{before}{BEGIN}{tables.rstrip()}\n{END}{rest.partition(END)[2]}")
