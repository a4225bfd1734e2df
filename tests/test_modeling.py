"""The model against the authors' outputs, and right where batches make it easy to be wrong."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from owl_model import OwlAbstractorConfig, OwlConfig, OwlForConditionalGeneration, OwlVisionConfig
from owl_model.answering import answer
from owl_model.parity import check


def test_equals_the_authors_outputs(golden):
    result = check(golden)
    assert result["passed"], result


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80), colour).save(buffer, "PNG")
    return buffer.getvalue()


def ask(*parts: str) -> list[dict]:
    content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}]


def test_batches_of_unequal_lengths_and_image_counts_equal_one_by_one(owl, processor):
    conversations = [ask("what is the circle ?"), ask("image", "circle ?"), ask("image", "image", "red large square ?")]
    images = [[], [picture("red")], [picture("blue"), picture("green")]]
    together = answer(owl, processor, conversations, images, max_new_tokens=8)
    alone = [answer(owl, processor, [c], [i], max_new_tokens=8)[0] for c, i in zip(conversations, images, strict=True)]
    assert together == alone


def test_adjacent_images_are_both_seen(owl, processor):
    encoded = processor.encode(ask("image", "image", "circle ?"))
    ids = torch.tensor([encoded.ids])

    def logits(*colours: str) -> torch.Tensor:
        pixels = torch.stack([processor.image_processor.pixels(picture(colour)) for colour in colours])
        return owl(input_ids=ids, pixel_values=pixels).logits

    assert not torch.allclose(logits("red", "blue"), logits("red", "green"))


def test_a_missing_image_is_refused_with_both_counts(owl, processor):
    ids = torch.tensor([processor.encode(ask("image", "circle ?")).ids])
    with pytest.raises(ValueError, match=r"11 image placeholders .* but 0 visual tokens"):
        owl(input_ids=ids)


def test_nothing_supervised_is_zero_loss_with_gradients(owl):
    ids = torch.randint(3, 20, (2, 6))
    loss = owl.train()(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None for p in owl.model.abstractor.parameters() if p.grad is not None or p.ndim == 3)


def test_text_alone_gives_the_visual_modules_zero_gradients(owl):
    ids = torch.randint(3, 20, (1, 6))
    owl.train()(input_ids=ids, labels=ids).loss.backward()
    for parameter in owl.model.abstractor.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


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
