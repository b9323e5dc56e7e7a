"""Hidden states wait where they are told to, and come back to the model's device batch by batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import random_rows
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_nlsr import streams
from peft_nlsr.blocks import find_blocks
from peft_nlsr.config import NLSRConfig
from peft_nlsr.examples import Example
from peft_nlsr.live_adapter import LiveAdapter
from peft_nlsr.ranks import Ranks
from peft_nlsr.streams import Stream, open_stream, weigh

MakeLora = Callable[..., PeftModel]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _batches_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples this short would all share one batch."""
    monkeypatch.setattr("peft_nlsr.examples.SHORT", 1)


def opened(model: Any, offload: str = "auto") -> Stream:
    adapter = LiveAdapter(model)
    examples = [Example(tuple(p), tuple(a), i) for i, (p, a) in enumerate(random_rows(7, seed=1))]
    (weighed,) = weigh([(examples, 2.0)], NLSRConfig(nlsr_batch_size=4))
    blocks = [block for _, block in find_blocks(adapter)]
    with torch.no_grad():
        return open_stream(adapter, blocks, weighed, None, pad_id=0, offload=offload)


def test_a_stream_holds_all_examples_once_and_its_weights_add_up(make_pico_lora: MakeLora) -> None:
    stream = opened(make_pico_lora())
    assert [len(w) for w in stream.weights] == [4, 3]
    assert float(sum(w.sum() for w in stream.weights)) == pytest.approx(2.0)
    assert stream.tokens() == sum(h.shape[0] * h.shape[1] for h in stream.repaired)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_ranks_have_each_batch_once_with_the_weights_that_one_process_gives_it(count: int) -> None:
    data = [([Example((3,) * (9 - i % 3), (4,), i) for i in range(n)], total) for n, total in ((7, 1.0), (1, 0.5))]
    for whole in weigh(data, NLSRConfig(nlsr_batch_size=2, max_tokens=20)):
        shares = [whole.share(Ranks(number, count)) for number in range(count)]
        assert sum(len(share.batches) for share in shares) == len(whole.batches)
        for which, parts in enumerate(zip(whole.batches, whole.weights, whole.drawn, strict=True)):
            share = shares[which % count]
            found = share.batches[which // count], share.weights[which // count], share.drawn[which // count]
            assert all(a is b for a, b in zip(found, parts, strict=True))


def test_on_a_cpu_nothing_is_moved(make_pico_lora: MakeLora) -> None:
    for offload in ("auto", "always", "never"):
        stream = opened(make_pico_lora(), offload)
        batch = stream.batch(1, 1)
        assert stream.home == stream.device == CPU
        assert batch.repaired is stream.repaired[1] and batch.arguments is stream.arguments[1][1]


def test_what_waits_on_the_cpu_comes_to_the_device_with_its_arguments() -> None:
    with FakeTensorMode():
        mask = torch.zeros(2, 1, 5, 5)
        arguments = [((), {"attention_mask": mask, "position_embeddings": (torch.zeros(5), torch.ones(5)), "n": 3})]
        weights = [torch.zeros(2, 5, device=GPU)]
        stream = Stream(None, GPU, CPU, weights, weights, [arguments])
        stream.taught, stream.repaired = [torch.zeros(2, 5, 4)], [torch.zeros(2, 5, 4)]
        batch = stream.batch(0, 0)
        _, named = batch.arguments
        moved = (batch.taught, batch.repaired, named["attention_mask"], *named["position_embeddings"])
        assert {t.device for t in moved} == {GPU} and named["n"] == 3
        assert stream.repaired[0].device == CPU


def test_arguments_that_blocks_share_are_moved_once() -> None:
    with FakeTensorMode():
        mask = torch.zeros(3, device=GPU)
        moved = streams._moved_once([((), {"mask": mask}), ((mask,), {})], CPU)
    assert moved[0][1]["mask"] is moved[1][0][0] and moved[0][1]["mask"].device == CPU


@pytest.mark.parametrize(
    ("offload", "device", "needed", "goes"),
    [
        ("always", GPU, 0.0, True),
        ("never", GPU, 1e12, False),
        ("auto", GPU, 6e9, True),
        ("auto", GPU, 4e9, False),
        ("auto", CPU, 1e12, False),
    ],
)
def test_hidden_states_go_home_when_they_would_take_half_of_the_free_memory(
    offload: str, device: torch.device, needed: float, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10e9, 80e9))
    assert streams._goes_home(offload, device, needed) is goes


def test_memory_counts_shared_arguments_once(make_pico_lora: MakeLora) -> None:
    stream = opened(make_pico_lora())
    hidden = sum(t.nbytes for t in (*stream.taught, *stream.repaired, *stream.weights))
    assert hidden < stream.nbytes() < 3 * hidden
    stream.arguments = [[*given, *given] for given in stream.arguments]
    assert stream.nbytes() < 3 * hidden
