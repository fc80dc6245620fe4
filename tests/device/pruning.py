"""`prune` and `shrink` on another device: masks and weights are those of the CPU, to the bit.

`tests/test_device.py` runs this file in a process of its own. The device (`support.remote`) runs the CPU's kernels in
the caller's thread, and has no allocator for storages. So these tests cannot cover pinned memory, streams and events,
of which `torch.accelerator` shows a single one here, the memory of devices, kernels that round otherwise, autocast,
TF32, and several accelerators.
"""

import pytest
import torch
from support.disk import CHOICES, batches, same as same_weights, save_llama, weights
from support.layers import rng
from support.quiet import prune, shrink, shrinks
from support.remote import DEVICES, assert_equal, on
from support.zoo import ZOO, batches_of, model_of

from wanda_lightning import NM, prune_from_disk
from wanda_lightning.common.evaluation_mode import seeded
from wanda_lightning.core import Unstructured
from wanda_lightning.streaming import perplexity_from_disk

# Of few tokens; and PyTorch's, that the device has no fused kernels.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def on_both(no_float64):
    """Prune or shrink the same model on the CPU and on the device."""

    def pruned(specimen, **choices):
        change = shrink if shrinks(choices) else prune
        models = []
        reports = []
        for device in DEVICES:
            models.append(model_of(specimen).to(device))
            reports.append(change(models[-1], batches_of(specimen), **choices))
        assert_equal(*models)
        assert (reports[0].layers, reports[0].notes) == (reports[1].layers, reports[1].notes)
        return models[1], " ".join(reports[1].notes)

    return pruned


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_of_other_devices_are_not_seeded(monkeypatch, device):
    seeds = []
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.remote, "manual_seed_all", seeds.append)
    with seeded(3, torch.device(device)):
        drawn = torch.rand(4)
    assert torch.equal(drawn, torch.rand(4, generator=rng(3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds == ([] if device == "cpu" else [3])


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "refit", "thorough"])
def test_methods(on_both, method):
    on_both("llama", method=method)


@pytest.mark.parametrize(("specimen", "method"), [("vit", "best"), ("convnext", "ria")])
def test_images(on_both, specimen, method):
    on_both(specimen, method=method)


@pytest.mark.parametrize(
    ("specimen", "sequential"),
    [("llama_left_padded", "layer"), ("mixtral_padded", "block"), ("mixtral_padded", "none")],
)
def test_padding(on_both, specimen, sequential):
    on_both(specimen, sequential=sequential)


@pytest.mark.parametrize(
    "choices",
    [
        {"allocation": "owl"},
        {"pattern": "equal_share"},
        {"method": "sparsegpt", "pattern": "4:8"},
    ],
    ids=str,
)
def test_choices(on_both, choices):
    on_both("llama", **choices)


def test_batch_norm_is_corrected(on_both):
    _, notes = on_both("resnet18")
    assert "BatchNorm" in notes


def test_experts_leave(on_both):
    model, _ = on_both("qwen3_moe", experts=0.5)
    assert model.config.num_experts == 2


@pytest.mark.parametrize(
    "pattern", [NM(n=2, m=4), Unstructured("row"), Unstructured("layer")], ids=str
)
def test_masks_of_a_large_matrix(pattern):
    """Many and large groups are compared in other ways than few and small ones, and on a CPU by NumPy."""
    scores = torch.randint(50_000, (32, 8192), generator=rng()).float()
    assert torch.equal(pattern(scores.to("remote"), 0.5).cpu(), pattern(scores, 0.5))


def test_units_leave(on_both):
    model, _ = on_both("llama", units=0.5, by="loss")
    assert model.model.layers[0].mlp.up_proj.weight.shape[0] < 64


@pytest.mark.parametrize("method", ["wanda", "refit"])
def test_batches_of_the_other_device(method):
    """The batches of a model on the CPU may be on an accelerator, and those of one on it may be there already."""
    specimen = ZOO["llama_padded"]

    def pruned(model_device, batch_device):
        model = specimen.build().to(model_device)
        prune(model, on(batch_device, specimen.batches()), method=method)
        return model

    usual = pruned("cpu", "cpu")
    assert_equal(usual, pruned("remote", "remote"))
    other = pruned("cpu", "remote")
    assert all(map(torch.equal, usual.parameters(), other.parameters()))


def spread(model):
    """Put every second block on the device, as accelerate does with a `device_map`."""

    def move_inputs(module, args, kwargs):
        return on(module.lm_device, args), on(module.lm_device, kwargs)

    def place(module, device):
        module.lm_device = device
        module.to(device).register_forward_pre_hook(move_inputs, with_kwargs=True)

    body = model.model
    for module in (body.embed_tokens, body.norm, model.lm_head, body.rotary_emb):
        place(module, DEVICES[0])
    for index, block in enumerate(body.layers):
        place(block, DEVICES[index % 2])
    return model


CASES = {
    "wanda": {"method": "wanda"},
    "best": {"method": "best", "pattern": "2:4"},
    "units": {"units": 0.5},
}


@pytest.mark.parametrize("choices", CASES.values(), ids=CASES)
def test_a_model_on_two_devices(choices):
    models = model_of("llama"), spread(model_of("llama"))
    for model in models:
        (shrink if shrinks(choices) else prune)(model, batches_of("llama"), **choices)
    assert_equal(*models)
    assert len({parameter.device for parameter in models[1].parameters()}) == 2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    save_llama(folder)
    return folder


def test_from_disk(source, tmp_path):
    for device in DEVICES:
        options = {"device": device, "progress": False, **CHOICES["owl"]}
        prune_from_disk(source, tmp_path / device, batches(), 0.5, **options)
    assert same_weights(*(weights(tmp_path / device) for device in DEVICES))


def test_perplexity_from_disk(source):
    cpu, other = (
        perplexity_from_disk(source, batches(), progress=False, device=device) for device in DEVICES
    )
    assert cpu == other
