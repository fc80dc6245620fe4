"""What two processes do together in tests with the fixture `pair`, and how it is compared with one process."""

import contextlib
import io
import time
from functools import partial
from operator import attrgetter
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from support.callbacks import trainer as callbacks_trainer
from support.layers import rng
from support.mlps import Mlp
from support.quiet import prune, shrink, shrinks
from support.samples import gradients, samples_of, split
from support.zoo import batches_of, model_of, run
from torch import distributed as dist, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import wanda_lightning as wl
from wanda_lightning.calibration.lockstep import whole_model_calls
from wanda_lightning.calibration.observer import Observer
from wanda_lightning.callbacks import SavePretrained
from wanda_lightning.callbacks.trainer import processes_of
from wanda_lightning.common.errors import UserError
from wanda_lightning.config import PruningConfig
from wanda_lightning.core.statistics import SUMS
from wanda_lightning.lightning_modules import CausalLMModule
from wanda_lightning.loop.batch_norm import batch_norm_layers
from wanda_lightning.models import find_layers
from wanda_lightning.parallel import Processes
from wanda_lightning.shrink_config import ShrinkConfig
from wanda_lightning.verbs.shrink import carry_out


def both():
    return Processes(dist.group.WORLD)


def share_of(batches, rank, shares):
    """The batches of this process: every second one, or those at the given places."""
    return batches[rank::2] if shares is None else [batches[index] for index in shares[rank]]


def whole(model):
    """The parameters by name, gathered from both processes where they are sharded."""
    weights = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            parameter = parameter.full_tensor()
        weights[name] = parameter.detach().clone()
    return weights


def attempt(work):
    """The result, or the error as (type, text)."""
    try:
        return work()
    except AssertionError:  # of the test itself
        raise
    except Exception as error:
        return type(error).__name__, str(error)


def prune_both(model, batches, forward=None, **choices):
    """Prune or shrink a model together; return the report."""
    parts = ShrinkConfig(**choices).parts if shrinks(choices) else [PruningConfig(**choices)]
    return carry_out(parts, model, batches, forward, progress=False, processes=both())


def counted(processes):
    """How many numbers the processes add up from now on, one entry for each message."""
    sent = []
    all_reduce_sum = processes.all_reduce_sum

    def counting(tensors):
        sent.append(sum(tensor.numel() for tensor in tensors))
        return all_reduce_sum(tensors)

    processes.all_reduce_sum = counting
    return sent


