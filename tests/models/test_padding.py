"""Padding is read from every form of attention mask, or its absence from the masks is visible in the report."""

import pytest
import torch
from support.zoo import ZOO
from torch import nn

from wanda_lightning import prune
from wanda_lightning.models import fitting_mask, token_masks

RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
IDS = torch.arange(10).view(2, 5)


def read(attention_mask, **batch):
    return token_masks(nn.Identity(), {"input_ids": IDS, "attention_mask": attention_mask, **batch})


def causal(mask, window=None):
    """(samples, 1, queries, keys), by hand: True where a query attends to a key."""
    samples, tokens = mask.shape
    attends = torch.zeros(samples, 1, tokens, tokens, dtype=torch.bool)
    for sample in range(samples):
        for query in range(tokens):
            for key in range(tokens):
                near = window is None or query - key < window
                attends[sample, 0, query, key] = bool(mask[sample, key]) and key <= query and near
    return attends


def additive(attends, lowest):
    return torch.zeros(attends.shape).masked_fill(~attends, lowest)


FORMS = {
    "two dimensions": lambda mask: mask,
    "boolean": causal,
    "zeros and ones": lambda mask: causal(mask).float(),
    "additive": lambda mask: additive(causal(mask), torch.finfo(torch.float32).min),
    "additive infinity": lambda mask: additive(causal(mask), -torch.inf),
    "additive -10000 with heads": lambda mask: additive(causal(mask), -1e4).expand(-1, 4, -1, -1),
    "half precision": lambda mask: additive(causal(mask), -6e4).half(),
    "keys alone": lambda mask: mask[:, None, None, :].bool(),
    "dictionary": lambda mask: {"full_attention": causal(mask), "sliding_attention": causal(mask, window=2)},
    "dictionary of two dimensions": lambda mask: {"full_attention": mask, "sliding_attention": mask},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_every_form_shows_the_same_padding(form, mask):
    (found,) = read(form(mask))
    assert found.inside == ""
    assert torch.equal(found.keep, mask.bool())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_without_padding_nothing_is_left_out(form):
    assert read(form(torch.ones_like(RIGHT))) == ()


def test_no_mask_means_no_padding():
    assert read(None) == ()
    assert read({"full_attention": None, "sliding_attention": causal(RIGHT, window=2)}) == ()
    assert token_masks(nn.Identity(), {"input_ids": IDS}) == token_masks(nn.Identity(), IDS) == ()


@pytest.mark.parametrize(
    "mask",
    [
        object(),
        torch.ones(5),
        {"full_attention": object()},
        {"full_attention": causal(RIGHT), "sliding_attention": causal(RIGHT)[..., 1:]},
    ],
)
def test_a_mask_that_does_not_show_the_padding_fits_nothing(mask):
    masks = read(mask)
    assert len(masks) == 1
    for x in (torch.zeros(2, 5, 8), torch.zeros(10, 8), torch.zeros(5, 8)):
        assert fitting_mask(masks, "layer", x) is None


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (5, 2)])
def test_a_mask_of_another_shape_is_refused(shape):
    text = rf"attention_mask must have the shape of the tokens, \(2, 5\), but its shape is \({shape[0]}, {shape[1]}\)"
    with pytest.raises(ValueError, match=text):
        read(torch.ones(shape))
    with pytest.raises(ValueError, match=text):
        token_masks(nn.Identity(), {"inputs_embeds": torch.zeros(2, 5, 8), "attention_mask": torch.ones(shape)})
    assert read(torch.ones(2, 9), past_key_values=object()) == ()  # longer where a cache comes first


def test_the_report_says_where_padding_counted():
    """A mask of three numbers for each token, in a model that does not look at it."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.second(self.first(x))

    report = prune(Text(), [{"x": torch.randn(2, 5, 8), "attention_mask": torch.ones(5)}], progress=False)
    note = "padding counted: the attention_mask does not show which inputs are padding"
    assert [layer.note for layer in report.layers] == [note, note]


@pytest.mark.parametrize("compiled", ["model", "encoder"])
def test_the_encoder_of_a_compiled_model_is_found_under_its_own_name(compiled):
    model = ZOO["t5"].build()
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "labels": IDS.clone().fill_diagonal_(-100)}
    expected = token_masks(model, batch)
    assert [mask.inside for mask in token_masks(model, {**batch, "labels": None})] == ["encoder"]
    if compiled == "encoder":
        model.encoder = torch.compile(model.encoder, backend="eager")
    found = token_masks(torch.compile(model, backend="eager") if compiled == "model" else model, batch)
    assert [mask.inside for mask in found] == [mask.inside for mask in expected] == ["encoder", ""]
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(found, expected, strict=True))
