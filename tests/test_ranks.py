"""One process needs no other, and the shares of several are all of the work; test_distributed.py has two of them."""

from typing import Any

import pytest
import torch

from peft_nlsr.errors import PeftNLSRError
from peft_nlsr.ranks import ALONE, Ranks


@pytest.mark.parametrize("parts", [0, 1, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_each_part_belongs_to_one_rank_and_the_first_has_most(parts: int, count: int) -> None:
    shares = [Ranks(number, count).own(range(parts)) for number in range(count)]
    assert sorted(part for share in shares for part in share) == list(range(parts))
    assert len(shares[0]) == max(map(len, shares)) <= min(map(len, shares)) + 1


def test_alone_is_the_identity() -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    with ALONE.together():
        assert ALONE.add_up(rows) is rows and ALONE.of_first(rows) is rows
        assert ALONE.gather(rows)[0] is rows and ALONE.first(lambda: rows) is rows
        ALONE.require_same({"rows": len(rows)})
        stacked, place = ALONE.stacked(rows)
        assert torch.equal(stacked, rows) and torch.equal(stacked[place], rows)


def test_alone_an_error_is_raised_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), ALONE.together():
        _ = 1 // 0


def test_a_job_whose_processes_are_not_joined_is_no_job_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def mps(**_: Any) -> torch.device:
        return torch.device("mps")

    assert Ranks.launched() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", mps)
    with pytest.raises(PeftNLSRError, match=r"one of 4, but no process group.*init_process_group"):
        Ranks.launched()
