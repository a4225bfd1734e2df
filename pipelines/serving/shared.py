"""What all replicas of an endpoint know together: uploaded pictures, pictures' embeddings, and what keys have spent.

Everything here may be lost and made again: uploads are then asked for again, embeddings computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from pipelines.serving.engine import Picture
from pipelines.serving.keys import Budgets, Key
from pipelines.serving.options import Media


class Recent:
    """The values that were asked for last, up to a number of bytes."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any | None:
        if key not in self.values:
            return None
        self.values.move_to_end(key)
        return self.values[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        if key in self.values:
            self.size -= self.values.pop(key)[1]
        self.values[key] = (value, size)
        self.size += size
        while self.size > self.limit:
            self.size -= self.values.popitem(last=False)[1][1]


class Shared:
    """In one process; on Ray Serve it is a deployment of one replica, which others reach as `There`."""

    def __init__(self, media: Media):
        self.uploads, self.known = Recent(media.upload_megabytes << 20), Recent(media.embedding_megabytes << 20)
        self.budgets = Budgets()

    async def upload(self, owner: str, name: str) -> tuple[dict, Picture] | None:
        """What a key's owner uploaded under this id: its facts, and the picture."""
        return self.uploads.get((owner, name))

    async def keep_upload(self, owner: str, name: str, facts: dict, picture: Picture) -> None:
        self.uploads.put((owner, name), (facts, picture), picture.pixels.nbytes)

    async def embeddings(self, digest: str) -> np.ndarray | None:
        """[tokens, D] float32 of a picture that some engine has looked at."""
        return self.known.get(digest)

    async def keep_embeddings(self, digest: str, embeddings: np.ndarray) -> None:
        self.known.put(digest, embeddings, embeddings.nbytes)

    async def spend(self, key: Key, amounts: dict[str, int]) -> tuple[str, float] | None:
        """As of Budgets."""
        return self.budgets.spend(key, amounts)


class There:
    """Shared in another process: the same methods, through a Serve handle."""

    def __init__(self, handle: Any):
        self.handle = handle

    def __getattr__(self, name: str) -> Any:
        async def call(*given: Any) -> Any:
            return await getattr(self.handle, name).remote(*given)

        return call
