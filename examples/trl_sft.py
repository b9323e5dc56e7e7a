"""Supervised fine-tuning with TRL: the repair is measured on your own prompts and kept only if it helps.

    python examples/trl_sft.py lab/base lab/train.jsonl out \\
        --safety lab/safety.jsonl --ask-harmful lab/safety_prompts.jsonl --ask-benign lab/benign_prompts.jsonl

The harm rate must fall; coherence and the accuracy on your training answers must not, and over-refusal must not rise.
Else the repair is taken back and the fine-tuned adapter stays. `callback.outcome` says which, with every number and
its interval.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from peft_nlsr import NLSRCallback, load_prompt_set, to_terminal


def main(arguments: list[str] | None = None) -> NLSRCallback:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or Hub id of an aligned (instruct) model")
    parser.add_argument("data", help="JSONL file of conversations: prompt and completion")
    parser.add_argument("output")
    parser.add_argument("--safety", required=True, help="JSONL file of safety prompts to repair with")
    parser.add_argument("--ask-harmful", required=True, help="JSONL file of other safety prompts, to measure with")
    parser.add_argument("--ask-benign", required=True, help="JSONL file of benign prompts, to measure with")
    parser.add_argument("--max-steps", type=int, default=100)
    asked = parser.parse_args(arguments)

    callback = NLSRCallback(
        calibration=load_dataset("json", data_files=asked.safety, split="train"),
        evaluate=[
            load_prompt_set(asked.ask_harmful, kind="safety", limit=120),
            load_prompt_set(asked.ask_benign, kind="benign", limit=120),
        ],
        max_new_tokens=16,
        tolerance=0.05,
    )
    trainer = SFTTrainer(
        asked.base,
        SFTConfig(
            asked.output,
            max_steps=asked.max_steps,
            learning_rate=1e-3,
            max_length=512,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=asked.data, split="train"),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model()
    outcome = callback.outcome
    assert outcome is not None
    if outcome.report is not None:
        print(to_terminal(outcome.report))
    print("kept" if outcome.verdict.kept else f"taken back: {'; '.join(outcome.verdict.reasons)}")
    return callback


if __name__ == "__main__":
    main()
