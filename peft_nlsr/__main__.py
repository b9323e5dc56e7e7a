"""``python -m peft_nlsr`` is the ``peft-nlsr`` command."""

from .cli import main

main()
