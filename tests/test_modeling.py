"""The model against the authors' outputs, and right where batches make it easy to be wrong."""

from __future__ import annotations

import pytest
import torch

from owl_model import OwlAbstractorConfig, OwlConfig, OwlForConditionalGeneration, OwlVisionConfig
from owl_model.parity import check


def test_equals_the_authors_outputs(golden):
    result = check(golden)
    assert result["passed"], result


def test_widths_that_do_not_fit_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"width 96, but abstractor_config\.encoder_hidden_size is 64"):
        OwlConfig(
            vision_config=OwlVisionConfig(hidden_size=96, num_attention_heads=4),
            abstractor_config=OwlAbstractorConfig(encoder_hidden_size=64, hidden_size=64, num_attention_heads=4),
        )


def test_saving_and_loading_changes_nothing(owl, tmp_path):
    owl.save_pretrained(tmp_path)
    again = OwlForConditionalGeneration.from_pretrained(tmp_path).eval()
    for name, value in owl.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
