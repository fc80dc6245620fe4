"""`prune` on another device: masks and weights are those of the CPU, to the bit.

`tests/test_device.py` runs this file in a process of its own. The device (`support.remote`) runs the CPU's kernels in
the caller's thread, and has no allocator for storages. So these tests cannot cover pinned memory, streams and events,
of which `torch.accelerator` shows a single one here, the memory of devices, kernels that round otherwise, autocast,
TF32, and several accelerators.
"""

import itertools

import pytest
import torch
from support.disk import CHOICES, batches, same as same_weights, save_llama, weights
from support.remote import DEVICES, assert_equal, on
from support.zoo import ZOO

from wanda_lightning import NM, Unstructured, perplexity_from_disk, prune, prune_from_disk, shrink
from wanda_lightning.common.evaluation_mode import seeded
from wanda_lightning.methods import METHODS, PRESETS, SEQUENTIAL_CHOICES

# Of few tokens; and PyTorch's, that the device has no fused kernels.
pytestmark = pytest.mark.filterwarnings("ignore")


def on_both(specimen, **choices):
    """Prune the same model on the CPU and on the device."""
    models = []
    reports = []
    for device in DEVICES:
        models.append(ZOO[specimen].build().to(device))
        reports.append(prune(models[-1], ZOO[specimen].batches(), progress=False, **choices))
    assert_equal(*models)
    assert (reports[0].layers, reports[0].notes) == (reports[1].layers, reports[1].notes)
    return models[1], " ".join(reports[1].notes)


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_of_other_devices_are_not_seeded(monkeypatch, device):
    seeds = []
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.remote, "manual_seed_all", seeds.append)
    with seeded(3, torch.device(device)):
        drawn = torch.rand(4)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds == [3] * (device != "cpu")


@pytest.mark.usefixtures("no_float64")
@pytest.mark.parametrize(
    ("specimen", "choices"),
    [
        *(("llama", {"method": method}) for method in (*METHODS, *PRESETS)),
        *(("llama", {"allocation": allocation}) for allocation in ("owl", "owl_layer")),
        *itertools.product(("vit", "convnext"), ({"method": "best"}, {"method": "ria"})),
        *itertools.product(
            ("llama_left_padded", "mixtral_padded"), ({"sequential": s} for s in SEQUENTIAL_CHOICES)
        ),
        ("llama", {"pattern": "equal_share"}),
        ("llama", {"method": "sparsegpt", "pattern": "4:8"}),
    ],
)
def test_choices(specimen, choices):
    on_both(specimen, **choices)


@pytest.mark.usefixtures("no_float64")
def test_what_the_report_or_the_model_must_show():
    assert "permuted" in on_both("llama", method="ria", pattern="2:4", permutation="assignment")[1]
    assert "BatchNorm" in on_both("resnet18")[1]
    assert on_both("qwen3_moe", pattern="experts")[0].config.num_experts == 2


@pytest.mark.parametrize(
    "pattern", [NM(n=2, m=4), Unstructured("row"), Unstructured("layer")], ids=str
)
def test_masks_of_a_large_matrix(pattern):
    """Many and large groups are compared in other ways than few and small ones, and on a CPU by NumPy."""
    scores = torch.randint(50_000, (32, 8192), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(pattern(scores.to("remote"), 0.5).cpu(), pattern(scores, 0.5))


@pytest.mark.usefixtures("no_float64")
def test_structured():
    models = [ZOO["llama"].build().to(device) for device in DEVICES]
    for model in models:
        prune(model, ZOO["llama"].batches(), method="best", pattern="structured", progress=False)
        shrink(model)
    assert_equal(*models)
    assert models[1].model.layers[0].mlp.up_proj.weight.shape[0] < 64


@pytest.mark.parametrize("method", ["wanda", "refit"])
def test_batches_of_the_other_device(method):
    """The batches of a model on the CPU may be on an accelerator, and those of one on it may be there already."""
    models = [ZOO["llama_padded"].build() for _ in range(2)] + [
        ZOO["llama_padded"].build().to("remote")
    ]
    for model, device in zip(models, ("cpu", "remote", "remote"), strict=True):
        prune(model, on(device, ZOO["llama_padded"].batches()), method=method, progress=False)
    assert_equal(models[0], models[2])
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def spread(model):
    """Put every second block on the device, as accelerate does with a `device_map`."""

    def move_inputs(module, args, kwargs):
        return on(module.lm_device, args), on(module.lm_device, kwargs)

    rest = [model.model.embed_tokens, model.model.norm, model.lm_head, model.model.rotary_emb]
    for index, module in enumerate([*rest, *model.model.layers]):
        module.lm_device = DEVICES[index % 2 if module not in rest else 0]
        module.to(module.lm_device).register_forward_pre_hook(move_inputs, with_kwargs=True)
    return model


CASES = {
    "wanda": {"method": "wanda"},
    "owl": {"method": "balanced", "allocation": "owl_layer"},
    "best": {"method": "best", "pattern": "2:4"},
    "structured": {"pattern": "structured"},
}


@pytest.mark.parametrize("choices", CASES.values(), ids=CASES)
def test_a_model_on_two_devices(choices):
    models = ZOO["llama"].build(), spread(ZOO["llama"].build())
    for model in models:
        prune(model, ZOO["llama"].batches(), progress=False, **choices)
    assert_equal(*models)
    assert len({parameter.device for parameter in models[1].parameters()}) == 2


def test_errors_say_where_an_activation_is_not_finite():
    messages = []
    for device in DEVICES:
        model = ZOO["llama_left_padded"].build().to(device)
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight[3].mul_(1e30)
        with pytest.raises(
            ValueError, match=r"o_proj holds NaN or infinity.* in calibration batch"
        ) as caught:
            prune(model, ZOO["llama_left_padded"].batches(), progress=False)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_from_disk(tmp_path):
    save_llama(tmp_path / "source")
    for device in DEVICES:
        folder = tmp_path / device
        prune_from_disk(
            tmp_path / "source",
            folder,
            batches(),
            0.5,
            progress=False,
            device=device,
            **CHOICES["owl"],
        )
    assert same_weights(*(weights(tmp_path / device) for device in DEVICES))
    first, second = (
        perplexity_from_disk(tmp_path / "source", batches(), progress=False, device=d)
        for d in DEVICES
    )
    assert first == second
