"""The grouping that a search found, by the name of its document: read without torch, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from groupsearch.documents import Search
from groupsearch.documents.rows import Candidate, Variant
from groupsearch.errors import BudgetError, DocumentError, GroupSearchError
from groupsearch.plan.trace import Trace
from groupsearch.records import read_document
from groupsearch.units import format_bytes, parse_bytes


@dataclass(frozen=True)
class Winner:
    """A candidate of a search.

    Attributes:
        where: the document, for errors.
        document: the search.
        candidate: the one that was asked for.
    """

    where: str
    document: Search
    candidate: Candidate

    @property
    def cost(self) -> dict[str, object]:
        """What choosing it cost in privacy, as far as the search says."""
        chosen = self.document.cost.selection
        if chosen is None:
            said = " ".join(self.document.privacy.sentences[:1])
            return {"epsilon": self.document.cost.epsilon, "statement": f"Chosen by a search. {said}"}
        return {"epsilon": chosen.epsilon, "whole": chosen.whole, "data": chosen.data, "statement": chosen.statement}

    def check(self, model: str, trace: Trace) -> None:
        """Raise unless the candidate is one of this model, as it is to be trained.

        Raises:
            GroupSearchError: when the search was of another model, or of one with other sites.
        """
        if self.document.model.name != model:
            raise GroupSearchError(
                f"Expected a search of {model}, found one of {self.document.model.name} in {self.where}. Name the "
                "document of the model that is to be trained."
            )
        found = [(site.name, site.parameters) for site in self.document.trace.sites]
        here = [(site.name, site.parameters) for site in trace.sites]
        if found != here:
            number = next(
                (i for i, (a, b) in enumerate(zip(found, here, strict=False)) if a != b), min(len(found), len(here))
            )
            names = [sites[number][0] if number < len(sites) else "none" for sites in (found, here)]
            raise GroupSearchError(
                f"Expected the {len(found)} sites of the search in {self.where}, found {len(here)}; at {number} it has "
                f"{names[0]}, the model {names[1]}. Train with the settings that were searched: "
                f"{_settings(self.document)}."
            )

    @property
    def variant(self) -> Variant | None:
        """The way of taking a step that the candidate's peak is of, where several were searched."""
        named = {each.name: each for each in self.document.variants or ()}
        return named.get(self.candidate.variant or "")


def names_search(text: str) -> bool:
    """Whether a grouping as text is the name of a search's document, maybe with the number of a candidate.

    Raises:
        DocumentError: when it is the name of a file that holds no document.
    """
    path, number = _parted(text)
    if number is not None:
        return True
    if not (path.endswith(".json") or Path(path).is_file()):
        return False
    return bool(read_document(path, ("profile", "search"))["kind"] == "search")


def winner(found: str | Search, pick: int | str | None = None) -> Winner:
    """The candidate of a search that is recommended, has a number, or is the best within a peak.

    Args:
        found: a document, or the name of its file; ``search.json#3`` is the third of its candidates.
        pick: the largest peak, as in ``12GiB``: the candidate with the best metric among those within it.

    Raises:
        DocumentError: when it is no search, or one without such a candidate.
        BudgetError: when no candidate's peak is within ``pick``.
    """
    if isinstance(found, Search):
        return Winner("the search given", found, _chosen(found, "the search given", None, pick))
    path, number = _parted(found)
    document = Search.load(path)
    if number and pick is not None:
        raise GroupSearchError(f"Found {found} and --pick {pick}, which name a candidate each. Give either.")
    return Winner(path, document, _chosen(document, path, number, pick))


def winner_of(grouping: object, pick: int | str | None) -> Winner | None:
    """The candidate that is asked for, where a search is.

    Raises:
        GroupSearchError: when there is no such candidate, or no search to pick it from.
    """
    searched = isinstance(grouping, Search) or (isinstance(grouping, (str, Path)) and names_search(str(grouping)))
    if searched:
        return winner(grouping if isinstance(grouping, Search) else str(grouping), pick)
    if pick is not None:
        raise GroupSearchError(
            f"Found --pick {pick} without the document of a search to pick from. Name one as --grouping, or give "
            "--grouping within:12GiB, which takes the fewest groups within a peak."
        )
    return None


def _parted(text: str) -> tuple[str, str | None]:
    """The file that a text names, and what stands after # there, if anything: a file's own name may have one, too."""
    path, mark, number = text.rpartition("#")
    return (text, None) if not mark or Path(text).is_file() else (path, number)


def _chosen(document: Search, where: str, number: str | None, pick: int | str | None) -> Candidate:
    candidates = document.candidates
    if number:
        if number.isdecimal() and 1 <= int(number) <= len(candidates):
            return candidates[int(number) - 1]
        known = f"{len(candidates)} candidates, by falling peak" if candidates else "no candidates"
        raise DocumentError(
            f"Expected the number of a candidate from 1 to {len(candidates)} after #, found {number!r}: {where} has "
            f"{known}. Name one of them, or none for the one that is recommended."
        )
    if pick is not None:
        largest = parse_bytes(pick) if isinstance(pick, str) else pick
        judged = [each for each in candidates if each.metric.mean is not None]
        within = [each for each in judged if each.peak_bytes <= largest]
        if within:
            return max(within, key=lambda each: (each.metric.mean, -each.peak_bytes))
        least = min((each.peak_bytes for each in judged), default=None)
        known = "has no candidate that was trained" if least is None else f"has none below {format_bytes(least)}"
        raise BudgetError(
            f"Expected a candidate with a peak of at most {format_bytes(largest)}, found that {where} {known}. Pick "
            "more, name a grouping such as within:12GiB, or search with that --budget."
        )
    if document.recommended is None:
        raise DocumentError(
            f"Expected a search that recommends a grouping, found one that does not in {where}: it was interrupted "
            "before anything was trained, or all trainings failed. Go on with `groupsearch optimize --resume`, or name "
            "a grouping such as best:4."
        )
    return document.recommended


def _settings(document: Search) -> str:
    asked = document.settings
    given = asked.get("workload")
    told = [f"--setting {key}={value}" for key, value in (given.items() if isinstance(given, dict) else ())]
    told = [text.replace("--setting batch_size=", "--batch-size ") for text in told]
    told += [f"--checkpoint {asked['checkpoint']}"] if asked.get("checkpoint", "none") != "none" else []
    return " ".join(told) or "the model's own"
