"""The typed documents between stages: read, written and shown on any machine, without torch."""

from groupsearch.documents.codec import schema
from groupsearch.documents.kinds import Document, Fit, Memory, Profile, Search, Study, Train, Verify
from groupsearch.documents.tables import Table
from groupsearch.records import SCHEMA_VERSION

KINDS: tuple[type[Document], ...] = (Profile, Fit, Search, Verify, Train, Study)

__all__ = [
    "KINDS",
    "Document",
    "Fit",
    "Memory",
    "Profile",
    "Search",
    "Study",
    "Table",
    "Train",
    "Verify",
    "json_schema",
]


def json_schema(kind: type[Document]) -> dict[str, object]:
    """The JSON Schema of a kind of documents, as it is shipped in ``schemas/``."""
    return schema(kind, schema_version=SCHEMA_VERSION, kind=kind.KIND)
