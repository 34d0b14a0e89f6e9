"""The card of a model and the card that a repository has already."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

#: Stands at the head of the model cards that we write.
CARD_MARK = "<!-- written by hf-mlprune -->"
#: Stands at their end, with a digest of the words between: a card that somebody edited is theirs.
_END = "<!-- end of the card that hf-mlprune wrote"
_SEAL = re.compile(rf"\n{_END}, ([0-9a-f]{{16}}) -->\s*\Z")
#: Stands in a card for the name of its repository, until it is pushed to one.
CARD_PLACE = "this-repository"
#: Entries of the metadata that describe one model: those of an earlier card are not of this one.
_OF_MODEL = ("base_model", "datasets", "library_name", "metrics", "model-index", "pipeline_tag", "tags")
#: Stands in the card that transformers makes for a repository without one.
_GENERATED_CARD = "This model card has been automatically generated"
#: Stands in the card that Trainer makes; it asks whoever completes the card to take it out.
_TRAINER_CARD = "<!-- This model card has been generated automatically according to the information the"


def sealed(text: str) -> str:
    """A card of ours as it is written, so that a later save may replace it and no other."""
    body = _SEAL.sub("", text).rstrip()
    digest = _digest(body[body.find(CARD_MARK) :])
    return f"{body}\n\n{_END}, {digest} -->\n"


def is_ours(text: str) -> bool:
    """Whether we wrote a card and nobody edited its text; what lies above our mark may be of others.

    Cards of earlier versions have no digest and count as ours.
    """
    _, mark, body = text.partition(CARD_MARK)
    if not mark:
        return False
    seal = _SEAL.search(body)
    if seal is None:
        return _END not in body
    return _digest(mark + body[: seal.start()]) == seal[1]


def may_replace(card: Path) -> bool:
    """Whether a file may be replaced by a card of ours: there is none, or it is one of ours."""
    return not card.is_file() or is_ours(card.read_text(encoding="utf-8", errors="replace"))


def _digest(body: str) -> str:
    # Line ends and blanks may change on the way to a hub and back.
    return sha256(" ".join(body.split()).encode()).hexdigest()[:16]


def pushed_card(theirs: str, ours: str) -> str:
    """The card of a repository that has one already.

    Ours takes the place of cards that nobody wrote or edited, and stands below the metadata and text of
    Trainer's draft. What somebody wrote stays, a text and entries of the metadata.

    Args:
        theirs: of the repository, or what transformers made for one without.
        ours: of the model.
    """
    if not re.sub(r"\A---\n.*?^---\s*", "", theirs, flags=re.DOTALL | re.MULTILINE).strip():
        return _with_metadata(ours, theirs)
    before, mark, _ = theirs.partition(CARD_MARK)
    if mark and not is_ours(theirs):
        return theirs
    if _TRAINER_CARD in before:
        return f"{before.rstrip()}\n\n{ours[ours.find(CARD_MARK) :]}"
    if not mark and _GENERATED_CARD not in theirs:
        return theirs
    ours = _with_metadata(ours, theirs)
    # Tags that are given to `push_to_hub` are in theirs by now.
    tags, own = (re.search(r"^tags:\n((?:- .*\n)+)", text, re.MULTILINE) for text in (theirs, ours))
    if not tags or not own:
        return ours
    added = [line for line in tags[1].splitlines(True) if line not in own[1].splitlines(True)]
    return ours[: own.end()] + "".join(added) + ours[own.end() :]


def _with_metadata(ours: str, theirs: str) -> str:
    """Our card, with the metadata of theirs (a licence, say) that ours does not have."""
    entries = re.findall(r"^([\w-]+):(.*\n(?:[ -](?!--).*\n)*)", theirs, re.MULTILINE)
    head = re.match(r"---\n(.*?)^---", ours, re.DOTALL | re.MULTILINE)
    if head is None:
        return ours
    own = {*_OF_MODEL, *re.findall(r"^([\w-]+):", head[1], re.MULTILINE)}
    added = "".join(f"{name}:{value}" for name, value in entries if name not in own)
    return ours[: head.end(1)] + added + ours[head.end(1) :]


def named_card(text: str, repository: str, subfolder: str = "") -> str:
    """A card with the name of the repository that it goes to.

    Args:
        text: of a card.
        repository: its name, with its owner.
        subfolder: where the model lies in it.
    """
    place, name, whole = f'"{CARD_PLACE}"', f'"{repository}"', bool(_SEAL.search(text)) and is_ours(text)
    if subfolder:
        text = text.replace(f"from_pretrained({place}", f'from_pretrained({name}, subfolder="{subfolder}"')
    text = text.replace(place, name)
    return sealed(text) if whole else text
