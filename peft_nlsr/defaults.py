"""Defaults that several doors share, so that the callback, the command line and `tune` decide alike.

Light, because the command line reads them before anything else is imported.
"""

TOLERANCE = 0.02  # how much worse a guarded rate may become, as a share: two points
MAX_NEW_TOKENS = 128  # where answers that are judged are cut
