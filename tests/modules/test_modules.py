"""The modules against slow loops, plain Hugging Face and timm, and a file system that fails."""

import json
import math
import os
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
import transformers
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file, save_file
from support.gguf import write_gguf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from wanda_lightning.files import refuse_nonempty, refuse_replacement, whole_file, whole_folder
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule, WindowPerplexity

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would only slow down these tests
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),  # some tests only train
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning 2.6 under torch 2.13
]

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    # The variables are read when huggingface_hub is imported, so the constant it was read into is set.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def tiny_llama(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=64, **sizes, **kwargs)).eval()


def tiny_tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def tiny_vit(**kwargs):
    torch.manual_seed(0)
    return ImageClassifierModule(
        "vit_tiny_patch16_224", pretrained=False, model_kwargs=VIT, **{"num_classes": 10} | kwargs
    )


def trainer(**kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **kwargs)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def slow_perplexity(logits, input_ids, attention_mask=None):
    """One token at a time, in float64, straight from the definition of perplexity over windows."""
    windows = []
    for w, ids in enumerate(input_ids):
        losses = []
        for t in range(len(ids) - 1):
            if attention_mask is None or (attention_mask[w, t] and attention_mask[w, t + 1]):
                probabilities = logits[w, t].double().softmax(-1)
                losses.append(-math.log(probabilities[ids[t + 1]].item()))
        if losses:
            windows.append(sum(losses) / len(losses))
    return math.exp(sum(windows) / len(windows))


def windows_of_text(n=7, tokens=24):
    return torch.randint(128, (n, tokens), generator=torch.Generator().manual_seed(1))


MASKS = {
    "none": lambda ids: None,
    "right padding": lambda ids: (torch.arange(ids.shape[1]) < torch.tensor([24, 9, 2, 1, 0, 24, 5])[:, None]).long(),
    "left padding": lambda ids: (torch.arange(ids.shape[1]) >= torch.tensor([0, 9, 22, 23, 24, 3, 5])[:, None]).long(),
}


