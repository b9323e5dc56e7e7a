"""The synthetic safety lab: a small world and a tiny model in which alignment is built, broken and repaired.

Everything is made here, offline and from a seed; "harmful" is only a label on invented verbs.
"""

from .evaluation import LabScores
from .lab import Lab, LabConfig

__all__ = ["Lab", "LabConfig", "LabScores"]
