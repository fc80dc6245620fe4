"""Training and evaluation on another device: weights and results are those of the CPU, to the bit.

`tests/test_device.py` runs this file in a process of its own. See `pruning.py` for what such a device cannot cover.
"""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import support.remote
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from peft import get_peft_model
from support import lora, modules
from support.callbacks import ADAMW, SGD, Manual, Net, loader, trainer
from support.quiet import prune
from support.remote import DEVICES, assert_equal, on
from support.zoo import batches_of, model_of
from torch.utils.data import DataLoader

from wanda_lightning import (
    CausalLMModule,
    CubicSchedule,
    DistillFromDense,
    KeepZeros,
    PruningCallback,
    WandaPrune,
    keep_zeros,
    sample_windows,
)
from wanda_lightning.evaluation.agreement import Agreement
from wanda_lightning.lora import merge
from wanda_lightning.training.predictions import mixed_precision

pytestmark = pytest.mark.filterwarnings("ignore")


def train(model, optimizer, device, clip=None):
    for batch in on(device, batches_of("llama") * 2):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize("moves", ["before", "after"])
def test_zeros_are_kept_in_plain_loops(optimizer, moves):
    """The model may also move after the call of `keep_zeros`, as Fabric and accelerate move it."""
    models = []
    for device in DEVICES:
        model = model_of("llama")
        if moves == "before":
            model.to(device)
        prune(model, method="magnitude")
        zeros = {name: (p == 0).cpu() for name, p in model.named_parameters() if p.ndim > 1}
        updates = optimizer(model.parameters())
        with keep_zeros(model, updates):
            train(model.to(device), updates, device, clip=1.0)
        for name, zero in zeros.items():
            assert torch.equal(zero, (model.get_parameter(name) == 0).cpu()), name
        models.append(model)
    assert_equal(*models)


def test_a_run_resumes():
    models = [model_of("llama").to(device) for device in DEVICES]
    for model, device in zip(models, DEVICES, strict=True):
        prune(model, method="magnitude")
        updates = SGD(model.parameters())
        weight = model.model.layers[0].mlp.up_proj.weight
        with keep_zeros(model, updates) as held:
            weight.data[:, :3] = 0  # by chance
            state = held.state_dict()
        with keep_zeros(model, updates, state=state):
            train(model, updates, device)
        assert (weight[:, :3] != 0).any()
    assert_equal(*models)


@pytest.mark.parametrize("build", [lora.llama, lora.gpt2])
def test_adapters_merge(monkeypatch, build):
    merged = []
    for device in DEVICES:
        monkeypatch.setattr(lora, "TOKENS", lora.TOKENS.to(device))
        base = build()
        zeros = lora.zeros_of(base)
        config = lora.config(target_modules="all-linear", lora_dropout=0.3)
        model = get_peft_model(base, config).to(device)
        torch.manual_seed(0)
        lora.train(model)
        merged.append(merge(model))
        lora.assert_zeros(merged[-1], {name: zero.to(device) for name, zero in zeros.items()})
    assert_equal(*merged)


class Remote(Accelerator):
    """The device for a Trainer."""

    def setup_device(self, device):
        assert device.type == "remote"

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    parse_devices = get_parallel_devices = staticmethod(lambda devices: devices)
    auto_device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    name = staticmethod(lambda: "remote")


class WhereItRan(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, *_):
        self.device = pl_module.device.type

    on_validation_batch_start = on_test_batch_start = on_train_batch_start


def trainers(callbacks, **options):
    """A Trainer on the CPU, and one on the device."""
    for device in DEVICES:
        place = WhereItRan()
        if device != "cpu":
            strategy = SingleDeviceStrategy(torch.device(device), accelerator=Remote())
            options |= {"accelerator": "auto", "strategy": strategy}
        yield trainer(*callbacks(), place, **options)
        assert place.device == device.partition(":")[0]


FITS = {
    "wanda": lambda: [WandaPrune(num_samples=12), KeepZeros()],
    "thorough": lambda: [PruningCallback(num_samples=12, method="thorough")],
    "schedule": lambda: [WandaPrune(num_samples=12, schedule=CubicSchedule(2, 8, 2))],
    "distillation": lambda: [WandaPrune(num_samples=12), DistillFromDense()],
    "SWA": lambda: [WandaPrune(num_samples=12), StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
    "EMA on the CPU": lambda: [WandaPrune(num_samples=12), EMAWeightAveraging(device="cpu")],
}


@pytest.mark.parametrize(
    ("callbacks", "make"),
    [
        *((callbacks, Net) for callbacks in FITS.values()),
        (FITS["wanda"], partial(Net, ADAMW)),
        (FITS["wanda"], Manual),
    ],
)
def test_fit(callbacks, make):
    nets = []
    for device, made in zip(DEVICES, trainers(callbacks, max_epochs=2), strict=True):
        torch.manual_seed(0)
        net = make()
        made.fit(net, loader(24), loader(8))
        nets.append(net.to(device))  # Lightning has moved it to the CPU at the end
    assert_equal(*nets)


@pytest.mark.parametrize("supported", [True, False, None])
def test_distillation_in_bfloat16(monkeypatch, supported):
    """A model in float32 runs in bfloat16 if the device says that it can."""
    if supported is not None:
        monkeypatch.setattr(
            torch.remote, "is_bf16_supported", lambda including_emulation: supported, raising=False
        )
    with mixed_precision(torch.nn.Linear(1, 1).to("remote")):
        assert torch.is_autocast_enabled("remote") == bool(supported)
        assert not supported or torch.get_autocast_dtype("remote") == torch.bfloat16


@pytest.mark.parametrize("has_float64", [True, False])
def test_perplexity(monkeypatch, has_float64):
    monkeypatch.setattr(support.remote, "HAS_FLOAT64", has_float64)
    windows = DataLoader([{"input_ids": ids} for ids in modules.windows_of_text()], 3)
    cpu, other = (
        made.validate(CausalLMModule(modules.tiny_llama()), windows, verbose=False)
        for made in trainers(list)
    )
    assert cpu == other


def test_agreement_with_the_dense_model():
    found = []
    for device in DEVICES:
        agreement = Agreement()
        model = model_of("llama").to(device).eval()
        for watching in (agreement.storing, agreement.comparing):
            with watching(model) as after_batch, torch.no_grad():
                for index, batch in enumerate(on(device, batches_of("llama"))):
                    model(**batch)
                    after_batch(batch, index, 0)
            if watching == agreement.storing:
                prune(model, method="magnitude")
        found.append(agreement.metrics())
    assert found[0]["kl_divergence"] > 0
    assert found[0] == found[1]


def test_text_that_the_model_writes():
    special = SimpleNamespace(bos_token_id=5, eos_token_id=7)
    texts = []
    for device in DEVICES:
        model = modules.tiny_llama().to(device)
        texts.append(sample_windows(model, special, 5, 12, seed=3, progress=False))
    assert torch.equal(*texts)
