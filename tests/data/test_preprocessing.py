"""The size, normalization and class names that timm models have."""

import pytest
import timm
from support.data import Wrapped, vit

from wanda_lightning.data.preprocessing import class_names_of, resolve_preprocessing


def test_preprocessing_is_the_models_own():
    found = resolve_preprocessing(timm.create_model("convnext_atto", num_classes=10))
    assert found["input_size"] == (3, 224, 224)
    assert found["mean"] == (0.485, 0.456, 0.406)
    assert found["crop_pct"] == 0.875
    assert resolve_preprocessing("convnext_atto") == resolve_preprocessing("timm:convnext_atto.d2_in1k") == found
    assert resolve_preprocessing("convnext_atto", image_size=64)["input_size"] == (3, 64, 64)
    gray = resolve_preprocessing(Wrapped(timm.create_model("resnet18", in_chans=1)))
    assert gray["input_size"] == (1, 224, 224)
    assert gray["mean"] == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert gray["std"] == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))


def test_a_folder_without_a_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "test_vit"}')
    with pytest.raises(ValueError, match=r"^model must be a name for which timm has transforms, but it is"):
        resolve_preprocessing("local-dir:.")


def test_class_names_come_from_the_model_or_imagenet():
    model = vit(num_classes=3)
    assert class_names_of(model) == ()
    for names in (["a", "b", "c"], {"0": "a", "1": "b", "2": "c"}, {0: "a", 1: "b", 2: "c"}):
        model.pretrained_cfg["label_names"] = names
        assert class_names_of(model) == class_names_of(Wrapped(model)) == ("a", "b", "c")
    model.pretrained_cfg["label_names"] = ["a", "b"]  # of another head
    assert class_names_of(model) == ()
    assert class_names_of(vit(num_classes=1000))[:2] == ("n01440764", "n01443537")
