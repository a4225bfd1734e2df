"""Pictures in processes of limited memory."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest
from endpoint import png
from hostile_requests import png_of

from owl_model.processing import OwlImageProcessor
from pipelines.serving.decoding import Decoders, Undecodable


def run(body, **options):
    async def inside():
        decoders = Decoders(OwlImageProcessor(56), **options)
        try:
            return await body(decoders)
        finally:
            await decoders.close()

    return asyncio.run(inside())


def test_pixels_are_those_of_training():
    async def body(decoders):
        return await asyncio.gather(*(decoders.pixels(png(seed)) for seed in range(4)))

    for seed, pixels in enumerate(run(body, processes=2)):
        assert np.array_equal(pixels, OwlImageProcessor(56).pixels(png(seed)).numpy())


def test_a_process_that_is_killed_is_replaced():
    async def body(decoders):
        await decoders.start()
        os.kill(decoders.idle[0].pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        return await decoders.pixels(png(0))

    assert run(body).shape == (3, 56, 56)


def test_memory_and_time_are_limited():
    async def body(decoders):
        with pytest.raises(Undecodable, match="cannot be decoded"):
            await decoders.pixels(png_of(5000, 5000, 5000))  # 75 MB of pixels, more than it may have
        with pytest.raises(Undecodable):
            await decoders.pixels(png_of(3000, 3000, 3000), seconds=0.001)
        return await decoders.pixels(png(0))

    assert run(body, megabytes=32).shape == (3, 56, 56)


def test_who_leaves_leaves_no_answer_for_the_next():
    async def body(decoders):
        leaving = asyncio.create_task(decoders.pixels(png_of(4000, 4000, 4000)))
        await asyncio.sleep(0.5)
        leaving.cancel()
        return await decoders.pixels(png(3))

    assert np.array_equal(run(body), OwlImageProcessor(56).pixels(png(3)).numpy())