def shard(model):
    """Apply `fully_shard` to the blocks and to the model around them, as one does for training."""
    mesh = init_device_mesh("cpu", (2,))
    for unit in find_layers(model, "block").stops:
        fully_shard(unit.module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def collectives(rank):
    """What each collective returns, for tensors of several shapes and dtypes."""
    processes = both()
    tensors = [
        torch.tensor([1.0, 2.0]) * (rank + 1),
        torch.tensor(10 + rank),
        torch.tensor([[0.5]], dtype=torch.float64),
        torch.zeros(0),
        torch.tensor([[3.0], [4.0]]),
    ]
    processes.all_reduce_sum(tensors)

    # A device without float64 adds in float32.
    with (
        mock.patch("wanda_lightning.parallel.processes.has_float64", return_value=False),
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as message,
    ):
        processes.all_reduce_sum(tensors[2:3])
    assert message.call_args.args[0].dtype == torch.float32
    return {
        "add": [tensor.tolist() for tensor in tensors],
        "minimum": processes.all_reduce_min(5 - rank),
        "share": [processes.broadcast(f"of {rank}", source) for source in (0, 1)],
        "gather": processes.all_gather([rank, 5]),
    }


def failures(rank, who):
    """Both in step after some failed, however deep inside."""
    processes = both()

    def work():
        with processes.fail_together():
            with processes.fail_together():
                if rank in who["inner"]:
                    raise KeyError(rank)
            processes.all_reduce_min(1)
            if rank in who["outer"]:
                raise UserError(f"bad {rank}")
        return "fine"

    return attempt(work), both().all_reduce_min(3 + rank)


def replicated(rank, name, shares=None, size=None, times=1, wide=False, **choices):
    """Prune a specimen that both processes have, maybe in float64, and with batches of another size.

    Return its weights and the report.
    """
    model = model_of(name)
    if wide:
        model = model.double()
    batches = batches_of(name) * times
    if size is not None:
        batches = split(batches, size)
    report = prune_both(model, iter(share_of(batches, rank, shares)), **choices)
    return whole(model), report


class Fork(nn.Module):
    """Two layers with one input, which some batches copy before the second one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        y = x + 1
        total = self.first(y) + self.second(y.clone() if x.mean() > 0 else y)
        return self.third(y) if x.mean() > 1 else total


def statistics_of(rank, name, shares=None):
    """The sums that the processes have together, by layer; which layers share them; how many numbers were sent."""
    if name == "fork":
        model, batches = Fork(), fork_batches()
    else:
        model, batches = model_of(name), batches_of(name)
    processes = both()
    sent = counted(processes)
    observer = Observer(frozenset(SUMS), processes)
    stop = find_layers(model, "none").stops[0]
    with torch.no_grad():
        calls = whole_model_calls(samples_of(model, share_of(batches, rank, shares)))
        inputs = observer(stop, calls).inputs

    sums = {layer: (statistics.count, statistics.sums) for layer, statistics in inputs.items()}
    groups = {}  # of layers with one input
    for layer, statistics in inputs.items():
        groups.setdefault(id(statistics), []).append(layer)
    return sums, list(groups.values()), sum(sent)


def fork_batches():
    """The first two share the input of both layers, the third and fourth do not, the fifth reaches only the last."""
    generator = rng()
    return [
        torch.randn(4, 8, generator=generator) * 0.1 + mean for mean in (-0.5, -0.5, 0.5, 0.5, 2.0)
    ]


def fisher_of(rank, name, shares, samples):
    """The Fisher sums of both processes."""
    model = model_of(name).double()
    batches = share_of(split(batches_of(name), 1), rank, shares)
    return gradients(model, batches, samples, processes=both())


def progress(rank):
    parts = [PruningConfig()]
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        carry_out(parts, model_of("plain_mlp"), batches_of("plain_mlp")[rank::2], processes=both())
    return shown.getvalue()


def spoilt(rank, sequential, spoil):
    """Prune where one process has something wrong; the error, and whether the weights are as before."""
    name = "llama" if spoil in ("mask", "training") else "plain_mlp"
    model = model_of(name)
    batches = batches_of(name)[rank::2]
    forward = None
    recovery = None
    if spoil == "mask":
        batches = [{"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8 - rank)}]
    if spoil == "training":
        recovery = wl.Reconstruct()
        activation = model.model.layers[0].mlp.act_fn
        if rank == 1:
            activation.register_forward_hook(lambda *_: torch.is_grad_enabled() and fail())
    if spoil == "iterator":
        batches = failing(batches) if rank == 1 else iter(batches)
    if spoil == "nothing":
        batches = []
    before = whole(model)
    if rank == 1 and spoil == "input":
        batches[-1][0] = float("nan")
    if rank == 1 and spoil == "weight":
        model[0].weight.data[0, 0] = float("inf")
    if rank == 1 and spoil == "forward":

        def forward(batch):
            model[:2](batch)
            fail()

    choices = {"sequential": sequential, "recovery": recovery}
    error = attempt(lambda: prune_both(model, batches, forward=forward, **choices))
    same = all(torch.equal(value, before[name]) for name, value in whole(model).items())
    return error, same or spoil in ("weight", "forward", "training")


def fail():
    raise OSError("no more disk")


def failing(batches):
    yield batches[0]
    fail()


Block = partial(Mlp, size=16, width=24)


def prune_shards(rank, folder):
    """Why a model is not pruned that FSDP2 shards, and which was just gathered, or a block of it."""
    model = shard(model_of("llama"))
    batches = batches_of("llama")
    with torch.no_grad():
        run(model, batches[0])
    refusal = attempt(lambda: prune_both(model, batches))
    assert attempt(lambda: prune_both(model.model.layers[0], batches)) == refusal
    fit = trainer("fsdp2", wl.WandaPrune()).fit
    loader = DataLoader(SAMPLES, batch_size=2)
    assert attempt(lambda: fit(Regression(True), loader)) == refusal
    return refusal


def trainer(strategy, *callbacks, **options):
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    options = {"max_steps": 3, "num_sanity_val_steps": 1, "devices": 2, **options}
    return callbacks_trainer(*callbacks, strategy=strategy, **options)


class Regression(L.LightningModule):
    def __init__(self, sharding=False, blocks=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(Block() for _ in range(3)))
        self.sharding = sharding
        self.blocks = blocks

    def configure_model(self):
        if self.sharding and not isinstance(self.layers, FSDPModule):
            for block in self.layers if self.blocks else ():
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch), torch.zeros_like(batch))

    def validation_step(self, batch, batch_idx):
        self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


SAMPLES = torch.randn(16, 16, generator=rng(2))


class Final(L.Callback):
    """The weights before and after training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.pruned = whole(pl_module)

    def on_train_end(self, trainer, pl_module):
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        self.trained = whole(pl_module)


def fit_with(rank, strategy, make, zeros_in=None, blocks=True):
    """Train with a callback of ours; the weights at the first step and at the end, and its report."""
    module = Regression(strategy == "fsdp2", blocks)
    if zeros_in is not None:
        module.layers[zeros_in].up.weight.data[:, ::2] = 0
    callback = make()
    final = Final()
    loaders = DataLoader(SAMPLES, batch_size=2), DataLoader(SAMPLES, batch_size=2)
    trainer(strategy, callback, final).fit(module, *loaders)
    return final.pruned, final.trained, getattr(callback, "report", None)


class Recording(Regression):
    """Records the batches that it is calibrated on."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def calibration_step(self, batch):
        self.batches.append(batch)
        return self(batch)


def fit(rank, num_samples, given, shuffle=False):
    """Prune in a Trainer; the samples that this process took, the weights, and the report."""
    module = Recording()
    torch.manual_seed(5 + rank)
    calibration = DataLoader(SAMPLES, batch_size=3, shuffle=shuffle) if given else None
    callback = wl.WandaPrune(num_samples=num_samples, dataloader=calibration, sequential="none")
    final = Final()
    trainer("ddp", callback, final).fit(
        module, DataLoader(SAMPLES, batch_size=2), DataLoader(SAMPLES)
    )
    return module.batches, final.pruned, callback.report


def distill(rank, strategy):
    """Train a pruned module toward a dense one, on batches of four samples over all processes."""
    module = Regression(strategy == "fsdp2")
    dense = Regression()
    with torch.no_grad():
        for weight in dense.parameters():
            weight.mul_(1.5)
    prune(module, criterion="magnitude")

    batches = SAMPLES.view(4, 4, 16)
    devices = 1
    if rank is not None:  # one of two processes
        batches = batches[:, rank::2]
        devices = 2
    fit = trainer(
        strategy,
        wl.KeepZeros(),
        wl.DistillFromDense(dense),
        devices=devices,
        use_distributed_sampler=False,
    ).fit
    fit(module, DataLoader(batches, batch_size=None))
    return whole(module)


def fit_llama(rank, folder, saved):
    """Train a pruned model that FSDP2 shards, and save it; what is sharded, what is refused, and the weights."""
    module = CausalLMModule(folder)
    windows = [batch["input_ids"] for batch in batches_of("llama")]
    trainer("fsdp2", wl.KeepZeros()).fit(module, DataLoader(windows, batch_size=None))
    module.configure_model()  # a second call does nothing
    sharded = [type(inner).__name__ for inner in module.modules() if isinstance(inner, FSDPModule)]
    refused = [attempt(lambda: shrink(module.model))]
    module.save_pretrained(saved)
    assert (saved / "config.json").is_file()  # in every process
    refused.append(attempt(lambda: module.save_pretrained(saved)))
    return sharded, refused, whole(module.model)


def save_tied(rank, folder):
    torch.manual_seed(0)
    config = model_of("llama").config
    config.tie_word_embeddings = True
    module = CausalLMModule(shard(type(model_of("llama"))(config)))
    module.save_pretrained(folder)
    return whole(module.model)


def save_classifier(rank, folder):
    module = wl.ImageClassifierModule(shard(model_of("convnext")))
    return attempt(lambda: module.save_pretrained(folder))


def save_shards(rank, folder):
    fit = trainer("fsdp2", SavePretrained(folder)).fit
    return attempt(lambda: fit(CausalLMModule(model_of("llama")), DataLoader(SAMPLES)))


class SlowlySaved(Regression):
    def save_pretrained(self, folder, overwrite):
        time.sleep(1)
        folder.mkdir()


def save_slowly(rank, folder):
    """Whether the saved folder is there when training has ended."""
    trainer("ddp", SavePretrained(folder)).fit(SlowlySaved(), DataLoader(SAMPLES))
    return folder.is_dir()


def tensor_parallel(rank, folder):
    class Ask(L.Callback):
        def setup(self, trainer, pl_module, stage):
            processes_of(trainer)

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    return attempt(lambda: trainer(strategy, Ask()).fit(Regression(), DataLoader(SAMPLES)))


def prune_batch_norms(rank, batches, shares):
    """The running means of a ResNet whose last blocks both processes prune, each with its batches."""
    model = model_of("resnet18").double()
    prune_both(model, share_of(batches, rank, shares), method="magnitude", only=["layer4.*"])
    return [layer.running_mean for layer in batch_norm_layers(model)]


def alone(name, **choices):
    """Prune or shrink a specimen in one process; return the model and the report."""
    model = model_of(name)
    change = shrink if shrinks(choices) else prune
    return model, change(model, batches_of(name), **choices)


def assert_same_weights(weights, expected, tolerance=1e-3):
    """The same zeros but for near ties (sums in another order differ in the last bit); what stays is bit-equal."""
    assert weights.keys() == expected.keys()
    different = 0
    size = 0
    for name, value in weights.items():
        other = expected[name].detach()
        different += int(((value == 0) != (other == 0)).sum())
        size += value.numel()
        kept = (value != 0) & (other != 0)
        assert torch.equal(value[kept], other[kept]), name
    assert different <= tolerance * size


def assert_same_report(report, expected):
    plain = attrgetter("name", "shape", "tokens", "note", "target", "zeros")
    assert [*map(plain, report.layers)] == [*map(plain, expected.layers)]
    for layer, other in zip(report.layers, expected.layers, strict=True):
        if other.error is None:
            assert layer.error is None, layer.name
        else:
            assert layer.error == pytest.approx(other.error, rel=1e-3), layer.name
    rest = attrgetter("skipped", "parameters", "zeros", "config", "notes")
    assert rest(report) == rest(expected)
