"""Image pools: returned batches, and saving with the weights."""

from __future__ import annotations

import torch

from glua_bench.methods.components.image_pool import ImagePool


def test_a_pool_fills_then_exchanges_half_of_the_time() -> None:
    torch.manual_seed(0)
    pool = ImagePool(3, 2, 4)
    batches = [torch.full((2, 1, 4, 4), float(value)) for value in range(1, 204)]
    for batch in batches[:3]:
        assert torch.equal(pool(batch), batch)
    held, exchanged = {1.0, 2.0, 3.0}, 0
    for batch in batches[3:]:
        got, now = float(pool(batch)[0, 0, 0, 0]), float(batch[0, 0, 0, 0])
        if got != now:
            assert got in held
            held = held - {got} | {now}
            exchanged += 1
    assert set(pool.images[:, 0, 0, 0, 0].tolist()) == held
    assert 70 <= exchanged <= 130


def test_a_pool_is_saved_with_the_weights() -> None:
    torch.manual_seed(0)
    pool, copy = ImagePool(2, 1, 4), ImagePool(2, 1, 4)
    for value in range(5):
        pool(torch.full((1, 1, 4, 4), float(value)))
    copy.load_state_dict(pool.state_dict())
    new = torch.full((1, 1, 4, 4), 9.0)
    for _ in range(8):
        state = torch.get_rng_state()
        first = pool(new)
        torch.set_rng_state(state)
        assert torch.equal(copy(new), first)
