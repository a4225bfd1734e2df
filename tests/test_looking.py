"""Where an answer looked."""

from __future__ import annotations

import torch

from owl_model.looking import Watch, patches_of_queries


def test_a_watch_sees_what_attention_gives():
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    watch = Watch(3)
    watch.see(query, key, None)
    watch.see(query, key, None)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    many = key.repeat_interleave(2, 1)
    scores = (query @ many.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    assert torch.allclose(watch.given, 2 * scores[:, :, 3:].mean(dim=(0, 1, 2)), atol=1e-6)


def test_queries_that_attend_to_one_patch_show_it(owl):
    abstractor = owl.model.abstractor
    width = owl.config.abstractor_config.encoder_hidden_size
    features = torch.randn(1, 9, width)
    found = patches_of_queries(abstractor, features)
    assert found.shape == (owl.config.abstractor_config.num_queries, 9)
    assert torch.allclose(found.sum(-1), torch.ones(len(found)))
    # the same patch seen anywhere is given the same: where two are equal, so are their shares
    features[:, 5] = features[:, 2]
    found = patches_of_queries(abstractor, features)
    if not owl.config.abstractor_config.grid_size:
        assert torch.allclose(found[:, 5], found[:, 2], atol=1e-6)
