"""Whole jobs, as the command line does them: data in a file, a model, a pruned model in a folder."""

from __future__ import annotations

from .job import JobReport, prune
from .plan import Job

__all__ = ["Job", "JobReport", "prune"]