class TestWindowPerplexity:
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
    def test_equals_the_slow_loop(self, mask, dtype, rel):
        ids = windows_of_text()
        logits = (torch.randn(*ids.shape, 128, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
        attention_mask = MASKS[mask](ids)
        metric = WindowPerplexity()
        metric.update(logits, ids, attention_mask)
        assert metric.compute().item() == pytest.approx(slow_perplexity(logits, ids, attention_mask), rel=rel)

    def test_chunks_do_not_change_the_result(self, monkeypatch):
        ids = windows_of_text()
        logits = torch.randn(*ids.shape, 128).double()
        monkeypatch.setattr("wanda_lightning.modules.perplexity._CHUNK", 5 * 128)
        metric = WindowPerplexity()
        metric.update(logits, ids)
        assert metric.compute().item() == pytest.approx(slow_perplexity(logits, ids), rel=1e-12)

    def test_is_a_sum_over_windows(self):
        ids = windows_of_text()
        logits = torch.randn(*ids.shape, 128)
        whole, parts = WindowPerplexity(), WindowPerplexity()
        whole.update(logits, ids)
        for w in range(len(ids)):
            parts.update(logits[w : w + 1], ids[w : w + 1])
        assert parts.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)

    def test_padding_may_hold_anything(self):
        ids = windows_of_text()
        attention_mask = MASKS["right padding"](ids)
        logits = torch.randn(*ids.shape, 128)
        garbage = logits.masked_fill(attention_mask[..., None] == 0, math.nan)
        metric, clean = WindowPerplexity(), WindowPerplexity()
        metric.update(garbage, ids, attention_mask)
        clean.update(logits, ids, attention_mask)
        assert torch.equal(metric.compute(), clean.compute())

    def test_only_padding_is_nan(self):
        ids = windows_of_text()
        metric = WindowPerplexity()
        metric.update(torch.randn(*ids.shape, 128), ids, torch.zeros_like(ids))
        assert metric.compute().isnan()

    @pytest.mark.parametrize("batch", [1, 4])
    def test_no_second_tensor_of_the_size_of_the_logits(self, batch):
        class Largest(TorchDispatchMode):
            numel = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
                new = [t for t in tree_leaves(out) if torch.is_tensor(t)]
                new = [t.numel() for t in new if t.untyped_storage().data_ptr() not in known]
                self.numel = max([self.numel, *new])
                return out

        logits = torch.zeros(batch, 600 // batch, 2**15, dtype=torch.bfloat16)
        ids = torch.zeros(logits.shape[:2], dtype=torch.long)
        with Largest() as largest:
            WindowPerplexity().update(logits, ids, torch.ones_like(ids))
        assert 0 < largest.numel <= 2**22 < logits.numel() / 4

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"\(1, 5, 9\) for \(1, 4\)"):
            WindowPerplexity().update(torch.zeros(1, 5, 9), torch.zeros(1, 4, dtype=torch.long))


class TestCausalLM:
    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("mask", MASKS)
    def test_validate_and_test_equal_the_slow_loop(self, batch_size, mask):
        model, ids = tiny_llama(), windows_of_text()
        attention_mask = MASKS[mask](ids)
        with torch.no_grad():
            expected = slow_perplexity(model(ids, attention_mask=attention_mask).logits, ids, attention_mask)
        if attention_mask is None:
            windows = [{"input_ids": row} for row in ids]
        else:
            windows = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, attention_mask, strict=True)]
        module, loader = CausalLMModule(model), DataLoader(windows, batch_size=batch_size)
        (validated,) = trainer().validate(module, loader, verbose=False)
        (tested,) = trainer().test(module, loader, verbose=False)
        assert validated == {"val_perplexity": pytest.approx(expected, rel=1e-5)}
        assert tested == {"test_perplexity": pytest.approx(expected, rel=1e-5)}
        assert model.training
        with torch.no_grad():  # outside the inference mode of the loops
            module.val_perplexity.update(model(ids, attention_mask=attention_mask).logits, ids, attention_mask)
        assert module.val_perplexity.compute().item() == pytest.approx(expected, rel=1e-5)

    def test_dropout_is_off_while_measuring(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = OPTConfig(vocab_size=128, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5, **sizes)
        model, ids = OPTForCausalLM(config).eval(), windows_of_text()
        with torch.no_grad():
            expected = slow_perplexity(model(ids).logits, ids)
        (validated,) = trainer().validate(CausalLMModule(model), DataLoader(ids, batch_size=3), verbose=False)
        assert validated["val_perplexity"] == pytest.approx(expected, rel=1e-5)

    def test_predict_gives_each_windows_loss(self):
        model, ids = tiny_llama(), windows_of_text()
        losses = torch.cat(trainer().predict(CausalLMModule(model), DataLoader(ids, batch_size=3)))
        assert losses.shape == (7,)
        with torch.no_grad():
            each = [math.log(slow_perplexity(model.eval()(ids).logits[w : w + 1], ids[w : w + 1])) for w in range(7)]
        assert losses.tolist() == pytest.approx(each, rel=1e-5)

    @pytest.mark.parametrize("mask", MASKS)
    def test_training_loss_is_the_mean_over_real_tokens(self, mask):
        model, ids = tiny_llama(), windows_of_text()
        attention_mask = MASKS[mask](ids)
        logits = model(ids, attention_mask=attention_mask).logits
        losses = []
        for w in range(7):
            for t in range(23):
                if attention_mask is None or (attention_mask[w, t] and attention_mask[w, t + 1]):
                    losses.append(-logits[w, t].log_softmax(-1)[ids[w, t + 1]].item())
        module = CausalLMModule(model)
        module.log = lambda *args, **kwargs: None
        loss = module.training_step({"input_ids": ids, "attention_mask": attention_mask}, 0)
        assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    def test_labels_of_the_batch_are_used(self):
        model, ids = tiny_llama(), windows_of_text()
        labels = torch.full_like(ids, -100)
        labels[0, 5] = ids[0, 5]
        module = CausalLMModule(model)
        module.log = lambda *args, **kwargs: None
        loss = module.training_step({"input_ids": ids, "labels": labels}, 0)
        assert loss.item() == pytest.approx(-model(ids).logits[0, 4].log_softmax(-1)[ids[0, 5]].item(), rel=1e-5)

    def test_fit_learns_and_leaves_frozen_parameters(self):
        model, ids = tiny_llama(), windows_of_text()
        frozen = model.model.embed_tokens.weight.requires_grad_(False).clone()
        module = CausalLMModule(model, lr=1e-2)
        before = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        fit = trainer(max_epochs=3, log_every_n_steps=1)
        fit.fit(module, DataLoader(ids, batch_size=4))
        assert fit.callback_metrics["train_loss"] < before
        assert torch.equal(model.model.embed_tokens.weight, frozen)
        assert all(p.requires_grad for g in module.configure_optimizers().param_groups for p in g["params"])

    def test_calibration_runs_all_blocks_and_no_head(self):
        model, calls = tiny_llama(), []
        for name, part in {"last": model.model.layers[-1], "head": model.lm_head}.items():
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
        module = CausalLMModule(model)
        for batch in (windows_of_text(), [windows_of_text()], {"input_ids": windows_of_text()}):
            assert module.calibration_step(batch) is None
        assert calls == ["last"] * 3

    @pytest.mark.parametrize("tied", [False, True])
    def test_saves_an_ordinary_folder(self, tmp_path, tied):
        model = tiny_llama(tie_word_embeddings=tied)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
        CausalLMModule(model, tiny_tokenizer()).save_pretrained(tmp_path / "new" / "model")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
        assert same_weights(loaded, model)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert AutoTokenizer.from_pretrained(tmp_path / "new" / "model")("w3 w7").input_ids == [3, 7]
        assert [file.suffix for file in (tmp_path / "new" / "model").iterdir() if file.stat().st_size > 20_000] == [
            ".safetensors"
        ]
        again = CausalLMModule(str(tmp_path / "new" / "model"))
        assert same_weights(again.model, model)
        assert again.model.training
        assert again.tokenizer("w3 w7").input_ids == [3, 7]

    def test_overwrites_the_folder_that_it_was_loaded_from(self, tmp_path):
        tiny_llama().save_pretrained(tmp_path)
        module = CausalLMModule(str(tmp_path))
        assert module.tokenizer is None
        with torch.no_grad():
            module.model.lm_head.weight.zero_()
        module.save_pretrained(tmp_path, overwrite=True)
        assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), module.model)

    def test_a_failed_save_leaves_the_old_folder(self, tmp_path, monkeypatch):
        tiny_llama().save_pretrained(tmp_path / "model")
        before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
        module = CausalLMModule(tiny_llama(), tiny_tokenizer())

        def fail(folder):
            assert (Path(folder) / "model.safetensors").exists()
            raise KeyboardInterrupt

        monkeypatch.setattr(module.tokenizer, "save_pretrained", fail)
        for target, overwrite in ((tmp_path / "model", True), (tmp_path / "other", False)):
            with pytest.raises(KeyboardInterrupt):
                module.save_pretrained(target, overwrite=overwrite)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
        assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before

    def test_dtype(self, tmp_path):
        tiny_llama().bfloat16().save_pretrained(tmp_path)
        assert CausalLMModule(str(tmp_path)).model.dtype == torch.bfloat16
        assert CausalLMModule(str(tmp_path), dtype="float32").model.dtype == torch.float32
        assert CausalLMModule(tiny_llama(), dtype="float16").model.dtype == torch.float16
        with pytest.raises(ValueError, match="auto, float32, bfloat16, float16, but it is 'int8'"):
            CausalLMModule(str(tmp_path), dtype="int8")

    def test_keeps_what_requires_a_gradient(self):
        model = tiny_llama()
        model.lm_head.requires_grad_(False)
        CausalLMModule(model)
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]

    def test_only_bin_is_refused(self, tmp_path):
        model = tiny_llama()
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(OSError, match=r"no weights in safetensors.*pytorch_model\.bin.*save_pretrained"):
            CausalLMModule(str(tmp_path))
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(OSError, match="with safetensors weights"):
            CausalLMModule(str(tmp_path))

    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(OSError, match=r"'nobody/nothing'.*neither a local folder nor.*hub") as caught:
            CausalLMModule("nobody/nothing")
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(OSError, match="neither a local folder nor"):
            CausalLMModule(str(tmp_path / "nothing"))
        with pytest.raises(OSError, match=r"no config\.json"):
            CausalLMModule(str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"nothing\.gguf does not exist"):
            CausalLMModule(str(tmp_path / "nothing.gguf"))
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(OSError, match=r"is a file, and of single files only \.gguf"):
            CausalLMModule(str(tmp_path / "model.safetensors"))

    def test_encoder_decoders_are_refused(self, tmp_path):
        T5Config(d_model=32).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(ValueError, match=r"t5 is an encoder-decoder.*wanda_lightning\.prune"):
            CausalLMModule(str(tmp_path))

    def test_a_batch_without_ids(self):
        with pytest.raises(ValueError, match="'input_ids', but it has 'text', 'n'"):
            CausalLMModule(tiny_llama()).calibration_step({"text": "", "n": 1})

    def test_bars_are_silent_in_a_file_and_come_back(self, tmp_path, capsys):
        transformers.utils.logging.enable_progress_bar()
        tiny_llama().save_pretrained(tmp_path)
        capsys.readouterr()
        CausalLMModule(str(tmp_path)).save_pretrained(tmp_path, overwrite=True)
        assert capsys.readouterr().err == ""
        assert transformers.utils.logging.is_progress_bar_enabled()

    def test_comes_back_from_a_checkpoint(self, tmp_path):
        tiny_llama().save_pretrained(tmp_path / "model")
        module = CausalLMModule(str(tmp_path / "model"), lr=0.5)
        with torch.no_grad():
            module.model.lm_head.weight.zero_()
        run = trainer()
        run.strategy.connect(module)
        run.save_checkpoint(tmp_path / "last.ckpt")
        again = CausalLMModule.load_from_checkpoint(tmp_path / "last.ckpt")
        assert same_weights(again, module)
        assert again.lr == 0.5

    def test_a_ready_model_is_no_hyperparameter(self):
        assert set(CausalLMModule(tiny_llama(), tiny_tokenizer()).hparams) & {"model", "tokenizer"} == set()


