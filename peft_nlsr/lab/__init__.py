"""The synthetic safety lab: a world and a tiny model in which alignment is built, broken and repaired, offline, in minutes."""

from .evaluation import LabScores
from .lab import Lab, LabConfig

__all__ = ["Lab", "LabConfig", "LabScores"]
