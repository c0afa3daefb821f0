"""``python -m groupsearch`` is the command ``groupsearch``."""

from __future__ import annotations

from groupsearch.cli import main

if __name__ == "__main__":
    main(prog_name="groupsearch")