def test_gguf_becomes_an_ordinary_model(tmp_path):
    tensors = write_gguf(tmp_path / "tiny.gguf")
    module = CausalLMModule(str(tmp_path / "tiny.gguf"))
    assert module.model.dtype == torch.float32
    assert torch.equal(module.model.model.layers[1].mlp.down_proj.weight, torch.tensor(tensors["blk.1.ffn_down"]))
    assert module.tokenizer("theta").input_ids == [29, 21, 2]
    module.save_pretrained(tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), module.model)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("theta").input_ids == [29, 21, 2]


class TestImageClassifier:
    @pytest.mark.parametrize("num_classes", [3, 10])
    @pytest.mark.parametrize("keys", [None, ("image", "label"), ("pixel_values", "labels")])
    def test_validate_and_test_equal_a_slow_loop(self, num_classes, keys):
        module = tiny_vit(num_classes=num_classes)
        images, labels = torch.randn(7, 3, 32, 32), torch.arange(7) % num_classes
        with torch.no_grad():
            logits = module.model.eval()(images)
        module.model.train()
        ranks = [sum(bool(row[j] > row[y]) for j in range(num_classes)) for row, y in zip(logits, labels, strict=True)]
        expected = {
            "accuracy": sum(rank < 1 for rank in ranks) / 7,
            "accuracy_top5": sum(rank < 5 for rank in ranks) / 7,
            "loss": sum(-row.log_softmax(0)[y].item() for row, y in zip(logits, labels, strict=True)) / 7,
        }
        if num_classes <= 5:
            del expected["accuracy_top5"]
        samples = list(zip(images, labels, strict=True))
        if keys:
            samples = [dict(zip(keys, sample, strict=True)) for sample in samples]
        loader = DataLoader(samples, batch_size=3)
        (validated,) = trainer().validate(module, loader, verbose=False)
        (tested,) = trainer().test(module, loader, verbose=False)
        assert validated == {f"val_{name}": pytest.approx(value, rel=1e-5) for name, value in expected.items()}
        assert tested == {f"test_{name}": pytest.approx(value, rel=1e-5) for name, value in expected.items()}

    def test_predict_and_calibration_need_no_labels(self):
        module, images = tiny_vit(), torch.randn(4, 3, 32, 32)
        (logits,) = trainer().predict(module, DataLoader(images, batch_size=4))
        with torch.no_grad():
            assert torch.equal(logits, module.model.eval()(images))
        for batch in (images, [images], {"image": images}, (images, torch.zeros(4))):
            assert module.calibration_step(batch) is None
        with pytest.raises(ValueError, match="needs labels"):
            module.validation_step(images, 0)
        with pytest.raises(ValueError, match="'image' or 'pixel_values', but it has 'x'"):
            module.calibration_step({"x": images})

    def test_fit_learns(self):
        module = tiny_vit()
        images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
        before = F.cross_entropy(module(images), labels).item()
        fit = trainer(max_epochs=4, log_every_n_steps=1)
        fit.fit(module, DataLoader(list(zip(images, labels, strict=True)), batch_size=8))
        assert fit.callback_metrics["train_loss"] < before

    def test_biases_and_norms_do_not_decay(self):
        module = tiny_vit(weight_decay=0.1)
        decays = {id(p): g["weight_decay"] for g in module.configure_optimizers().param_groups for p in g["params"]}
        spared = {name for name, p in module.model.named_parameters() if decays.pop(id(p)) == 0}
        assert not decays
        assert spared == {
            name for name, p in module.model.named_parameters() if p.ndim < 2 or name in ("cls_token", "pos_embed")
        }

    def test_two_heads_of_a_distilled_model(self):
        torch.manual_seed(0)
        module = ImageClassifierModule("deit_tiny_distilled_patch16_224", False, 10, model_kwargs=VIT)
        module.model.set_distilled_training(True)
        images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
        one, two = module(images)
        module.log = lambda *args, **kwargs: None
        expected = (F.cross_entropy(one, labels) + F.cross_entropy(two, labels)) / 2
        assert torch.allclose(module.training_step((images, labels), 0), expected)

    @pytest.mark.parametrize(("name", "kwargs"), [("timm:vit_tiny_patch16_224", VIT), ("convnext_atto", CONVNEXT)])
    def test_saves_a_timm_folder(self, tmp_path, name, kwargs):
        torch.manual_seed(0)
        module = ImageClassifierModule(name, pretrained=False, num_classes=7, model_kwargs=kwargs)
        module.save_pretrained(tmp_path / "model")
        assert {file.name for file in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
        loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
        assert same_weights(loaded, module.model)
        again = ImageClassifierModule(f"local-dir:{tmp_path / 'model'}")
        assert same_weights(again.model, module.model)
        assert again.num_classes == 7
        with pytest.raises(FileExistsError, match="not empty"):
            module.save_pretrained(tmp_path / "model")

    def test_only_timm_models_are_saved(self, tmp_path):
        module = ImageClassifierModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), num_classes=2)
        with pytest.raises(ValueError, match="does not come from timm"):
            module.save_pretrained(tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    def test_checkpoint(self, tmp_path):
        module = tiny_vit()
        save_file(module.model.state_dict(), tmp_path / "weights.safetensors")
        torch.manual_seed(1)
        # pretrained stays true: with a checkpoint nothing is downloaded
        name, path = "vit_tiny_patch16_224", str(tmp_path / "weights.safetensors")
        again = ImageClassifierModule(name, num_classes=10, checkpoint=path, model_kwargs=VIT)
        assert same_weights(again.model, module.model)
        with pytest.raises(ValueError, match=r"head\.weight has the shape \(10, 32\) instead of \(9, 32\)"):
            ImageClassifierModule(name, num_classes=9, checkpoint=path, model_kwargs=VIT)
        weights = load_file(path)
        weights["extra"] = weights.pop("norm.bias")
        save_file(weights, path)
        with pytest.raises(ValueError, match=r"norm\.bias is missing; extra is unknown"):
            ImageClassifierModule(name, num_classes=10, checkpoint=path, model_kwargs=VIT)
        with pytest.raises(ValueError, match=r"more\. Check"):
            ImageClassifierModule(name, num_classes=10, checkpoint=path, model_kwargs={**VIT, "depth": 1})

    def test_only_safetensors_are_read(self, tmp_path):
        with pytest.raises(ValueError, match=r"\.safetensors file, but it is .*weights\.pth.*save_file"):
            tiny_vit(checkpoint=str(tmp_path / "weights.pth"))
        with pytest.raises(FileNotFoundError, match="does not exist"):
            tiny_vit(checkpoint=str(tmp_path / "weights.safetensors"))

    def test_what_is_not_there(self):
        with pytest.raises(ValueError, match=r"'convnext_ato'; the nearest names are convnext_atto.*hf-hub:"):
            ImageClassifierModule("convnext_ato")
        for name in ("hf-hub:nobody/nothing", "vit_tiny_patch16_224"):
            with pytest.raises(OSError, match=r"checkpoint=.*pretrained=False") as caught:
                ImageClassifierModule(name)
            assert isinstance(caught.value.__cause__, OSError)

    def test_it_must_be_a_classifier(self):
        with pytest.raises(ValueError, match="Linear has no classes"):
            ImageClassifierModule(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="has no classes"):
            tiny_vit(num_classes=0)
        with pytest.raises(ValueError, match="model_kwargs are for a model given by name"):
            ImageClassifierModule(nn.Linear(2, 2), num_classes=2, model_kwargs={"a": 1})

    def test_comes_back_from_a_checkpoint(self, tmp_path):
        module = tiny_vit(lr=0.5)
        run = trainer()
        run.strategy.connect(module)
        run.save_checkpoint(tmp_path / "last.ckpt")
        again = ImageClassifierModule.load_from_checkpoint(tmp_path / "last.ckpt")
        assert same_weights(again, module)
        assert again.lr == 0.5


def test_the_command_line_builds_them_from_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["wanda-lightning"]
    )  # LightningCLI warns where pytest's arguments are beside its own
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls what jsonargparse deprecates
    tiny_llama().save_pretrained(tmp_path / "model")
    recipes = {
        "text": {"class_path": "CausalLMModule", "init_args": {"model": str(tmp_path / "model"), "dtype": "bfloat16"}},
        "image": {
            "class_path": "ImageClassifierModule",
            "init_args": {"model": "timm:vit_tiny_patch16_224", "pretrained": False, "model_kwargs": VIT},
        },
    }
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"model": recipe}))  # JSON is YAML
        arguments = ["--config", str(tmp_path / f"{name}.yaml"), "--trainer.accelerator=cpu", "--trainer.logger=false"]
        cli = LightningCLI(run=False, args=arguments, save_config_callback=None, seed_everything_default=0)
        assert type(cli.model).__name__ == recipe["class_path"]
        assert cli.model.hparams.model == recipe["init_args"]["model"]


