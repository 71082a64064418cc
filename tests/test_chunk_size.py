"""The plan takes as large a chunk of the loss as memory allows, and whole logits where they cost nothing."""

import pytest

from gptfit.config import derive, make_run
from gptfit.door import read_config
from gptfit.estimate import estimate
from gptfit.gpus import load_gpu
from gptfit.memory.step import steady_peak
from gptfit.plan import CHUNK_SIZES, Plan, plan
from gptfit.verify import verify


def planned(card: str, *changes: str) -> Plan:
    return plan(read_config("gpt2", list(changes)), load_gpu(card))


def speed(found: Plan) -> float:
    assert found.speed is not None
    return found.speed.tokens_per_second


def test_logits_are_whole_where_memory_is_not_short() -> None:
    found = planned("b200")
    assert found.run is not None and found.run.loss == "full"
    assert "loss_chunk_size" not in (found.choice or {})


@pytest.mark.parametrize("card", ["rtx4070", "rtx3060", "l4"])
def test_a_chunked_loss_is_within_3_percent_of_whole_logits(card: str) -> None:
    """Of the same micro-batch, had the card memory for them."""
    found = planned(card, "loss=chunked")
    assert found.run is not None and found.run.loss == "chunked" and found.run.loss_chunk_size > 1024
    whole = estimate(derive(found.run, loss="full"), "gptfit", load_gpu(card)).speed
    assert whole is not None and speed(found) > whole.tokens_per_second / 1.03
    assert found.estimate is not None and found.estimate.certain
    assert speed(found) > speed(planned(card, "loss=chunked", "loss_chunk_size=1024"))


def test_a_chunk_that_the_user_set_stays() -> None:
    found = planned("rtx4070", "loss=chunked", "loss_chunk_size=512")
    assert found.run is not None and found.run.loss_chunk_size == 512


def test_no_candidate_is_another_one_with_a_smaller_chunk() -> None:
    found = planned("rtx4070").candidates
    kinds = [tuple(item for item in each.choice.items() if item[0] != "loss_chunk_size") for each in found]
    assert len(set(kinds)) == len(kinds)
    for each in found:
        if each.run.loss_chunk_size in CHUNK_SIZES:
            assert each.run.loss_chunk_size < 2 * each.run.batch_size * each.run.block_size


@pytest.mark.parametrize("changes", [{"logit_softcap": 15.0, "loss_chunk_size": 200}, {"dtype": "float32"}])
def test_a_compiled_chunk_is_inductors_plan(changes: dict[str, object]) -> None:
    """A model whose peak is in the loss; with the soft-cap its last chunk is shorter."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 64, "vocab_size": 4096, "block_size": 64, "batch_size": 8}
    found = verify(make_run({**shape, "gradient_accumulation_steps": 2, **changes}))
    assert found.estimate is not None and found.traced.peak.phase == "loss"
    assert found.estimate.live_bytes == pytest.approx(found.traced.live_bytes, rel=0.0005)


def test_a_compiled_chunk_of_4096_costs_an_fp32_copy_less_than_eager() -> None:
    """Eager: an fp32 copy beside the bf16 logits. Compiled: three numbers a row."""
    run = make_run({"n_layer": 1, "n_head": 2, "n_embd": 64, "vocab_size": 65536, "block_size": 4096, "batch_size": 1})
    run = derive(run, loss_chunk_size=4096)
    compiled, eager = (steady_peak(derive(run, compile=mode), "gptfit")[0] for mode in (True, False))
    assert eager - compiled == pytest.approx(4096 * 65536 * 4, rel=0.03)
