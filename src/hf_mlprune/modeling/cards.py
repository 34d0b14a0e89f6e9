"""The card of a model and the card that a repository has already."""

from __future__ import annotations

import re

#: Stands in the model cards that we write, so that a later save may replace them and no other.
CARD_MARK = "<!-- written by hf-mlprune -->"
#: Stands in a card for the name of its repository, until it is pushed to one.
CARD_PLACE = "this-repository"
#: Stands in the card that transformers makes for a repository without one.
_GENERATED_CARD = "This model card has been automatically generated"
#: Stands in the card that Trainer makes; it asks whoever completes the card to take it out.
_TRAINER_CARD = "<!-- This model card has been generated automatically according to the information the"


def pushed_card(theirs: str, ours: str) -> str:
    """The card of a repository that has one already.

    Ours takes the place of cards that nobody wrote, and stands below the metadata and text of Trainer's
    draft. What somebody wrote stays.

    Args:
        theirs: of the repository, or what transformers made for one without.
        ours: of the model.
    """
    if not re.sub(r"\A---\n.*?^---\s*", "", theirs, flags=re.DOTALL | re.MULTILINE).strip():
        return _with_metadata(ours, theirs)
    before, mark, _ = theirs.partition(CARD_MARK)
    if _TRAINER_CARD in before:
        return f"{before.rstrip()}\n\n{ours[ours.find(CARD_MARK) :]}"
    if not mark and _GENERATED_CARD not in theirs:
        return theirs
    # Tags that are given to `push_to_hub` are in theirs by now.
    tags, own = (re.search(r"^tags:\n((?:- .*\n)+)", text, re.MULTILINE) for text in (theirs, ours))
    if not tags or not own:
        return ours
    added = [line for line in tags[1].splitlines(True) if line not in own[1].splitlines(True)]
    return ours[: own.end()] + "".join(added) + ours[own.end() :]


def _with_metadata(ours: str, theirs: str) -> str:
    """Our card, with the metadata of one without text (a licence, say) that ours does not have."""
    entries = re.findall(r"^(\w+):(.*\n(?:[ -](?!--).*\n)*)", theirs, re.MULTILINE)
    head = re.match(r"---\n(.*?)^---", ours, re.DOTALL | re.MULTILINE)
    if head is None:
        return ours
    own = set(re.findall(r"^(\w+):", head[1], re.MULTILINE))
    added = "".join(f"{name}:{value}" for name, value in entries if name not in own)
    return ours[: head.end(1)] + added + ours[head.end(1) :]


def named_card(text: str, repository: str, subfolder: str = "") -> str:
    """A card with the name of the repository that it goes to.

    Args:
        text: of a card.
        repository: its name, with its owner.
        subfolder: where the model lies in it.
    """
    place, name = f'"{CARD_PLACE}"', f'"{repository}"'
    if subfolder:
        text = text.replace(f"from_pretrained({place}", f'from_pretrained({name}, subfolder="{subfolder}"')
    return text.replace(place, name)