class TestFiles:
    def test_a_file_appears_whole(self, tmp_path):
        with whole_file(tmp_path / "new" / "a.json") as temporary:
            temporary.write_text("1")
            assert temporary.suffix == ".json"
            assert not (tmp_path / "new" / "a.json").exists()
        with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "new" / "a.json") as temporary:
            temporary.write_text(f"{1 / 0}")
        assert [(f.name, f.read_text()) for f in (tmp_path / "new").iterdir()] == [("a.json", "1")]
        with pytest.raises(IsADirectoryError, match="is a folder"), whole_file(tmp_path / "new"):
            pass

    def test_a_folder_appears_whole(self, tmp_path):
        (tmp_path / "empty").mkdir()
        for name in ("empty", "new/deep"):
            with whole_folder(tmp_path / name) as temporary:
                (temporary / "a").write_text("1")
                assert not (tmp_path / name / "a").exists()
            assert [entry.name for entry in (tmp_path / name).iterdir()] == ["a"]
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "new"]

    def test_overwriting_replaces_everything(self, tmp_path):
        (tmp_path / "x").mkdir()
        for name in ("config.json", "old"):
            (tmp_path / "x" / name).touch()
        (tmp_path / "link").symlink_to(tmp_path / "x", target_is_directory=True)
        with whole_folder(tmp_path / "link", overwrite=True) as temporary:
            (temporary / "new").touch()
        assert (tmp_path / "link").is_symlink()
        assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["new"]
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "x"]

    def test_a_rename_that_fails_brings_the_old_folder_back(self, tmp_path, monkeypatch):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "config.json").touch()
        rename = os.replace

        def fail(source, target):
            if (Path(source) / "new").exists():
                raise OSError("disk gone")
            rename(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk gone"), whole_folder(tmp_path / "x", overwrite=True) as temporary:
            (temporary / "new").touch()
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
        assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["config.json"]

    def test_a_folder_filled_meanwhile_is_kept(self, tmp_path):
        (tmp_path / "x").mkdir()
        with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "x"):
            (tmp_path / "x" / "theirs").touch()
        assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["theirs"]
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]

    def test_refusals(self, tmp_path, monkeypatch):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "old").touch()
        refuse_nonempty(tmp_path / "none")
        refuse_nonempty(tmp_path / "x", True)
        for refuse in (refuse_replacement, lambda *args: whole_folder(*args).__enter__()):
            with pytest.raises(FileExistsError, match="is no model"):
                refuse(tmp_path / "x", True)
            with pytest.raises(FileExistsError, match=r"x is not empty.*overwrite"):
                refuse(tmp_path / "x")
            with pytest.raises(FileExistsError, match="is a file"):
                refuse(tmp_path / "x" / "old", True)
            with monkeypatch.context() as inside:
                (tmp_path / "x" / "config.json").touch()
                inside.chdir(tmp_path / "x")
                with pytest.raises(FileExistsError, match="holds the working directory"):
                    refuse(".", True)
                (tmp_path / "x" / "config.json").unlink()
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
