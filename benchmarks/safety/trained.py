"""The trained baseline: a short gradient fine-tune of the broken adapter on the data of the closed form.

What a repair without training is measured against; the loop is the one that the lab's users train with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_nlsr.examples import Example
from peft_nlsr.lab.training import IGNORED, Schedule, Tokens, fit, lm_loss

SCHEDULE = Schedule(steps=100, batch_size=32, learning_rate=6e-4, seed=0)


def fine_tune(model: Any, examples: Sequence[Example], schedule: Schedule = SCHEDULE) -> None:
    """Train the adapter of ``model`` in place to give the examples' answers; only answers are learned."""
    fit(model, [_tokens(e) for e in examples], lm_loss, schedule=schedule, progress=lambda fraction: None)


def _tokens(example: Example) -> Tokens:
    ids = [*example.prompt, *example.answer]
    return Tokens(ids, [IGNORED] * len(example.prompt) + list(example.answer))
