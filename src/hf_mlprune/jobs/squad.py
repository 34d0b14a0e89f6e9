"""Questions in the nested form of SQuAD's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def squad_rows(file: Path) -> list[dict[str, Any]] | None:
    """Rows with ``question``, ``context`` and ``answers``; ``None`` of a file in another form.

    Args:
        file: JSON.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
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
