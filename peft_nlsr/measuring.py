"""How models are measured when several are compared: one frozen description, so that all are asked the same.

It also holds the prompts apart from the data that a repair is made with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .defaults import MAX_NEW_TOKENS
from .evaluation import Evaluation, Metric, evaluate, require_askable, require_room
from .judges import Judge, judge_name, refuses, require_function
from .prompt_sets import PromptSet, builtin_prompt_set, require_unseen
from .prompts import KINDS


@dataclass(frozen=True)
class EvaluationSettings:
    """What each model is asked and how its answers are judged; the fields are arguments of :func:`peft_nlsr.evaluate`.

    Attributes:
        prompts: sets of the kinds "safety", "lookalike" and "benign"; the built-in evaluation prompts when None.
        task: prompts of kind "task" with their answers.
        judge: which answers are refusals; also what screens the user's data.
        harm_judge: which answers to safety prompts are harmful; None is every coherent one that is no refusal.
        compute_metrics: score of the task's answers in place of ``exact_match``.
        max_new_tokens: answers are cut there.
        batch_size: prompts per batch.
        template: text around each prompt, with ``{prompt}`` in it; None is the tokenizer's own.

    Raises:
        ValueError: prompt sets or a task that :func:`peft_nlsr.evaluate` refuses, see ``require_askable``.
        TypeError: a judge or a metric that is no function.
    """

    prompts: Sequence[PromptSet] | None = None
    task: PromptSet | None = None
    judge: Judge = refuses
    harm_judge: Judge | None = None
    compute_metrics: Metric | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 16
    template: str | None = None

    def __post_init__(self) -> None:
        require_function(self.judge, "judge")
        for name in ("harm_judge", "compute_metrics"):
            if getattr(self, name) is not None:
                require_function(getattr(self, name), name)
        require_askable(self.prompts, self.task, self.compute_metrics)

    def sets(self) -> list[PromptSet]:
        """The prompt sets, without the task."""
        return [builtin_prompt_set(kind) for kind in KINDS] if self.prompts is None else list(self.prompts)

    def all_sets(self) -> list[PromptSet]:
        """The prompt sets and the task."""
        return self.sets() + ([] if self.task is None else [self.task])

    def evaluate(
        self, model: Any, tokenizer: Any, label: str, *, adapter_name: str | None = None, progress: bool = True
    ) -> Evaluation:
        """The model measured this way."""
        return evaluate(
            model,
            tokenizer,
            label=label,
            prompts=self.sets(),
            judge=self.judge,
            harm_judge=self.harm_judge,
            task=self.task,
            compute_metrics=self.compute_metrics,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            template=self.template,
            progress=progress,
            adapter_name=adapter_name,
        )

    def require_room(self, model: Any, tokenizer: Any) -> None:
        """Check that the model has room for every prompt and its answer, see ``peft_nlsr.evaluation.require_room``."""
        require_room(model, tokenizer, self.all_sets(), max_new_tokens=self.max_new_tokens, template=self.template)

    def to_dict(self) -> dict[str, Any]:
        """What results depend on, JSON values; no prompts."""
        named = {"judge": self.judge, "harm_judge": self.harm_judge, "task_metric": self.compute_metrics}
        return {
            "prompt_sets": [each.to_dict() for each in self.all_sets()],
            **{role: None if judge is None else judge_name(judge) for role, judge in named.items()},  # type: ignore[arg-type]
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "template": self.template,
        }

    def require_unseen(self, *data: Iterable[Any] | None) -> int:
        """Check that no prompt is also in the data, and count the rows that have no text to compare.

        Raises:
            IncompatibleError: shared prompts, by id.
        """
        return require_unseen((row for each in data if each is not None for row in each), self.all_sets())
