"""Questions in the nested form of SQuAD's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Letters in which the first article begins; nothing but its title stands before its paragraphs.
BEGINNING = 1 << 16


def squad_rows(file: Path) -> list[dict[str, Any]] | None:
    """Rows with ``question``, ``context`` and ``answers``; ``None`` of a file in another form.

    Args:
        file: JSON. Only its beginning is read, if it has another form.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            beginning = stream.read(BEGINNING)
            if '"paragraphs"' not in beginning:
                return None
            found = json.loads(beginning + stream.read())
        return [
            {
                "question": asked["question"],
                "context": paragraph["context"],
                "answers": {
                    "text": [answer["text"] for answer in asked["answers"]],
                    "answer_start": [answer["answer_start"] for answer in asked["answers"]],
                },
            }
            for article in found["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError):
        return None
