"""Document: what all kinds share, which is their header, their file and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from groupsearch.documents.codec import Part
from groupsearch.documents.rows import Environment, Model
from groupsearch.errors import DocumentError
from groupsearch.records import COMMANDS, SCHEMA_VERSION, check_header, plain, read_document, write_document

_SHOWN = 12


class Table(NamedTuple):
    """Text in rows and columns; a heading that ends in a blank is of a column that is aligned to the left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class Document(Part):
    """A typed document: read with :meth:`load`, written with :meth:`save`, never changed.

    Attributes:
        model: what it is about.
        environment: where its numbers come from.
        settings: what was asked for.
    """

    KIND: ClassVar[str]

    model: Model
    environment: Environment
    settings: Mapping[str, object]

    @classmethod
    def from_json(cls, data: object, where: str = "document") -> Self:
        """The document that a plain structure tells, of the class of its kind.

        Raises:
            DocumentError: when it is of another kind than this class, or a part is missing or garbled.
        """
        found = plain(data)
        check_header(where, found)
        kinds = [kind for kind in _kinds(cls) if kind.is_of(found)]
        if not kinds:
            raise DocumentError(
                f"Expected a {cls.__name__} in {where}, found a document of kind {found['kind']}. Name one written by "
                f"`groupsearch {COMMANDS[getattr(cls, 'KIND', found['kind'])]}`."
            )
        body = {key: value for key, value in found.items() if key not in ("schema_version", "kind")}
        kind = kinds[-1]
        return super(Document, kind).from_json(body, where)  # type: ignore[return-value]

    @classmethod
    def is_of(cls, data: Mapping[str, object]) -> bool:
        """Whether a plain structure is of this kind."""
        return data["kind"] == getattr(cls, "KIND", None)

    def to_json(self) -> dict[str, object]:
        """The document as it is written; :meth:`from_json` is its inverse."""
        return {"schema_version": SCHEMA_VERSION, "kind": self.KIND, **super().to_json()}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The document in a file.

        Raises:
            DocumentError: when it cannot be read, or is of another kind than this class.
        """
        return cls.from_json(read_document(path), str(path))

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the document whole or not at all, over another one only with ``force``, and return its path.

        Raises:
            GroupSearchError: when it is there already, or its folder cannot be written.
        """
        return write_document(path, self.to_json(), force=force)

    def to_dataframe(self) -> Any:
        """Its rows as a table: of pandas where that is installed, else of polars, else a list of dictionaries."""
        rows = [_flat(row.to_json()) for row in self.rows_of_table()]
        for library in ("pandas", "polars"):
            try:
                return import_module(library).DataFrame(rows)
            except ModuleNotFoundError:
                continue
        return rows

    def rows_of_table(self) -> tuple[Part, ...]:
        """What :meth:`to_dataframe` has a row of each for."""
        raise NotImplementedError

    def table(self) -> Table:
        """What a person reads first, as text."""
        raise NotImplementedError

    @property
    def about(self) -> str:
        """Model and batch."""
        return f"{self.model.name}, batch {self.model.batch_size}"

    @property
    def finding(self) -> str:
        """What it found, in a sentence or two; empty where there is none."""
        return ""

    def __repr__(self) -> str:
        table = self.table()
        lines = [table.columns, *table.rows[:_SHOWN]]
        widths = [max(len(line[i].strip()) for line in lines) for i in range(len(table.columns))]
        left = [heading.endswith(" ") for heading in table.columns]
        shown = [
            "  ".join(
                cell.strip().ljust(w) if is_left else cell.strip().rjust(w)
                for cell, w, is_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        ]
        more = [f"... {len(table.rows) - _SHOWN} more"] if len(table.rows) > _SHOWN else []
        return "\n".join((f"{type(self).__name__} of {table.title}", *shown, *more, *filter(None, [self.finding])))

    def _repr_html_(self) -> str:
        table = self.table()
        head = "".join(f"<th>{escape(each.strip())}</th>" for each in table.columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows[:_SHOWN])
        more = f"<p>... {len(table.rows) - _SHOWN} more</p>" if len(table.rows) > _SHOWN else ""
        return (
            f"<p><b>{type(self).__name__}</b> of {escape(table.title)}</p><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>{more}<p>{escape(self.finding)}</p>"
        )


def _kinds(kind: type[Document]) -> list[type[Document]]:
    """The class and those under it, the most particular ones last."""
    return [kind, *(each for below in kind.__subclasses__() for each in _kinds(below))]


def _flat(row: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """The row with mappings in it written out, as in ``metric.mean``."""
    found: dict[str, object] = {}
    for key, value in row.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
